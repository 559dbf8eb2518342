"""Tokens that arrive one by one give the text that decoding them together gives."""

import random

import pytest

from dla_train.data.incremental_text import IncrementalText, token_pieces
from dla_train.data.tokenizer import load_tokenizer

TEXTS = [
    "plain words and spaces",
    " leading space,  two spaces\n\tand a tab ",
    "Grüße, 你好, \N{SNOWMAN}\N{GRINNING FACE} and a family: \U0001f468\u200d\U0001f469",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(sentencepiece_model, text):
    tokenizer = load_tokenizer(sentencepiece_model)
    ids = tokenizer.encode(text * 3)
    pieces = token_pieces(ids, tokenizer)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)


def test_a_continuation_is_what_it_adds_to_the_prompt(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    ids = tokenizer.encode(" ".join(TEXTS) * 4)
    for cut in range(0, len(ids), 3):
        if tokenizer.decode(ids[:cut]).endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # a prompt is whole characters
        text = IncrementalText(tokenizer, ids[:cut])
        shown = "".join(text.push(token) for token in ids[cut:]) + text.flush()
        assert tokenizer.decode(ids[:cut]) + shown == tokenizer.decode(ids)


def test_an_unfinished_character_waits_and_is_shown_whole(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    ids = tokenizer.encode("a\N{GRINNING FACE}b")
    pieces = token_pieces(ids, tokenizer)
    assert "\N{GRINNING FACE}" in pieces and "" in pieces


def test_any_sequence_of_tokens_is_shown_in_full(sentencepiece_model):
    """Random ids: broken bytes, control pieces and all."""
    tokenizer, generator = load_tokenizer(sentencepiece_model), random.Random(0)
    for _ in range(60):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(40)]
        shown = "".join(token_pieces(ids, tokenizer))
        assert shown.replace("\N{REPLACEMENT CHARACTER}", "") == tokenizer.decode(ids).replace(
            "\N{REPLACEMENT CHARACTER}", ""
        )
