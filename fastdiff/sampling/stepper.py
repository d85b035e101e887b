"""One run of a plan: its buffers, which stay where they are from the first row to the last, and its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import network as fast
from fastdiff.noise import KNOWN
from fastdiff.ops.update import bind
from fastdiff.ops.update.checks import split_outputs
from fastdiff.ops.update.operands import Operands
from fastdiff.ops.update.reference import learned_sigma
from fastdiff.plan.plan import SLOTS, Plan, Row
from fastdiff.sampling.classifier_guidance import Classifier
from fastdiff.sampling.guidance import Guidance, P, Q, mixed
from fastdiff.sampling.model import Network, evaluating, first_tensor
from fastdiff.sampling.noise_source import NoiseSource
from fastdiff.sampling.thresholding import Thresholding


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


class Run:
    """One run of a plan over the state ``x`` [B, …], float32, from row ``start`` on.

    ``mask`` and ``known`` are like x. A row without a network call leaves them alone, as it does clip and gain.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        x: Tensor,
        start: int,
        draws: NoiseSource,
        guidance: Guidance,
        backend: str,
        *,
        thresholding: Thresholding | None = None,
        classifier: Classifier | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        keeps_x0: bool = False,
        progress: bool = False,
    ) -> None:
        self.network, self.plan, self.x, self.start = network, plan, x, start
        self.draws, self.guidance, self.backend, self.progress = draws, guidance, backend, progress
        self.thresholding, self.classifier = thresholding, classifier
        self.batch = len(x)
        self.calls = guidance.row_calls(plan)  # how many times each row stacks the batch
        device, dtype = network.device, network.dtype
        table = plan.table(guidance.weights, guidance.interval)
        stacked = (self.batch * guidance.calls, *x.shape[1:])
        times = torch.tensor(plan.timesteps, dtype=torch.float64, device="cpu")[:, None].expand(-1, stacked[0])
        self.times = times.to(torch.int64 if plan.integer_timesteps else torch.float32).to(device)
        self.row_times = self.times.unbind()
        # The network reads x itself where that is what it takes; else the update writes its input as it goes.
        self.shares_x = (
            dtype == torch.float32
            and network.layout == torch.contiguous_format
            and guidance.calls == 1
            and all(row.c_in == 1 for row in plan)
        )
        # An accelerated network's time embedding, of all rows at once.
        accelerated = fast.network_of(network.model)
        with torch.no_grad():
            self.rows = None if accelerated is None else accelerated.rows(self.times[:, 0])
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
            o.gain = torch.ones(self.batch, dtype=torch.float32, device=device)
        if thresholding is not None:
            o.clip = torch.ones(self.batch, 2, dtype=torch.float32, device=device)
        if classifier is not None:
            o.gradient = torch.zeros_like(x)
        o.mask, o.known = mask, known
        if keeps_x0:
            o.x0_out = torch.empty_like(x)
        self.update = bind(o, backend)
        # What rows without a network call do, beside noise: nothing but their linear combination.
        bare = replace(o, gain=None, clip=None, gradient=None, mask=None, known=None)
        self.change = bind(bare, backend) if 0 in self.calls else self.update

    # ---- one row

    def first_input(self) -> None:
        """Make the network's input of the first row; the rows' updates make the others."""
        if not self.shares_x and self.start < len(self.plan):
            self.net_in[: self.batch].copy_(self.x * self.plan[self.start].c_in)
            self.stack()

    def call(self, times: Tensor, index: int | Tensor, count: int) -> Tensor | None:
        """Call the network with ``count`` stacked batches and hand its outputs to the update of row ``index``.

        Returns the learned variance's channels, where the plan has them.
        """
        with nullcontext() if self.rows is None else self.rows.at(index):
            return self._call(times, index, count)

    def _call(self, times: Tensor, index: int | Tensor, count: int) -> Tensor | None:
        version = self.net_in._version
        if count == self.guidance.calls:
            out = self.network.model(self.net_in, times, **self.guidance.kwargs)
        else:
            out = self.network.model(self.net_in[: self.batch], times[: self.batch], **self.guidance.plain)
        if self.shares_x and self.net_in._version != version:
            raise ValueError("model changed its input in place; it must not, since that is the sampler's state")
        out = out if isinstance(out, Tensor) else first_tensor(out)
        if out.stride() != self.net_in.stride() and _share_memory(out, self.net_in):
            out = out.clone()  # a view of the input, which the update would overwrite while it reads
        if out.ndim == 0 or out.shape[0] != self.batch * count:
            raise ValueError(f"model must return [{self.batch * count}, …] for its input; got {list(out.shape)}")
        outputs = (out,) if count == 1 else out.chunk(count) if self.batch else (out,) * count
        outputs, variance = split_outputs(
            outputs, self.x.shape, self.plan.learned_variance, self.network.device, "the model's outputs"
        )
        if (self.operands.gain is not None or self.operands.clip is not None) and self.x.numel():
            self.reduce(outputs, index)
        self.update.set_outputs(outputs, variance)
        return variance

    def reduce(self, outputs: tuple[Tensor, ...], index: int | Tensor) -> None:
        """What a row needs to know of each sample as a whole: guidance rescale's gain, thresholding's bounds."""
        o = self.operands
        row = o.table[index] if isinstance(index, int) else o.table.index_select(0, index)[0]
        m = mixed(outputs, row)
        if o.gain is not None:
            if len(outputs) > 1:
                self.guidance.gain(mixed(outputs[-1:], row), m, o.gain)
            else:
                o.gain.fill_(1.0)
            m = m * o.gain[:, None]
        if self.thresholding is not None and o.clip is not None:
            self.thresholding.bounds(self.x.view(self.batch, -1) * row[P] + m * row[Q], o.clip)

    def step(self, index: int) -> None:
        """Run row ``index`` eagerly."""
        row, times = self.plan[index], self.row_times[index]
        update = self.update if row.calls_model else self.change
        if row.calls_model:
            variance = self.call(times, index, self.calls[index])
            if self.classifier is not None and row.uses("g"):
                self.guide(row, times, variance)
        else:
            update.set_outputs(())
        if not self.draws.from_stream:
            z = self.draws.noise(row.stream, index, self.backend) if row.uses("z") else None
            known = row.calls_model and self.operands.mask is not None and index + 1 < len(self.plan)
            known = known and self.plan[index + 1].sigma != 0
            update.set_noise(z, self.draws.noise(KNOWN, index, self.backend) if known else None)
        update(index)
        self.stack()

    def guide(self, row: Row, times: Tensor, variance: Tensor | None) -> None:
        """Take the classifier's gradient at the state, times the network's variance where the row has a learned one."""
        g = self.operands.gradient
        assert self.classifier is not None
        assert g is not None
        self.classifier.gradient(self.x, times[: self.batch], g)
        if variance is not None and row.variance is not None and row.log_variance is not None:
            g.mul_(learned_sigma(variance.to(torch.float32), *row.log_variance).square_())

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

    def finish(self, callback: Callable[[State], Any] | None, cuda_graph: bool | str) -> Tensor:
        """Run every row and return x; among ``plain_tensors``."""
        from fastdiff.sampling.graph import stepping

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
            with plain_tensors():
                self.first_input()
            for index in self._bar():
                with plain_tensors():
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


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No gradients, and tensors that are no inference tensors: a run's are written to, and kept, from call to call."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
