"""Runs that begin with the weights of a model folder: weights alone, once, in any engine."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dla_train.checkpoint.errors import RunDirectoryError
from dla_train.config import ConfigError
from dla_train.engine import build_engine
from dla_train.evaluate.loading import load_model
from dla_train.huggingface.conversions import convert
from dla_train.huggingface.convert import with_memory
from dla_train.huggingface.foreign import Source
from dla_train.huggingface.initial import begin_with
from dla_train.huggingface.writing import Content, write_files
from dla_train.hydra_app import compose
from dla_train.models.build import meta_model
from dla_train.parallel.mesh import Mesh
from dla_train.train import train
from tests.huggingface.sources import mamba2
from tests.train.runs import TINY, run_training, tensors_of

RUN = [setting for setting in TINY if not setting.startswith("model.")]


@pytest.fixture(scope="module")
def initial(corpus, tmp_path_factory):
    """A model folder made from a trained tiny run with four slots, and the tensors of that run."""
    path = tmp_path_factory.mktemp("initial")
    train(compose([*TINY, *corpus, f"run_dir={path}/run", "memory.capacity=4", "train.steps=3"]))
    model, config, _ = load_model(path / "run")
    (path / "folder").mkdir()
    content = Content(config.model, config.memory, model.state_dict(), None, bos=True, context_tokens=32)
    write_files(content, path / "folder", "float32", 20_000)
    assert (path / "folder/model.safetensors.index.json").exists()
    return path / "folder", {f"model/{name}": tensor for name, tensor in model.state_dict().items()}


def upcycled(corpus, folder, *overrides):
    return compose(["experiment=upcycle", *RUN, "train.dtype=float32", *corpus, f"train.initial={folder}", *overrides])


def state_after_beginning(config):
    with Mesh.start(config) as mesh:
        engine = build_engine(config, meta_model(config, mesh.axes), mesh)
        fresh = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
        begin_with(engine, config)
        return {name: tensor.clone() for name, tensor in engine.export_state()}, fresh


def test_a_run_with_the_folders_memory_begins_with_every_tensor_of_it_and_zero_moments(corpus, initial):
    folder, tensors = initial
    state, _ = state_after_beginning(upcycled(corpus, folder, "memory.capacity=4"))
    assert {name for name in state if name.startswith("model/")} == tensors.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[name]) if name in tensors else not tensor.any(), name


def test_a_run_with_another_memory_initialises_that_and_takes_the_rest(corpus, initial):
    folder, tensors = initial
    config = upcycled(corpus, folder, "memory.capacity=6", "memory=dla_learned")
    state, fresh = state_after_beginning(config)
    readers = 0
    for name, tensor in state.items():
        kind, _, rest = name.partition("/")
        if kind == "model":
            readers += ".reader." in name
            assert torch.equal(tensor, fresh[rest] if ".reader." in name else tensors[name]), name
    assert readers >= 4


def test_training_goes_on_from_the_folder_and_a_resumed_run_does_not_read_it_again(corpus, initial, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(initial[0], folder)
    settings = ("train.steps=4", "optim.warmup_steps=0", "checkpoint=end")
    train(upcycled(corpus, folder, f"run_dir={tmp_path}/whole", *settings))
    train(upcycled(corpus, folder, f"run_dir={tmp_path}/parts", *settings, "train.stop_at_step=2"))
    rest = upcycled(corpus, folder, f"run_dir={tmp_path}/parts", *settings)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    train(rest)
    whole, parts = (tensors_of(tmp_path / name, 4) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert not torch.equal(whole["model/embedding.weight"], initial[1]["model/embedding.weight"])


@torch.no_grad()
def test_an_imported_model_under_a_dynamic_memory_begins_with_its_sources_logits(corpus, tmp_path):
    logits = mamba2(tmp_path / "source", vocab_size=320)
    _, model, backbone = convert(Source(tmp_path / "source"), "small")
    single = compose(["experiment=quickstart", "memory=single"]).memory
    (tmp_path / "folder").mkdir()
    content = Content(model, single, with_memory(model, single, backbone), None, bos=False, context_tokens=64)
    write_files(content, tmp_path / "folder", "float32", 10**9)
    config = upcycled(corpus, tmp_path / "folder", "memory=dla", "memory.capacity=5")
    state, _ = state_after_beginning(config)
    begun = dataclasses.replace(
        content,
        memory=config.memory,
        tensors={name.removeprefix("model/"): x for name, x in state.items() if name.startswith("model/")},
    )
    tokens = torch.randint(310, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits(tokens)
    found = begun.native("float32")(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_deepspeed_begins_with_the_folder_as_the_local_engine_does(corpus, initial, tmp_path):
    settings = ["memory.capacity=4", "train.steps=1", "optim.warmup_steps=0", "optim.lr=1e-12", "optim.weight_decay=0"]
    engines = [["engine=local"], *([f"engine=deepspeed engine.zero_stage={stage}"] for stage in (1, 3))]
    runs = [
        ["experiment=upcycle", *RUN, "train.dtype=float32", *corpus, f"train.initial={initial[0]}", *settings]
        + [*" ".join(engine).split(), f"run_dir={tmp_path}/{number}"]
        for number, engine in enumerate(engines)
    ]
    run_training(tmp_path / "spec.json", runs)
    for number in range(len(engines)):
        state = tensors_of(tmp_path / str(number), 1)
        for name, tensor in initial[1].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-7, msg=f"{engines[number]}: {name}")


def test_a_run_that_began_with_another_folder_is_another_run(corpus, initial, tmp_path):
    shutil.copytree(initial[0], tmp_path / "copy")
    settings = ("memory.capacity=4", f"run_dir={tmp_path}/run", "train.steps=2", "optim.warmup_steps=0")
    train(upcycled(corpus, initial[0], *settings, "train.stop_at_step=1"))
    with pytest.raises(RunDirectoryError, match="holds another run, tiny: train.initial is .* there and .* here"):
        train(upcycled(corpus, tmp_path / "copy", *settings))


def test_another_model_than_the_folders_is_an_error_that_names_the_setting(corpus, initial, tmp_path):
    config = upcycled(corpus, initial[0], f"run_dir={tmp_path}/run", "model.mlp_width=40")
    with pytest.raises(ConfigError, match="model.mlp_width=40 is not the 48 of train.initial"):
        train(config)


def spoil_a_shape(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path)
    return "does not hold the model its config.json describes"


def spoil_a_name(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors["model.more.weight"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    return "absent, too many or of another shape"


def spoil_bytes(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    return "is damaged"


def lose_a_file(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()
    return "which is absent"


@pytest.mark.parametrize("spoil", [spoil_a_shape, spoil_a_name, spoil_bytes, lose_a_file])
def test_a_folder_that_is_not_whole_is_an_error_before_anything_is_written(corpus, initial, tmp_path, spoil):
    folder = tmp_path / "folder"
    shutil.copytree(initial[0], folder)
    message = spoil(folder)
    with pytest.raises(ConfigError, match=message):
        train(upcycled(corpus, folder, f"run_dir={tmp_path}/run", "memory.capacity=4"))
    assert not (tmp_path / "run/run.json").exists()
