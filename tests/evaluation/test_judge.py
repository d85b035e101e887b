"""The judge names the picture that it sees; shares, intervals and PSNR are what their formulas say."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from factors import factorial

from fastdiff.evaluation import Judge, Scores, wilson
from fastdiff.evaluation.features import pooled_pixels
from fastdiff.training.captioned import load_captioned

DATA = Path(__file__).parents[2] / "data" / "emoji"


@pytest.fixture(scope="module")
def data():
    return factorial()


@pytest.fixture(scope="module")
def judge(data) -> Judge:
    return Judge(data.rows, data.pixels)


def test_real_pictures_are_themselves(data, judge: Judge) -> None:
    scores = judge.judge(data.images(), torch.arange(len(data)))
    assert scores.nearest.tolist() == list(range(len(data)))
    assert all(scores.hits[name].all() for name in ("exact", "subject", "tone", "style"))
    assert scores.hits["training"].tolist() == [row["part"] == "train" for row in data.rows]
    assert scores.psnr.tolist() == [100.0] * len(data)


def test_what_is_right_is_told_by_factor(data, judge: Judge, rng: random.Random) -> None:
    """A sample that shows another cell is right in the factors that the two share, and in no other."""
    shown = torch.tensor([rng.randrange(len(data)) for _ in range(200)])
    asked = torch.tensor([rng.randrange(len(data)) for _ in range(200)])
    noise = torch.randn(200, 3, 16, 16) * 0.1
    scores = judge.judge(data.images(shown) + noise, asked)
    assert scores.nearest.tolist() == shown.tolist()
    assert scores.hits["exact"].tolist() == (shown == asked).tolist()
    for name in ("subject", "tone", "style"):
        values = [row[name] for row in data.rows]
        expected = [values[i] == values[j] for i, j in zip(shown.tolist(), asked.tolist(), strict=True)]
        assert scores.hits[name].tolist() == expected


def test_psnr_is_to_the_picture_that_was_asked_for(data, judge: Judge) -> None:
    images = data.images(torch.tensor([3, 4]))
    images[0] = (images[0] - 0.2).clamp(-1, 1)
    images[1] += 5.0  # is clamped to white
    scores = judge.judge(images, torch.tensor([3, 4]))
    truth = data.images(torch.tensor([3, 4]))
    for i, shown in enumerate((images[0], torch.ones(3, 16, 16))):
        assert scores.psnr[i].item() == pytest.approx(
            -10 * math.log10((shown - truth[i]).square().mean() / 4), abs=1e-4
        )


def test_pictures_that_look_the_same_count_as_one(data) -> None:
    """Two rows with one picture, but for half a grey level: each is right where the other was asked for."""
    pixels = data.pixels.clone()
    pixels[4] = pixels[0]
    pixels[4, 0, 0, 0] -= 1
    judge = Judge(data.rows, pixels)
    scores = judge.judge(pixels[[0, 0, 0]].float() / 127.5 - 1, torch.tensor([0, 4, 1]))
    assert scores.nearest.tolist() == [0, 4, 0]
    assert scores.hits["exact"].tolist() == [True, True, False]
    assert scores.hits["training"].tolist() == [True, False, True]  # row 4 is held out


def test_pictures_of_another_subset_were_not_trained_on(data) -> None:
    rows = [row | {"subset": "rest"} if i == 0 else row for i, row in enumerate(data.rows)]
    seen = [i for i, row in enumerate(rows) if row["part"] == "train"][:2]
    assert seen[0] == 0
    scores = Judge(rows, data.pixels).judge(data.pixels[seen].float() / 127.5 - 1, torch.tensor(seen))
    assert scores.hits["training"].tolist() == [False, True]


def test_other_features_make_another_judge(data) -> None:
    """One that sees mean colours alone knows a picture that is moved and turned; pooled pixels do not."""
    calls = []

    def colours(images: torch.Tensor) -> torch.Tensor:
        calls.append(images.shape)
        return images.mean((2, 3))

    judge, every = Judge(data.rows, data.pixels, colours), torch.arange(len(data))
    assert calls == [data.pixels.shape]
    moved = data.images().flip(2, 3).roll(5, 2)
    nearest = judge.judge(moved, every).nearest
    torch.testing.assert_close(colours(data.images(nearest)), colours(moved))
    assert not Judge(data.rows, data.pixels).judge(moved, every).hits["exact"].all()


def test_pooled_pixels_measure_root_mean_squares() -> None:
    grey = torch.zeros(1, 3, 64, 64)
    assert (pooled_pixels(grey) - pooled_pixels(grey + 0.25)).norm().item() == pytest.approx(0.25, rel=1e-4)
    assert pooled_pixels(grey).shape == (1, 960)
    # Blue and red differences of a red that is 0.2 brighter: 0.2 · (0.299, −0.168736, 0.5), the colours counted twice.
    red = grey.clone()
    red[:, 0] += 0.2
    expected = 0.2 * math.sqrt(0.299**2 + 2 * (0.168736**2 + 0.5**2))
    assert (pooled_pixels(grey) - pooled_pixels(red)).norm().item() == pytest.approx(expected, rel=1e-5)


# ---- shares and intervals


def test_wilson_s_interval_is_where_the_score_test_is_at_its_bound() -> None:
    for share, number in ((0.85, 500), (0.0, 10), (1.0, 10), (0.5, 1)):
        low, high = wilson(share, number)
        assert 0 <= low <= share <= high <= 1
        for end in (low, high):
            if 0 < end < 1:  # |p̂ − p| = z √(p (1 − p) / n)
                bound = 1.959964 * math.sqrt(end * (1 - end) / number)
                assert abs(share - end) == pytest.approx(bound, rel=1e-9)
    assert wilson(0.0, 10)[1] == pytest.approx(1.959964**2 / (10 + 1.959964**2), rel=1e-9)


def scores_of(targets: list[int], hits: list[bool]) -> Scores:
    hit, index = torch.tensor(hits), torch.tensor(targets)
    return Scores(index, index, {"exact": hit}, torch.zeros(len(hits), dtype=torch.float64))


def test_samples_of_one_target_are_not_counted_as_independent() -> None:
    hits = [True] * 40 + [False] * 10
    once = scores_of(list(range(50)), hits).means()["exact"]
    assert once == pytest.approx((0.8, *wilson(0.8, 50)))
    # Drawn three times, always with the same result: no more is known than from the first draw.
    thrice = Scores.join([scores_of(list(range(50)), hits)] * 3).means()["exact"]
    assert thrice == pytest.approx(once)
    # With results that vary as much within a target as between them: as many as there are samples.
    many = torch.rand(6000, generator=torch.Generator().manual_seed(0)) < 0.8
    mean, low, high = scores_of(list(range(2000)) * 3, many.tolist()).means()["exact"]
    assert high - low == pytest.approx(wilson(mean, 6000)[1] - wilson(mean, 6000)[0], rel=0.05)
    # Always right: Wilson's interval of as many as there are targets.
    assert scores_of([0, 0, 1, 1], [True] * 4).means()["exact"] == pytest.approx((1.0, *wilson(1.0, 2)))


def test_the_interval_of_psnr(data, judge: Judge) -> None:
    noise = torch.randn(18, 3, 16, 16) * torch.linspace(0.05, 0.3, 18)[:, None, None, None]
    scores = judge.judge(data.images() + noise, torch.arange(18))
    mean, low, high = scores.means()["psnr"]
    assert mean == pytest.approx(scores.psnr.mean().item())
    assert high - low == pytest.approx(2 * 1.959964 * scores.psnr.std().item() / math.sqrt(18), rel=1e-9)


def test_the_table(data, judge: Judge) -> None:
    scores = judge.judge(data.images(torch.tensor([1, 1, 2, 3])), torch.tensor([1, 1, 2, 9]))
    lines = scores.table().splitlines()
    assert [line[:29].strip() for line in lines[:-1]] == [
        "", "exact", "subject", "tone", "style", "nearest is a training picture", "PSNR, dB"
    ]  # fmt: skip
    low, high = scores.means()["exact"][1:]
    assert lines[1].split() == ["exact", "0.750", f"{low:.3f}", "…", f"{high:.3f}"]
    assert lines[-1] == "4 samples of 3 pictures"


# ---- what is refused


def test_rows_and_pixels_that_do_not_match_are_refused(data) -> None:
    for rows, pixels, message in (
        (data.rows, data.pixels.float(), "must be a tensor of bytes; got torch.float32"),
        (data.rows, data.pixels.numpy(), "NumPy"),
        (data.rows[:-1], data.pixels, r"must be \[17, 3, H, W\], a picture a row; got \[18, 3, 16, 16\]"),
        ((), data.pixels[:0], "a picture a row"),
        (data.rows, data.pixels[:, :1], "a picture a row"),
        ((*data.rows[:-1], {"subject": "disc", "part": "train"}), data.pixels, "row 17 lacks tone, style"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            Judge(rows, pixels)


def test_samples_that_do_not_match_are_refused(data, judge: Judge) -> None:
    good, targets = data.images(), torch.arange(18)
    for images, rows, message in (
        (good.numpy(), targets, "must be a tensor"),
        (data.pixels, targets, "floating point"),
        (good[..., :8], targets, r"must be \[B, 3, 16, 16\]; got \[18, 3, 16, 8\]"),
        (good * torch.nan, targets, "finite"),
        (good, targets[:5], r"a row each of 18 images; got \[5\]"),
        (good, targets.float(), "int64"),
        (good, targets + 1, "rows of the 18 pictures"),
        (good[:0], targets[:0], "a row each"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            judge.judge(images, rows)


# ---- the emoji


@pytest.fixture(scope="module")
def sample():
    """The 300 pictures for tests, with the factors that their captions name."""
    if not (DATA / "sample" / "metadata.jsonl").exists():
        pytest.skip("data/emoji/sample is not here")
    found = load_captioned(DATA / "sample")
    lines = (DATA / "sample" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{"subject": json.loads(line)["text"], "tone": "", "style": "", "part": "train"} for line in lines]
    return found, rows


def test_disturbed_emoji_are_recognised_among_300(sample) -> None:
    data, rows = sample
    judge = Judge(rows, data.pixels)
    images, generator = data.images(), torch.Generator().manual_seed(0)
    noisy = images + 0.3 * torch.randn(images.shape, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    for disturbed in (noisy, blurred, images.roll(1, 3)):
        assert judge.judge(disturbed, torch.arange(len(data))).means()["exact"][0] >= 0.98


@pytest.mark.slow
def test_disturbed_emoji_are_recognised_among_all() -> None:
    """What was measured for `pooled_pixels`, less three standard errors of 400 pictures."""
    if not (DATA / "sheet.webp").exists():
        pytest.skip("data/emoji is not here")
    data = load_captioned(DATA, part=None, subset=None)
    judge, generator = Judge(data.rows, data.pixels), torch.Generator().manual_seed(0)
    targets = torch.randperm(5760, generator=generator)[:400]
    images = data.images(targets)
    noisy = images + 0.3 * torch.randn(images.shape, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    for disturbed, least in ((noisy, 0.98), (blurred, 0.98), (images.roll(1, 3), 0.91)):
        assert judge.judge(disturbed, targets).means()["exact"][0] >= least
