"""Files that appear whole or not at all: threads, links, permissions, full disks, leftovers; JSON that is refused."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from fastdiff import files
from fastdiff.files import atomic_write, check_writable, parse_json, read_json_object, remove_leftovers


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def test_threads_that_write_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    contents = [bytes([i]) * (50_000 + i) for i in range(6)]
    write(path, contents[0])
    errors: list[BaseException] = []

    def work(content: bytes) -> None:
        try:
            for _ in range(20):
                write(path, content)
                assert path.read_bytes() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "ab" * n)  # even if the name could be guessed
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = tmp_path / f".a.png.{'ab' * 8}.tmp"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.png", b"picture")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a.png").exists()


def test_a_link_is_followed_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link, chain = tmp_path / "there" / "a.bin", tmp_path / "link.bin", tmp_path / "chain.bin"
    link.symlink_to(Path("there") / "a.bin")  # which does not exist yet
    chain.symlink_to(link)
    for path, content in ((link, b"one"), (chain, b"two")):
        check_writable(path)
        write(path, content)
        assert target.read_bytes() == content
    assert link.is_symlink()
    assert chain.is_symlink()
    assert os.listdir(tmp_path / "there") == ["a.bin"]
    nowhere, circle = tmp_path / "nowhere.bin", tmp_path / "circle.bin"
    nowhere.symlink_to(tmp_path / "missing" / "a.bin")
    circle.symlink_to(circle)
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        check_writable(nowhere)
    for function in (check_writable, lambda path: write(path, b"")):
        with pytest.raises(OSError, match=r"circle\.bin: its symbolic links lead in a circle"):
            function(circle)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_are_kept_and_new_files_have_those_of_the_umask(tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        path = tmp_path / f"{mask:o}"
        before = os.umask(mask)
        try:
            write(path, b"new")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    for mode in (0o600, 0o640, 0o755):
        path.chmod(mode)
        write(path, b"again")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert path.read_bytes() == b"again"


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write(path, b"former")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.bin: No space left") as caught:
        write(path, b"latter")
    assert caught.value.errno == errno.ENOSPC
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"former", ["a.bin"])


def test_only_our_own_leftovers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        ".notes.tmp",
        ".a.json.123.tmp",
        ".other.json.0123456789abcdef.tmp",
        "a.json.0123456789abcdef.tmp",
        "a.json",
    }
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".a.json.00112233aabbccdd.tmp").mkdir()
    with monkeypatch.context() as patch:  # what a killed process leaves, by the name that it was given
        patch.setattr(os, "replace", lambda *_: None)
        write(tmp_path / "a.json", b"half")
    assert len(os.listdir(tmp_path)) == len(kept) + 2
    remove_leftovers(tmp_path, r"a\.json|b\.png")
    assert set(os.listdir(tmp_path)) == {*kept, ".a.json.00112233aabbccdd.tmp"}


@pytest.mark.parametrize("path", [None, 3, b"a.png"])
def test_what_is_no_path_is_refused_by_name(path: object) -> None:
    with pytest.raises(TypeError, match=f"path must be a str or a path; got {type(path).__name__}"):
        check_writable(path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("[1e999]", "1e999 is beyond float64"),
        ("[NaN]", "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
    ],
)
def test_json_that_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json_object(tmp_path / "a.json")


def test_infinities_that_diffusers_writes_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"lambda_min_clipped": -Infinity}')
    assert read_json_object(tmp_path / "a.json") == {"lambda_min_clipped": -float("inf")}
