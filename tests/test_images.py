"""Images to bytes, grids and GIFs, and files that appear whole or not at all."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.files import atomic_write
from fastdiff.images import check_writable, make_grid, save_gif, save_grid, to_uint8


def test_bytes_are_clamped_and_rounded_to_nearest():
    values = torch.tensor([-9.0, -1.0, -0.9999, 0.0, 1 / 255, 0.9999, 1.0, 9.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 128, 255, 255, 255]


def test_every_byte_survives_the_way_to_minus_one_one_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(levels.to(dtype) / 127.5 - 1), levels)


def test_bytes_refuse_what_has_no_colour():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    with pytest.raises(TypeError, match="floating-point"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


def test_a_grid_places_each_image_in_reading_order():
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 4, 4)
    grid = make_grid(images, columns=3, scale=2, gap=1)
    assert (grid.mode, grid.size) == ("L", ((3 * 5 - 1) * 2, (2 * 5 - 1) * 2))
    for index, value in enumerate(to_uint8(images)[:, 0, 0, 0].tolist()):
        left, top = index % 3 * 10, index // 3 * 10
        corners = [(left, top), (left + 7, top), (left, top + 7), (left + 7, top + 7)]
        assert [grid.getpixel(corner) for corner in corners] == [value] * 4
    assert grid.getpixel((8, 0)) == grid.getpixel((25, 15)) == 128  # the gap, and the place of a sixth


@pytest.mark.parametrize(("side", "width"), [(8, 64), (32, 64), (48, 48), (64, 64), (100, 100)])
def test_tiny_images_are_enlarged_until_they_can_be_seen(side, width):
    assert make_grid(torch.zeros(1, 3, side, side)).size == (width, width)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (4, 2, 8, 8), (1, 8, 8), (2, 1, 0, 8)])
def test_a_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="non-empty tensor"):
        make_grid(torch.zeros(shape))


@pytest.mark.parametrize("bad", [{"columns": 0}, {"scale": 0}, {"gap": -1}])
def test_a_grid_refuses_bad_numbers(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_grid(torch.zeros(2, 1, 8, 8), **bad)


def test_a_png_holds_the_pixels(tmp_path):
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    path = save_grid(tmp_path / "grid.png", images, columns=3, scale=1, gap=0)
    with Image.open(path) as picture:
        row = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(8, 3, 8, 3)
    assert torch.equal(row.permute(1, 3, 0, 2), to_uint8(images))
    assert os.listdir(tmp_path) == ["grid.png"]


def test_a_gif_holds_every_frame(tmp_path):
    frames = [torch.full((2, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0)]
    path = save_gif(tmp_path / "film.GIF", iter(frames), duration=0.05, hold=2, scale=1)
    with Image.open(path) as film:
        assert film.n_frames == 3
        shown = []
        for index in range(3):
            film.seek(index)
            shown.append((film.convert("L").getpixel((0, 0)), film.info["duration"]))
    assert shown == [(0, 50), (128, 50), (255, 2000)]


def test_a_gif_refuses_no_frames_and_frames_of_several_shapes(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        save_gif(tmp_path / "a.gif", [])
    with pytest.raises(ValueError, match="one shape"):
        save_gif(tmp_path / "a.gif", [torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8)])
    with pytest.raises(ValueError, match="duration"):
        save_gif(tmp_path / "a.gif", [torch.zeros(1, 1, 8, 8)], duration=0)
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_written_are_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="missing"):
        check_writable(tmp_path / "missing" / "a.png")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "a.png")
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match=r"\.png"):
        check_writable(tmp_path / "a.jpg", suffix=".png")
    assert check_writable(str(tmp_path / "a.PNG"), suffix=".png") == tmp_path / "a.PNG"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_without_permission_is_known_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write"):
        check_writable(tmp_path / "a.png")


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("former")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (path.read_text(), os.listdir(tmp_path)) == ("former", ["a.txt"])


@pytest.fixture
def meta_default():
    """Another default device than the CPU, as scripts set "cuda"."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_another_default_device_changes_nothing(tmp_path, meta_default):
    images = torch.linspace(-1, 1, 2 * 3 * 4 * 4, device="cpu").reshape(2, 3, 4, 4)
    grid, png = make_grid(images, scale=2), save_grid(tmp_path / "a.png", images, scale=2)
    save_gif(tmp_path / "a.gif", [images, -images])
    torch.set_default_device(None)
    assert grid.tobytes() == make_grid(images, scale=2).tobytes()
    with Image.open(png) as picture:
        assert picture.tobytes() == grid.tobytes()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"columns": 2.0}, "columns must be an int; got float"),
        ({"scale": "2"}, "scale must be an int; got str"),
        ({"gap": 1.5}, "gap must be an int; got float"),
        ({"gap": None}, "gap must be an int; got NoneType"),
    ],
)
def test_a_grid_refuses_numbers_of_another_type(bad, message):
    with pytest.raises(TypeError, match=message):
        make_grid(torch.zeros(2, 1, 8, 8), **bad)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 4, device="meta"), torch.zeros(1, 3, 4, 4).to_sparse()])
def test_images_without_numbers_are_refused(images):
    for function in (to_uint8, make_grid):
        with pytest.raises(TypeError, match="images must be a dense tensor"):
            function(images)


def test_bad_arguments_of_files_are_named(tmp_path):
    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match="path must be"):
        save_grid(None, images)
    with pytest.raises(TypeError, match="duration must be a number; got NoneType"):
        save_gif(tmp_path / "a.gif", [images], duration=None)
    with pytest.raises(TypeError, match="hold must be a number; got str"):
        save_gif(tmp_path / "a.gif", [images], hold="1")
    with pytest.raises(TypeError, match=r"frames must be .*; got NoneType"):
        save_gif(tmp_path / "a.gif", None)
    assert os.listdir(tmp_path) == []


def test_show_is_a_picture_that_notebooks_display():
    images = torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 1, 8, 8)
    shown = fastdiff.show(images, columns=3)
    assert isinstance(shown, Image.Image)
    assert shown.tobytes() == make_grid(images, columns=3).tobytes()
    assert shown._repr_png_().startswith(b"\x89PNG")


def test_what_needs_pillow_is_loaded_when_it_is_asked_for():
    code = (
        "import sys, fastdiff; before = 'PIL' in sys.modules; fastdiff.images.make_grid; fastdiff.plots.forward; "
        "print(before, 'PIL' in sys.modules, {'save_grid', 'show', 'images', 'plots'} <= set(dir(fastdiff)), "
        "fastdiff.save_grid is fastdiff.images.save_grid)\n"
        "try: fastdiff.nothing\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False True True True", "module 'fastdiff' has no attribute 'nothing'"]


def test_a_gif_keeps_only_the_pictures_of_its_frames(tmp_path):
    """States of a long run are shown one after another, not held."""
    made, held = [], []

    def frames():
        for i in range(5):
            state = fastdiff.State(torch.full((1, 1, 8, 8), i / 5), None, None, (None,) * 4, i)
            made.append(weakref.ref(state))
            yield state
            del state
            gc.collect()
            held.append(sum(reference() is not None for reference in made))

    gc.freeze()  # what the other tests left need not be looked through for each frame
    try:
        save_gif(tmp_path / "a.gif", frames())
    finally:
        gc.unfreeze()
    assert max(held) == 1  # the last one, whose name the loop still has
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 5
