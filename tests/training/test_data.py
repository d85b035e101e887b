"""The digits' split, and folders of pictures of every kind."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.training import data
from fastdiff.training.pictures import read_picture


def picture(path, colour="red", size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


# ---- digits


def test_the_digits_are_split_into_two_parts_that_share_nothing_and_miss_nothing():
    from sklearn.datasets import load_digits

    train, held_out = data.load_digits("train"), data.load_digits("held_out")
    assert (len(train), len(held_out)) == (1297, 500)
    both = torch.cat([train.pixels, held_out.pixels]).flatten(1).numpy()
    original = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, original))
    shares = torch.bincount(held_out.labels) / torch.bincount(torch.cat([train.labels, held_out.labels]))
    assert (shares - 500 / 1797).abs().max() < 0.01


def test_the_split_never_changes():
    ink = data.load_digits("held_out").pixels.long().sum((1, 2, 3))
    assert int((ink * torch.arange(500)).sum()) == 38904969  # order and choice of the 500


def test_digits_span_minus_one_to_one():
    digits = data.load("digits")
    images = digits.images()
    assert (images.dtype, images.shape) == (torch.float32, (1297, 1, 8, 8))
    assert images.unique().tolist() == [level / 8 - 1 for level in range(17)]
    assert torch.equal(digits.images(torch.tensor([5, 3])), images[[5, 3]])


def test_a_missing_scikit_learn_names_the_command_that_helps(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "fastdiff-torch\[train\]"'):
        data.load("digits")


def test_importing_the_module_imports_no_scikit_learn():
    import subprocess

    code = "import sys, fastdiff.training.data; assert not any(name.startswith('sklearn') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("bad", "error", "told"),
    [
        ({"data": 3}, TypeError, "data"),
        ({"data": "digits", "size": 16}, ValueError, "8 × 8"),
        ({"data": "digits", "size": 0}, ValueError, "size"),
        ({"data": "digits", "size": 8.0}, TypeError, "size"),
        ({"data": "/no/such/folder"}, FileNotFoundError, "no folder"),
        ({"data": __file__}, NotADirectoryError, "not a folder"),
    ],
)
def test_bad_arguments(bad, error, told):
    with pytest.raises(error, match=told):
        data.load(**bad)
    with pytest.raises(ValueError, match="part"):
        data.load_digits("test")


# ---- folders


def test_subfolders_are_classes_in_alphabetical_order(tmp_path):
    picture(tmp_path / "zebra" / "1.png", "black")
    picture(tmp_path / "ant" / "deep" / "2.jpg", "white")
    picture(tmp_path / "ant" / "1.png", "white")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("not a picture")
    found = data.load(tmp_path, size=4)
    assert (found.classes, found.labels.tolist()) == (("ant", "zebra"), [0, 0, 1])
    assert found.pixels.shape == (3, 3, 4, 4)
    assert found.images().flatten(1).mean(1).tolist() == pytest.approx([1, 1, -1], abs=0.02)


def test_a_flat_folder_has_no_classes_and_grey_stays_grey(tmp_path):
    picture(tmp_path / "a.png", 255, mode="L")
    picture(tmp_path / "b.png", 0, mode="1")
    found = data.load(tmp_path)
    assert (found.labels, found.classes, found.pixels.shape) == (None, (), (2, 1, 32, 32))
    picture(tmp_path / "c.png", "blue")
    assert data.load(str(tmp_path)).pixels[:, :, 0, 0].tolist() == [[255] * 3, [0] * 3, [0, 0, 255]]


def test_pictures_are_cropped_to_their_central_square(tmp_path):
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    assert (data.load(tmp_path, size=10).pixels == 255).all()


def test_transparency_becomes_white_and_a_rotated_photo_upright(tmp_path):
    picture(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA")
    assert (data.load(tmp_path, size=4).pixels == 255).all()
    half = Image.new("RGB", (16, 16), "black")
    half.paste("white", (0, 0, 16, 8))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    half.save(tmp_path / "a.png", exif=exif)
    rows = data.load(tmp_path, size=16).pixels[0, 0, :, 0]
    assert rows.tolist() == [0] * 8 + [255] * 8


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n and no more", b"GIF89a"])
def test_a_corrupt_picture_is_named(tmp_path, content):
    picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png"):
        data.load(tmp_path)


def test_a_truncated_picture_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for kind in ("png", "jpg"):
        path = tmp_path / kind / f"cut.{kind}"
        path.parent.mkdir()
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(ValueError, match=rf"cut\.{kind}"):
            data.load(path.parent)


def test_folders_without_pictures_or_with_both_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        data.load(tmp_path)
    picture(tmp_path / "a.png")
    picture(tmp_path / "ant" / "b.png")
    with pytest.raises(ValueError, match="both"):
        data.load(tmp_path)


def test_files_that_hold_no_picture_are_left_out(tmp_path):
    """Pillow knows their names, but only writes them, starts another program for them, or cannot read them."""
    picture(tmp_path / "a.png")
    for name in ("b.pdf", "c.eps", "d.h5", "e.mpg", "f.fits", "g.wmf"):
        (tmp_path / name).write_bytes(b"not a picture")
    assert len(data.load(tmp_path, size=4)) == 1


def test_another_default_device_changes_nothing(tmp_path):
    for name in ("ant", "bee"):
        picture(tmp_path / name / "1.png")
    torch.set_default_device("meta")
    try:
        found = data.load(tmp_path, size=4)
        images = found.images()
    finally:
        torch.set_default_device(None)
    assert (found.labels.tolist(), images.shape, images.device.type) == ([0, 1], (2, 3, 4, 4), "cpu")


def test_a_batch_is_what_a_data_loader_gives(rng):
    """The DataLoader's batches are those of randint, image by image, and the generator is never drawn from ahead."""
    digits = data.load("digits")
    seed, batch = rng.randrange(2**31), rng.randrange(1, 70)
    generator, oracle = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    draws = data.Draws(len(digits), batch, generator)
    batches = iter(torch.utils.data.DataLoader(digits, batch_size=None, sampler=draws, generator=torch.Generator()))
    for _ in range(3):
        images, labels = next(batches)
        index = torch.randint(len(digits), (batch,), generator=oracle)
        assert torch.equal(images, digits.images(index))
        assert torch.equal(labels, digits.labels[index])
        assert torch.equal(generator.get_state(), oracle.get_state())


# ---- pictures that cannot be read, 16 bits, tensors and Datasets


def test_every_picture_that_cannot_be_read_is_listed_at_once(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError) as raised:
        data.load(tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"3 of 4 pictures in {tmp_path} cannot be read:"
    assert [name in line for name, line in zip(("cut.png", "empty.jpg", "float.tif"), lines[1:], strict=True)] == [
        True
    ] * 3
    with pytest.warns(UserWarning, match=r"3 of 4 pictures in .* were left out:\n.*cut\.png"):
        found = data.load(tmp_path, size=4, skip_broken=True)
    assert len(found) == 1
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match="3 of 3"):
        data.load(tmp_path, skip_broken=True)


def test_a_skipped_picture_takes_its_label_along(tmp_path):
    for name, kind in (("ant", "white"), ("bee", "black")):
        picture(tmp_path / name / "2.png", kind)
    (tmp_path / "ant" / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        found = data.load(tmp_path, size=2, skip_broken=True)
    assert found.labels.tolist() == [0, 1]
    assert found.pixels[:, 0, 0, 0].tolist() == [255, 0]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_of_grey_become_eight(tmp_path, mode, monkeypatch):
    """65535 is white, and every eighth bit pattern v·257 is v exactly; older Pillow calls such a PNG's mode I."""
    values = np.array([[0, 257 * 7, 128], [129, 40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    if mode == "I":
        opened = Image.open
        monkeypatch.setattr(Image, "open", lambda path: _as_mode_i(opened(path)))
    pixels = read_picture(tmp_path / "deep.png", (2, 3))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (1, 2, 3))
    assert pixels[0].tolist() == [[0, 7, 0], [1, 156, 255]]  # 128/257 < ½ < 129/257; 40000/257 = 155.6


def _as_mode_i(opened):
    converted = Image.fromarray(np.asarray(opened).astype(np.int32))
    converted.format = "PNG"
    return converted


def test_a_picture_is_fitted_to_any_shape_and_made_grey(tmp_path):
    picture(tmp_path / "a.png", "red", (40, 20))
    assert read_picture(tmp_path / "a.png", (4, 6)).shape == (3, 4, 6)
    grey = read_picture(tmp_path / "a.png", (4, 6), grey=True)
    assert grey.unique().tolist() == [76]  # 0.299 · 255, ITU-R 601
    with pytest.raises(ValueError, match=r"nothing\.png"):
        read_picture(tmp_path / "nothing.png", (4, 6))


def test_tensors_and_datasets_are_data(seed):
    images, labels = torch.rand(5, 3, 4, 4) * 2 - 1, torch.arange(5)
    index = torch.tensor([4, 0, 4])
    for given, labelled in (
        (images, False),
        ((images, labels), True),
        (torch.utils.data.TensorDataset(images, labels), True),
        (torch.utils.data.TensorDataset(images), False),
    ):
        found = data.of(given)
        batch, chosen = found[index]
        assert (len(found), found.shape, batch.dtype) == (5, (3, 4, 4), torch.float32)
        assert torch.equal(batch, images[index])
        assert torch.equal(chosen, labels[index]) if labelled else chosen is None
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(data.of(pixels)[index][0], pixels[index].float() / 127.5 - 1)
    assert data.of(images).fingerprint() != data.of(images.flip(0)).fingerprint()
    assert data.of("digits").fingerprint() == data.load("digits").fingerprint()


@pytest.mark.parametrize(
    ("bad", "error", "told"),
    [
        (3, TypeError, "got int"),
        (torch.zeros(3), ValueError, r"\[N, …\]"),
        (torch.zeros(0, 3), ValueError, "at least one"),
        (torch.zeros(3, 3, dtype=torch.int64), TypeError, "int64"),
        ((torch.zeros(3, 3), torch.zeros(2)), ValueError, "3 examples"),
        ([torch.zeros(3)] * 3, TypeError, "got list"),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(3, 3))), TypeError, r"its \.dataset"),
        (torch.utils.data.TensorDataset(torch.zeros(0, 3)), ValueError, "empty"),
    ],
)
def test_other_data_is_refused(bad, error, told):
    with pytest.raises(error, match=told):
        data.of(bad)
    with pytest.raises(ValueError, match="resized"):
        data.of(torch.zeros(3, 3), size=8)
