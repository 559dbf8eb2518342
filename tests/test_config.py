"""Every rule between settings, and the sentence a user reads after each kind of mistake."""

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from dla_train.config import CHOICES, Config, ConfigError, ModelConfig
from dla_train.config_rules import AT_LEAST, POSITIVE, SHARES, validate, value_at
from dla_train.config_sentences import GROUPS, USUAL_NAMES, setting_names
from dla_train.hydra_app import compose, config_directory, config_from_dict, run_application

BASE = [
    "model=gated_deltanet_tiny",
    "memory=dla",
    "data=quickstart",
    "name=base",
    "data.context_tokens=512",
    "optim.warmup_steps=20",
    "train.steps=300",
    "train.global_batch_rows=8",
    "train.micro_batch_rows=4",
    "train.validation_interval_steps=100",
    "train.validation_batches=8",
]
"""A legal run of its own, so that tuning the shipped ones breaks no test here."""
ATTENTION = ["model=transformer_tiny", "memory=none"]


@pytest.fixture(autouse=True)
def no_leftover_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@functools.cache
def _base() -> Config:
    return compose(BASE)


def base() -> Config:
    return copy.deepcopy(_base())


def error_of(*overrides: str, ranks: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(compose([*BASE, *overrides]), ranks)
    return str(caught.value)


BROKEN = {
    "heads not divisible by key heads": (
        ["model.num_heads=6", "model.num_key_heads=4"],
        ["model.num_key_heads=4", "does not divide model.num_heads=6", "1, 2, 3 or 6"],
    ),
    "tensor degree that does not divide the heads": (
        ["model.num_heads=12", "model.num_key_heads=12", "parallel.tensor=8"],
        ["model.num_heads=12", "parallel.tensor=8", "1, 2, 3, 4, 6 or 12"],
    ),
    "tensor degree that does not divide the groups": (
        ["model.num_heads=8", "model.num_key_heads=2", "parallel.tensor=4"],
        ["model.num_key_heads=2", "parallel.tensor=4", "1 or 2"],
    ),
    "bfloat16 weights in the local engine": (
        ["engine.weights=bfloat16", "train.dtype=bfloat16"],
        ["engine.weights=bfloat16", "engine=deepspeed"],
    ),
    "bfloat16 weights without ZeRO": (
        ["engine=deepspeed", "engine.zero_stage=0", "engine.weights=bfloat16", "train.dtype=bfloat16"],
        ["engine.weights=bfloat16", "engine.zero_stage=1, 2 or 3"],
    ),
    "bfloat16 weights of a float32 model": (
        ["engine=deepspeed", "engine.weights=bfloat16"],
        ["train.dtype=float32", "set train.dtype=bfloat16"],
    ),
    "offload in the local engine": (["engine.offload_optimizer=true"], ["engine.offload_optimizer=True", "ZeRO"]),
    "heads over context ranks": (
        ["parallel.context=3", "data.context_tokens=384"],
        ["not divisible by parallel.context=3", "choose parallel.context from"],
    ),
    "tokens over context ranks": (
        ["parallel.context=2", "data.context_tokens=255"],
        ["data.context_tokens=255", "2 ranks along time", "256 or 254"],
    ),
    "sequence parallelism alone": (["parallel.sequence=true"], ["parallel.sequence=True", "parallel.sequence=false"]),
    "attention with a memory": (["model=transformer_tiny"], ["model.backbone=attention", "memory=none"]),
    "a recurrent backbone without a memory": (["memory=none"], ["memory.policy=none", "memory=single"]),
    "attention with two head sizes": (
        [*ATTENTION, "model.value_dim=8"],
        ["model.value_dim=8", "model.value_dim=32"],
    ),
    "odd rotary head size": (
        [*ATTENTION, "model.key_dim=31", "model.value_dim=31"],
        ["model.key_dim=31", "even"],
    ),
    "a bias without a convolution": (
        ["model.conv_width=0", "model.conv_bias=true"],
        ["model.conv_bias=True", "=false"],
    ),
    "an epsilon of no keys": (
        ["model=mamba2_tiny", "model.qk_norm_eps=1e-6"],
        ["model.qk_norm_eps=1e-06", "gated_deltanet", "at 0"],
    ),
    "attention with a convolution": ([*ATTENTION, "model.conv_width=4"], ["model.conv_width=4", "=0"]),
    "capacity 0": (["memory.capacity=0"], ["memory.capacity=0", "1 to 64"]),
    "capacity 65": (["memory.capacity=65"], ["memory.capacity=65", "1 to 64"]),
    "single with slots": (["memory=single", "memory.capacity=4"], ["memory.capacity=4", "memory.capacity=1"]),
    "single with read weights": (["memory=single", "memory.read=slot"], ["memory.read=slot", "memory.read=unit"]),
    "tau above its range": (["memory=dla", "memory.tau=1.5"], ["memory.tau=1.5", "0.1 to 1.3"]),
    "tau below its range": (["memory=dla", "memory.tau=0.05"], ["memory.tau=0.05", "0.1 to 1.3"]),
    "soft gate of a unit read": (["memory.read=unit"], ["memory.gate=soft", "memory.gate=hard"]),
    "learned tau behind a hard gate": (
        ["memory=dla_learned", "memory.gate=hard"],
        ["memory.tau_control=learned", "no gradient", "memory.gate=soft"],
    ),
    "learned tau of a unit read": (
        ["memory=dla_learned", "memory.gate=hard", "memory.read=unit"],
        ["memory.tau_control=learned"],
    ),
    "chunk that is no power of two": (["memory.chunk_tokens=48"], ["memory.chunk_tokens=48", "16, 32, 64"]),
    "chunk longer than the context": (
        ["memory.chunk_tokens=256", "data.context_tokens=100"],
        ["memory.chunk_tokens=256", "data.context_tokens=100"],
    ),
    "log_linear context": (
        ["memory=log_linear", "memory.capacity=8", "data.context_tokens=512"],
        ["memory.capacity=8", "128 tokens", "memory.capacity=10"],
    ),
    "tau of another policy": (["memory=fixed", "memory.tau=0.5"], ["memory.tau=0.5", "memory.policy=dla"]),
    "rate without rate control": (
        ["memory=dla", "memory.target_boundary_rate=0.2"],
        ["memory.target_boundary_rate=0.2", "memory.tau_control=rate"],
    ),
    "interval of dla": (["memory.interval_tokens=32"], ["memory.interval_tokens=32", "memory.policy=fixed"]),
    "levels of dla": (["memory.levels=4"], ["memory.levels=4", "log_linear"]),
    "frozen single state": (["memory=single", "memory.closed_slots=frozen"], ["memory.closed_slots=frozen"]),
    "routing of a slot read": (["memory.read=slot", "memory.routing=qk"], ["memory.read=content"]),
    "size of a projection that is not there": (
        ["memory.routing=qk", "memory.routing_dim=32"],
        ["projections of its own"],
    ),
    "temperature of a hard gate": (["memory.gate=hard", "memory.gate_temperature=0.5"], ["soft gate"]),
    "gate of another policy": (["memory=fixed", "memory.gate=straight_through"], ["memory.policy=dla"]),
    "capacity rule of log_linear": (["memory=log_linear", "memory.capacity_rule=oldest"], ["memory.policy=dla"]),
    "capacity rule of fixed": (["memory=fixed", "memory.capacity_rule=random"], ["memory.policy=dla"]),
    "warm-up longer than the run": (["optim.warmup_steps=301"], ["optim.warmup_steps=301", "train.steps=300"]),
    "wsd without a decay": (["optim.schedule=wsd"], ["optim.decay_steps=0"]),
    "wsd that does not fit": (
        ["optim.schedule=wsd", "optim.decay_steps=290"],
        ["optim.decay_steps=290", "optim.warmup_steps=20", "train.steps=300"],
    ),
    "decay of cosine": (["optim.decay_steps=5"], ["optim.decay_steps=5", "optim.schedule=wsd"]),
    "final rate of a constant schedule": (
        ["optim.schedule=constant", "optim.final_lr_ratio=0.5"],
        ["optim.final_lr_ratio=0.5", "optim.schedule=constant"],
    ),
    "ZeRO in the local engine": (["engine.zero_stage=1"], ["engine.zero_stage=1", "engine=deepspeed"]),
    "ZeRO stage 4": (["engine=deepspeed", "engine.zero_stage=4"], ["engine.zero_stage=4", "0, 1, 2 or 3"]),
    "batch that does not divide": (
        ["train.global_batch_rows=10"],
        ["train.global_batch_rows=10", "train.micro_batch_rows=4", "8 or 12"],
    ),
    "checkpoints kept for good where all are kept": (
        ["checkpoint.keep_last=0", "checkpoint.interval_steps=5", "checkpoint.keep_every_steps=10"],
        ["checkpoint.keep_every_steps=10", "checkpoint.keep_last=0 keeps all"],
    ),
    "checkpoints kept for good without an interval": (
        ["checkpoint.interval_steps=0", "checkpoint.keep_every_steps=10"],
        ["checkpoint.keep_every_steps=10", "checkpoint.interval_steps=0"],
    ),
    "checkpoints kept for good between intervals": (
        ["checkpoint.interval_steps=4", "checkpoint.keep_every_steps=10"],
        ["checkpoint.keep_every_steps=10", "checkpoint.interval_steps=4", "choose 8 or 12"],
    ),
    "stop after the end": (["train.stop_at_step=301"], ["train.stop_at_step=301", "train.steps=300"]),
    "stop before the start": (["train.stop_at_step=0"], ["train.stop_at_step=0"]),
    "validation of nothing": (["train.validation_batches=0"], ["train.validation_interval_steps=100"]),
    "validation without files": (["data.validation=[]"], ["train.validation_batches=8", "data.validation"]),
    "bands of no validation": (
        [
            "train.validation_batches=0",
            "train.validation_interval_steps=0",
            "train.validation_band_edges_tokens=[8]",
        ],
        ["train.validation_band_edges_tokens=[8]", "train.validation_batches=0"],
    ),
    "bands that do not rise": (
        ["train.validation_band_edges_tokens=[64,32]"],
        ["train.validation_band_edges_tokens=[64, 32]", "rise strictly between 0 and data.context_tokens"],
    ),
    "a band beyond the context": (
        ["train.validation_band_edges_tokens=[99999999]"],
        ["train.validation_band_edges_tokens=[99999999]"],
    ),
    "no training files": (["data.train=[]"], ["data.train"]),
    "tasks without documents": (
        ["evaluation.tasks=[piqa]"],
        ["evaluation.tasks=['piqa']", "evaluation.data_dir", "fetch"],
    ),
    "a task twice": (["evaluation=commonsense", "evaluation.tasks=[piqa,piqa]"], ["names piqa twice"]),
    "settings of no task": (["evaluation.interval_steps=5"], ["evaluation.interval_steps=5", "evaluation.tasks"]),
    "no room for a question": (["evaluation=commonsense", "evaluation.max_length=1"], ["evaluation.max_length=1"]),
    "short needles": (["evaluation=commonsense", "evaluation.lengths=[128]"], ["evaluation.lengths=[128]", "256"]),
    "a length twice": (["evaluation=commonsense", "evaluation.lengths=[512,512]"], ["each once"]),
    "questions longer than the memory": (
        ["memory=log_linear", "memory.capacity=10", "evaluation=commonsense", "evaluation.max_length=513"],
        ["evaluation.max_length=513", "512 tokens", "memory.capacity"],
    ),
    "needles longer than the memory": (
        ["memory=log_linear", "memory.capacity=10", "evaluation=commonsense", "evaluation.lengths=[256,1024]"],
        ["evaluation.lengths=1024", "512 tokens"],
    ),
    "empty run_dir": (["run_dir=''"], ["run_dir"]),
    "misspelt choice": (["optim.schedule=cosin"], ["optim.schedule=cosin", "did you mean cosine?", "wsd"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_names_key_value_and_mend(case: str) -> None:
    overrides, words = BROKEN[case]
    message = error_of(*overrides)
    for word in words:
        assert word in message


def test_the_batch_rule_counts_the_ranks() -> None:
    validate(base(), world_size=2)
    message = error_of(ranks=3)
    assert "train.global_batch_rows=8" in message and "3 data-parallel ranks" in message and "choose 12" in message


@pytest.mark.parametrize("key", AT_LEAST)
def test_counts_have_a_least_value(key: str) -> None:
    config = base()
    node, _, leaf = key.rpartition(".")
    setattr(value_at(config, node) if node else config, leaf, AT_LEAST[key] - 1)
    with pytest.raises(ConfigError, match=rf"{key}={AT_LEAST[key] - 1} is below {AT_LEAST[key]}"):
        validate(config)


@pytest.mark.parametrize("key", [*POSITIVE, *SHARES])
@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_real_numbers_out_of_range_are_named(key: str, value: float) -> None:
    config = base()
    node, _, leaf = key.rpartition(".")
    setattr(value_at(config, node), leaf, value)
    with pytest.raises(ConfigError, match=f"{key}={value}"):
        validate(config)


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_checked(key: str) -> None:
    config = base()
    node, _, leaf = key.rpartition(".")
    setattr(value_at(config, node), leaf, "nonsense")
    with pytest.raises(ConfigError, match=f"{key}=nonsense is not one of the choices"):
        validate(config)


def test_every_rule_table_names_real_settings() -> None:
    assert {*AT_LEAST, *POSITIVE, *SHARES, *CHOICES} <= set(setting_names())


def test_usual_names_stand_for_real_settings_and_are_none() -> None:
    names = setting_names()
    assert set(USUAL_NAMES.values()) <= set(names)
    assert not {*USUAL_NAMES} & {name.rpartition(".")[2] for name in names}


# ---- the shipped configurations ----

EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
MEMORIES = sorted(path.stem for path in (config_directory() / "memory").glob("*.yaml"))


FILES = ["data.train=[prefix]", "data.tokenizer=my.model"]


def model_folder(path: Path, **changes: object) -> Path:
    """A folder with the config.json of an exported model."""
    tiny = compose(["experiment=quickstart"])
    described = {"model_type": "dla", "architecture": asdict(tiny.model), "memory": asdict(tiny.memory), **changes}
    (path / "config.json").write_text(json.dumps(described))
    return path


def test_upcycling_takes_the_models_settings_from_its_folder(tmp_path: Path) -> None:
    wide = ModelConfig(**{**asdict(compose(["experiment=quickstart"]).model), "width": 72, "qk_norm_eps": 1e-6})
    folder = model_folder(tmp_path, architecture=asdict(wide))
    config = compose(["experiment=upcycle", f"train.initial={folder}", *FILES, "model.init_std=0.5"])
    assert asdict(config.model) == {**asdict(wide), "init_std": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba2"}, "is not a model folder of dla-export or dla-import"),
        ({"architecture": {}}, "no usable backbone for ModelConfig"),
        ({"architecture": [1]}, "no usable backbone for ModelConfig"),
        ({"memory": {"policy": "dla", "slots": 3}}, "no usable slots for MemoryConfig"),
        ({"memory": {"policy": "dla", "tau": "high"}}, "no usable tau for MemoryConfig"),
        ({"memory": {"policy": "dla", "capacity": True}}, "no usable capacity for MemoryConfig"),
    ],
)
def test_a_folder_that_describes_no_model_of_ours_is_an_error(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = model_folder(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=upcycle", f"train.initial={folder}", *FILES])


@pytest.mark.parametrize("text", ["[", "[]", "[" * 100_000])
def test_upcycling_without_a_readable_folder_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="train.initial is not set, and model.*give train.initial=FOLDER"):
        compose(["experiment=upcycle", *FILES])
    with pytest.raises(ConfigError, match="config.json cannot be read: No such file"):
        compose(["experiment=upcycle", *FILES, f"train.initial={tmp_path}"])
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="is not JSON|is not a model folder"):
        compose(["experiment=upcycle", *FILES, f"train.initial={tmp_path}"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_legal_and_named_after_its_file(experiment: str, tmp_path: Path) -> None:
    given = {"upcycle": [f"train.initial={model_folder(tmp_path)}", *FILES]}
    config = compose([f"experiment={experiment}", *given.get(experiment, [])])
    validate(config)
    assert config.name == experiment


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_is_legal_with_a_fitting_model(memory: str) -> None:
    validate(compose([*BASE, f"memory={memory}", *(["model=transformer_tiny"] if memory == "none" else [])]))


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes(group: str) -> None:
    options = [path.stem for path in (config_directory() / group).glob("*.yaml")]
    assert options
    for option in options:
        required = ["data.train=[x]", "data.tokenizer=y"] if option == "files" else []
        compose([*BASE, f"{group}={option}", *required])


def test_the_paper_runs_follow_the_paper() -> None:
    config = compose(["experiment=paper_mamba2_780m_dla"])
    assert (config.data.context_tokens, config.memory.capacity, config.memory.tau) == (16384, 30, 0.6)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm) == (4e-4, 0.1, 1.0)
    tokens = config.train.steps * config.train.global_batch_rows * config.data.context_tokens
    assert tokens == pytest.approx(50e9, rel=1e-4)
    paper = compose(["experiment=paper_mamba2_780m_dla", "memory=dla_paper"]).memory
    assert (paper.read, paper.capacity_rule) == ("slot", "density")


def test_paired_runs_differ_in_their_memory_only() -> None:
    runs = [compose([f"experiment=paper_gated_deltanet_1300m_{memory}"]) for memory in ("dla", "single", "log_linear")]
    for run in runs:
        run.memory, run.name, run.run_dir = runs[0].memory, "", ""
    assert runs[0] == runs[1] == runs[2]


def test_a_configuration_survives_a_checkpoint_as_plain_values() -> None:
    config = compose([*BASE, "train.stop_at_step=7"])
    assert config_from_dict(dataclasses.asdict(config)) == config


def test_configurations_are_found_in_an_installed_package_and_in_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert config_directory() == Path(__file__).parents[1] / "configs"
    package = tmp_path / "dla_train"
    monkeypatch.setattr("dla_train.hydra_app.__file__", str(package / "hydra_app.py"))
    with pytest.raises(ConfigError, match="no configs folder"):
        config_directory()
    (package / "configs").mkdir(parents=True)
    (package / "configs/config.yaml").touch()
    assert config_directory() == package / "configs"


# ---- the command line ----


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[Config]]:
    started: list[Config] = []
    points: list[object] = []
    monkeypatch.setattr(sys, "argv", ["dla-train", *arguments])
    try:
        code = run_application(started.append, (ValueError,), points.append)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert not points, "this is no multirun"
    return code, started


MISTAKES = {
    "misspelt key": (["train.stpes=4"], ["train.stpes", "did you mean train.steps?"]),
    "key without its group": (["lr=1e-3"], ["lr is not a setting", "optim.lr"]),
    "a name of other frameworks": (["optim.learning_rate=1"], ["optim.learning_rate", "did you mean optim.lr?"]),
    "a name of other frameworks alone": (["batch_size=8"], ["did you mean train.global_batch_rows?"]),
    "misspelt key of a group": (["optim.warmup=8"], ["did you mean optim.warmup_steps?"]),
    "nothing near in the group": (["optim.nesterov=true"], ["optim has lr, beta1, beta2", "final_lr_ratio"]),
    "misspelt group": (["modle=mamba2_tiny"], ["modle", "did you mean model?"]),
    "unknown key added by force": (["+train.stpes=4"], ["train.stpes", "train.steps"]),
    "unknown top-level key": (["+colour=red"], ["colour is not a setting"]),
    "unknown option": (
        ["model=mamba_tiny"],
        ["model=mamba_tiny", "did you mean model=mamba2_tiny?", "transformer_tiny"],
    ),
    "unknown experiment": (["experiment=quickstrt"], ["did you mean experiment=quickstart?"]),
    "word for an integer": (["train.steps=many"], ["train.steps", "'many'", "Integer"]),
    "fraction for an integer": (["model.width=1.5"], ["model.width", "1.5", "Integer"]),
    "word for a number": (["optim.lr=fast"], ["optim.lr", "'fast'", "Float"]),
    "word for a switch": (["train.recompute=maybe"], ["train.recompute", "'maybe'"]),
    "one value for a list": (["data.train=3"], ["data.train=3 is not a list; write data.train=[3]"]),
    "several values": (["optim.lr=1,3"], ["add --multirun to run each", "quote it for one value", "optim.lr='1,3'"]),
    "letters that need quotes": (["run_dir=Größe"], ["quote the value, \"run_dir='Größe'\""]),
    "no value": (["model.width"], ["key=value"]),
    "list that the shell split": (["data.train=[a,", "b]"], ["data.train=[a, has", "quote the whole word", "no space"]),
    "setting as a flag": (["--optim.lr=3"], ["write optim.lr=3, without --"]),
    "setting as a flag, apart from its value": (["--steps", "3"], ["write steps=VALUE, without --"]),
    "a name of other frameworks as a flag": (["--batch_size=8"], ["write batch_size=8, without --"]),
    "interpolation of nothing": (["run_dir=${nme}/x"], ["nme"]),
    "illegal combination": (["memory.capacity=99"], ["memory.capacity=99"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_paragraph_and_exit_code_2(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, words = MISTAKES[case]
    code, started = run(monkeypatch, *BASE, *arguments)
    written = capfd.readouterr()
    assert code == 2 and not started
    assert written.err.startswith("dla-train: error: ") and written.err.count("\n") == 1, written.err
    assert "Traceback" not in written.err and written.out == ""
    for word in words:
        assert word in written.err


def test_missing_values_are_listed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, _ = run(monkeypatch)
    error = capfd.readouterr().err
    assert code == 2 and "train.steps" in error and "experiment=" in error


def test_an_error_of_the_job_is_one_paragraph_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def job(config: Config) -> None:
        raise FileNotFoundError("no such corpus")

    monkeypatch.setattr(sys, "argv", ["dla-train", *BASE])
    with pytest.raises(SystemExit) as stop:
        run_application(job, (FileNotFoundError,), job)
    assert stop.value.code == 2
    assert capfd.readouterr().err == "dla-train: error: no such corpus\n"


@pytest.mark.parametrize("word", ["train.stpes=4", "train.micro_batch_rows=0", "checkpoint=none"])
def test_under_torchrun_only_rank_0_reports_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], word: str
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code, _ = run(monkeypatch, *BASE, word)
        assert code == 2 and capfd.readouterr().err.count("\n") == (rank == "0")


def test_a_legal_command_line_runs_the_job_and_leaves_no_hydra_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, started = run(monkeypatch, *BASE, "optim.lr=0.5")
    assert code == 0 and [config.optim.lr for config in started] == [0.5]
    assert list(tmp_path.iterdir()) == []


def test_a_multirun_under_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, started = run(monkeypatch, "-m", *BASE, "optim.lr=0.1,0.2")
    assert code == 2 and not started and "--multirun" in capfd.readouterr().err
