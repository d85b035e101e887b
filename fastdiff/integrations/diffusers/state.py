"""The steps of a scheduler: the rows of the plans made for its list, and the tensors that they run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.noise import NoiseKey, noise_key
from fastdiff.ops.backend import choose
from fastdiff.ops.randn import randn
from fastdiff.ops.update import BoundUpdate, bind, update
from fastdiff.ops.update.operands import Operands
from fastdiff.plan.plan import COLUMNS, SLOTS, Plan


def version_of(value: Any) -> Any:
    """A number that changes where a tensor is edited in place.

    Tensors made under torch.inference_mode have none: those on the CPU are compared by their values.
    """
    if not isinstance(value, Tensor):
        return value
    if not value.is_inference():
        return value._version
    return value.tolist() if value.device.type == "cpu" else None


class Rows:
    """A plan for the steps from number ``start`` of a list on, as the tables that the update reads."""

    def __init__(self, plan: Plan, start: int, second: str | None) -> None:
        self.plan, self.start = plan, start
        self.table = plan.table().clone()
        self.table[:, COLUMNS.index("next_c_in")] = 1.0  # the network's input is made outside
        self.table[:, COLUMNS.index("draw")] += start
        self.reads_anchor = any(row.uses("anchor") for row in plan)
        # What a step brings out beside x': x̂_0, nothing, or what rows write to an anchor that none reads.
        anchors = any(row.anchor is not None for row in plan)
        self.second = "anchor" if anchors and not self.reads_anchor else second
        self.learned_variance = plan.learned_variance
        self.end = start + len(plan)

    def layout(self, index: int) -> list[tuple[tuple[int, ...], int | None]]:
        """The slots that the rows before step ``index`` read and write."""
        return [(row.reads, row.write) for row in self.plan.rows[: max(0, index - self.start)]]

    def on(self, device: torch.device) -> Tensor:
        """The float32 table on a device; the copy does not wait for it."""
        return self.table.to(torch.float32).to(device, non_blocking=True)


class Steps:
    """The rows of a scheduler's list, and the tensors that they run on.

    Attributes:
        times, sigmas: the list's timesteps, and σ where it has them, on the host.
        places: the number of each timestep in the list.
        seen: the tensors that the plans come from, as they were when they were last read (``changed``).
        base, itemsize: where the timesteps lie, and the bytes of one; 0 where they have no addresses.
        start: the number of the step that the run began with, None before it began.
        key: the seed and sample numbers of the noise stream where the steps' noise is ours, as arguments of noise_key.
        rows, earlier: the plans made, by their steps' options, and those made before a tensor was changed.
        state: the anchor and the slots, by name, between steps.
        bound, bound_rows, shape, device: the last step's update, and what it was made for.
    """

    rows: dict[tuple[Any, ...], Rows]
    earlier: dict[tuple[Any, ...], Rows]
    seen: list[tuple[str, Any, Any]]
    start: int | None
    state: dict[str | int, Tensor]
    bound: BoundUpdate | None
    bound_rows: Rows | None
    shape: torch.Size | None
    device: torch.device | None

    def __init__(self) -> None:
        self.key: dict[str, Any] | None = None
        self.times: list[float] = []
        self.sigmas: list[float] = []
        self.places: dict[float, int] = {}
        self.base = self.itemsize = 0
        self.forget()

    def changed(self, attributes: dict[str, Any]) -> bool:
        """Whether one of the tensors that the plans come from was replaced, or edited in place, since it was read."""
        for name, value, version in self.seen:
            if attributes[name] is not value:
                return True
            if (value._version if type(version) is int else version_of(value)) != version:
                return True
        return not self.seen

    def read(self, attributes: dict[str, Any], names: tuple[str, ...]) -> None:
        """Read a scheduler's tensors of these names (this waits for their device).

        Plans are made anew. A run goes on with its history if its list is as long as before: σ may change in its midst.
        """
        timesteps, sigmas = attributes.get("timesteps"), attributes.get("sigmas")
        times = [] if timesteps is None else timesteps.tolist()
        values = [] if sigmas is None else sigmas.tolist()
        if (len(times), len(values)) != (len(self.times), len(self.sigmas)):
            self.forget()
        self.earlier, self.rows = self.earlier | self.rows, {}
        self.unbind()
        self.times, self.sigmas = times, values
        self.places = {t: i for i, t in enumerate(times)}
        self.base = self.itemsize = 0
        if timesteps is not None and timesteps.is_contiguous():
            self.base, self.itemsize = timesteps.data_ptr(), timesteps.element_size()
        present = [(name, attributes[name]) for name in names if attributes.get(name) is not None]
        self.seen = [(name, value, version_of(value)) for name, value in present]

    def forget(self) -> None:
        """Begin anew: no plan, no history."""
        self.rows, self.earlier, self.seen = {}, {}, []
        self.start, self.state = None, {}
        self.unbind()

    def unbind(self) -> None:
        self.bound = self.bound_rows = self.shape = self.device = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: the run's state, but no addresses, and no tables, which can be made again."""
        copied = Steps()
        copied.key, copied.times, copied.sigmas = self.key, self.times, self.sigmas
        copied.start, copied.state = self.start, self.state
        return copied.__dict__

    # ---- one step

    def bind(self, rows: Rows, index: int, x: Tensor, thresholds: bool) -> BoundUpdate:
        """The update for the steps of these rows and this shape, from step ``index`` on."""
        key = NoiseKey()
        if self.key is not None:
            key = noise_key(x.shape[0], torch.device("cpu"), **self.key)
            if key.seeds is not None and key.samples is not None:
                seeds, samples = (ids.to(x.device, non_blocking=True) for ids in (key.seeds, key.samples))
                key = NoiseKey(seeds=seeds, samples=samples)
        o = Operands(x, x, rows.on(x.device), key, host_table=rows.table)
        if rows.reads_anchor:
            o.anchor = o.anchor_out = self.kept("anchor", rows, index, x)
        for slot in rows.plan.slots_used:
            o.slots[slot] = o.slots_out[slot] = self.kept(slot, rows, index, x)
        if thresholds:
            o.clip = torch.ones((x.shape[0], 2), device=x.device)
        self.bound = bind(o, choose("auto", x.device.type))
        self.bound_rows, self.shape, self.device = rows, x.shape, x.device
        return self.bound

    def kept(self, name: str | int, rows: Rows, index: int, x: Tensor) -> Tensor:
        """A tensor of the history, new where the run begins."""
        known = self.state.get(name)
        if index == rows.start or known is None:
            if index != rows.start and not self.state:
                raise ValueError(
                    f"step {index} needs the outputs of the steps before it, which this scheduler never saw"
                )
            known = torch.zeros_like(x)
        elif known.shape != x.shape or known.device != x.device:
            raise ValueError(
                f"sample must stay {list(known.shape)} on {known.device} from a run's first step to its last; "
                f"got {list(x.shape)} on {x.device}"
            )
        self.state[name] = known = known.detach().to(x.dtype)
        return known

    def run(
        self, rows: Rows, index: int, x: Tensor, m: Tensor, variance: Tensor | None, z: Tensor | None,
        clip: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Run step ``index`` on checked tensors: x' and the second result, "x0" or "anchor", both new."""
        call = self.bound
        if call is None or rows is not self.bound_rows or x.shape != self.shape or x.device != self.device:
            call = self.bind(rows, index, x, clip is not None)
        out, other = torch.empty_like(x), None
        call.set_state(x, out)
        if rows.second is not None:
            other = torch.empty_like(x)
            if rows.second == "x0":
                call.set_results(other, call.operands.anchor)
            else:
                call.set_results(None, other)
        call.set_outputs((m,), variance)
        call.set_noise(z)
        if clip is not None:
            bounds = call.operands.clip
            assert bounds is not None
            bounds.copy_(clip)
        call(index - rows.start)
        return out, other

    def run_functional(
        self, rows: Rows, index: int, x: Tensor, m: Tensor, z: Tensor | None, clip: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same for float64, for gradients and under torch.compile: through the functional operator."""
        row = rows.plan[index - rows.start]
        slots: list[Tensor | None] = [None] * SLOTS
        for slot in rows.plan.slots_used:
            slots[slot] = self.kept_graph(slot, rows, index, x)
        anchor = self.kept_graph("anchor", rows, index, x) if rows.reads_anchor else None
        if z is None and row.uses("z"):
            z = randn(tuple(x.shape), draw=index, stream=row.stream, device=x.device, **(self.key or {})).to(x.dtype)
        done = update(
            x, m, rows.plan, index - rows.start, anchor=anchor, slots=slots, noise=z,
            clip=None if clip is None else clip.to(x.dtype), return_x0=rows.second == "x0",
        )  # fmt: skip
        if rows.reads_anchor and done.anchor is not None:
            self.state["anchor"] = done.anchor
        if row.write is not None:
            assert done.slot is not None
            self.state[row.write] = done.slot
        self.unbind()
        return done.x, {"x0": done.x0, "anchor": done.anchor, None: None}[rows.second]

    def kept_graph(self, name: str | int, rows: Rows, index: int, x: Tensor) -> Tensor:
        known = self.state.get(name)
        if index > rows.start and known is not None and known.shape == x.shape and known.dtype == x.dtype:
            return known  # with its graph
        return self.kept(name, rows, index, x)
