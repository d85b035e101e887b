"""Sets in object stores: memory's, obstore's own folders, and a stub of S3's on this machine."""

import os
import sys
import threading

import pytest
from helpers import run

pytest.importorskip("obstore")

import fastdiff
from fastdiff.generation import stores
from fastdiff.generation.job import Folder
from fastdiff.generation.verify import verify
from fastdiff.generation.worker import Worker
from fastdiff.training.signals import Interrupted

SMALL = {"steps": 1, "shard_size": 4, "batch_size": 2, "guidance_scale": 1.0, "device": "cpu"}
NUM = 10


def make_set(out, **options):
    return fastdiff.generate(None, NUM, out, **{**SMALL, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    return folder, make_set(folder).sha256


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """A URL under which nothing is yet."""
    return f"memory://{tmp_path}/set" if request.param == "memory" else f"file://{tmp_path}/deep/set"


def test_a_set_is_the_one_of_a_folder(url, whole):
    made = make_set(url)
    assert (made.path, made.made, made.sha256) == (url, NUM, whole[1])
    place = Folder(url)
    job = place.read()
    assert sorted(place.store.names()) == ["job.json", "manifest.jsonl", *(job.shard_name(i) for i in range(3))]
    for shard in range(3):
        assert place.store.read(job.shard_name(shard)) == (whole[0] / job.shard_name(shard)).read_bytes()
    assert verify(url).sha256 == whole[1]
    assert make_set(url).sha256 == whole[1]
    with pytest.raises(ValueError, match=r"is the folder of another job: seed 0 \(now 1\)"):
        make_set(url, seed=1)


def test_what_is_unfinished_is_kept_and_no_shard(url, whole, monkeypatch):
    stopped = iter([None, Interrupted("interrupted", 15)])
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_stop", lambda self: next(stopped))
        with pytest.raises(Interrupted):
            make_set(url)
    place = Folder(url)
    assert place.published(place.read()) == set()
    assert sorted(place.store.names()) == [".unfinished", "job.json"]
    assert place.store.has(".unfinished/shard-000000/0-2.tar")
    assert verify(url).missing == ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar")
    assert make_set(url).sha256 == whole[1]
    assert not place.store.has(".unfinished/shard-000000/0-2.tar")


def test_damage_is_found_and_made_good(url, whole):
    make_set(url)
    store = Folder(url).store
    store.replace("shard-000001.tar", lambda path: path.write_bytes(b"no tar"))
    store.remove("manifest.jsonl")
    found = verify(url, discard=True)
    assert list(found.damaged) == ["shard-000001.tar"]
    assert not store.has("shard-000001.tar")
    assert make_set(url).sha256 == whole[1]
    assert verify(url).right


def test_the_first_object_keeps_its_name(url):
    store, begin, won = Folder(url).store, threading.Barrier(8), []

    def one(i):
        begin.wait()
        if store.create("name", lambda path: path.write_text(str(i)), scratch=".unfinished"):
            won.append(str(i))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.read("name").decode()] == won
    store.remove("name")
    store.remove("name")  # what is gone already is no error
    assert store.read("name") is None


def test_removing_takes_what_lies_in_a_folder_alone(url):
    store = Folder(url).store
    for name in ("a/1.tar", "a/2.tar", "ab/1.tar", "a.tar"):
        store.replace(name, lambda path: path.write_bytes(b"x"))
    store.remove("a")
    assert sorted(store.names()) == ["a.tar", "ab"]


def test_npz_and_prompts_of_the_command_line(url, whole):
    asked = ("generate", "-n", NUM, "--out", url, "--steps", 1, "--shard-size", 4, "--batch-size", 2, "--guidance", 1,
             "--format", "npz", "--device", "cpu")  # fmt: skip
    done = run(*asked)
    assert done.exit_code == 0, done.output
    assert f"{url}: 10 images, sha256 {whole[1]}" in done.output
    assert run("verify", url, "--remake", 2, "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    ("out", "options", "told"),
    [
        ("hdfs://a/b", {}, r"out must be a folder or a URL of s3, gs, az, memory, file; got 'hdfs://a/b'"),
        (
            "memory://pictures",
            {"format": "png"},
            "format png makes folders of files, and memory://pictures has objects",
        ),
        ("az://container/set", {}, "az://container/set: .*Account must be specified"),
    ],
)
def test_what_is_refused_before_any_work(monkeypatch, out, options, told):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises((ValueError, OSError), match=told):
        make_set(out, **options)


def test_other_objects_and_no_job(tmp_path):
    url = f"memory://{tmp_path}"
    Folder(url).store.replace("photo.png", lambda path: path.write_bytes(b"x"))
    with pytest.raises(FileExistsError, match=r"holds other files and no job\.json"):
        make_set(url)
    with pytest.raises(FileNotFoundError, match=r"no job\.json"):
        verify(f"{url}/nothing")


def test_without_obstore(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ImportError, match=r'pip install "fastdiff-torch\[stores\]"'):
        make_set("s3://bucket/set")


@pytest.fixture
def bucket(monkeypatch):
    """A stub of S3 on this machine, with one bucket."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server.start()
    host, port = server.get_host_and_port()
    told = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    for name, value in (told | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    import boto3

    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="bucket")
    yield "s3://bucket/deep/set"
    server.stop()


@pytest.mark.slow
def test_a_stub_of_s3(bucket, whole):
    assert make_set(bucket).sha256 == whole[1]
    assert verify(bucket).right
    store = Folder(bucket).store
    assert not store.create("shard-000001.tar", lambda path: path.write_bytes(b"other"), scratch="")
    store.remove("shard-000001.tar")
    assert verify(bucket).missing == ("shard-000001.tar",)
    assert make_set(bucket).sha256 == whole[1]
    with pytest.raises(OSError, match=r"s3://nowhere/set: The specified bucket does not exist"):
        make_set("s3://nowhere/set")


def test_credentials_that_may_not_do_that(monkeypatch):
    """The store's errors are told in words, before the work."""
    from obstore import exceptions

    class Refusing:
        def get(self, name):
            raise exceptions.PermissionDeniedError("Access denied\n\nDebug source: …")

    monkeypatch.setattr(stores, "_opened", lambda url, **more: Refusing())
    with pytest.raises(PermissionError, match=r"^memory://a: these credentials may not do that: Access denied$"):
        make_set("memory://a")
