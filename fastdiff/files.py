"""Files that appear whole or not at all, the check that they can be written before any work is spent, and JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes the name `path` only when the block ends without an error.

    A run that is killed in between leaves the former file as it was, and at worst a hidden ``.NAME.RANDOM.tmp`` beside
    it (see `remove_leftovers`). Threads and processes may write one path at a time: the last whole file stays. A
    symbolic link is followed: its target is written. A file keeps its permissions; a new one has those of the umask.
    Raises OSError, naming the path.
    """
    target = _target(path)
    # A name that cannot be guessed, opened only if nothing is there: no planted link is followed, and no other thread,
    # process or container (which may have the same process number) writes to the same file.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk's error does not say which file it was
            raise _named(error, path) from error
        raise


def publish(made: Path, target: Path) -> bool:
    """Give a finished file, or a folder of files, the name `target`, unless that is taken: whether it was given.

    Either way `made` is gone afterwards. Of several processes that publish one name one wins, without a lock: a file
    is linked and unlinked, a folder renamed, which fails where a folder with something in it has the name. What the
    file or the folder holds must be on the disk already (fsync); the name is, when this returns.
    """
    try:
        if made.is_dir():
            os.rename(made, target)
        else:
            _link(made, target)
    except OSError as error:
        if not target.exists() or error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
            raise _named(error, target) from error
        remove(made)
        return False
    sync_folder(target.parent)
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _link(made: Path, target: Path) -> None:
    try:
        os.link(made, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if target.exists():  # a file system without links; between this look and the name one of two equals may win
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
        os.rename(made, target)
        return
    made.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what `atomic_write` left in `folder` where it was killed while it wrote files of these names (a regular
    expression); no other file.
    """
    ours = re.compile(rf"\.(?:{names})\.[0-9a-f]{{16}}\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], *, suffix: str | None = None) -> Path:
    """`path` as a Path, once it is known that a file can be written there: ask before the work, not after it.

    suffix: the ending that the name must have, in small or capital letters (".png"), else ValueError.
    Raises TypeError for what is no path, FileNotFoundError or NotADirectoryError for a parent that is no folder,
    IsADirectoryError where `path` is a folder, PermissionError (or another OSError) where the parent takes no new file.
    The file itself is not touched.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path; got {type(path).__name__}")
    path = Path(path)
    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(f"the name of {path} must end in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    folder = _target(path).parent
    if not folder.exists():
        raise FileNotFoundError(f"cannot write {path}: the folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {folder} is not a folder")
    try:  # permissions, read-only mounts and quotas differ by system: trying is the only check that counts
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _named(error, path) from error
    return path


def parse_json(text: str | bytes, *, infinities: bool = False) -> Any:
    """What a text of JSON holds. ValueError says what is wrong with it; an object that names a key twice is refused.

    infinities: also take NaN, Infinity and -Infinity, which JSON has not, but which diffusers writes.
    """
    constant = None if infinities else _refuse_constant
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=constant, parse_float=_float)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError naming the file where it is anything else."""
    try:
        content = parse_json(path.read_bytes(), infinities=True)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got a {type(content).__name__}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names {twice!r} twice")
    return content


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond float64")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _target(path: str | os.PathLike[str]) -> Path:
    """`path` itself, or what it leads to if it is a symbolic link."""
    path = Path(path)
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, f"cannot write {path}: its symbolic links lead in a circle")
    return target


def _named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error (its class follows from its number) with the file's name in its message."""
    if error.errno is None:
        return OSError(f"cannot write {path}: {error}")
    return OSError(error.errno, f"cannot write {path}: {error.strerror}")
