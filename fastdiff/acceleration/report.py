"""What ``accelerate`` changed, as people read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastdiff.pictures import html

if TYPE_CHECKING:
    from fastdiff.acceleration.network import Network

Rows = tuple[tuple[str, int, str], ...]


class NetworkReport:
    """What stands in for what in one network, as it is now; prints as a table.

    Attributes:
        what: the network's class.
        dtype: of its arithmetic; its parameters keep their own.
        changed: (class, how many, what its modules now do), inner ones first.
        kept: (class, how many, why) of modules whose own code runs though their class is known, and of layers that
            are not known. What was exchanged since accelerate, such as layers with a LoRA, is among them.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.what = class_name(network.root)

    @property
    def dtype(self) -> torch.dtype:
        return self._network.dtype

    @property
    def changed(self) -> Rows:
        return self._network.counts()

    @property
    def kept(self) -> Rows:
        return self._network.reasons()

    def __str__(self) -> str:
        rows = [(kind, str(count), does) for count, kind, does in self.rows()]
        kind, number = (max((len(row[i]) for row in rows), default=0) for i in range(2))
        lines = [f"  {row[1]:>{number}} {row[0]:<{kind}}  {row[2]}" for row in rows]
        return "\n".join([f"{self.title()}:", *lines])

    def title(self) -> str:
        """The network and how it computes."""
        told = f"{self.what}, computing in {str(self.dtype).removeprefix('torch.')}, channels_last"
        replayed = sum(layout.trusted for layout in list(self._network.replays.layouts.values()))
        told += f", calls of {replayed} layout{'s' * (replayed > 1)} replayed" if replayed else ""
        if not self._network.invariant:
            return told
        apart = self._network.apart
        how = "" if apart is None else f"; called sample by sample, since {apart}"
        return f"{told}, the same bits of an image in every batch{how}"

    def rows(self) -> list[tuple[int, str, str]]:
        """(how many, class, what they do or why they are as they were)."""
        changed = [(count, kind, does) for kind, count, does in self.changed]
        return changed + [(count, kind, f"as it was: {why}") for kind, count, why in self.kept]

    def _repr_html_(self) -> str:
        return html.of_report(self.title(), self.rows())

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class Accelerated:
    """What ``accelerate`` changed; print it. It tells the present, also after weights or layers were exchanged.

    Attributes:
        what: the class of the accelerated object.
        changed: the class before and the class after, by the component's name.
        kept: the class of each component that was left alone though it is a scheduler or a network, and why.
        networks: a report of each network, by the component's name; under "" that of the object itself.
    """

    what: str
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    networks: dict[str, NetworkReport] = field(default_factory=dict)

    def __str__(self) -> str:
        if "" in self.networks:
            return str(self.networks[""])
        lines = [f"{self.what}:"]
        lines += [f"  {name}: {before} -> {after}" for name, (before, after) in self.changed.items()]
        lines += [f"  {name}: {kept}, as it was" for name, kept in self.kept.items()]
        for name, report in self.networks.items():
            lines += [f"  {line}" for line in f"{name}: {report}".splitlines()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(name, f"{before} → {after}") for name, (before, after) in self.changed.items()]
        rows += [(name, f"{kept}, as it was") for name, kept in self.kept.items()]
        own = [report._repr_html_() for report in self.networks.values()]
        return "".join(([html.of_report(self.what, rows)] if rows else []) + own)


def class_name(value: Any) -> str:
    return f"{type(value).__module__.split('.')[0]}.{type(value).__name__}"
