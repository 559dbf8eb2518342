"""Streams: the same for the same words, different for all others."""

import pytest
import torch

from dla_train.recall.tasks.errors import RecallError
from dla_train.recall.tasks.streams import LARGEST_SEED, SPLITS, stream


def numbers(generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(2**62, (4,), generator=generator).tolist())


def test_the_same_words_give_the_same_stream() -> None:
    assert numbers(stream(3, "train")) == numbers(stream(3, "train"))


def test_no_two_streams_begin_alike_nor_as_a_plainly_seeded_one() -> None:
    seeds = [*range(300), LARGEST_SEED - 1, LARGEST_SEED]
    begun = [numbers(stream(seed, split)) for seed in seeds for split in SPLITS]
    begun += [numbers(torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert len(set(begun)) == len(begun)


def test_all_streams_have_seeds_of_their_own_within_the_32_bits_that_torch_uses() -> None:
    low = torch.Generator().manual_seed(5)
    assert numbers(low) == numbers(torch.Generator().manual_seed(5 + 2**32))
    half = 2**31 // len(SPLITS)  # where a factor that is even would begin to repeat
    seeds = [*range(1000), *range(half, half + 1000)]
    used = [stream(seed, split).initial_seed() for seed in seeds for split in SPLITS]
    assert len(set(used)) == len(used) and max(used) < 2**32
    assert stream(LARGEST_SEED, SPLITS[-1]).initial_seed() < 2**32


@pytest.mark.parametrize(
    ("seed", "split", "message"),
    [
        (0, "test", "split='test' is not one of the choices; choose from train, held_out, tuning"),
        (-1, "train", "seed=-1 has no stream of its own; choose from 0 to 1431655764"),
        (LARGEST_SEED + 1, "train", "seed=1431655765 has no stream of its own; choose from 0 to 1431655764"),
    ],
)
def test_other_words_are_refused(seed: int, split: str, message: str) -> None:
    with pytest.raises(RecallError) as error:
        stream(seed, split)
    assert str(error.value) == message
