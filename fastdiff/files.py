"""Files that appear whole or not at all, and the check that they can be written before any work is spent on them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes the name `path` only when the block ends without an error.

    A run that is killed in between leaves the former file as it was, and at worst a hidden ``.NAME.PID.tmp`` beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str], *, suffix: str | None = None) -> Path:
    """`path` as a Path, once it is known that a file can be written there: ask before the work, not after it.

    suffix: the ending that the name must have, in small or capital letters (".png"), else ValueError.
    Raises FileNotFoundError or NotADirectoryError for a parent that is no folder, IsADirectoryError where `path` is
    a folder, PermissionError (or another OSError) where the parent takes no new file. The file itself is not touched.
    """
    path = Path(path)
    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(f"the name of {path} must end in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.parent.exists():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {path.parent} is not a folder")
    try:  # permissions, read-only mounts and quotas differ by system: trying is the only check that counts
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
    return path
