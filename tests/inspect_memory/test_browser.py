"""The page of an inspection in a browser: what it shows at every moment is the model's own history."""

import json

import pytest

from dla_train.inspect_memory.history import HeadHistory, Inspection, inspect_text
from dla_train.inspect_memory.page import write_page
from tests.inspect_memory.browser import missing, run_in_page
from tests.inspect_memory.test_history import TEXT, opened

pytestmark = pytest.mark.browser

LOOK = """
const heads = data.heads.map(h => [h.layer, h.head]), seen = [];
const spans = [...element("text").children];
for (const [layer, number] of heads) {
  element("layer").value = layer; element("layer").onchange({target: element("layer")});
  element("head").value = number; element("head").onchange({target: element("head")});
  for (const t of MOMENTS) {
    element("time").value = t; element("time").oninput({target: element("time")});
    seen.push({layer, head: number, t, summary: element("summary").textContent,
      classes: spans.map(span => span.className), colours: spans.map(span => span.style.backgroundColor)});
  }
}
return {seen, text: element("text").textContent, wide: document.body.scrollWidth <= innerWidth};
"""
POINT = """
const spans = [...element("text").children], canvas = id => element(id), told = {};
const at = (target, x, y) => target.dispatchEvent(new MouseEvent("mousemove", {bubbles: true, clientX: x, clientY: y}));
const box = spans[TOKEN].getBoundingClientRect();
at(spans[TOKEN], box.left + 1, box.top + 1);
told.token = element("tip").textContent;
told.shown = element("tip").style.display;
told.marked = spans.findIndex(span => span.classList.contains("hover"));
const area = canvas("slots").getBoundingClientRect();
at(canvas("slots"), area.left + (TOKEN + 0.5) / spans.length * area.width, area.bottom - 2);
told.slot = element("tip").textContent;
spans[TOKEN].click();
told.when = element("when").textContent;
spans[TOKEN].dispatchEvent(new MouseEvent("mouseleave"));
told.hidden = element("tip").style.display;
element("colour").value = "weight"; element("colour").onchange();
told.heat = spans.map(span => span.style.backgroundColor);
const pixels = canvas("reads").getContext("2d").getImageData(0, 0, spans.length, canvas("reads").height).data;
told.drawn = pixels.filter((value, index) => index % 4 === 3 && value > 0).length;
element("play").click();
told.playing = element("play").textContent;
return told;
"""


@pytest.fixture
def inspection(tiny, tmp_path) -> Inspection:
    if why := missing():
        pytest.skip(why)
    found = inspect_text(*opened(tiny), TEXT)
    write_page(found, tmp_path / "index.html", title="a <title>", facts=["a fact"], chosen=found.heads[2])
    return found


def test_every_head_at_every_moment_has_the_slots_of_its_history(inspection, tmp_path):
    moments = [0, 1, 7, len(inspection.pieces) - 1]
    told = run_in_page(tmp_path / "index.html", LOOK.replace("MOMENTS", json.dumps(moments)))
    assert told["text"] == TEXT.replace("\n", "\u21b5\n")
    assert told["wide"]
    assert len(told["seen"]) == len(inspection.heads) * len(moments)
    heads = {(head.layer, head.head): head for head in inspection.heads}
    for look in told["seen"]:
        head, time = heads[look["layer"], look["head"]], look["t"]
        opened_so_far = int(head.boundary[: time + 1].sum())
        live = len(head.live[time])
        assert look["summary"] == (
            f"{live} of 4 states, {opened_so_far} boundaries, {opened_so_far - live} merged away"
        )
        assert [name.split(" ")[0] for name in look["classes"]] == [
            kind(head, token, time) for token in range(head.tokens)
        ]
        slots, colours = head.slot_of_token(time), look["colours"]
        for token in range(1, time + 1):
            assert (colours[token] == colours[token - 1]) == (slots[token] == slots[token - 1])
        assert set(colours[time + 1 :]) <= {""}


def kind(head: HeadHistory, token: int, time: int) -> str:
    """The class of a token's span after token `time`; the chosen token's own may stand alone."""
    if token > time:
        return "later"
    if not head.boundary[token]:
        return "now" if token == time else ""
    return "kept" if head.death[token] > time else "gone"


def test_pointing_clicking_and_playing_tell_what_the_memory_did(inspection, tmp_path):
    token, head = 9, inspection.heads[2]
    told = run_in_page(tmp_path / "index.html", POINT.replace("TOKEN", str(token)))
    assert (told["shown"], told["marked"], told["hidden"]) == ("block", token, "none")
    assert told["token"].startswith(
        f"token {token}: {json.dumps(inspection.pieces[token])}\ndrift {head.score[token]:.3f}"
    )
    last = head.tokens - 1
    rank = len(head.live[last]) - 1 - int(head.slot_of_token(last)[token])
    assert f"read weight {head.weights[last, rank]:#.3g}" in told["token"]
    end = head.live[token][1] - 1 if len(head.live[token]) > 1 else token
    assert f"slot 0 of 0 to {len(head.live[token]) - 1}, which holds tokens 0 to {end}" in told["slot"]
    assert told["when"] == f"{token} of {last}"
    assert told["heat"][token + 1 :] == [""] * (last - token) and "" not in told["heat"][: token + 1]
    assert told["drawn"] == sum(map(len, head.live))
    assert told["playing"] == "pause"


def test_a_mistake_on_the_page_is_noticed(inspection, tmp_path):
    with pytest.raises(AssertionError, match="nobody"):
        run_in_page(tmp_path / "index.html", "nobody.knows()")
