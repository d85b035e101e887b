"""One run of a plan: its buffers, which stay where they are from the first row to the last, and its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.draws import Draws
from fastdiff.guidance import Guidance
from fastdiff.ops.update import bind, split_outputs
from fastdiff.ops.update.operands import Operands
from fastdiff.plan import SLOTS, Plan


@dataclass(frozen=True)
class State:
    """The state of a run after a row: what ``resume=`` needs to go on, to the bit.

    Attributes:
        x: float32 [B, …].
        x0: the row's x̂_0, like x.
        anchor: the saved x, or None where the plan has none.
        slots: the history: four entries, tensors or None.
        row: the number of the plan's next row.
    """

    x: Tensor
    x0: Tensor | None
    anchor: Tensor | None
    slots: tuple[Tensor | None, ...]
    row: int


@dataclass(frozen=True)
class Network:
    """A network and what it takes: where it is, its dtype, and the memory format of its input."""

    model: Callable[..., Any]
    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format


class Run:
    """One run of a plan over the state ``x`` [B, …], float32, from row ``start`` on."""

    def __init__(
        self,
        network: Network,
        plan: Plan,
        x: Tensor,
        start: int,
        draws: Draws,
        guidance: Guidance,
        backend: str,
        *,
        keeps_x0: bool = False,
        progress: bool = False,
    ) -> None:
        self.network, self.plan, self.x, self.start = network, plan, x, start
        self.draws, self.guidance, self.backend, self.progress = draws, guidance, backend, progress
        self.batch = len(x)
        device, dtype = network.device, network.dtype
        table = plan.table(guidance.weights)
        stacked = (self.batch * guidance.calls, *x.shape[1:])
        times = torch.tensor(plan.timesteps, dtype=torch.float64)[:, None].expand(-1, stacked[0])
        self.times = times.to(torch.int64 if plan.integer_timesteps else torch.float32).to(device)
        self.row_times = self.times.unbind()
        # The network reads x itself where that is what it takes; else the update writes its input as it goes.
        self.shares_x = (
            dtype == torch.float32
            and network.layout == torch.contiguous_format
            and guidance.calls == 1
            and all(row.c_in == 1 for row in plan)
        )
        self.net_in = x
        if not self.shares_x:
            self.net_in = torch.empty(stacked, dtype=dtype, device=device, memory_format=network.layout)
        self.nonfinite = torch.full((1,), len(plan), dtype=torch.int64, device=device)
        self.operands = o = Operands(
            x, x, table.to(torch.float32).to(device), draws.key, host_table=table, nonfinite=self.nonfinite
        )
        if not self.shares_x:
            o.model_input = self.net_in[: self.batch]
        if plan.uses_anchor:
            o.anchor = o.anchor_out = torch.zeros_like(x)
        for slot in plan.slots_used:
            o.slots[slot] = o.slots_out[slot] = torch.zeros_like(x)
        if guidance.rescale:
            o.gain = torch.ones(self.batch, device=device)
        if keeps_x0:
            o.x0_out = torch.empty_like(x)
        self.update = bind(o, backend)

    # ---- one row

    def first_input(self) -> None:
        """Make the network's input of the first row; the rows' updates make the others."""
        if not self.shares_x and self.start < len(self.plan):
            self.net_in[: self.batch].copy_(self.x * self.plan[self.start].c_in)
            self.stack()

    def call(self, times: Tensor) -> None:
        """Call the network and hand its outputs to the update."""
        version = self.net_in._version
        out = self.network.model(self.net_in, times, **self.guidance.kwargs)
        if self.shares_x and self.net_in._version != version:
            raise ValueError("model changed its input in place; it must not, since that is the sampler's state")
        out = out if isinstance(out, Tensor) else _first_tensor(out)
        if out.stride() != self.net_in.stride() and _share_memory(out, self.net_in):
            out = out.clone()  # a view of the input, which the update would overwrite while it reads
        count = self.guidance.calls
        if out.ndim == 0 or out.shape[0] != self.batch * count:
            raise ValueError(f"model must return [{self.batch * count}, …] for its input; got {list(out.shape)}")
        outputs = (out,) if count == 1 else out.chunk(count) if self.batch else (out,) * count
        outputs, variance = split_outputs(
            outputs, self.x.shape, self.plan.learned_variance, self.network.device, "the model's outputs"
        )
        if self.operands.gain is not None:
            self.guidance.gain(outputs, self.operands.gain)
        self.update.set_outputs(outputs, variance)

    def step(self, index: int) -> None:
        """Run row ``index`` eagerly."""
        row = self.plan[index]
        if row.calls_model:
            self.call(self.row_times[index])
        else:
            self.update.set_outputs(())
        if not self.draws.from_stream:
            self.update.set_noise(self.draws.noise(row.stream, index, self.backend) if row.uses("z") else None)
        self.update(index)
        self.stack()

    def stack(self) -> None:
        """Repeat the network's input for the guided calls."""
        if self.guidance.calls > 1:
            for k in range(1, self.guidance.calls):
                self.net_in[k * self.batch : (k + 1) * self.batch].copy_(self.net_in[: self.batch])

    def check_finite(self, rows: int) -> None:
        """Raise if a network output was not finite in the first ``rows`` rows. Waits for the device."""
        row = int(self.nonfinite)
        if row < rows:
            t = self.plan[row].t
            raise FloatingPointError(f"the model returned NaN or infinity at row {row} of {len(self.plan)} (t = {t:g})")

    # ---- all rows

    @torch.no_grad()
    def finish(self, callback: Callable[[State], Any] | None, cuda_graph: bool | str) -> Tensor:
        """Run every row and return x."""
        from fastdiff.graph import stepping

        self.first_input()
        with evaluating(self.network.model), stepping(self, cuda_graph if callback is None else False) as step:
            for index in self._bar():
                step(index)
                if self.network.device.type == "cpu":
                    self.check_finite(index + 1)
                if callback is not None:
                    callback(self.state(index + 1))
        self.check_finite(len(self.plan))
        return self.x

    def states(self, callback: Callable[[State], Any] | None) -> Iterator[State]:
        """Run the rows one by one, yielding the state after each. Gradients are off only while a row runs."""
        with evaluating(self.network.model):
            with torch.no_grad():
                self.first_input()
            for index in self._bar():
                with torch.no_grad():
                    self.step(index)
                    if self.network.device.type == "cpu":
                        self.check_finite(index + 1)
                    state = self.state(index + 1)
                if callback is not None:
                    callback(state)
                yield state
        self.check_finite(len(self.plan))

    def _bar(self) -> Any:
        rows = range(self.start, len(self.plan))
        if not self.progress:
            return rows
        from tqdm import tqdm

        return tqdm(rows, desc=self.plan.name, unit="step")

    # ---- states

    def state(self, row: int) -> State:
        """A copy of the state, ``row`` being the next to run."""
        o = self.operands
        slots = tuple(None if slot is None else slot.clone() for slot in o.slots)
        x0, anchor = (None if t is None else t.clone() for t in (o.x0_out, o.anchor))
        return State(self.x.clone(), x0, anchor, slots, row)

    def restore(self, state: State) -> None:
        """Take the anchor and the slots of an earlier run."""
        names = ["resume.anchor", *(f"resume.slots[{i}]" for i in range(SLOTS))]
        pairs = zip(names, [self.operands.anchor, *self.operands.slots], [state.anchor, *state.slots], strict=True)
        for name, mine, saved in pairs:
            if mine is None:
                continue
            if not isinstance(saved, Tensor) or saved.shape != mine.shape:
                raise ValueError(f"{name} must be a tensor of shape {list(mine.shape)}: is the state of another plan?")
            mine.copy_(saved)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _first_tensor(out: Any) -> Tensor:
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return out[0]
    sample = getattr(out, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise TypeError(
        "model must return a tensor, a tuple that starts with one, or an object whose .sample is one; "
        f"got {type(out).__name__}"
    )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A module that is in training mode, in eval mode for a while; each submodule's own flag comes back."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
