"""Prompt by chunks and then token by token equals the whole sequence, for every backbone and policy, in float32."""

import pytest
import torch

from dla_train.generate import generate, main, prefill, sample

RECURRENT = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
CASES = [
    *((b, p, {}) for b, p in [*RECURRENT, ("attention", "none")]),
    *(
        (b, "dla", v)
        for b in ("mamba2", "gated_deltanet")
        for v in (
            {"closed_slots": "frozen"},
            {"drift": "update"},
            {"capacity_rule": "oldest"},
            {"capacity_rule": "random"},
            {"read": "slot"},
            {"routing": "projected", "routing_dim": 3},
            {"conv_width": 0},
            {"conv_width": 1},
            {"conv_bias": True},
            {"num_key_heads": 1},
        )
    ),
    ("gated_deltanet", "log_linear", {"read": "content"}),
    ("mamba2", "fixed", {"read": "slot"}),
]
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-3)]


def tokens_of(*shape, seed=0):
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("backbone", "policy", "changes"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(tiny, build, backbone, policy, changes, dtype, tolerance):
    lm, tokens = build(*tiny(backbone, policy, **changes), dtype=dtype).eval(), tokens_of(2, 26)
    whole = lm(tokens).logits
    caches = lm.empty_caches(2, 26)
    logits, caches = prefill(lm, tokens[:, :15], caches, chunk_tokens=7)
    torch.testing.assert_close(logits, whole[:, 14], rtol=tolerance, atol=tolerance)
    held = sum(cache.nbytes for cache in caches)
    for t in range(15, 26):
        torch.testing.assert_close(lm.step(tokens[:, t], caches), whole[:, t], rtol=tolerance, atol=tolerance)
    assert sum(cache.nbytes for cache in caches) == held


@pytest.mark.parametrize(("backbone", "policy"), [*RECURRENT, ("attention", "none")])
@torch.no_grad()
def test_decoding_from_the_first_token_equals_the_full_forward(tiny, build, backbone, policy):
    lm, tokens = build(*tiny(backbone, policy)).eval(), tokens_of(3, 12)
    caches = lm.empty_caches(3, 12)
    stepped = torch.stack([lm.step(tokens[:, t], caches) for t in range(12)], dim=1)
    torch.testing.assert_close(stepped, lm(tokens).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("backbone", "policy"), [*RECURRENT, ("attention", "none")])
@torch.no_grad()
def test_a_cache_continues_the_last_document_and_packed_rows_may_follow(tiny, build, backbone, policy):
    """Rows hold several documents before and after the split; the second call's first document continues the cache."""
    lm, tokens = build(*tiny(backbone, policy)).eval(), tokens_of(2, 20)
    whole = lm(tokens, torch.tensor([0, 6, 14, 20, 23, 40])).logits
    first, second = tokens[:, :9], tokens[:, 9:]
    out = lm(first, torch.tensor([0, 6, 9, 12, 18]), caches=lm.empty_caches(2, 20), return_caches=True)
    rest = lm(second, torch.tensor([0, 5, 11, 22]), caches=out.caches).logits
    torch.testing.assert_close(torch.cat([out.logits, rest], dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("backbone", "policy"), [("gated_deltanet", "dla"), ("attention", "none")])
@torch.no_grad()
def test_no_cache_and_an_empty_cache_are_the_same(tiny, build, backbone, policy):
    lm, tokens = build(*tiny(backbone, policy)).eval(), tokens_of(2, 9)
    fresh, given = lm(tokens, return_caches=True), lm(tokens, caches=lm.empty_caches(2, 9), return_caches=True)
    torch.testing.assert_close(fresh.logits, given.logits)
    for a, b in zip(fresh.caches, given.caches, strict=True):
        for name, value in vars(a).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(b, name), msg=name)


def test_generation_is_a_function_of_its_seed_and_greedy_is_the_argmax(tiny, build):
    lm = build(*tiny("gated_deltanet", "dla")).train()
    prompt = tokens_of(9).tolist()
    first, again, other = (generate(lm, prompt, 12, seed=s).tokens for s in (0, 0, 1))
    assert first == again != other and len(first) == 12
    assert lm.training
    greedy = generate(lm, prompt, 5, temperature=0).tokens
    with torch.no_grad():
        full = lm.eval()(torch.tensor([prompt + greedy])).logits[0].argmax(-1)
    assert greedy == full[len(prompt) - 1 : -1].tolist()
    assert greedy == generate(lm, prompt, 5, temperature=1.0, top_k=1).tokens
    assert greedy == generate(lm, prompt, 5, temperature=1.0, top_p=1e-6).tokens


def test_generation_stops_at_the_stop_token(tiny, build):
    lm = build(*tiny("mamba2", "dla"))
    free = generate(lm, [1, 2], 20, seed=3).tokens
    stop = free[4]
    assert generate(lm, [1, 2], 20, seed=3, stop_id=stop).tokens == free[: free.index(stop) + 1]


def test_cache_bytes_of_a_recurrent_model_do_not_depend_on_the_prompt(tiny, build):
    lm = build(*tiny("mamba2", "dla"))
    assert generate(lm, [1], 2).cache_bytes == generate(lm, [1] * 50, 2).cache_bytes


def test_top_k_and_top_p_restrict_what_is_drawn():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, top_k=2, generator=generator).unique().tolist() == [0, 1]
    assert sample(logits, top_p=0.6, generator=generator).unique().tolist() == [0, 1]
    share = (sample(logits, generator=generator) == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("prompt", [[], [17], [-1]])
def test_a_prompt_outside_the_vocabulary_or_empty_is_refused(tiny, build, prompt):
    with pytest.raises(ValueError, match="vocabulary|empty"):
        generate(build(*tiny("mamba2", "single")), prompt, 3)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_illegal_sampling_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sample(torch.zeros(1, 4), **wrong)


def test_the_console_command_names_a_missing_run(tmp_path):
    with pytest.raises(SystemExit, match="dla-generate: "):
        main(["--run", str(tmp_path / "nowhere"), "--prompt", "x"])


class LetterTokenizer:
    """Letters a to p as tokens 0 to 15, and token 16 as BOS."""

    bos_id, eos_id = 16, None

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join("^" if i == 16 else chr(ord("a") + i) for i in ids)


@pytest.mark.parametrize(
    ("option", "manifest_bos", "begins"),
    [
        ([], None, "abc"),
        ([], False, "abc"),
        ([], True, "^abc"),
        (["--bos"], None, "^abc"),
        (["--no-bos"], True, "abc"),
    ],
)
def test_the_console_command_begins_as_training_did_and_reports_the_cache(
    tiny, build, monkeypatch, tmp_path, capsys, option, manifest_bos, begins
):
    from types import SimpleNamespace

    from dla_train import generate as command
    from dla_train.data.manifest import Manifest

    lm = build(*tiny("gated_deltanet", "dla"), dtype=torch.float32)
    prefix = tmp_path / "corpus"
    if manifest_bos is not None:
        Manifest("letters", "0" * 64, 17, manifest_bos, False, 1, 3, 3).write(tmp_path / "corpus.json")
    data = SimpleNamespace(tokenizer="letters", train=[str(prefix)], phases=[])
    config = SimpleNamespace(data=data, model=lm.model_config, memory=lm.memory_config)
    monkeypatch.setattr(command, "load_model", lambda run: (lm, config, 7))
    monkeypatch.setattr(command, "load_tokenizer", lambda path: LetterTokenizer())
    main(["--run", str(tmp_path), "--prompt", "abc", "--max-new-tokens", "4", *option])
    captured = capsys.readouterr()
    text = captured.out.strip()
    assert text.startswith(begins) and len(text) == len(begins) + 4
    held = sum(cache.nbytes for cache in lm.empty_caches(1, 1))
    assert f"caches {held:,} bytes" in captured.err and "step 7" in captured.err
