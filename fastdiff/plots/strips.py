"""Images in rows and columns with words beside them: the forward process, a trajectory, samplers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastdiff.checks import check_int
from fastdiff.ops.add_noise import add_noise
from fastdiff.pictures.grid import make_grid
from fastdiff.sampling.state import State
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.resolve import resolve_table

SIZE, PAD = 14, 6  # of the letters and between things, in pixels


def forward(
    x0: Tensor,
    schedule: NoiseSchedule | str = "linear",
    *,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    scale: int | None = None,
) -> Image.Image:
    """The forward process: x_t of each image, a row an image, a column a timestep (Ho et al. 2020, Equation 4).

    x0: [B, 1 or 3, H, W] in [−1, 1]. timesteps: indices of the schedule; eight from 0 to T − 1 unless given. The noise
    of an image is the same in all columns. scale: as in ``make_grid``. Returns a picture, which notebooks display.
    """
    if not isinstance(x0, Tensor) or x0.ndim != 4 or x0.shape[1] not in (1, 3) or x0.numel() == 0:
        got = list(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
        raise ValueError(f"x0 must be a non-empty tensor [B, 1 or 3, H, W]; got {got}")
    table = resolve_table(schedule)
    last = len(table) - 1
    if timesteps is None:
        chosen = sorted({round(last * i / 7) for i in range(8)})
    else:
        chosen = [check_int(f"timesteps[{i}]", t, 0, last) for i, t in enumerate(timesteps)]
    columns = [add_noise(x0, t, table, seed=seed)[0] for t in chosen]
    return labelled(_cells(columns, scale), [""] * len(x0), [f"t = {t}" for t in chosen])


def trajectory(states: Iterable[State], *, columns: int = 8, images: int = 4, scale: int | None = None) -> Image.Image:
    """The reverse process: of an image a row of x, from noise to image, and under it x̂_0, what each step expects.

    states: what ``fastdiff.sample_iter`` yields, its images [B, 1 or 3, H, W]. columns: how many states are shown,
    evenly chosen, the first and the last among them. images: how many of the batch, from the first on. Returns a
    picture, which notebooks display.
    """
    check_int("columns", columns, 1, 1 << 12)
    check_int("images", images, 1, 1 << 12)
    every = list(states)
    if not every or not all(isinstance(state, State) for state in every):
        raise TypeError("states must be the states that sample_iter yields, at least one")
    count = min(columns, len(every))
    shown = [every[round((len(every) - 1) * (i / (count - 1) if count > 1 else 1))] for i in range(count)]
    x = _cells([state.x[:images] for state in shown], scale)
    x0 = _cells([(state.x if state.x0 is None else state.x0)[:images] for state in shown], scale)
    expected = [[None if state.x0 is None else cell for state, cell in zip(shown, row, strict=True)] for row in x0]
    rows: list[Sequence[Image.Image | None]] = []
    for pair in zip(x, expected, strict=True):
        rows += pair
    return labelled(rows, ["x", "x0"] * len(x), [f"row {state.row}" for state in shown])


def labelled(
    cells: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    note: str = "",
) -> Image.Image:
    """Pictures of one size in rows and columns, on white: words left of the rows and above the columns, a caption under
    each picture, a note under all. A cell may be None. Letters are those of Pillow's own font: Latin.
    """
    font = ImageFont.load_default(SIZE)
    size = next(cell.size for cell in chain(*cells) if cell is not None)
    width = max([size[0], *(_width(font, word) for word in chain(columns, *(captions or [])))])
    height, line = size[1], SIZE + PAD
    left = max(_width(font, word) for word in rows) + (2 * PAD if any(rows) else PAD)
    cell_height = height + PAD + (line if captions else 0)
    whole = max(left + len(columns) * (width + PAD), _width(font, note) + 2 * PAD)
    high = PAD + line + len(rows) * cell_height + (line if note else 0)
    picture = Image.new("RGB", (whole, high), "white")
    draw = ImageDraw.Draw(picture)
    for j, word in enumerate(columns):
        draw.text((left + j * (width + PAD) + width / 2, PAD), word, "black", font, anchor="ma")
    for i, word in enumerate(rows):
        top = PAD + line + i * cell_height
        draw.text((PAD, top + height / 2), word, "black", font, anchor="lm")
        for j, cell in enumerate(cells[i]):
            middle = left + j * (width + PAD) + width // 2
            if cell is not None:
                picture.paste(cell, (middle - cell.width // 2, top))
            if captions:
                draw.text((middle, top + height + 2), captions[i][j], "dimgray", font, anchor="ma")
    if note:
        draw.text((PAD, picture.height - line), note, "dimgray", font, anchor="la")
    return picture


def _cells(columns: Sequence[Tensor], scale: int | None) -> list[list[Image.Image]]:
    """Rows of pictures, an image a row, of columns [B, C, H, W]."""
    return [[make_grid(column[i : i + 1], scale=scale) for column in columns] for i in range(len(columns[0]))]


def _width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, word: str) -> int:
    return round(font.getlength(word))
