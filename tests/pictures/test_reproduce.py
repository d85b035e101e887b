"""Pictures made again: identical to the bit, or by how much not, and what differs."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Affine
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import fastdiff
from fastdiff.pictures import embedded, network
from fastdiff.pictures import reproduce as module
from fastdiff.pictures.grid import to_uint8

SHAPE = (4, 1, 8, 8)


def saved(path: Path, model: Any, shape: tuple[int, ...] = SHAPE, **arguments: Any) -> Path:
    arguments = {"sampler": "ddim", "steps": 3, **arguments}
    recipe = fastdiff.Recipe.of(model, shape, **arguments)
    if path.suffix == ".png":
        return fastdiff.save_grid(path, recipe.sample(model), recipe=recipe)
    return fastdiff.save_gif(path, recipe.states(model), recipe=recipe)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_identical_to_the_bit(name: str, channels: int, tmp_path: Path) -> None:
    model, shape = Affine(), (4, channels, 8, 8)
    path = saved(tmp_path / name, model, shape, seed=5)
    made = fastdiff.reproduce(path, model)
    assert (made.identical, made.same_bits, made.pixels, made.worst) == (True, True, 0, 0)
    assert str(made) == repr(made) == (
        f"{path}: identical, to the bit (4 images [{channels}, 8, 8], seed 5, ddim in 3 network calls, Affine)"
    )  # fmt: skip
    assert torch.equal(made.images, fastdiff.sample(model, shape, sampler="ddim", steps=3, seed=5))


def test_batches_offsets_and_other_layouts_are_made_again(tmp_path: Path) -> None:
    model = Affine()
    recipe = fastdiff.Recipe.of(model, (7, 3, 5, 6), batch_size=3, steps=2, seed=1, sample_offset=40)
    fastdiff.save_grid(tmp_path / "a.png", recipe.sample(model), recipe=recipe, columns=2, scale=3, gap=0)
    assert fastdiff.reproduce(tmp_path / "a.png", model).identical


def test_some_frames_of_a_film_are_made_again(tmp_path: Path) -> None:
    model = Affine()
    recipe = fastdiff.Recipe.of(model, SHAPE, steps=9)
    states = [state for state in recipe.states(model) if state.row % 3 == 0]
    fastdiff.save_gif(tmp_path / "a.gif", states, recipe=recipe, duration=0.1, hold=2)
    made = fastdiff.reproduce(tmp_path / "a.gif", model)
    assert made.same_bits
    assert made.identical


def with_pixels(path: Path, change: Any) -> None:
    with Image.open(path) as picture:
        info = PngInfo()
        info.add_text("fastdiff", picture.info["fastdiff"], zip=True)
        changed = change(picture.copy()) or picture
    changed.save(path, pnginfo=info)


def test_pixels_that_were_changed_are_counted(tmp_path: Path) -> None:
    model = Affine()
    path = saved(tmp_path / "a.png", model)

    def paint(picture: Image.Image) -> Image.Image:
        for place in ((0, 0), (5, 9)):
            picture.putpixel(place, (picture.getpixel(place) + 100) % 256)
        return picture

    with_pixels(path, paint)
    made = fastdiff.reproduce(path, model)
    assert (made.identical, made.same_bits, made.pixels, made.total) == (False, True, 2, 136 * 136)
    assert made.worst in (100, 156)
    assert "the images are identical, to the bit, but the file was changed since: 2 of 18,496 pixels" in str(made)


def test_a_cropped_picture_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Affine())
    with_pixels(path, lambda picture: picture.crop((0, 0, 50, 60)))
    with pytest.raises(ValueError, match="has 50×60 pixels, its recipe makes 136×136: it was cropped or resized"):
        fastdiff.reproduce(path, Affine())


class Rounded(Affine):
    """A network that another library rounds in another way, a little or more."""

    off = 0.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * (1 + self.off)


@pytest.mark.parametrize("off", [1e-6, 0.05])
def test_another_rounding_is_told_with_what_differs(
    off: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Rounded()
    path = saved(tmp_path / "a.png", model)
    then = fastdiff.sample(model, SHAPE, sampler="ddim", steps=3)
    model.off = off
    now = fastdiff.sample(model, SHAPE, sampler="ddim", steps=3)
    made = fastdiff.reproduce(path, model)
    assert not made.same_bits
    assert "nothing that the recipe names differs" in str(made)
    steps = (to_uint8(then).int() - to_uint8(now).int()).abs()
    assert (made.identical, made.worst) == (not steps.any(), steps.max())  # columns are enlarged by 8, with gaps
    assert made.pixels == 64 * int((steps > 0).sum())
    assert made.mean == pytest.approx(float(steps.sum()) * 64 / made.total)
    known = network.environment(torch.device("cpu"))
    monkeypatch.setattr(module, "environment", lambda device: known | {"torch": "9.9", "device": "Abacus"})
    made = fastdiff.reproduce(path, model)
    assert made.differences == (("torch", known["torch"], "9.9"), ("device", "cpu", "Abacus"))
    assert f"  torch: {known['torch']} then, 9.9 now" in str(made).splitlines()


def test_another_network_is_refused(tmp_path: Path) -> None:
    model = Affine()
    path = saved(tmp_path / "a.png", model)
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(ValueError, match=r"a\.png was made by another network: helpers\.Affine, float32, sha256 "):
        fastdiff.reproduce(path, model)
    with pytest.raises(ValueError, match="which came from no folder: say which model it was"):
        fastdiff.reproduce(path)


def test_a_function_is_taken_at_its_word(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", lambda x, t: x * 0.5)
    assert fastdiff.reproduce(path, lambda x, t: x * 0.5).identical
    assert not fastdiff.reproduce(path, lambda x, t: x * 0.1).identical


def test_latents_are_no_pictures(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Affine())
    with Image.open(path) as picture:
        text = picture.info["fastdiff"].replace('"shape":[4,1,8,8]', '"shape":[4,4,8,8]')
    info = PngInfo()
    info.add_text("fastdiff", text)
    Image.new("L", (136, 136)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match=r"\[4, 4, 8, 8\], which is no batch of pictures"):
        fastdiff.reproduce(path, Affine())


def test_the_threads_of_then_are_taken_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Counting(Affine):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x, t)

    model, before = Counting(), torch.get_num_threads()
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    try:
        torch.set_num_threads(2)
        path = saved(tmp_path / "a.png", model)
        torch.set_num_threads(1)
        made = fastdiff.reproduce(path, model)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert seen == [2] * 6
    assert made.differences == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder, without a scheduler's config."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = fastdiff.models.UNet(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "small"
    unet.save_pretrained(path)
    return path


@pytest.mark.parametrize("how", ["as it is", "bfloat16", "channels_last", "accelerated", "exact"])
def test_a_folder_s_network_is_made_what_it_was(how: str, folder: Path, tmp_path: Path) -> None:
    unet = fastdiff.models.load(folder).unet
    if how == "bfloat16":
        unet.to(torch.bfloat16)
    if how == "channels_last":
        unet.to(memory_format=torch.channels_last)
    if how in ("accelerated", "exact"):
        fastdiff.accelerate(unet, dtype=torch.float32, exact_convolutions=how == "exact")
    path = saved(tmp_path / "a.png", unet)
    for model in (None, folder, str(folder), fastdiff.models.TrainedModel(unet, {})):
        made = fastdiff.reproduce(path, model)
        assert (made.identical, made.same_bits, made.differences) == (True, True, ()), str(made)


def test_another_acceleration_is_named(folder: Path, tmp_path: Path) -> None:
    unet = fastdiff.models.load(folder).unet
    path = saved(tmp_path / "a.png", unet)
    fastdiff.accelerate(unet, dtype=torch.float32)
    made = fastdiff.reproduce(path, unet)
    assert [name for name, _, _ in made.differences] == ["accelerated"]


def test_a_folder_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    unet = fastdiff.models.load(folder).unet
    unet.name_or_path = str(tmp_path / "moved")
    path = saved(tmp_path / "a.png", unet)
    with pytest.raises(FileNotFoundError, match=r"a\.png was made by the model in .*moved; say where that is now"):
        fastdiff.reproduce(path)
    assert fastdiff.reproduce(path, folder).identical


def test_the_picture_of_the_readme_is_of_the_packaged_model() -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "digits.png"
    if not path.exists():
        pytest.skip("the examples are not here")
    recipe, _ = embedded.read(path)
    now = fastdiff.Recipe.of(fastdiff.models.digits().unet, (1, 1, 8, 8), steps=1).network
    assert (recipe.network.folder, recipe.network.sha256) == (now.folder, now.sha256)
    assert recipe.shape == [64, 1, 8, 8]


def test_the_packaged_model_is_known_wherever_it_lies(tmp_path: Path) -> None:
    trained = fastdiff.models.digits()
    path = saved(tmp_path / "a.png", trained.unet, **trained.arguments(torch.arange(4), steps=2))
    found, layout = embedded.read(path)
    assert found.network.folder == "package:digits"
    assert layout.sha256 == hashlib.sha256(found.sample(trained.unet).numpy().tobytes()).hexdigest()
    assert fastdiff.reproduce(path).identical
