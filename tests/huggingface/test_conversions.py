"""Imported models compute what their sources compute, under every memory policy; what cannot be expressed is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dla_train.config_rules import validate
from dla_train.huggingface.conversions import convert
from dla_train.huggingface.convert import main, with_memory
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import Source
from dla_train.huggingface.writing import Content
from dla_train.hydra_app import compose
from tests.huggingface.conftest import config_of, opened
from tests.huggingface.sources import SOURCES, mamba2

MEMORIES = {
    "single": ["memory=single"],
    "log_linear": ["memory=log_linear"],
    "fixed": ["memory=fixed", "memory.capacity=3", "memory.interval_tokens=4"],
    "slot": ["memory=dla_slot", "memory.capacity=4"],
    "content": ["memory=dla", "memory.capacity=4"],
    "qk": ["memory=dla_learned", "memory.routing=qk", "memory.capacity=4"],
}
CHANGES = {
    "mamba2": [{}, {"n_groups": 1, "tie_word_embeddings": True}, {"use_conv_bias": False, "n_groups": 6}],
    "state-spaces": [{}],
    "gated_deltanet": [{}, {"conv_bias": True}],
    "qwen3_next": [{}, {"linear_num_key_heads": 4, "tie_word_embeddings": True}],
}
NOISE = {"qwen3_next": 5e-5}
"""Where float32 alone is further than 1e-5 from float64: over 8 seeds up to 1.8e-5 there and 1.4e-5 here."""
TOKENS = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))


def imported(folder, memory):
    _, model, tensors = convert(Source(folder), "small")
    config = compose(["experiment=quickstart", *MEMORIES[memory]])
    config.model = model
    validate(config)
    tensors = with_memory(model, config.memory, tensors)
    return Content(model, config.memory, tensors, None, bos=False, context_tokens=64).native("float32")


@pytest.mark.parametrize(
    ("kind", "changes", "memory"),
    [(kind, changes, "content") for kind in SOURCES for changes in CHANGES[kind]]
    + [(kind, {}, memory) for kind in ("mamba2", "gated_deltanet") for memory in MEMORIES if memory != "content"],
)
@torch.no_grad()
def test_logits_equal_the_sources_under_every_memory(tmp_path, kind, changes, memory):
    expected = SOURCES[kind](tmp_path / "source", **changes)(TOKENS)
    found = imported(tmp_path / "source", memory)(TOKENS).logits
    assert float(expected.std()) > 0.1, "the source says something"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=NOISE.get(kind, 1e-5) * float(expected.abs().max()))


@torch.no_grad()
def test_decoding_an_import_token_by_token_equals_its_source(tmp_path):
    expected = SOURCES["qwen3_next"](tmp_path / "source")(TOKENS)
    model = imported(tmp_path / "source", "slot")
    caches = model.empty_caches(2, 40)
    steps = torch.stack([model.step(tokens, caches) for tokens in TOKENS.T], 1)
    torch.testing.assert_close(steps, expected, rtol=1e-4, atol=5e-5 * float(expected.abs().max()))


def test_the_command_makes_a_verified_folder_with_the_sources_logits(tmp_path, capsys):
    logits = mamba2(tmp_path / "source", max_position_embeddings=96)
    arguments = [str(tmp_path / "source"), "memory=dla_slot", "--output", str(tmp_path / "out"), "memory.capacity=5"]
    main(arguments)
    said = capsys.readouterr().out
    assert "mamba2, 0.0M parameters" in said and "from the source's by" in said
    config = config_of(tmp_path / "out")
    assert config["memory"]["read"] == "slot" and config["memory"]["capacity"] == 5
    assert config["architecture"]["name"] == "source" and config["max_position_embeddings"] == 96
    with torch.no_grad():
        expected, found = logits(TOKENS), opened(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "source"), "model.width=3", "--output", str(tmp_path / "other")])
    assert "model.width=3 is no memory setting" in capsys.readouterr().err


def test_an_import_that_differs_from_its_source_is_not_kept(tmp_path, monkeypatch, capsys):
    mamba2(tmp_path / "source")
    monkeypatch.setattr(
        "dla_train.huggingface.convert.whole_logits", lambda model, tokens: model(tokens).logits.detach() + 1
    )
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "source"), "--output", str(tmp_path / "out")])
    assert "differ from those of" in (said := capsys.readouterr().err) and "nothing was kept" in said
    assert not (tmp_path / "out").exists()


REFUSED = [
    ("mamba2", {"use_bias": True}, "use_bias=True is a bias of the projections"),
    ("mamba2", {"hidden_act": "gelu"}, "hidden_act=gelu is another activation"),
    ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit=\[0.0, 0.1\] clamps"),
    ("mamba2", {"num_heads": "six"}, "num_heads=six is not an integer of at least 1"),
    ("mamba2", {"num_heads": True}, "num_heads=True is not an integer"),
    ("mamba2", {"state_size": 0}, "state_size=0 is not an integer of at least 1"),
    ("mamba2", {"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon=tiny is not a finite number"),
    ("mamba2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings=yes is not true or false"),
    ("mamba2", {"n_groups": 4}, "6 heads do not divide into 4 groups"),
    ("mamba2", {"state_size": 6}, r"in_proj.weight has shape \[122, 24\] where its config.json says \[126, 24\]"),
    ("mamba2", {"num_hidden_layers": 3}, "lacks the tensor backbone.layers.2.norm.weight"),
    (
        "mamba2",
        {"num_hidden_layers": 1},
        "holds tensors that this import has no place for: backbone.layers.1.mixer.A_log",
    ),
    ("mamba2", {"use_conv_bias": False}, "no place for: backbone.layers.0.mixer.conv1d.bias, "),
    ("mamba2", {"tie_word_embeddings": True}, "lm_head.weight differs from backbone.embeddings.weight"),
    ("mamba2", {"model_type": "jamba"}, "model_type=jamba is not one that is known: gated_deltanet, mamba2,"),
    ("mamba2", {"model_type": "dla"}, "is a model folder of this project already; train on .*train.initial=FOLDER"),
    ("mamba2", {"model_type": ["mamba2"]}, "is not one that is known"),
    ("state-spaces", {"ssm_cfg": {}}, "layer=None is Mamba-1"),
    ("state-spaces", {"ssm_cfg": [1]}, r"ssm_cfg=\[1\] is not an object"),
    ("state-spaces", {"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\] is attention in some layers"),
    ("state-spaces", {"d_intermediate": 48}, "d_intermediate=48 is an MLP"),
    ("state-spaces", {"rms_norm": False}, "rms_norm=False is LayerNorm"),
    ("state-spaces", {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim=True is a skip connection"),
    ("state-spaces", {"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 1.0]}}, "clamps the step sizes"),
    ("state-spaces", {"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "headdim=7 does not divide 48"),
    ("gated_deltanet", {"use_gate": False}, "use_gate=False is an output without gate"),
    ("gated_deltanet", {"allow_neg_eigval": True}, "allow_neg_eigval=True is a write strength up to 2"),
    ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation=sigmoid is another output gate"),
    ("gated_deltanet", {"attn": {"layers": [1]}}, "attention in some layers"),
    ("gated_deltanet", {"use_short_conv": False}, "no place for: model.layers.0.attn.k_conv1d.weight"),
    ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "layers of full attention"),
    ("qwen3_next", {"layer_types": None}, "lacks|shape"),
    ("qwen3_next", {"num_experts": 8}, "num_experts=8 makes layer 0 a mixture of experts"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, sources, kind, changes, message):
    folder = sources(kind, changes)
    if kind == "qwen3_next" and changes == {"layer_types": None}:
        convert(Source(folder), "small")  # two layers of the default pattern are linear
        return
    with pytest.raises(FolderError, match=message):
        convert(Source(folder), "small")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    made = {}
    for kind, make in SOURCES.items():
        folder = tmp_path_factory.mktemp("originals") / kind
        make(folder)
        made[kind] = folder
    return made


@pytest.fixture
def sources(tmp_path, originals):
    """sources(kind, changes) -> a copy of a source with other settings in its config.json."""

    def copy(kind, changes):
        folder = tmp_path / "copy"
        folder.mkdir()
        config = {**json.loads((originals[kind] / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").symlink_to(originals[kind] / "model.safetensors")
        return folder

    return copy


def test_a_folder_of_pickles_is_refused_and_not_opened(sources):
    folder = sources("mamba2", {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(FolderError, match="holds no .safetensors file"):
        Source(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(FolderError, match="pytorch_model.bin, a pickle, which can run any code"):
        Source(folder)


def test_quantised_weights_are_refused(sources):
    folder = sources("mamba2", {})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FolderError, match="backbone.norm_f.weight holds I8; quantised weights"):
        convert(Source(folder), "small")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "weights.bin", ""])
def test_an_index_that_names_files_elsewhere_is_refused(sources, name):
    folder = sources("mamba2", {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(FolderError, match="which is no safetensors file beside it"):
        Source(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"x": 3}}, "no weight_map"),
        ({"weight_map": {"x": "a.safetensors"}}, "absent"),
    ],
)
def test_an_index_that_is_wrong_is_refused(sources, index, message):
    folder = sources("mamba2", {})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match=message):
        Source(folder)


@torch.no_grad()
def test_sharded_weights_are_read_by_their_index(sources):
    folder = sources("mamba2", {})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number, name in enumerate(sorted(tensors)):
        places[name] = f"part-{number % 3}.safetensors"
    for place in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    _, _, found = convert(Source(folder), "small")
    assert torch.equal(found["final_norm.weight"], tensors["backbone.norm_f.weight"])
