"""Two sets of pictures compared, from memory and from files; beside the halves of the real one."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factors import factorial
from helpers import SEED, run
from pictures_of import means, pixels, write

import fastdiff
from fastdiff.evaluation import Distances, ImageNetFeatures, extractors, statistics
from fastdiff.evaluation.against import compare, compare_sets, statistics_of
from fastdiff.evaluation.distances import Moments
from fastdiff.evaluation.extractors import Features, Identity, features_of
from fastdiff.evaluation.sets import open_pictures
from fastdiff.evaluation.statistics import Statistics


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def features_in(path: Path) -> torch.Tensor:
    return torch.cat([means()(batch) for batch in open_pictures(path).batches(3)])


@pytest.fixture
def folders(tmp_path: Path, generator: torch.Generator) -> tuple[Path, Path]:
    real, fake = pixels(41, generator), pixels(15, generator) // 2
    return write("png", tmp_path / "real", real), write("tar", tmp_path / "fake", fake)


def same(a: Distances, b: Distances) -> bool:
    numbers = [list(asdict(each).values()) for each in (a, b)]
    return numbers[0][-1] == numbers[1][-1] and numbers[0][:-1] == pytest.approx(numbers[1][:-1], rel=1e-9, abs=1e-12)


# ---- what is kept of a set


@pytest.mark.parametrize(("first", "subset"), [(20, 10_000), (7, 10_000), (20, 12), (3, 8)])
def test_a_set_is_cut_at_random_into_parts_that_are_all_of_it(folders, monkeypatch, first, subset):
    monkeypatch.setattr(statistics, "_BLOCK", 6)
    found = Statistics.of(open_pictures(folders[0]), means(), first=first, subset=subset)
    every = features_in(folders[0])
    assert [part.moments.n for part in found.parts] == [first, first, 41 - 2 * first]
    assert len(found.kept) == min(subset, 41)
    assert abs(len(found.parts[0].kept) - len(found.parts[1].kept)) <= 1
    expected = Moments.of(every)
    torch.testing.assert_close(found.moments.mean, expected.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        found.moments.root.T @ found.moments.root, expected.root.T @ expected.root, rtol=1e-10, atol=1e-10
    )
    rows = {tuple(row) for row in every.tolist()}
    kept = [tuple(row) for row in found.kept.tolist()]
    assert len(set(kept)) == len(kept)  # of pictures each once
    assert set(kept) <= rows
    if subset > 41:
        for part in found.parts:
            mean = part.kept.double().mean(0) if len(part.kept) else part.moments.mean
            torch.testing.assert_close(part.moments.mean, mean, rtol=1e-12, atol=1e-12)


def test_roles_are_drawn_evenly():
    """Of 20 pictures each is as often in the first part as any other, over 200 cuts, within five standard errors."""
    counts = np.zeros(20)
    for seed in range(200):
        state = np.random.RandomState(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "RandomState", lambda _, state=state: state)
            roles = list(statistics._roles([5, 0, 15]))
        assert (roles.count(0), roles.count(2)) == (5, 15)
        counts += np.array(roles) == 0
    assert abs(counts - 50).max() < 5 * (200 * 0.25 * 0.75) ** 0.5


def test_the_statistics_do_not_depend_on_how_the_set_is_kept(tmp_path, generator):
    given = pixels(30, generator)
    found = [
        Statistics.of(open_pictures(write(kind, tmp_path / kind, given)), means(), first=15)
        for kind in ("png", "tar", "npz", "npz.file")
    ]
    for other in found[1:]:
        for a, b in zip(found[0].parts, other.parts, strict=True):
            assert torch.equal(a.moments.mean, b.moments.mean)
            assert torch.equal(a.moments.root, b.moments.root)
            assert torch.equal(a.kept, b.kept)


# ---- two sets


def test_sets_are_compared_at_equal_numbers_and_beside_the_floor(folders):
    real, fake = folders
    found, told = compare_sets(fake, real, means())
    assert {name: (d.n, d.m) for name, d in found.items()} == {
        "all": (15, 41), "as many": (15, 15), "real (floor)": (15, 15)
    }  # fmt: skip
    assert same(found["all"], Distances.between(features_in(fake), features_in(real)))
    assert told == [f"{fake}: 15 pictures in tars", f"{real}: 41 pictures"]
    assert found["as many"].frechet > 5 * found["real (floor)"].frechet  # half as bright
    again, _ = compare_sets(real, real, means())
    assert (again["all"].frechet, again["all"].precision, again["all"].recall) == (pytest.approx(0, abs=1e-9), 1, 1)
    assert (again["as many"].n, again["real (floor)"].n) == (20, 20)


def test_gaussians_that_are_known(generator):
    """The Fréchet distance of many pictures is that of the Gaussians that they were drawn of, within its bias."""
    n = 4000

    def drawn(mean, scale):
        values = mean + scale * torch.randn(n, 1, 2, 2, generator=generator)
        return statistics.Part(Moments.of(values.flatten(1)), values.flatten(1)[:50])

    def made(mean, scale, name):
        parts = (drawn(mean, scale), drawn(mean, scale), statistics.Part(Moments.none(4), torch.zeros(0, 4)))
        return Statistics(name, name, Identity(name="pixels", sha256="0"), 2, parts)

    found = compare(made(0.3, 0.5, "fake"), made(0.0, 0.2, "real"))
    expected = 4 * 0.3**2 + 4 * (0.5 - 0.2) ** 2
    assert found["as many"].frechet == pytest.approx(expected, rel=0.08)
    assert found["all"].frechet == pytest.approx(expected, rel=0.06)
    assert found["real (floor)"].frechet < 0.01 * expected
    assert found["all"].drawn == (100, 100)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_saved_statistics_stand_for_the_set(folders, tmp_path, suffix):
    real, fake = folders
    path = tmp_path / f"real{suffix}"
    statistics_of(real, means()).save(path)
    kept = Statistics.load(path)
    assert (kept.features, kept.side, kept.name) == (means().identity, 8, str(real))
    more = write("npz", tmp_path / "more", pixels(30, torch.Generator().manual_seed(1)))
    straight = compare_sets(more, real, means())[0]  # halves of 20
    for name, found in compare_sets(more, path, means())[0].items():
        assert same(found, straight[name])
    found, _ = compare_sets(fake, path, means())  # the file's halves are larger than the set
    assert {name: (d.n, d.m) for name, d in found.items()} == {
        "all": (15, 41), "as many": (15, 15), "real (floor)": (15, 15)
    }  # fmt: skip
    assert same(found["all"], compare_sets(fake, real, means())[0]["all"])
    both, _ = compare_sets(path, path, means())
    assert both["all"].frechet == pytest.approx(0, abs=1e-9)


def test_statistics_that_do_not_fit_are_refused(folders, tmp_path):
    real, fake = folders
    path = tmp_path / "real.npz"
    statistics_of(real, means()).save(path)
    with pytest.raises(ValueError, match=r"holds features of means \(0+\), and those asked for are of others \(0+\)"):
        compare_sets(fake, path, means("others"))
    with pytest.raises(ValueError, match=r"those of .*small have 4 pixels a side, those of .*real\.npz 8"):
        compare_sets(write("npz", tmp_path / "small", pixels(9, torch.Generator(), 4)), path, means())
    with pytest.raises(ValueError, match=r"is of pictures of 8 pixels a side; size \(--size\) is 4"):
        compare_sets(fake, path, means(), size=4)
    whole = dict(np.load(path))
    for change, message in (
        ({"first_root": whole["first_root"][:, :5]}, "first_root is"),
        ({"rest_mean": whole["rest_mean"] * np.nan}, "rest_mean holds NaN"),
        ({"second_kept": whole["second_kept"].astype(np.float64)}, "second_kept is torch.float64"),
        ({"header": np.array("{}")}, "missing required field"),
        ({"header": np.array(str(whole["header"]).replace('"version":1', '"version":2'))}, "version 2"),
        ({"first_mean": None}, "it has no 'first_mean"),
    ):
        arrays = {name: array for name, array in (whole | change).items() if array is not None}
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            Statistics.load(path)
    for name in ("text.safetensors", "short.safetensors"):
        (tmp_path / name).write_bytes(b"no such thing" if name[0] == "t" else b"\0")
        with pytest.raises(ValueError, match="holds no statistics"):
            compare_sets(fake, tmp_path / name, means())


def test_sets_that_are_too_small_are_refused(folders, tmp_path):
    real, fake = folders
    few = write("npz", tmp_path / "few", pixels(3, torch.Generator()))
    wide = write("npz", tmp_path / "wide", pixels(4, torch.Generator(), 9))
    one = write("png", tmp_path / "one", pixels(1, torch.Generator()))
    for pair, message in (
        ((few, real), "few holds 3 pictures; at least 4 are needed"),
        ((one, real), "one holds 1 pictures; at least 4 are needed"),
        ((fake, few), "few holds 3 pictures; at least 8 are needed"),
        ((wide, real), "of one size; those of .*wide have 9"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_sets(*pair, means())
    assert compare_sets(wide, real, means(), size=6)[0]["all"].n == 4
    with pytest.raises(ValueError, match="few holds 3 pictures; at least 8"):
        statistics_of(few, means())
    with pytest.raises(ValueError, match="subset must be in"):
        compare_sets(fake, real, means(), subset=7)


# ---- the command


def test_the_command_compares_a_generated_set(tmp_path):
    for seed in (0, 1):
        fastdiff.generate(None, 24, tmp_path / str(seed), steps=1, shard_size=12, batch_size=12, seed=seed)
    how = ("--features", "digits", "--quiet", "--device", "cpu")
    done = run("evaluate", tmp_path / "0", "--against", tmp_path / "1", *how, "--out", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line[:12].strip() for line in lines[5:]] == ["all", "as many", "real (floor)"]
    assert lines[0].endswith("24 images of `fastdiff generate`, each compared with its hash")
    told = json.loads((tmp_path / "a.json").read_text())
    expected, _ = compare_sets(tmp_path / "0", tmp_path / "1", features_of("digits", torch.device("cpu")))
    assert told["found"].keys() == expected.keys()
    assert told["found"]["all"]["frechet"] == expected["all"].frechet
    assert told["features"].startswith("the middle of the packaged digits")

    kept = tmp_path / "real.safetensors"
    done = run("evaluate", tmp_path / "1", "--save", kept, *how)
    assert done.exit_code == 0, done.output
    done = run("evaluate", tmp_path / "0", "--against", kept, *how, "--out", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "b.json").read_text())["found"] == told["found"]
    done = run("evaluate", "--fake", tmp_path / "0", "--real", kept, *how)
    assert done.stdout.splitlines()[-3:] == lines[-3:]


def test_the_command_refuses_another_network_s_statistics(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "features_of", lambda name, device: means(name))
    assert run("evaluate", folders[0], "--save", tmp_path / "a.npz", "--features", "one").exit_code == 0
    done = run("evaluate", folders[1], "--against", tmp_path / "a.npz", "--features", "two")
    assert done.exit_code == 2
    assert "holds features of one (000000000000), and those asked for are of two" in done.stderr


@pytest.mark.slow
def test_noise_is_further_from_pictures_than_pictures_are(tmp_path: Path, seed: int) -> None:
    """By the real network; "slow" for its 27 pictures of 224 pixels."""
    pytest.importorskip("efficientnet_lite_pytorch")
    images = factorial(64).pixels.permute(0, 2, 3, 1).numpy()
    real = write("png", tmp_path / "real", images)
    noise = write("png", tmp_path / "noise", pixels(9, torch.Generator().manual_seed(SEED), 64))
    network = ImageNetFeatures()
    found, _ = compare_sets(noise, real, replace(means("EfficientNet"), function=network))
    assert found["as many"].frechet > 3 * found["real (floor)"].frechet
    assert found["as many"].precision == 0
    assert isinstance(features_of("efficientnet", torch.device("cpu")), Features)
