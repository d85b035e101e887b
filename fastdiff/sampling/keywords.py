"""Keywords of network calls as trees: mappings, lists and tuples, whose leaves are tensors and anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

APART = object()  # in place of a stacked value: only calls of their own can be given these
ABSENT = object()


def rebuilt(container: Any, content: Sequence[Any]) -> Any:
    """A container like another one (a named tuple, an OrderedDict), with other entries in the same order."""
    if isinstance(container, Mapping):
        entries = dict(zip(container, content, strict=True))
        return entries if type(container) is dict else _of_kind(type(container), entries)
    if hasattr(container, "_fields"):
        return type(container)(*content)
    return type(container)(content)


def _of_kind(kind: Callable[[Any], Any], entries: dict[Any, Any]) -> Any:
    try:
        return kind(entries)
    except TypeError:  # a mapping that is not made of a dict
        return entries


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf with its name, ``name['a'][0]``; each container itself, as its class and its length, before them."""
    if isinstance(value, Mapping):
        yield name, (type(value), len(value))
        for key in sorted(value, key=str):
            yield from leaves(f"{name}[{key!r}]", value[key])
    elif isinstance(value, (list, tuple)):
        yield name, (type(value), len(value))
        for i, entry in enumerate(value):
            yield from leaves(f"{name}[{i}]", entry)
    else:
        yield name, value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree with every leaf changed."""
    if isinstance(value, Mapping):
        return rebuilt(value, [mapped(entry, change) for entry in value.values()])
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [mapped(entry, change) for entry in value])
    return change(value)
