"""Sets of a network whose bits do not depend on the batch: runs of one set with batches of other sizes."""

import os
import signal

import pytest
from helpers import run

import fastdiff
from fastdiff.generation import worker
from fastdiff.generation.formats import read_shard
from fastdiff.generation.job import Folder
from fastdiff.generation.verify import verify
from fastdiff.training.signals import Interrupted

NUM = 14  # two shards
SMALL = {"steps": 2, "shard_size": 12, "guidance_scale": 1.5, "batch_invariant": True, "device": "cpu"}


def make_set(out, batch_size, **options):
    return fastdiff.generate(None, NUM, out, **{**SMALL, "batch_size": batch_size, **options})


def files_of(folder):
    """The bytes of every file of the shards."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0][:5] == "shard"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module", params=["tar", "png", "npz"])
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    return request.param, folder, make_set(folder, 3, format=request.param).sha256


def hashes(folder):
    place = Folder(folder)
    job = place.read()
    shards = [read_shard(job.format, place.shard(job, shard)) for shard in range(job.shards)]
    return [record["sha256"] for shard in shards for record, _ in shard]


def test_other_batches_make_the_same_bytes(tmp_path, whole):
    format, folder, sha256 = whole
    assert make_set(tmp_path / "set", 12, format=format).sha256 == sha256
    assert files_of(tmp_path / "set") == files_of(folder)
    assert hashes(tmp_path / "set") == hashes(folder)


def test_a_run_that_was_ended_goes_on_with_other_batches(tmp_path, whole, monkeypatch):
    """Batches of 2, ended twice; of 4, ended once; of 6: no batch is made of which all images are kept."""
    format, folder, sha256 = whole
    out, made, original = tmp_path / "set", [], worker.make

    def make(job, trained, numbers, labels):
        made.append(numbers)
        if len(made) == ends:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(job, trained, numbers, labels)

    monkeypatch.setattr(worker, "make", make)
    for batch_size, ends in ((2, 1), (2, 2), (4, 3), (6, 0)):
        if ends:
            with pytest.raises(Interrupted):
                make_set(out, batch_size, format=format)
        else:
            assert make_set(out, batch_size, format=format).sha256 == sha256
    assert made == [range(0, 2), range(2, 4), range(4, 8), range(6, 12), range(12, 14)]
    assert files_of(out) == files_of(folder)
    assert verify(out, remake=2).right
    assert not (out / ".unfinished").exists()
    assert make_set(out, 12, format=format).sha256 == sha256
    assert made[-1] == range(12, 14)  # the same call again makes nothing


def test_a_picture_is_made_again_alone(tmp_path):
    fastdiff.generate(None, 6, tmp_path / "set", format="png", batch_size=3, **{**SMALL, "shard_size": 6})
    found = fastdiff.reproduce(tmp_path / "set" / "shard-000000" / "000005.png")
    assert (found.identical, found.same_bits) == (True, True)
    assert found.images.shape == (1, 1, 8, 8)


def test_the_flag_is_of_the_job(tmp_path, whole):
    _, folder, _ = whole
    job = Folder(folder).read()
    assert job.batch_invariant
    assert "batch_size" not in job.told()
    with pytest.raises(ValueError, match=r"is the folder of another job: .*accelerated"):
        make_set(folder, 3, batch_invariant=False, accelerate=True, format=job.format)
    with pytest.raises(ValueError, match=r"another job: (steps|plan)"):
        make_set(folder, 4, steps=3, format=job.format)


def test_what_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="batch_invariant=True is a promise of accelerate; accelerate is False"):
        make_set(tmp_path / "set", 2, accelerate=False)
    with pytest.raises(TypeError, match="batch_invariant must be a bool; got int"):
        make_set(tmp_path / "set", 2, batch_invariant=1)
    assert not (tmp_path / "set").exists()


def test_the_command(tmp_path):
    options = ["-n", 4, "--steps", 1, "--shard-size", 4, "--guidance", 1, "--device", "cpu", "--batch-invariant"]
    for name, batch in (("a", 1), ("b", 4)):
        result = run("generate", "--out", tmp_path / name, "--batch-size", batch, *options)
        assert result.exit_code == 0, result.output
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    result = run("generate", "--out", tmp_path / "c", "--accelerate", "off", *options)
    assert result.exit_code != 0
    assert "a promise of accelerate" in result.output
