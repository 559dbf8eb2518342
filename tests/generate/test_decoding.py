"""Continuing prompts: batches of unequal lengths, seeds, ends, what is refused."""

import pytest
import torch

from dla_train.generate import GenerationError, Sampling, generate, prefill

RECURRENT = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
KINDS = [*RECURRENT, ("attention", "none")]
GREEDY = Sampling(temperature=0)


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(17, (length,), generator=generator).tolist() for length in lengths]


def tokens_of(result):
    return [continuation.tokens for continuation in result.continuations]


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone_and_the_full_forward(tiny, build, backbone, policy):
    lm, prompts = build(*tiny(backbone, policy)), prompts_of(3, 13, 6, 3, 1)
    together = tokens_of(generate(lm, prompts, 5, GREEDY))
    assert together == tokens_of(generate(lm, prompts, 5, GREEDY, batch_rows=1))
    lm.eval()
    for prompt, tokens in zip(prompts, together, strict=True):
        with torch.no_grad():
            full = lm(torch.tensor([prompt + tokens])).logits[0].argmax(-1)
        assert tokens == full[len(prompt) - 1 : -1].tolist()


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
@torch.no_grad()
def test_joined_and_taken_caches_step_as_their_sequences_do_alone(tiny, build, backbone, policy):
    lm, prompts = build(*tiny(backbone, policy)).eval(), prompts_of(4, 11, 7)
    alone = [prefill(lm, torch.tensor([p]), lm.empty_caches(1, len(p) + 3))[1] for p in prompts]
    joined = [layers[0].join(layers) for layers in zip(*alone, strict=True)]
    taken = [cache.take(torch.tensor([2, 0])) for cache in joined]
    for token in (1, 5, 2):
        expected = torch.cat([lm.step(torch.tensor([token]), alone[row]) for row in (2, 0)])
        torch.testing.assert_close(lm.step(torch.tensor([token, token]), taken), expected, rtol=1e-9, atol=1e-9)
    held = [cache.position.tolist() for cache in joined]
    assert held == [[4, 11, 7]] * 2, "taking shares nothing with what was taken from"


def test_a_prompt_is_drawn_with_its_own_seed_whatever_is_beside_it(tiny, build):
    lm, prompts = build(*tiny("gated_deltanet", "dla")).train(), prompts_of(5, 9, 5)
    together = tokens_of(generate(lm, prompts, 7, seed=3))
    assert together == tokens_of(generate(lm, prompts, 7, seed=3))
    assert together == [tokens_of(generate(lm, [p], 7, seed=3 + i))[0] for i, p in enumerate(prompts)]
    assert together != tokens_of(generate(lm, prompts, 7, seed=4))
    assert lm.training


def test_filters_that_leave_one_token_are_greedy(tiny, build):
    lm, prompts = build(*tiny("mamba2", "dla")), prompts_of(6)
    greedy = tokens_of(generate(lm, prompts, 6, GREEDY))
    assert tokens_of(generate(lm, prompts, 6, Sampling(top_k=1))) == greedy
    assert tokens_of(generate(lm, prompts, 6, Sampling(top_p=1e-6))) == greedy


def test_a_strong_repetition_penalty_takes_no_token_of_the_prompt_or_the_continuation_again(tiny, build):
    lm = build(*tiny("gated_deltanet", "dla"))
    prompts = [[0, 1, 2], [3, 4, 5, 6, 3]]
    for prompt, tokens in zip(
        prompts, tokens_of(generate(lm, prompts, 9, Sampling(temperature=0, repetition_penalty=1e4))), strict=True
    ):
        assert len(set(tokens)) == 9 and not set(tokens) & set(prompt)


def test_rows_end_at_their_own_stop_token_and_the_others_go_on(tiny, build):
    lm, prompts = build(*tiny("mamba2", "dla")), prompts_of(4, 6, 8)
    free = tokens_of(generate(lm, prompts, 12, seed=3))
    stop = free[0][4]
    result = generate(lm, prompts, 12, seed=3, stop_ids=frozenset([stop]))
    for whole, continuation in zip(free, result.continuations, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 12
        assert continuation.tokens == whole[:end]
        assert continuation.ended_by == ("stop_token" if stop in whole else "length")
    assert result.stepped_tokens == sum(len(c.tokens) - 1 for c in result.continuations)


def test_a_listener_hears_every_token_and_may_end_its_prompt(tiny, build):
    lm, heard = build(*tiny("mamba2", "single")), []

    def listen(row, token):
        heard.append((row, token))
        return row == 1 and sum(r == 1 for r, _ in heard) == 2

    result = generate(lm, prompts_of(4, 6), 5, GREEDY, on_token=listen)
    assert [len(c.tokens) for c in result.continuations] == [5, 2]
    assert result.continuations[1].ended_by == "listener"
    assert [[t for r, t in heard if r == row] for row in (0, 1)] == tokens_of(result)


def test_no_new_tokens_still_reads_the_prompts(tiny, build):
    seen = []
    lm = build(*tiny("mamba2", "dla"))
    result = generate(lm, prompts_of(4, 6, 4), 0, on_prompt=lambda rows, caches: seen.append((rows, caches)))
    assert tokens_of(result) == [[], [], []] and result.prompt_tokens == 14
    assert [(rows, caches[0].position.tolist()) for rows, caches in seen] == [([0, 2], [4, 4]), ([1], [6])]


def test_cache_bytes_of_a_recurrent_model_do_not_depend_on_the_prompt_and_those_of_attention_do(tiny, build):
    lm = build(*tiny("mamba2", "dla"))
    assert generate(lm, [[1]], 2).cache_bytes == generate(lm, [[1] * 50], 2).cache_bytes
    lm = build(*tiny("attention", "none"))
    assert generate(lm, [[1]], 2).cache_bytes < generate(lm, [[1] * 50], 2).cache_bytes


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[17]], r"tokens \[17\] outside .* 17"),
        ([[2], [-1, 3]], r"prompt 1 has tokens \[-1\]"),
    ],
)
def test_a_prompt_that_is_empty_or_outside_the_vocabulary_is_refused(tiny, build, prompts, message):
    with pytest.raises(GenerationError, match=message):
        generate(build(*tiny("mamba2", "single")), prompts, 3)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": -1}, {"max_new_tokens": 1, "batch_rows": 0}])
def test_counts_out_of_range_are_refused(tiny, build, wrong):
    with pytest.raises(GenerationError, match="at least"):
        generate(build(*tiny("mamba2", "single")), [[1]], **wrong)


def test_a_log_linear_memory_says_how_many_tokens_it_holds(tiny, build):
    lm = build(*tiny("mamba2", "log_linear", capacity=4))
    generate(lm, [[1] * 6], 2)
    with pytest.raises(GenerationError, match="6 tokens, with 3 new ones more than the 8 .*capacity=4"):
        generate(lm, [[1] * 6], 3)
