"""Sets of images in shards: what they hold, that each is made once, and what a run refuses before any work."""

import errno
import json
import os
import shutil
import signal
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from helpers import run

import fastdiff
from fastdiff.acceleration.network import networks_in
from fastdiff.generation import formats, worker
from fastdiff.generation.job import Folder
from fastdiff.generation.stores import Disk
from fastdiff.generation.verify import verify
from fastdiff.models import digits
from fastdiff.pictures.grid import to_uint8
from fastdiff.pictures.recipe import Recipe
from fastdiff.training.signals import Interrupted

SMALL = {"steps": 1, "shard_size": 4, "batch_size": 2, "guidance_scale": 1.0}
NUM = 10  # three shards, five batches


def make_set(out, num=NUM, model=None, **options):
    return fastdiff.generate(model, num, out, **{**SMALL, **options})


def shards_of(folder):
    """Every shard's bytes by its name, in a folder of PNGs every file's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0][:5] == "shard"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def images_of(folder):
    """(record, pixels) of the whole set."""
    place = Folder(folder)
    job = place.read()
    return [image for shard in range(job.shards) for image in place.images(job, shard)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set that was made without an interruption, and its SHA-256."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    return folder, make_set(folder).sha256


@pytest.fixture
def count(monkeypatch):
    """The batches that are made, in order; ``count.before`` is called before each."""

    class Count(list):
        before = staticmethod(lambda numbers: None)

    counted, original = Count(), worker.make

    def make(job, model, numbers, given):
        counted.before(numbers)
        counted.append(numbers)
        return original(job, model, numbers, given)

    monkeypatch.setattr(worker, "make", make)
    return counted


# ---- what a set holds


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_the_images_are_those_of_sample(tmp_path, format, whole, count):
    made = make_set(tmp_path / "set", format=format)
    assert (made.made, made.failed, made.sha256) == (NUM, {}, whole[1])
    trained, found = digits(), images_of(tmp_path / "set")
    labels = [i % 10 for i in range(NUM)]
    for begin in range(0, NUM, 2):
        told = trained.arguments(torch.tensor(labels[begin : begin + 2]), 1.0, steps=1)
        images = fastdiff.sample(trained.unet, (2, 1, 8, 8), sample_offset=begin, **told)
        for i, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy(), begin):
            record, kept = found[i]
            assert (record["number"], record["label"], record["seed"]) == (i, labels[i], 0)
            np.testing.assert_array_equal(kept, pixels)
    assert not (tmp_path / "set" / ".unfinished").exists()
    assert verify(tmp_path / "set").sha256 == whole[1]
    count.clear()
    assert make_set(tmp_path / "set", format=format).sha256 == whole[1]
    assert count == []  # the same call again makes nothing


def test_a_tar_is_a_webdataset(whole):
    with tarfile.open(whole[0] / "shard-000001.tar") as tar:
        names = tar.getnames()
    assert names == [f"{number:06d}.{suffix}" for number in range(4, 8) for suffix in ("png", "json")]


def test_an_npz_is_read_by_numpy_alone(tmp_path):
    make_set(tmp_path / "set", format="npz")
    with np.load(tmp_path / "set" / "shard-000002.npz") as arrays:
        assert arrays["images"].shape == (2, 8, 8, 1)
        assert arrays["images"].dtype == np.uint8
        assert arrays["numbers"].tolist() == arrays["labels"].tolist() == [8, 9]


def test_a_picture_is_made_again_by_the_recipe_in_it(tmp_path):
    make_set(tmp_path / "set", format="png")
    found = fastdiff.reproduce(tmp_path / "set" / "shard-000001" / "000005.png")
    assert found.identical
    assert found.same_bits
    assert found.images.shape == (1, 1, 8, 8)


def test_an_accelerated_network(tmp_path, whole, count):
    """It is put in for the run alone, the job names it, and what is made again is made with it."""
    trained = digits()
    made = make_set(tmp_path / "set", model=trained, accelerate=True, format="png")
    assert not networks_in(trained.unet)
    assert Folder(tmp_path / "set").read().images.network.accelerated is not None
    assert fastdiff.reproduce(tmp_path / "set" / "shard-000001" / "000005.png").same_bits
    found = verify(tmp_path / "set", remake=2, device="cpu")
    assert (found.right, found.again, found.sha256) == (True, 2, made.sha256)
    count.clear()
    with pytest.raises(ValueError, match=r"accelerated None \(now \{'dtype': 'float32'"):
        make_set(whole[0], accelerate=True)
    assert count == []


def test_without_recipes(tmp_path, whole):
    assert make_set(tmp_path / "set", format="png", recipes=False).sha256 == whole[1]
    with pytest.raises(ValueError, match="no recipe"):
        fastdiff.read_recipe(tmp_path / "set" / "shard-000000" / "000001.png")


def test_labels_from_a_file(tmp_path):
    given = [3, 1, 4, 1, 5, 9]
    (tmp_path / "labels").write_text("\n".join(map(str, given)) + "\n7\n")  # more than are needed
    make_set(tmp_path / "set", num=6, labels=tmp_path / "labels")
    assert [record["label"] for record, _ in images_of(tmp_path / "set")] == given
    (tmp_path / "labels").write_text("3\n" * 6)
    with pytest.raises(ValueError, match=r"another job: labels a file, sha256 \w+ \(now a file, sha256 \w+\)"):
        make_set(tmp_path / "set", num=6, labels=tmp_path / "labels")


def test_the_manifest_is_derived_from_the_shards(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "set")
    place = tmp_path / "set" / "manifest.jsonl"
    before = place.read_bytes()
    *lines, total = map(json.loads, before.splitlines())
    assert [line["images"] for line in lines] == [4, 4, 2]
    assert total == {"images": NUM, "images_sha256": whole[1]}
    place.unlink()
    assert verify(tmp_path / "set").right
    assert place.read_bytes() == before


def test_verify_ends_a_run_that_was_killed_when_all_was_published(tmp_path, whole):
    folder = shutil.copytree(whole[0], tmp_path / "set")
    (folder / "manifest.jsonl").unlink()
    batches = folder / ".unfinished" / "shard-000001"
    batches.mkdir(parents=True)
    (batches / "4-6.tar").write_bytes(b"of one that helped")
    found = verify(folder)
    assert (found.right, found.sha256) == (True, whole[1])
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole[0].iterdir()}


def test_the_batch_size_is_found_once_and_kept(tmp_path):
    make_set(tmp_path / "set", num=4, batch_size=None)
    size = Folder(tmp_path / "set").read().batch_size
    assert size in (1, 2, 4)
    make_set(tmp_path / "set", num=4, batch_size=None)
    assert Folder(tmp_path / "set").read().batch_size == size


def test_a_dry_run_writes_nothing(tmp_path, whole):
    made = make_set(tmp_path / "set", dry_run=True)
    assert (made.made, made.num) == (0, NUM)
    assert made.seconds > 0
    size = sum(map(len, shards_of(whole[0]).values()))
    assert abs(made.bytes - size) < 3 * 10240  # the ends of three tars
    assert list(tmp_path.iterdir()) == []


# ---- runs that end early, and others that go on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_batch_and_keeps_it(tmp_path, whole, count, number):
    count.before = lambda numbers: os.kill(os.getpid(), number) if numbers.start == 4 else None
    with pytest.raises(Interrupted, match=r"4 of 10 images are in shards.*the same command goes on"):
        make_set(tmp_path / "set")
    assert [batch.start for batch in count] == [0, 2, 4]
    assert (tmp_path / "set" / ".unfinished" / "shard-000001" / "4-6.tar").exists()
    count.clear()
    count.before = lambda numbers: None
    assert make_set(tmp_path / "set").sha256 == whole[1]
    assert [batch.start for batch in count] == [6, 8]
    assert shards_of(tmp_path / "set") == shards_of(whole[0])


def test_the_exit_code_of_a_signal(tmp_path, count):
    count.before = lambda numbers: os.kill(os.getpid(), signal.SIGTERM)
    result = run("generate", "-n", 4, "--out", tmp_path / "set", "--steps", 1, "--shard-size", 4, "--batch-size", 2)
    assert result.exit_code == 75
    assert "the same command goes on" in result.output


def test_who_helps_makes_only_what_is_missing(tmp_path, whole, count):
    """Of two processes one does nothing; the other makes its own share first, then the other's from the far end."""
    made = make_set(tmp_path / "set", rank=1, world_size=2)
    assert [batch.start for batch in count] == [4, 6, 8, 2, 0]
    assert made.sha256 == whole[1]
    assert shards_of(tmp_path / "set") == shards_of(whole[0])


def test_a_batch_of_a_shard_that_another_has_published_is_not_written(tmp_path, whole, count, monkeypatch):
    """Else a folder of batches stays in the whole set, where the process that helped is ended before it looks again."""
    folder, sha256 = whole
    written = []

    def overtaken(numbers):
        for shard in folder.glob("shard-*"):
            shutil.copy(shard, tmp_path / "set")

    count.before = overtaken
    monkeypatch.setattr(Disk, "replace", lambda self, name, write: written.append(name))
    assert make_set(tmp_path / "set").sha256 == sha256
    assert (len(count), written) == (1, ["manifest.jsonl"])


def test_a_process_ends_with_the_one_that_started_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    parents = iter([1000, 1000, 1000, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "readlink", lambda path: "python3")
    with pytest.raises(Interrupted, match="has ended"):
        make_set(tmp_path / "set")
    assert not (tmp_path / "set" / "shard-000001.tar").exists()


@pytest.mark.parametrize("failure", ["nan", "raises"])
def test_a_batch_that_fails_costs_its_shard_alone(tmp_path, whole, monkeypatch, failure):
    sample = Recipe.sample

    def failing(self, model, **how):
        if self.arguments.get("sample_offset") == 4:
            if failure == "raises":
                raise RuntimeError("no such kernel")
            return torch.full(self.shape, float("nan"))
        return sample(self, model, **how)

    monkeypatch.setattr(Recipe, "sample", failing)
    arguments = ["generate", "-n", NUM, "--out", tmp_path / "set", "--steps", 1, "--shard-size", 4, "--batch-size", 2,
                 "--guidance", 1, "--quiet"]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 1
    assert "shard-000001.tar: not made: images 4 to 5" in result.output
    assert ("NaN" if failure == "nan" else "no such kernel") in result.output
    found = verify(tmp_path / "set")
    assert (found.missing, found.damaged, found.sha256) == (("shard-000001.tar",), {}, None)
    monkeypatch.setattr(Recipe, "sample", sample)
    assert run(*arguments).exit_code == 0
    assert verify(tmp_path / "set").sha256 == whole[1]


def test_a_full_disk_leaves_nothing_torn(tmp_path, whole, monkeypatch):
    original, written = formats.tarfile.TarFile.addfile, []

    def addfile(self, member, file=None):
        written.append(member)
        if len(written) == 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, member, file)

    monkeypatch.setattr(formats.tarfile.TarFile, "addfile", addfile)
    with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
        make_set(tmp_path / "set")
    assert not list((tmp_path / "set").rglob("*.tmp"))
    found = verify(tmp_path / "set")
    assert found.damaged == {}
    assert make_set(tmp_path / "set").sha256 == whole[1]


def test_a_small_disk(tmp_path, whole):
    """A tmpfs that holds a part of the set."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a small disk")
    try:
        with pytest.raises(OSError, match=r"cannot write .*No space left"):
            make_set(place / "set")
        assert verify(place / "set").damaged == {}
        subprocess.run(["mount", "-o", "remount,ro,size=4m", str(place)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            make_set(place / "set")
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        assert make_set(place / "set").sha256 == whole[1]
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_batch_that_does_not_fit_is_made_in_halves(tmp_path, monkeypatch):
    sample = Recipe.sample

    def small(self, model, **how):
        if self.shape[0] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return sample(self, model, **how)

    monkeypatch.setattr(Recipe, "sample", small)
    make_set(tmp_path / "set", num=4)
    assert [record["parts"] for record, _ in images_of(tmp_path / "set")] == [2] * 4
    assert json.loads((tmp_path / "set" / "manifest.jsonl").read_text().splitlines()[0])["parts"] == 2


# ---- damage


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_damage_is_found_and_made_good(tmp_path, whole, format, rng):
    make_set(tmp_path / "set", format=format)
    path = rng.choice(sorted(path for path in (tmp_path / "set").rglob("*") if path.is_file()
                             and path.relative_to(tmp_path / "set").parts[0][:5] == "shard"))  # fmt: skip
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    name = path.relative_to(tmp_path / "set").parts[0]
    result = run("verify", tmp_path / "set", "--discard")
    assert result.exit_code == 1
    assert f"{name}: damaged" in result.output
    assert not (tmp_path / "set" / name).exists()
    assert make_set(tmp_path / "set", format=format).sha256 == whole[1]
    assert run("verify", tmp_path / "set").exit_code == 0


def test_without_a_manifest_wrong_pixels_are_found(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "set")
    (tmp_path / "set" / "manifest.jsonl").unlink()
    path = tmp_path / "set" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 4
    path.write_bytes(content)
    assert list(verify(tmp_path / "set").damaged) == ["shard-000000.tar"]


def test_a_damaged_batch_is_made_again(tmp_path, whole, count):
    count.before = lambda numbers: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        make_set(tmp_path / "set")
    count.before = lambda numbers: None
    (tmp_path / "set" / ".unfinished" / "shard-000000" / "0-2.tar").write_bytes(b"no tar")
    made = make_set(tmp_path / "set")
    assert list(made.failed) == ["shard-000000.tar"]
    assert "was damaged, and is removed" in str(made)
    assert make_set(tmp_path / "set").sha256 == whole[1]


def test_remaking_finds_what_no_hash_tells(tmp_path, whole):
    result = run("verify", whole[0], "--remake", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "3 of 3 batches made again are the same" in result.output
    trained = digits()
    with torch.no_grad():
        trained.unet.conv_out.bias += 1.0
    make_set(tmp_path / "set", num=4, model=trained)
    with pytest.raises(ValueError, match="the images are of network"):
        verify(tmp_path / "set", remake=1, device="cpu")


# ---- what is refused, before any work


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 1}, r"seed 0 \(now 1\)"),
        ({"num": 11}, r"num 10 \(now 11\)"),
        ({"batch_size": 4}, r"batch_size 2 \(now 4\)"),
        ({"shard_size": 8}, r"shard_size 4 \(now 8\)"),
        ({"format": "npz"}, r"format tar \(now npz\)"),
        ({"recipes": False}, r"recipes True \(now False\)"),
        ({"steps": 2}, r"plan ddim \w+ \(now ddim \w+\)"),
        ({"sampler": "euler"}, r"plan ddim \w+ \(now euler \w+\)"),
        ({"guidance_scale": 2.0}, r"guidance_scale None \(now 2.0\)"),
        ({"dtype": torch.bfloat16}, r"dtype float32 \(now bfloat16\)"),
    ],
)
def test_another_job_in_the_folder_is_refused(whole, count, changed, told):
    with pytest.raises(ValueError, match=f"is the folder of another job: .*{told}"):
        make_set(whole[0], **changed)
    assert count == []


def test_another_network_in_the_folder_is_refused(whole, count):
    trained = digits()
    with torch.no_grad():
        trained.unet.conv_out.bias += 1e-3
    with pytest.raises(ValueError, match=r"another job: network \S+ \w+ \(now \S+ \w+\)"):
        make_set(whole[0], model=trained)
    assert count == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num": 0}, r"num must be in \[1, 4294967296\]; got 0"),
        ({"num": 2.5}, "num must be an int"),
        ({"shard_size": 0}, "shard_size must be in"),
        ({"batch_size": 3}, "batch_size must divide shard_size, 4; got 3"),
        ({"batch_size": 8}, r"batch_size must be in \[1, 4\]; got 8"),
        ({"format": "zip"}, "format is 'zip'"),
        ({"model": 7}, "model must be a folder"),
        ({"labels": "few"}, "few has 2 labels, and num is 10"),
        ({"labels": "beyond"}, "beyond, line 2: '10' is none of the classes 0, 1"),
        ({"labels": "empty"}, "empty, line 2: '' is none of the classes"),
        ({"labels": "missing"}, "missing"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 1\], of 2 processes; got 2"),
        ({"rank": -1, "world_size": 2}, r"rank must be in \[0, .*; got -1"),
        ({"rank": 1}, "nothing says of how many: give world_size"),
        ({"world_size": 2}, "neither rank nor the environment"),
        ({"steps": 0}, "steps"),
        ({"stepz": 1}, "stepz is no argument of generate; did you mean 'steps'"),
        ({"x_T": torch.zeros(1, 1, 8, 8)}, "x_T is no argument of generate"),
        ({"seed": -1}, "seed"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, count, wrong, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").write_text("1\n2\n")
    (tmp_path / "beyond").write_text("9\n10\n")
    (tmp_path / "empty").write_text("9\n\n3\n")
    with pytest.raises((ValueError, TypeError, OSError), match=told):
        make_set("set", **wrong)
    assert count == []
    assert not (tmp_path / "set").exists()


def test_a_place_that_is_no_folder_of_a_job(tmp_path, whole):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        make_set(tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"holds other files and no job\.json"):
        make_set(tmp_path)
    shutil.copytree(whole[0], tmp_path / "set")
    for content in (b"{", b"[]", b'{"what": "fastdiff.job", "version": 2}', b'{"what": "fastdiff.job", "version": 1}'):
        (tmp_path / "set" / "job.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"job\.json"):
            make_set(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"no job\.json"):
        verify(tmp_path / "nothing")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_without_classes_takes_no_labels(tmp_path):
    trained = digits()
    trained.classes = []
    with pytest.raises(ValueError, match="labels is 'balanced', but this model has no classes"):
        make_set(tmp_path / "set", model=trained, labels="balanced")
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a class-conditional model"):
        make_set(tmp_path / "set", model=trained, guidance_scale=2.0)
