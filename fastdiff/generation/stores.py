"""Where a set is kept: a folder on a file system, or the objects under a URL, by obstore.

Both publish create-only: of several processes that give one name, one wins, and what has a name is whole.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff.files import publish, remove

SCHEMES = ("s3", "gs", "az", "memory", "file")
URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
TIMEOUT = timedelta(hours=1)  # of one request, which may hold a whole shard
FIRST_LOOK: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
METADATA = "169.254.169.254"  # where a cloud's machine has its role's credentials

Write = Callable[[Path], object]  # makes the file of this path, whole or not at all


class Disk:
    """A folder, which need not be there yet. Names are relative to it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.place = Path(path)

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in the place, or in a folder of it."""
        place = self.place / folder
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"out must be a folder; {place} is a file")
        return os.listdir(place) if place.exists() else []

    def has(self, name: str) -> bool:
        return (self.place / name).exists()

    def read(self, name: str) -> bytes | None:
        return (self.place / name).read_bytes() if self.has(name) else None

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A file to read for a while."""
        yield self.place / name

    def replace(self, name: str, write: Write) -> None:
        """Write a file, in the place of one that has the name."""
        (self.place / name).parent.mkdir(parents=True, exist_ok=True)
        write(self.place / name)

    def create(self, name: str, write: Write, scratch: str) -> bool:
        """Make a file, or a folder of files, and give it the name unless that is taken: whether it was given.

        scratch: the folder for it while it is made, under a name that no other process has.
        """
        temporary = self.place / scratch / f"{name}.{secrets.token_hex(8)}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            return publish(temporary, self.place / name)
        finally:
            remove(temporary)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it, if it is there."""
        remove(self.place / name)


class Bucket:
    """The objects under a URL. An object appears whole or not at all, so that nothing is temporary."""

    def __init__(self, url: str) -> None:
        self.place = url.rstrip("/")
        with self._told():
            if URL.match(url)[1].lower() in ("s3", "gs", "az"):  # type: ignore[index]
                _exists(_opened(self.place, retry_config=FIRST_LOOK), "job.json")
            self._store = _opened(self.place)

    def names(self, folder: str = "") -> list[str]:
        with self._told():
            found = self._store.list_with_delimiter(folder or None)
        paths = [entry["path"] for entry in found["objects"]] + list(found["common_prefixes"])
        return [path.rsplit("/", 1)[-1] for path in paths]

    def has(self, name: str) -> bool:
        with self._told():
            return _exists(self._store, name)

    def read(self, name: str) -> bytes | None:
        with self._told():
            try:
                return bytes(self._store.get(name).bytes())
            except FileNotFoundError:
                return None

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A copy of an object to read for a while. Raises FileNotFoundError."""
        with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
            path = Path(folder) / Path(name).name
            with self._told(), open(path, "wb") as file:
                for part in self._store.get(name):
                    file.write(part)
            yield path

    def replace(self, name: str, write: Write) -> None:
        self._put(name, write, "overwrite")

    def create(self, name: str, write: Write, scratch: str) -> bool:
        """Make an object unless there is one of that name: whether it was made. ``scratch`` is for disks."""
        return self._put(name, write, "create")

    def remove(self, name: str) -> None:
        """Remove an object, or all whose names go on after a slash."""
        with self._told():
            for part in self._store.list(prefix=name):  # a thousand at a time
                self._delete([entry["path"] for entry in part])
            if _exists(self._store, name):  # a folder of file:// cannot be deleted as a file
                self._delete([name])

    def _delete(self, names: list[str]) -> None:
        try:
            self._store.delete(names)
        except FileNotFoundError:  # another process was first
            return

    def _put(self, name: str, write: Write, mode: str) -> bool:
        from obstore.exceptions import AlreadyExistsError

        with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
            path = Path(folder) / Path(name).name
            write(path)
            with self._told():
                try:
                    self._store.put(name, path, mode=mode)
                except AlreadyExistsError:
                    return False
        return True

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong, as OSError, in the store's first sentence."""
        from obstore import exceptions

        try:
            yield
        except exceptions.BaseError as error:
            what = str(error).split("\n\n")[0].strip()
            if (said := re.search(r"<Message>([^<]+)", what)) is not None:  # in S3's XML
                what = said[1]
            if METADATA in what:
                told = "there are no credentials: the environment has none, and this machine has no role"
                raise PermissionError(f"{self.place}: {told}") from None
            if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
                raise PermissionError(f"{self.place}: these credentials may not do that: {what}") from None
            if isinstance(error, exceptions.NotSupportedError):
                raise OSError(
                    f"{self.place}: the store cannot put an object only where there is none: {what}"
                ) from None
            raise OSError(f"{self.place}: {what}") from None


Store = Disk | Bucket


def store_of(place: str | os.PathLike[str]) -> Store:
    """The store of a folder or a URL. Raises ImportError without obstore, ValueError for another kind of URL."""
    match = URL.match(place) if isinstance(place, str) else None
    if match is None:
        return Disk(place)
    if match[1].lower() not in SCHEMES:
        raise ValueError(f"out must be a folder or a URL of {', '.join(SCHEMES)}; got {place!r}")
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise ImportError(f'{place} needs obstore: pip install "fastdiff-torch[stores]"') from None
    return Bucket(str(place))


def _opened(url: str, **more: Any) -> Any:
    from obstore.store import from_url

    if url.lower().startswith("memory:"):
        return _of_this_process(url)
    if url.lower().startswith("file:"):
        return from_url(url, mkdir=True, automatic_cleanup=True)  # removes folders that are empty
    # An endpoint of http:// is somebody's own, named in the environment; the clouds' are https.
    return from_url(url, client_options={"timeout": TIMEOUT, "allow_http": True}, **more)


def _exists(store: Any, name: str) -> bool:
    try:
        store.head(name)
    except FileNotFoundError:
        return False
    return True


@cache
def _of_this_process(url: str) -> Any:
    """The objects under a memory:// URL, which live as long as the process."""
    from obstore.store import MemoryStore

    return MemoryStore()
