"""Pictures with captions: a metadata.jsonl, texts beside pictures, the emoji's sheet, and what is wrong with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.training.captioned import is_captioned, load_captioned, wordings


@pytest.fixture
def folder(tmp_path, rng):
    for i, name in enumerate("abc"):
        pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}\nnumber {i}\n\n")
    return tmp_path


@pytest.fixture
def sheet(tmp_path):
    """Two styles of two subjects in six tones, as tools/emoji.py writes them, each picture of one grey."""
    rows = [
        {"style": style, "subject": subject, "tone": tone, "subset": subset, "part": part}
        for style, subset in (("noto", "emoji-240"), ("old", "rest"))
        for subject, part in (("cook", "train"), ("pilot", "held_out"))
        for tone in ("", "light", "medium-light", "medium", "medium-dark", "dark")
    ]
    pixels = np.repeat(np.arange(24, dtype=np.uint8)[:, None], 64 * 64 * 3, 1).reshape(4, 6, 64, 64, 3) * 10
    image = Image.fromarray(pixels.transpose(0, 2, 1, 3, 4).reshape(4 * 64, 6 * 64, 3))
    image.save(tmp_path / "sheet.webp", lossless=True)
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_texts_beside_pictures(folder):
    data = load_captioned(folder, size=16)
    assert data.captions == tuple((f"picture {name}", f"number {i}") for i, name in enumerate("abc"))
    assert data.pixels.shape == (3, 3, 16, 16)
    assert data[torch.tensor([2, 0])][0].equal(data.images()[[2, 0]])
    assert is_captioned(folder)
    (folder / "b.txt").unlink()
    assert is_captioned(folder), "a caption is missing, which is no reason to do without the others"
    with pytest.raises(ValueError, match=r"no \.txt beside b\.png"):
        load_captioned(folder)


def test_what_has_no_captions(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_captioned("digits")
    assert is_captioned("emoji")
    for path in folder.glob("*.txt"):
        path.unlink()
    assert not is_captioned(folder)
    assert not is_captioned(folder / "nothing")


def test_metadata(folder):
    lines = [{"file_name": "c.png", "text": "a see"}, {"file_name": "a.png", "text": ["an ay", "ay"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    data = load_captioned(folder, size=16)
    assert data.captions == (("a see",), ("an ay", "ay"))
    assert is_captioned(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1 must be \{"),
        ('{"file_name": "a.png"}', "line 1 must be"),
        ('["a.png"]', "line 1 must be"),
        ('{"file_name": "a.png", "text": ""}', "the caption is empty"),
        ('{"file_name": "a.png", "text": [1]}', "a caption must be text"),
        ('{"file_name": "z.png", "text": "z"}', r"1 of 1 pictures .*z\.png"),
    ],
)
def test_metadata_that_is_wrong(folder, line, message):
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_captioned(folder)


def test_a_broken_picture_is_left_out_when_asked(folder):
    (folder / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 3 pictures"):
        load_captioned(folder)
    with pytest.warns(UserWarning, match=r"b\.png"):
        data = load_captioned(folder, skip_broken=True)
    assert len(data) == 2


def test_the_sheet(sheet):
    data = load_captioned(sheet)
    assert [row["subject"] for row in data.rows] == ["cook"] * 6
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert (data.pixels == data.pixels[:, :1, :1, :1]).all()
    assert data.captions[5][0] == "noto style cook dark skin tone"
    assert len(load_captioned(sheet, part=None, subset=None)) == 24
    held_out = load_captioned(sheet, part="held_out", subset="rest")
    assert held_out.pixels[:, 0, 0, 0].tolist() == list(range(180, 240, 10))
    assert data.fingerprint() != load_captioned(sheet, part="held_out").fingerprint()
    with pytest.raises(ValueError, match="size is 32, but the emoji are 64"):
        load_captioned(sheet, size=32)
    with pytest.raises(ValueError, match=r"part is .test.; it must be one of train"):
        load_captioned(sheet, part="test")


def test_without_the_sheet_it_is_said_where_it_should_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdiff.training.captioned.LINES", "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no emoji in data/emoji or .*tools/emoji\.py"):
        load_captioned("emoji")


def test_every_wording_names_all_factors():
    for row in ({"style": "noto", "subject": "cook", "tone": "dark"}, {"style": "noto", "subject": "cook", "tone": ""}):
        for wording in wordings(row):
            assert all(row[name] in wording for name in row)
    assert len(set(wordings(row))) == len(wordings(row))
