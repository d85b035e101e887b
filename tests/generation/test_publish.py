"""Names that are given once: a file's and a folder's; and the thread that writes."""

import errno
import os
import threading
import time

import pytest

from fastdiff.files import publish
from fastdiff.generation.writer import WAITING, Writer


@pytest.mark.parametrize("links", [True, False])
def test_the_first_file_keeps_its_name(tmp_path, monkeypatch, links):
    if not links:

        def link(*_):
            raise OSError(errno.EPERM, "this file system has none")

        monkeypatch.setattr(os, "link", link)
    for content, first in ((b"a", True), (b"b", False)):
        (tmp_path / "made").write_bytes(content)
        assert publish(tmp_path / "made", tmp_path / "name") is first
        assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert (tmp_path / "name").read_bytes() == b"a"


def test_the_first_folder_keeps_its_name(tmp_path):
    for content, first in ((b"a", True), (b"b", False)):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").write_bytes(content)
        assert publish(tmp_path / "made", tmp_path / "name") is first
        assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert (tmp_path / "name" / "file").read_bytes() == b"a"


def test_of_many_at_once_one_publishes(tmp_path):
    begin, won = threading.Barrier(8), []

    def one(i):
        (tmp_path / str(i)).write_text(str(i))
        begin.wait()
        if publish(tmp_path / str(i), tmp_path / "name"):
            won.append(str(i))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / "name").read_text()] == won
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write .*name"):
        publish(tmp_path / "nothing", tmp_path / "name")


def test_the_queue_is_short_and_all_of_it_is_done():
    done, go = [], threading.Event()
    with Writer() as writer:
        writer.put(go.wait)
        for i in range(WAITING):
            writer.put(lambda i=i: done.append(i))
        late = threading.Thread(target=writer.put, args=(lambda: done.append("late"),))
        late.start()
        time.sleep(0.05)
        assert late.is_alive()  # there is no place for it yet
        go.set()
        late.join()
    assert done == [*range(WAITING), "late"]


def test_the_first_error_is_raised_and_the_rest_left():
    done = []

    def fail():
        raise OSError(errno.ENOSPC, "full")

    def work():
        with Writer() as writer:
            writer.put(fail)
            while True:
                writer.put(lambda: done.append(len(done)))

    with pytest.raises(OSError, match="full"):
        work()
    assert done == []
