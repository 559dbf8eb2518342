"""What a prompt left in the memory is what the plan of the whole prompt says."""

import pytest
import torch

from dla_train.generate import GenerationError, prefill
from dla_train.generate.memory_report import HeadMemory, Slot, head_memories, memory_text


@pytest.mark.parametrize("backbone", ["mamba2", "gated_deltanet"])
@pytest.mark.parametrize("policy", ["single", "log_linear", "fixed", "dla"])
@torch.no_grad()
def test_spans_are_those_of_the_plan(tiny, build, backbone, policy):
    lm = build(*tiny(backbone, policy)).eval()
    tokens = torch.randint(17, (2, 23), generator=torch.Generator().manual_seed(0))
    caches = prefill(lm, tokens, lm.empty_caches(2, 23), chunk_tokens=10)[1]
    plans = {}
    lm(tokens, observe=lambda layer, reading: plans.update({layer: reading.plan}))
    found = head_memories(caches, 1)
    assert [(memory.layer, memory.head) for memory in found] == [(layer, head) for layer in (0, 1) for head in range(4)]
    for memory in found:
        plan = plans[memory.layer]
        starts = plan.slot_starts()[1, -1, memory.head]
        assert [slot.first for slot in memory.slots] == starts[starts >= 0].tolist()
        assert [slot.end for slot in memory.slots] == [*(slot.first for slot in memory.slots[1:]), 23]
        for slot in memory.slots:
            scores = plan.score[1, slot.first : slot.end, memory.head]
            assert slot.mean_score == pytest.approx(scores.mean().item(), abs=1e-5)


def test_a_layer_or_head_can_be_chosen_and_one_that_is_not_there_is_named(tiny, build):
    lm = build(*tiny("mamba2", "dla")).eval()
    caches = prefill(lm, torch.tensor([[1, 2, 3]]), lm.empty_caches(1, 3))[1]
    assert {memory.layer for memory in head_memories(caches, layer=1)} == {1}
    assert [(m.layer, m.head) for m in head_memories(caches, layer=0, head=3)] == [(0, 3)]
    with pytest.raises(GenerationError, match="layer 2 does not exist; choose 0 to 1"):
        head_memories(caches, layer=2)
    with pytest.raises(GenerationError, match="head 4 does not exist; choose 0 to 3"):
        head_memories(caches, layer=0, head=4)


def test_softmax_attention_has_no_slots_to_show(tiny, build):
    lm = build(*tiny("attention", "none")).eval()
    caches = prefill(lm, torch.tensor([[1, 2, 3]]), lm.empty_caches(1, 3))[1]
    with pytest.raises(GenerationError, match="no memory slots"):
        head_memories(caches)


def test_the_text_shows_spans_with_the_words_at_their_edges():
    memory = HeadMemory(1, 2, [Slot(0, 9, 0.25), Slot(9, 10, 1.5)], capacity=4)
    pieces = [*(f"word{number} is long\n" for number in range(9)), "last"]
    text = memory_text([memory], pieces, scored=True)
    assert text.splitlines() == [
        "layer 1, head 2: 2 of 4 states",
        r"    0   0..8    9 tokens  drift 0.25  'word0 is long\nword1 is long\n' ... 'word7 is long\nword8 is long\n'",
        "    1   9..9    1 token   drift 1.50  'last'  (open)",
    ]
    assert "drift" not in memory_text([memory], pieces, scored=False)
