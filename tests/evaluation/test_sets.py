"""Sets of pictures: every form gives the same ones in one order, and what cannot be read is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SEED
from pictures_of import pixels, png, write, write_tar
from PIL import Image

import fastdiff
from fastdiff.evaluation import sets
from fastdiff.evaluation.sets import open_pictures

KINDS = ("png", "tar", "tar.file", "npz", "npz.file")


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def images_of(path: Path, size: int | None = None, channels: int = 3) -> torch.Tensor:
    return torch.cat(list(open_pictures(path, size).batches(channels)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_holds_the_same_pictures(tmp_path, generator, monkeypatch, kind, channels):
    monkeypatch.setattr(sets, "BATCH", 4)
    given = pixels(9, generator, channels=channels)
    path = write(kind, tmp_path / "set", given)
    found = open_pictures(path)
    assert (found.count, found.side) == (9, 8)
    batches = list(found.batches(3))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    expected = torch.from_numpy(given).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    assert torch.equal(((torch.cat(batches) + 1) * 127.5).round().to(torch.uint8), expected)
    assert images_of(path, 5).shape == (9, 3, 5, 5)
    if channels == 3:
        with pytest.raises(ValueError, match="is in colour, and the features are of pictures of 1 channel"):
            images_of(path, channels=1)


def test_a_planar_array_and_one_without_channels(tmp_path, generator):
    given = pixels(5, generator)
    for name, array in (("planar", given.transpose(0, 3, 1, 2)), ("grey", given[..., 0])):
        np.savez(tmp_path / f"{name}.npz", np.ascontiguousarray(array))
    np.savez(tmp_path / "straight.npz", given)
    assert torch.equal(images_of(tmp_path / "planar.npz"), images_of(tmp_path / "straight.npz"))
    assert torch.equal(images_of(tmp_path / "grey.npz", channels=1), images_of(tmp_path / "straight.npz")[:, :1])


def test_only_a_batch_is_in_memory(monkeypatch):
    """No more pictures are read than the batch that is asked for."""
    monkeypatch.setattr(sets, "BATCH", 4)
    read = 0

    def pictures():
        nonlocal read
        for i in range(18):
            read += 1
            yield str(i), np.full((2, 2, 3), i, np.uint8)

    for number, _ in enumerate(sets.Pictures("set", "", 18, 2, False, pictures).batches(3), 1):
        assert read == min(4 * number, 18)
    with pytest.raises(ValueError, match="set had 19 pictures, and 18 when they were read"):
        list(sets.Pictures("set", "", 19, 2, False, pictures).batches(3))


# ---- what `fastdiff generate` wrote


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    for format in ("tar", "png", "npz"):
        fastdiff.generate(None, 10, folder / format, steps=1, shard_size=4, batch_size=2, format=format)
    return folder


def test_a_generated_set_is_read_and_compared_with_its_hashes(generated):
    found = [images_of(generated / format, channels=1) for format in ("tar", "png", "npz")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    trained = fastdiff.models.digits()
    expected = torch.cat(
        [
            fastdiff.sample(
                trained.unet, (2, 1, 8, 8), sample_offset=i, **trained.arguments(torch.arange(i, i + 2), steps=1)
            )
            for i in range(0, 10, 2)
        ]
    )
    assert (found[0] - expected.clamp(-1, 1)).abs().max() < 1.01 / 255
    assert open_pictures(generated / "tar").told.endswith(
        "tar: 10 images of `fastdiff generate`, each compared with its hash"
    )


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_a_shard_that_is_missing_is_said_and_one_that_is_damaged_refused(tmp_path, generated, format):
    place = shutil.copytree(generated / format, tmp_path / "set")
    shard = next(place.glob("shard-000001*"))
    damaged = next(shard.glob("*.png")) if format == "png" else shard
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000001.* is damaged: .*fastdiff verify .*--discard"):
        images_of(place)
    shutil.rmtree(shard) if format == "png" else shard.unlink()
    assert len(images_of(place)) == 6
    assert "6 of 10 images, 1 of 3 shards are missing" in open_pictures(place).told
    for rest in place.glob("shard-*"):
        shutil.rmtree(rest) if format == "png" else rest.unlink()
    with pytest.raises(ValueError, match="holds no picture: 0 of 10 images"):
        open_pictures(place)


# ---- what is refused


def test_what_is_no_set_is_named(tmp_path, generator):
    given = pixels(4, generator)
    one, empty, both = (tmp_path / name for name in ("one.png", "empty", "both"))
    one.write_bytes(png(given[0]))
    empty.mkdir()
    write("png", both, given)
    write_tar(both / "more.tar", {0: png(given[0])})
    for path, message in (
        (tmp_path / "nowhere", "no folder or file"),
        (one, "is not a folder, nor a tar or an npz"),
        (empty, "empty holds no picture"),
        (both, "both holds 1 .tar, 4 pictures: a set is of one kind"),
        (write_tar(tmp_path / "none.tar", {}), r"none\.tar holds no picture: 0 pictures in tars"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            open_pictures(path)
    with pytest.raises(ValueError, match="size must be in"):
        open_pictures(both, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_differ_are_refused(tmp_path, generator, kind):
    wide = write(kind, tmp_path / "wide", pixels(3, generator)[:, :, :5])
    with pytest.raises(ValueError, match=r"square and of one size; .* is 5×8"):
        images_of(wide)
    assert images_of(wide, 6).shape == (3, 3, 6, 6)


def test_sizes_that_differ_within_a_set(tmp_path, generator):
    pictures = [png(pixels(1, generator, side)[0]) for side in (8, 8, 9)]
    with pytest.raises(ValueError, match=r"0002\.png is 9×9, and .* 8 wide"):
        images_of(write_tar(tmp_path / "a.tar", dict(enumerate(pictures))))


def test_what_cannot_be_read_is_named(tmp_path, generator):
    given = pixels(6, generator)
    folder = write("png", tmp_path / "png", given)
    (folder / "0" / "0003.png").write_bytes(b"no picture")
    tar = write_tar(tmp_path / "a.tar", {0: png(given[0]), 1: png(given[1])[:60]})
    cut = write("tar.file", tmp_path / "cut", given)
    cut.write_bytes(cut.read_bytes()[:700])
    (tmp_path / "text.tar").write_text("no tar " * 400)
    (tmp_path / "text.npz").write_text("no npz")
    np.savez(tmp_path / "float.npz", images=np.zeros((3, 8, 8, 3), np.float32))
    np.savez(tmp_path / "shape.npz", images=np.zeros((3, 8, 8, 7), np.uint8))
    np.savez(tmp_path / "other.npz", pictures=given)
    damaged = write("npz.file", tmp_path / "damaged", given)
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    for path, message in (
        (folder, r"cannot read the picture .*0003\.png"),
        (tar, r"cannot read the picture .*a\.tar:0001\.png"),
        (cut, "cannot read the (tar|picture)"),
        (tmp_path / "text.tar", "cannot read the tar"),
        (tmp_path / "text.npz", "cannot read .*text.npz"),
        (tmp_path / "float.npz", r"must be uint8 .*; got float32 \[3, 8, 8, 3\]"),
        (tmp_path / "shape.npz", r"got uint8 \[3, 8, 8, 7\]"),
        (tmp_path / "other.npz", r"no array images or arr_0; it has pictures\.npy"),
        (damaged, r"cannot read .*damaged\.npz.*CRC"),
    ):
        with pytest.raises(ValueError, match=message):
            images_of(path)


def test_a_picture_of_sixteen_bits(tmp_path):
    """In a tar as in a folder."""
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    tar = write_tar(tmp_path / "a.tar", {0: (tmp_path / "a.png").read_bytes()})
    expected = torch.from_numpy((deep / 257).round())[None].float() / 127.5 - 1
    assert torch.allclose(images_of(tar, channels=1)[0], expected)
    assert torch.equal(images_of(tmp_path, channels=1) if tar.unlink() is None else None, expected[None])
