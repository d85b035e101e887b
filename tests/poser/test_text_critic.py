"""Text in pictures: what rapidocr reads of pictures whose text is known, and what a critique makes of it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from fastdiff.poser.config import CriticSpec, make_critic
from fastdiff.poser.critics import simulated_critic
from fastdiff.poser.domain import Domain
from fastdiff.poser.simulated import paint
from fastdiff.poser.text_critic import TextCritic, rapidocr

DOMAIN = Domain()
REQUEST = 'draw a pilot, then write "HELLO", then write "BYE", then make the skin dark'


def written(*lines, side=96):
    """Black letters on white, float32 [3, side, side]."""
    image = Image.new("RGB", (side, side), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((6, 8 + 34 * i), line, fill="black", font=ImageFont.load_default(22))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def rate(critic, image, command, request=REQUEST, before=None):
    return critic.rate(image[None], [command], [request], [before])[0]


@pytest.mark.slow
def test_what_rapidocr_reads():
    pytest.importorskip("rapidocr")
    critic = make_critic(CriticSpec(kind="simulated", text=True), DOMAIN)
    hello, both, none = written("HELLO"), written("HELLO", "BYE"), written()
    assert rate(critic, hello, 'write "HELLO"').satisfied
    assert rate(critic, hello, "write “hello”").satisfied
    assert rate(critic, written("HELP"), 'write "HELLO"').score == pytest.approx(3 / 5)
    assert rate(critic, none, 'write "HELLO"').score == 0
    assert rate(critic, both, 'write "BYE"', before=hello).satisfied
    lost = rate(critic, written("BYE"), 'write "BYE"', before=hello)
    assert not lost.satisfied
    assert lost.issues == ("text: 'HELLO' is not there; what is read is 'BYE'",)
    assert lost.suggestion == 'write "HELLO"'


def by_name(read):
    """A critic whose reader knows pictures by their first pixel."""
    return TextCritic(simulated_critic(DOMAIN), DOMAIN, lambda image: read[round(image[0, 0, 0].item(), 3)])


def test_a_command_goes_to_the_critic_of_its_kind():
    dark, plain = ({"subject": "pilot", "tone": tone, "style": "flat"} for tone in ("dark", ""))
    images = {name: paint(goal, 1.0, DOMAIN) for name, goal in (("dark", dark), ("plain", plain))}
    blank = {round(image[0, 0, 0].item(), 3): () for image in images.values()}
    silent, loud = by_name(blank), by_name(dict.fromkeys(blank, ("H E L", "lo!")))
    assert rate(silent, images["dark"], "make the skin dark").satisfied
    assert not rate(silent, images["plain"], "make the skin dark").satisfied
    assert not rate(silent, images["dark"], 'write "HELLO"').satisfied
    assert rate(loud, images["dark"], 'write "HELLO"').satisfied  # in lines, whatever their spaces and case
    # A command of both kinds needs both.
    assert rate(loud, images["dark"], 'make the skin dark and write "HELLO"').satisfied
    one = rate(loud, images["plain"], 'make the skin dark and write "HELLO"')
    assert (one.satisfied, one.issues) == (False, ("tone: it is yellow, not dark",))
    two = rate(silent, images["plain"], 'make the skin dark and write "HELLO"')
    assert [issue.partition(":")[0] for issue in two.issues] == ["tone", "text"]
    assert two.suggestion == 'make the skin dark and write "HELLO"'


def test_a_text_that_another_command_loses():
    """What was read before must still be there; what was not, or what nobody asked for, is no loss."""
    before, after = (
        torch.full((3, 8, 8), 0.5),
        paint({"subject": "pilot", "tone": "dark", "style": "flat"}, 1.0, DOMAIN),
    )
    key = round(after[0, 0, 0].item(), 3)
    command = "make the skin dark"
    kept = by_name({0.5: ("HELLO",), key: ("HELLO",)})
    assert rate(kept, after, command, before=before).satisfied
    lost = rate(by_name({0.5: ("HELLO",), key: ("HELL",)}), after, command, before=before)
    assert (lost.satisfied, lost.score) == (False, 0.8)
    assert rate(by_name({0.5: ("HE",), key: ()}), after, command, before=before).satisfied
    assert rate(by_name({0.5: ("HELLO",), key: ()}), after, command, request=f"draw a pilot, then {command}",
                before=before).satisfied  # fmt: skip


def test_kinds_of_commands():
    assert DOMAIN.kind('write "HELLO"') == "text"
    assert DOMAIN.kind('make the skin dark and write "a cook"') == "tone+text"
    assert DOMAIN.kind('write ""') == "other"


def test_without_rapidocr_the_command_that_helps(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r'pip install "fastdiff-torch\[poser,ocr\]"'):
        rapidocr()
