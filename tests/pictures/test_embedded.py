"""Recipes in files: every picture still opens, what was written is read, and what is no recipe is refused in words."""

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from helpers import SEED, Affine
from PIL import Image

import fastdiff
from fastdiff.pictures import embedded
from fastdiff.pictures import recipe as recipes
from fastdiff.pictures.embedded import KEY, PART, read

SHAPE = (4, 3, 8, 8)


def saved(path: Path, shape: tuple[int, ...] = SHAPE, **arguments: object) -> fastdiff.Recipe:
    model = Affine()
    recipe = fastdiff.Recipe.of(model, shape, sampler="ddim", steps=2, **arguments)
    images = recipe.sample(model)
    if path.suffix == ".png":
        fastdiff.save_grid(path, images, recipe=recipe)
    else:
        fastdiff.save_gif(path, recipe.states(model), recipe=recipe)
    return recipe


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_what_was_written_is_read(name: str, tmp_path: Path) -> None:
    recipe = saved(tmp_path / name, seed=SEED)
    found, layout = read(tmp_path / name)
    assert found == recipe
    assert (layout.columns, layout.scale, layout.gap) == (2, 8, 1)
    assert layout.rows == (None if name == "a.png" else [0, 1, 2])


def test_pixels_do_not_depend_on_the_recipe(tmp_path: Path) -> None:
    model = Affine()
    recipe = saved(tmp_path / "with.png")
    fastdiff.save_grid(tmp_path / "without.png", recipe.sample(model))
    saved(tmp_path / "with.gif")
    fastdiff.save_gif(tmp_path / "without.gif", recipe.states(model))
    for kind in ("png", "gif"):
        with Image.open(tmp_path / f"with.{kind}") as a, Image.open(tmp_path / f"without.{kind}") as b:
            for frame in range(getattr(b, "n_frames", 1)):
                a.seek(frame)
                b.seek(frame)
                assert a.convert("RGB").tobytes() == b.convert("RGB").tobytes()


def test_a_file_with_a_recipe_has_no_date_in_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        saved(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_long_recipe_is_kept_in_parts_that_pillow_opens(name: str, tmp_path: Path) -> None:
    shape = (4, 3, 160, 160)  # 1.2 MB of noise, more than Pillow unpacks of one text
    recipe = saved(tmp_path / name, shape, x_T=torch.randn(shape, generator=torch.Generator().manual_seed(SEED)))
    assert len(recipe.to_json()) > PART
    with Image.open(tmp_path / name) as picture:
        picture.load()
    assert read(tmp_path / name)[0] == recipe


def test_a_recipe_too_long_is_refused_before_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "MOST", 100)
    with pytest.raises(ValueError, match="keeps at most 100"):
        saved(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def chunks(data: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0] + 12
        found.append(data[at : at + length])
        at += length
    return found


def with_text(path: Path, text: str, key: str = KEY) -> None:
    """A PNG's text in place of the one that it has."""
    data = path.read_bytes()
    body = b"zTXt" + key.encode() + b"\0\0" + zlib.compress(text.encode())
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    kept = [old for old in chunks(data) if old[4:8] != b"zTXt"]
    path.write_bytes(data[:8] + kept[0] + chunk + b"".join(kept[1:]))


def test_a_text_that_another_program_moved_behind_the_pixels_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    recipe = saved(path)
    data = path.read_bytes()
    header, *rest, end = chunks(data)
    texts = [chunk for chunk in rest if chunk[4:8] == b"zTXt"]
    assert len(texts) == 1
    path.write_bytes(data[:8] + header + b"".join(c for c in rest if c not in texts) + texts[0] + end)
    assert read(path)[0] == recipe


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1]", "an object"),
        ("{}", "an object"),
        ('{"picture": {}}', "columns"),
        ('{"picture": {"columns": 0, "scale": 1, "gap": 1, "sha256": ""}}', "columns"),
        ('{"picture": {"columns": 2, "scale": 1, "gap": 1, "sha256": ""}}', "format must be"),
        ("[" * 100_000, "cannot be read"),
        ('{"picture": 1, "picture": 2}', "twice"),
        ("__import__('os').system('true')", "cannot be read"),
    ],
)
def test_texts_that_are_no_recipe_are_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    saved(path)
    with_text(path, text)
    with pytest.raises(ValueError, match=rf"a\.png has a recipe that cannot be read: .*{told}|cannot be read"):
        read(path)
    with pytest.raises(ValueError, match=told):
        read(path)


def test_a_text_longer_than_ours_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a.png")
    monkeypatch.setattr(embedded, "MOST", 100)
    with pytest.raises(ValueError, match="more than 100 characters"):
        read(tmp_path / "a.png")


def test_pictures_without_a_recipe_say_who_writes_one(tmp_path: Path) -> None:
    for name in ("a.png", "a.gif", "b.gif"):
        Image.new("L", (9, 9)).save(tmp_path / name, **({"comment": b"hello"} if name == "b.gif" else {}))
        with pytest.raises(ValueError, match="has no recipe in it: fastdiff sample"):
            read(tmp_path / name)


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    Image.new("L", (9, 9)).save(tmp_path / "photo.jpg")
    (tmp_path / "jpeg.png").write_bytes((tmp_path / "photo.jpg").read_bytes())
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "short.png").write_bytes(data[:30])
    (tmp_path / "bomb.png").write_bytes(data[:16] + struct.pack(">II", 1 << 20, 1 << 20) + data[24:])
    for name in ("jpeg.png", "empty.png", "text.png", "short.png", "bomb.png"):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read(tmp_path / "nothing.png")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read(tmp_path)


def test_damaged_files_are_told_in_words(tmp_path: Path) -> None:
    """Bytes changed at random places: the recipe is read, or a ValueError says why not."""
    path = tmp_path / "a.png"
    saved(path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(SEED)
    told = []
    for _ in range(200):
        place = int(torch.randint(len(data), (), generator=generator))
        value = int(torch.randint(256, (), generator=generator))
        path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            read(path)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 0
    assert all("a.png" in message for message in told)


def test_the_text_is_json_for_other_programs(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", seed=17, sample_offset=3)
    with Image.open(tmp_path / "a.png") as picture:
        told = json.loads(picture.info["fastdiff"])
    assert (told["format"], told["arguments"]) == ("fastdiff.recipe", {"seed": 17, "sample_offset": 3})
    assert told["plan"]["name"] == "ddim"
    assert told["made_with"]["torch"] == torch.__version__


def test_a_recipe_belongs_to_its_images(tmp_path: Path) -> None:
    model = Affine()
    recipe = fastdiff.Recipe.of(model, SHAPE, sampler="ddim", steps=2)
    for images, wrong, error in (
        (torch.zeros(3, 3, 8, 8), recipe, ValueError),
        (torch.zeros(SHAPE), "ddim", TypeError),
    ):
        with pytest.raises(error, match="recipe"):
            fastdiff.save_grid(tmp_path / "a.png", images, recipe=wrong)
        with pytest.raises(error, match="recipe"):
            fastdiff.save_gif(tmp_path / "a.gif", [images], recipe=wrong)
    with pytest.raises(TypeError, match="must be states of sample_iter"):
        fastdiff.save_gif(tmp_path / "a.gif", [torch.zeros(SHAPE)], recipe=recipe)
    assert list(tmp_path.iterdir()) == []
