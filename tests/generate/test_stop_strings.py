"""Stop strings across pieces."""

import random

import pytest

from dla_train.generate.errors import GenerationError
from dla_train.generate.stop_strings import StopStrings


def shown(pieces, stops):
    watch = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += watch.feed(piece)
        if watch.found:
            return text, True
    return text + watch.finish(), False


def test_a_stop_string_is_found_across_pieces_and_nothing_of_it_is_shown_first():
    watch = StopStrings(["END"])
    assert [watch.feed(piece) for piece in ("one E", "N", "Dtwo")] == ["one ", "", ""]
    assert watch.found and watch.feed("more") == "" and watch.finish() == ""


def test_text_that_only_began_like_a_stop_string_is_shown_later():
    watch = StopStrings(["END"])
    assert [watch.feed(piece) for piece in ("E", "N", "E", "x")] == ["", "", "EN", "Ex"]
    assert watch.feed("E") == "" and watch.finish() == "E" and not watch.found


def test_the_first_of_several_stop_strings_ends_the_text():
    assert shown(["a b;c", "\n"], ["\n", ";"]) == ("a b", True)
    assert shown(["aab"], ["ab", "aab"]) == ("", True)


def test_however_a_text_is_cut_the_same_is_shown():
    """Against a plain search in the whole text, up to the piece that completes a stop string."""
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choice("ab") for _ in range(12))
        stops = ["".join(generator.choice("ab") for _ in range(generator.randint(1, 5))) for _ in range(2)]
        cuts = sorted(generator.sample(range(13), 4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        found, ends = "", False
        for piece in pieces:
            found += piece
            places = [found.find(stop) for stop in stops if stop in found]
            if places:
                found, ends = found[: min(places)], True
                break
        assert shown(pieces, stops) == (found, ends)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(GenerationError, match="empty"):
        StopStrings(["a", ""])
