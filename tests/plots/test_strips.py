"""Strips of images: every cell is the image that it should be, where it should be."""

import pytest
import torch
from helpers import SEED, Affine
from PIL import Image

import fastdiff
from fastdiff import NoiseSchedule, plots
from fastdiff.pictures.grid import make_grid
from fastdiff.plots.strips import PAD, SIZE, labelled

SIDE = 64  # of an image of 8 pixels, enlarged
TOP = PAD + SIZE + PAD


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(SEED)) * 2 - 1


def cells(picture: Image.Image, rows: int, columns: int, caption: int = 0) -> list[list[Image.Image]]:
    """The cells of a strip, found from its right and upper edge."""
    step = SIDE + PAD
    left = picture.width - columns * step
    return [
        [
            picture.crop((left + j * step, TOP + i * (step + caption), left + j * step + SIDE,
                          TOP + i * (step + caption) + SIDE))
            for j in range(columns)
        ]
        for i in range(rows)
    ]  # fmt: skip


def same(cell: Image.Image, image: torch.Tensor) -> bool:
    return cell.tobytes() == make_grid(image[None]).convert("RGB").tobytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_forward_shows_x_t_of_each_image(channels: int) -> None:
    x0, schedule = images(2, channels, 8, 8), NoiseSchedule.cosine()
    picture = plots.forward(x0, schedule, timesteps=[0, 300, 999], seed=3)
    shown = cells(picture, 2, 3)
    for j, t in enumerate((0, 300, 999)):
        x_t, _ = fastdiff.add_noise(x0, t, schedule, seed=3)
        assert same(shown[0][j], x_t[0])
        assert same(shown[1][j], x_t[1])


def test_forward_chooses_eight_timesteps_from_first_to_last() -> None:
    x0 = images(1, 1, 8, 8)
    shown = cells(plots.forward(x0, "linear"), 1, 8)
    for j, t in enumerate((0, 143, 285, 428, 571, 714, 856, 999)):
        assert same(shown[0][j], fastdiff.add_noise(x0, t, "linear")[0][0])
    assert plots.forward(x0, NoiseSchedule.linear(3)).width < 4 * (SIDE + PAD)  # as many as there are


def test_forward_refuses_what_it_cannot_show() -> None:
    with pytest.raises(ValueError, match=r"timesteps\[1\] must be"):
        plots.forward(images(1, 1, 8, 8), timesteps=[0, 1000])
    with pytest.raises(ValueError, match="schedule is 'flow'"):
        plots.forward(images(1, 1, 8, 8), "flow")
    with pytest.raises(ValueError, match="x0 must be a non-empty tensor"):
        plots.forward(images(1, 4, 8, 8))


def test_a_trajectory_shows_x_and_what_each_step_expects() -> None:
    states = list(fastdiff.sample_iter(Affine(), (2, 3, 8, 8), sampler="ddim", steps=6, clip=1.0))
    picture = plots.trajectory(iter(states), columns=4)
    shown = cells(picture, 4, 4)
    for j, row in enumerate((0, 2, 4, 6)):
        for image in range(2):
            assert same(shown[2 * image][j], states[row].x[image])
            x0 = states[row].x0
            if x0 is not None:
                assert same(shown[2 * image + 1][j], x0[image])
    one = TOP + 2 * (SIDE + PAD)  # the height of a strip of one image
    white = Image.new("RGB", (SIDE, SIDE), "white")
    assert shown[1][0].tobytes() == shown[3][0].tobytes() == white.tobytes()  # nothing is expected of x_T yet
    assert plots.trajectory(states, columns=99).width > picture.width
    assert plots.trajectory(states, columns=4, images=1).tobytes() == picture.crop((0, 0, picture.width, one)).tobytes()
    assert same(cells(plots.trajectory(states, columns=1), 2, 1)[0][0], states[-1].x[0])


@pytest.mark.parametrize("bad", [[], [torch.zeros(1, 1, 8, 8)]])
def test_a_trajectory_is_of_states(bad: list[torch.Tensor]) -> None:
    with pytest.raises(TypeError, match="states must be"):
        plots.trajectory(bad)


def test_words_stand_beside_their_cells() -> None:
    """Dark pixels are found above, left and below, and nowhere where no word was given."""
    grey = Image.new("RGB", (SIDE, SIDE), (200, 200, 200))

    def dark(picture: Image.Image, box: tuple[int, int, int, int]) -> bool:
        return picture.crop(box).convert("L").getextrema()[0] < 128

    bare = labelled([[grey, grey]], [""], ["", ""])
    assert not dark(bare, (0, 0, *bare.size))
    told = labelled([[grey, grey]], ["ddim"], ["5", "10"], [["a", ""]], "note")
    left = told.width - 2 * (SIDE + PAD)
    assert dark(told, (0, TOP, left, TOP + SIDE))
    assert dark(told, (left, 0, told.width, TOP))
    assert dark(told, (left, TOP + SIDE, left + SIDE, TOP + SIDE + SIZE + PAD))
    assert not dark(told, (left + SIDE, TOP + SIDE, told.width, TOP + SIDE + SIZE))
    assert dark(told, (0, told.height - SIZE - PAD, told.width, told.height))
    wide = labelled([[grey]], [""], ["a word that is wider than its picture"])
    assert wide.width > 3 * SIDE
