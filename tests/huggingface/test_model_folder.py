"""What transformers makes of a folder is what the native model makes."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from dla_train.generate import Sampling, generate
from dla_train.huggingface.bundle import bundle
from dla_train.models.loss import next_token_loss
from tests.huggingface.conftest import opened

KINDS = [
    ("gated_deltanet", "dla", {}),
    ("gated_deltanet", "dla", {"tau_control": "learned", "routing": "projected", "num_key_heads": 1}),
    ("gated_deltanet", "log_linear", {"tie_embeddings": True}),
    ("mamba2", "dla", {"tau_control": "rate", "closed_slots": "frozen"}),
    ("mamba2", "fixed", {"mlp_width": 0, "conv_width": 0}),
    ("mamba2", "single", {}),
    ("attention", "none", {}),
]


def tokens_of(rows, length, seed=0):
    return torch.randint(310, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("backbone", "policy", "changes"), KINDS)
@torch.no_grad()
def test_logits_generation_and_left_padding_equal_the_native_model(content, folder, backbone, policy, changes):
    made = content(backbone, policy, **changes)
    native, model = made.native("float32"), opened(folder(made))
    tokens = tokens_of(2, 40)
    assert torch.equal(model(tokens).logits, native(tokens).logits)

    prompts = [tokens[0, :9].tolist(), tokens[1, :17].tolist()]
    made_alone = generate(native, prompts, 12, Sampling(temperature=0), batch_rows=1).continuations
    expected = [continuation.tokens for continuation in made_alone]
    padded = torch.tensor([[0] * (17 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (17 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    out = model.generate(padded, attention_mask=mask, **settings)
    assert out[:, 17:].tolist() == expected


@torch.no_grad()
def test_beam_search_on_the_cache_equals_beam_search_without_one(content, folder):
    model = opened(folder(content("gated_deltanet", "dla")))
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    tokens = tokens_of(2, 8)
    found = [model.generate(tokens, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*found)


@torch.no_grad()
def test_the_cache_of_a_recurrent_model_does_not_grow(content, folder):
    model = opened(folder(content("mamba2", "dla")))
    sizes = {model(tokens_of(1, length), use_cache=True).past_key_values.nbytes for length in (3, 50)}
    assert len(sizes) == 1


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]], [[0, 0, 0]]])
def test_padding_that_would_enter_the_memory_is_refused(content, folder, mask):
    model = opened(folder(content("mamba2", "dla")))
    with pytest.raises(ValueError, match="attention_mask has zeros behind a row's first token"):
        model(tokens_of(1, 3), attention_mask=torch.tensor(mask))


@torch.no_grad()
def test_a_bfloat16_folder_keeps_vectors_exact_and_equals_the_native_model_in_bfloat16(content, folder):
    made = content("mamba2", "dla", tau_control="rate")
    model = opened(folder(made, "bfloat16"))
    state = model.model.state_dict()
    for name, tensor in made.tensors.items():
        if tensor.dim() == 1:
            assert torch.equal(state[name], tensor), name
    assert state["embedding.weight"].dtype == torch.bfloat16
    tokens = tokens_of(2, 40)
    assert torch.equal(model(tokens).logits, made.native("bfloat16")(tokens).logits)


@torch.no_grad()
def test_a_float32_folder_read_as_bfloat16_equals_the_native_model_in_bfloat16(content, folder):
    made = content("gated_deltanet", "dla")
    tokens = tokens_of(1, 20)
    assert torch.equal(opened(folder(made), torch.bfloat16)(tokens).logits, made.native("bfloat16")(tokens).logits)


def test_the_loss_of_labels_is_the_mean_over_counted_next_tokens(content, folder):
    made = content("gated_deltanet", "dla")
    tokens = tokens_of(2, 20)
    labels = tokens.clone()
    labels[:, :5] = -100
    out = opened(folder(made))(tokens, labels=labels)
    nats, _, count = next_token_loss(made.native("float32")(tokens).logits[:, :-1], labels[:, 1:])
    assert int(count) == 30
    torch.testing.assert_close(out.loss, nats / count)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 20])
def test_logits_of_the_last_tokens_alone_are_the_last_of_all(content, folder, count):
    model, tokens = opened(folder(content("gated_deltanet", "dla"))), tokens_of(2, 20)
    last, every = model(tokens, logits_to_keep=count).logits, model(tokens).logits
    assert every.shape[:2] == (2, 20)
    torch.testing.assert_close(last, every[:, -count:])


@torch.no_grad()
def test_weights_in_several_files_are_the_same_weights(content, folder):
    made = content("mamba2", "dla")
    path = folder(made, shard_bytes=4000)
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 3
    tokens = tokens_of(1, 20)
    assert torch.equal(opened(path)(tokens).logits, made.native("float32")(tokens).logits)


def test_a_pipeline_generates_text(content, folder):
    made = content("gated_deltanet", "dla")
    path = folder(made)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = pipeline("text-generation", model=opened(path), tokenizer=tokenizer)("line 3 adds", max_new_tokens=5)
    ids = tokenizer("line 3 adds")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id, "documents of the model began with BOS"
    assert text[0]["generated_text"].startswith("line 3 adds")


def test_copied_code_needs_torch_and_transformers_alone_and_transformers_finds_all_of_it(content, folder):
    files = bundle()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            tops = {module.split(".")[0] for module in modules} - {"torch", "transformers"} - sys.stdlib_module_names
            assert tops <= ({"dla_kernels"} if name == "dla_kernels.py" else set()), name
    path = folder(content("mamba2", "dla"))
    named = {f"{module}.py" for module in get_relative_imports(path / "modeling_dla.py")}
    assert named | {"modeling_dla.py"} == set(files), "transformers 4 follows imports of the first file only"
    found = {Path(file).name for file in get_relative_import_files(path / "modeling_dla.py")}
    assert found | {"modeling_dla.py"} == set(files) == {file.name for file in path.glob("*.py")}
