"""The grammar: what commands ask for, how requests fall apart, and that its own wordings are understood."""

import pytest

from fastdiff.poser.config import Config
from fastdiff.poser.domain import Domain
from fastdiff.poser.records import Critique, Spec
from fastdiff.training.captioned import wordings
from fastdiff.training.edits import instructions

DOMAIN = Domain()
DRAW, EDIT = Spec(name="d", kind="draw"), Spec(name="e", kind="edit")


def cells(rng, number=50):
    return [{name: rng.choice(values) for name, values in DOMAIN.values.items()} for _ in range(number)]


def test_every_wording_is_understood(rng):
    for cell in cells(rng):
        for name, value in cell.items():
            for text in instructions(cell, [name]):
                assert DOMAIN.goal(text) == {name: value}, text
        for text in wordings(cell):
            if "style" in text and (not cell["tone"] or "skin" in text):
                assert DOMAIN.goal(text) == {n: v for n, v in cell.items() if v}, text
        for attempt in range(4):
            assert DOMAIN.goal(DOMAIN.instruction(cell, attempt)) == cell


@pytest.mark.parametrize(
    ("request_", "commands"),
    [
        ("draw a pilot, then make the skin dark, and draw it in noto style",
         ["draw a pilot", "make the skin dark", "draw it in noto style"]),
        ("draw a pilot; give them dark skin. Make it flat style", 
         ["draw a pilot", "give them dark skin", "Make it flat style"]),
        ("a pilot, dark skin, noto style", ["a pilot", "dark skin", "noto style"]),
        ("make the skin dark and in flat style", ["make the skin dark", "in flat style"]),
        ("a red, round ball", ["a red, round ball"]),
        ("draw a pilot\0, then dark\0 7\0 skin", ["draw a pilot", "dark  7  skin"]),
        ('draw a cook, then write "salt, and then pepper"', ["draw a cook", 'write "salt, and then pepper"']),
        ("draw a cook and write “a; b”", ["draw a cook and write “a; b”"]),
    ],
)  # fmt: skip
def test_requests_fall_apart(request_, commands):
    assert DOMAIN.split(request_) == commands


def test_yellow_goes_without_saying_beside_a_subject():
    """As in the data, whose captions lack the word; alone it must be said."""
    domain = Domain()
    for attempt in range(6):
        assert "yellow" not in domain.caption({"subject": "pilot", "tone": ""}, attempt)
        assert "yellow" not in domain.caption({"subject": "pilot", "tone": "", "style": "flat"}, attempt)
        assert domain.goal(domain.caption({"tone": ""}, attempt)) == {"tone": ""}
        assert domain.goal(domain.caption({"tone": "", "style": "flat"}, attempt)) == {"tone": "", "style": "flat"}
        dark = {"subject": "pilot", "tone": "dark"}
        assert domain.goal(domain.caption(dark, attempt)) == dark


def test_a_subject_s_own_words_are_not_taken_apart():
    domain = Domain({"subject": ("hand with index finger and thumb crossed", "mrs. claus", "ear"), "tone": ("", "dark"),
                     "style": ("flat",)})  # fmt: skip
    assert domain.split("draw a hand with index finger and thumb crossed and dark skin") == [
        "draw a hand with index finger and thumb crossed", "dark skin",
    ]  # fmt: skip
    assert domain.split("draw mrs. claus, then dark skin") == ["draw mrs. claus", "dark skin"]
    assert domain.goal("draw a bear") == {}


@pytest.mark.parametrize("empty", ["", " \n", ", then ; and", "…"])
def test_an_empty_request_is_refused(empty):
    with pytest.raises(ValueError, match="request is empty"):
        DOMAIN.split(empty)
    with pytest.raises(TypeError, match="request must be a str; got NoneType"):
        DOMAIN.split(None)


def test_requests_are_about_cells_that_are_held_out_or_not(seed):
    kept, others = (
        {
            tuple(sorted(DOMAIN.goals(DOMAIN.split(r)).items()))
            for r in DOMAIN.requests(300, seed, held_out=h, commands=3)
        }
        for h in (True, False)
    )
    assert not kept & others
    assert DOMAIN.requests(5, seed) == DOMAIN.requests(5, seed) != DOMAIN.requests(5, seed + 1)
    for request in DOMAIN.requests(50, seed):
        assert 1 <= len(DOMAIN.split(request)) <= 3
        assert "subject" in DOMAIN.goal(DOMAIN.split(request)[0])


def test_reflection_asks_again_for_what_is_wrong():
    both = "make the skin dark and in flat style"
    assert DOMAIN.goal(DOMAIN.word(both, EDIT, (), 0, None)) == {"tone": "dark", "style": "flat"}
    failed = Critique(0.5, False, ("tone: it is light, not dark",))
    again = [DOMAIN.word(both, EDIT, (), attempt, failed) for attempt in (1, 2)]
    assert again[0] != again[1]
    assert [DOMAIN.goal(text) for text in again] == [{"tone": "dark"}] * 2
    # A model of captions is told captions, one that is given all is told what came before, too.
    assert DOMAIN.word("give them dark skin", DRAW, ["draw a pilot"], 0, None) == "dark skin"
    merged = Spec(name="m", kind="image-to-image", given="merged")
    assert DOMAIN.word("give them dark skin", merged, ["draw a pilot", "in flat style"], 0, None) in wordings(
        {"subject": "pilot", "tone": "dark", "style": "flat"}
    )
    # What the grammar does not know goes on as it stands, with the critic's suggestion once it failed.
    free = Critique(0.2, False, ("no hat",), "add a large red hat")
    assert DOMAIN.word("put on a hat", EDIT, (), 0, None) == "put on a hat"
    assert DOMAIN.word("put on a hat", EDIT, (), 1, free) == "put on a hat. add a large red hat"


# ---- experts.toml

TOML = '[critic]\nkind = "simulated"\n[[expert]]\nname = "a"\nkind = "draw"\nsource = "emoji"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOML.replace('"draw"', '"drow"'), "kind of a is 'drow'; did you mean 'draw'"),
        (TOML + "price = -1\n", r"`float` >= 0.0 - at `\$.expert\[0\].price`"),
        (TOML + "colour = 1\n", "unknown field `colour`"),
        (TOML + "timeout = 0\n", "timeout"),
        ("[budget]\ncost = -1\n" + TOML, r"`float` >= 0.0 - at `\$.budget.cost`"),
        ("[budget]\ncalls = -1\n" + TOML, r"`int` >= 0 - at `\$.budget.calls`"),
        (TOML.replace('"draw"\n', '"generations"\nurl = "ftp://x"\n'), "must begin with http:// or https://"),
        (TOML.replace('"draw"\n', '"edits"\nurl = "https://u:p@x/v1"\n'), "must not hold a password"),
        ("[hand]\ntune = 'a'\n" + TOML, "a kind of command in hand is 'tune'"),
        ("[hand]\ntone = 'b'\n" + TOML, "hand.tone is 'b'; it must be one of a"),
        ("[critic", "experts.toml: "),
    ],
)
def test_a_bad_file_is_told_in_words(tmp_path, text, message):
    path = tmp_path / "experts.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Config.read(path)


def test_names_and_missing_files(tmp_path):
    assert [spec.kind for spec in Config.read("emoji").expert] == ["draw", "draw", "image-to-image", *["edit"] * 4]
    with pytest.raises(FileNotFoundError, match="names are simulated, simulated-delayed and emoji"):
        Config.read(tmp_path / "none.toml")
