"""One run of a plan: its buffers, which stay where they are from the first row to the last, and what runs a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.noise import KNOWN, NoiseKey
from fastdiff.ops.alone import alone
from fastdiff.ops.update import bind
from fastdiff.ops.update.checks import split_outputs
from fastdiff.ops.update.deviance import blocks, log_probs
from fastdiff.ops.update.operands import Operands
from fastdiff.ops.update.reference import learned_sigma
from fastdiff.plan.row import SLOTS, Reuse, Row
from fastdiff.sampling.accelerated import is_batch_invariant, planned_embeddings
from fastdiff.sampling.guidance import P, Q, mixed, row_outputs
from fastdiff.sampling.keywords import leaves, mapped
from fastdiff.sampling.model import first_tensor, mismatch
from fastdiff.sampling.request import Request
from fastdiff.sampling.reuse import kept_deep, kept_output
from fastdiff.sampling.state import State, plan_identity
from fastdiff.schedules.level import Level


@dataclass
class Buffers:
    """What a run reads and keeps, at fixed addresses: what a captured step must be given anew for another run.

    Everything that differs between two runs of one kind stands here; a CUDA graph copies all of it, and two runs are of
    one kind only where these have one signature.
    """

    x: Tensor  # float32 [B, …], the state
    times: Tensor  # int64 or float32 [rows, stacked batch]
    table: Tensor  # float32 [rows, columns]
    nonfinite: Tensor  # int64 [1]: the first row whose network output is not finite
    seeds: Tensor | None  # None in an eager run of one seed
    samples: Tensor | None
    anchor: Tensor | None
    slots: list[Tensor | None]
    mask: Tensor | None
    known: Tensor | None
    calls: tuple[Mapping[str, Any], ...]  # the keywords of a guided row's calls
    plain: Mapping[str, Any]  # of a row's one call
    embeddings: tuple[Tensor, ...] = ()  # an accelerated network's, of all rows
    output: Tensor | None = None  # float32 [outputs·B, …], the last call's, for rows that reuse it
    deep: Tensor | None = None  # [outputs·B, …], the last whole call's features; made by the first one

    @classmethod
    def of(cls, request: Request) -> Buffers:
        """The buffers of a run that is to begin."""
        plan, x, guidance, device = request.plan, request.x, request.guidance, request.network.device
        times = torch.tensor(plan.timesteps, dtype=torch.float64, device="cpu")[:, None]
        times = times.expand(-1, len(x) * guidance.stacked)
        key = request.noise.key
        slots: list[Tensor | None] = [None] * SLOTS
        for slot in plan.slots_used:
            slots[slot] = torch.zeros_like(x)
        return cls(
            x=x,
            times=times.to(torch.int64 if plan.integer_timesteps else torch.float32).to(device),
            table=plan.device_table(guidance.weights).to(device),
            nonfinite=torch.full((1,), len(plan.rows), dtype=torch.int64, device=device),
            seeds=key.seeds,
            samples=key.samples,
            anchor=torch.zeros_like(x) if plan.uses_anchor else None,
            slots=slots,
            mask=request.mask,
            known=request.known,
            calls=guidance.calls,
            plain=guidance.plain,
            output=kept_output(plan, guidance, x) if "output" in plan.reused else None,
        )

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Every tensor, and every other value of a keyword, with its name."""
        for field in fields(self):
            yield from leaves(field.name, getattr(self, field.name))

    def clone(self) -> Buffers:
        """The same with every tensor copied."""

        def cloned(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        return Buffers(**{field.name: mapped(getattr(self, field.name), cloned) for field in fields(self)})

    def copy_from(self, other: Buffers) -> None:
        """Take every number of other buffers of this signature."""
        for (_, mine), (_, others) in zip(self.entries(), other.entries(), strict=True):
            if isinstance(mine, Tensor) and others is not None:  # a run that begins has no deep features yet
                mine.copy_(others)

    def signature(self, device: torch.device) -> tuple[Any, ...] | None:
        """What two runs must share to share buffers on a device; None where a keyword's value cannot be compared.

        Of a tensor that lies elsewhere it includes the numbers, which kernels take by value.
        """
        parts: list[tuple[Any, ...]] = []
        for name, value in self.entries():
            if name in ("seeds", "samples"):
                continue  # a graph has both, of the batch's size, whether or not an eager run has
            if not isinstance(value, Tensor):
                parts.append((name, value))
                continue
            parts.append((name, tuple(value.shape), value.dtype, value.device, value.stride()))
            if value.device.type == "cpu" != device.type:
                parts.append((name, *value.flatten().tolist()))
        try:
            hash(tuple(parts))
        except TypeError:
            return None
        return tuple(parts)


class Stepper:
    """A run of a request: ``step(row)`` for each of ``rows``, then ``finish``.

    A row without a network call leaves mask, known, clip and gain alone. ``buffers`` are the run's own unless given:
    a captured step's stay where they are when another run's numbers are copied in.
    """

    x: Tensor  # the state, float32 [B, …]
    rows: range  # the numbers of the rows to run

    def __init__(self, request: Request, buffers: Buffers | None = None, keeps_x0: bool = False) -> None:
        self.request, self.plan, self.start = request, request.plan, request.start
        self.rows = range(self.start, len(self.plan.rows))
        self.network, self.guidance, self.noise = request.network, request.guidance, request.noise
        self.deep = request.deep
        self.buffers = b = Buffers.of(request) if buffers is None else buffers
        self.x, self.batch = b.x, len(b.x)
        self.calls = row_outputs(self.plan, self.guidance.outputs, self.guidance.weights)
        self.row_times = b.times.unbind()
        # The network reads x itself where that is what it takes; else the update writes its input as it goes.
        self.shares_x = (
            self.network.dtype == torch.float32
            and self.network.layout == torch.contiguous_format
            and self.guidance.stacked == 1
            and self.plan.shows_x
        )
        self.invariant = is_batch_invariant(self.network.model)
        self.planned, b.embeddings = planned_embeddings(self.network.model, b.times)
        self.net_in = b.x
        if not self.shares_x:
            stacked = (self.batch * self.guidance.stacked, *b.x.shape[1:])
            self.net_in = torch.empty(
                stacked, dtype=self.network.dtype, device=self.network.device, memory_format=self.network.layout
            )
        key = self.noise.key if b.seeds is None else NoiseKey(seeds=b.seeds, samples=b.samples)
        self.operands = o = Operands(
            b.x, b.x, b.table, key, anchor=b.anchor, anchor_out=b.anchor, slots=list(b.slots), slots_out=list(b.slots),
            mask=b.mask, known=b.known, nonfinite=b.nonfinite,
            host_table=self.plan.table(self.guidance.weights),
            model_input=None if self.shares_x else self.net_in[: self.batch],
        )  # fmt: skip
        if self.guidance.rescale:
            o.gain = torch.ones(self.batch, dtype=torch.float32, device=b.x.device)
        if request.thresholding is not None:
            o.clip = torch.ones(self.batch, 2, dtype=torch.float32, device=b.x.device)
        if request.classifier is not None:
            o.gradient = torch.zeros_like(b.x)
        if keeps_x0:
            o.x0_out = torch.empty_like(b.x)
        self.log_probs: Tensor | None = None  # float32 [rows, B], known of the first ``known_rows`` rows
        if request.return_log_prob:
            self.elements, self.known_rows = b.x[:1].numel(), self.start
            self.log_probs = b.x.new_zeros(len(self.plan), self.batch)
            o.deviance = b.x.new_zeros(len(self.plan), self.batch, blocks(self.elements))
        self.update = self.change = bind(o, request.backend)
        if 0 in self.calls:
            # What rows without a network call do, beside noise: nothing but their linear combination.
            bare = replace(o, gain=None, clip=None, gradient=None, mask=None, known=None, x0_out=None)
            self.change = bind(bare, request.backend)
        # The first row at which something other than the network was not finite, by who made it; kept on a GPU.
        self.culprits: dict[str, Tensor] = {}
        if request.resume is not None and buffers is None:
            self._restore(request.resume)
        self.first_input()

    # ---- one row

    def first_input(self) -> None:
        """Make the network's input of the first row; the rows' updates make the others."""
        if not self.shares_x and self.start < len(self.plan):
            self.net_in[: self.batch].copy_(self.x * self.plan[self.start].c_in)
            self.stack()

    def step(self, index: int) -> None:
        """Run row ``index`` eagerly."""
        row = self.plan.rows[index]
        update = self.update if row.calls_model else self.change
        if row.calls_model:
            variance = self.call(self.row_times[index], index, self.calls[index], row.reuse)
            if self.request.classifier is not None and row.uses("g"):
                self.guide(row, index, variance)
        else:
            update.set_outputs(())
        if self.noise.draw is not None:
            self.draw(row, index)
        update(index)
        if self.guidance.stacked > 1:
            self.stack()

    def checked_step(self, index: int) -> None:
        """``step``; on a CPU, where that waits for nothing, FloatingPointError for a network output not finite."""
        self.step(index)
        if self.network.device.type == "cpu":
            self.check_finite(index + 1)

    def call(self, times: Tensor, index: int | Tensor, count: int, reuse: Reuse | None = None) -> Tensor | None:
        """Call the network for ``count`` outputs and hand them to the update of row ``index``; or, where the row reuses
        a call, the last outputs.

        Returns the learned variance's channels, where the row has a use for them.
        """
        kept = None if self.buffers.output is None else self.buffers.output[-count * self.batch or None :]
        if reuse == "output":
            assert kept is not None
            raw: tuple[Tensor, ...] = kept.chunk(count) if self.batch else (kept,) * count
        else:
            raw = self.outputs(times, index, count, reuse)
        outputs, variance = split_outputs(
            raw, self.x.shape, self.plan.learned_variance, self.network.device, "the model's outputs"
        )
        if kept is not None and reuse != "output":
            for k, output in enumerate(raw):
                kept[k * self.batch : (k + 1) * self.batch].copy_(output)
        if not self.plan.reads_variance:
            variance = None
        if (self.operands.gain is not None or self.operands.clip is not None) and self.x.numel():
            self.reduce(outputs, index)
        self.update.set_outputs(outputs, variance)
        return variance

    def outputs(self, times: Tensor, index: int | Tensor, count: int, reuse: Reuse | None) -> tuple[Tensor, ...]:
        """What the network returns for a row's ``count`` outputs, [B, …] each."""
        x, keywords = self.net_in, self.buffers.calls if count > 1 else (self.buffers.plain,)
        if count < self.guidance.stacked:
            x, times = x[: self.batch], times[: self.batch]
        # Of the deep features that are kept, those of the conditional call are the last.
        begins = [(self.guidance.outputs - count + k) * self.batch for k in range(len(keywords))]
        with nullcontext() if self.planned is None else self.planned.at(index):
            if len(keywords) == 1:
                model = self.model(reuse, begins[0])
                out = self.output(model, x, times, keywords[0], self.batch * count, self.shares_x)
                return (out,) if count == 1 else out.chunk(count) if self.batch else (out,) * count
            parts = []
            for kwargs, begin in zip(keywords, begins, strict=True):
                out = self.output(self.model(reuse, begin), x, times, kwargs, self.batch, True)
                # A network may return the same memory each time: all but the last output are copied.
                parts.append(out if begin == begins[-1] else out.clone())
            return tuple(parts)

    def output(
        self, model: Callable[..., Any], x: Tensor, times: Tensor, kwargs: Mapping[str, Any], size: int, shared: bool
    ) -> Tensor:
        """The network's output [size, …] for its input; ValueError where it changed one that is ``shared``."""
        version = x._version if shared else 0
        try:
            out = model(x, times, **kwargs)
        except (RuntimeError, IndexError) as error:
            if why := mismatch(error, x, times):
                raise RuntimeError(f"{error}: {why}") from error
            raise
        if shared and x._version != version:
            raise ValueError(
                "model changed its input in place; it must not, since that is the sampler's state, or another call's"
            )
        out = out if isinstance(out, Tensor) else first_tensor(out)
        if out.stride() != x.stride() and _share_memory(out, x):
            out = out.clone()  # a view of the input, which the update would overwrite while it reads
        if out.ndim == 0 or out.shape[0] != size:
            raise ValueError(f"model must return [{size}, …] for its input; got {list(out.shape)}")
        return out

    def model(self, reuse: Reuse | None, begin: int) -> Callable[..., Any]:
        """The network; of a plan with deep rows, so called that it keeps its deep features or, in a deep row, takes the
        kept ones, from entry ``begin`` on.
        """
        b, deep = self.buffers, self.deep
        if deep is None:
            return self.network.model

        def call(x: Tensor, times: Tensor, **kwargs: Any) -> Any:
            if reuse == "deep":
                assert b.deep is not None
                version = b.deep._version
                out = deep(x, times, b.deep[begin : begin + len(x)], **kwargs)[0]
                if b.deep._version != version:
                    raise ValueError("model changed its deep features in place; later rows take them again")
                return out
            out, features = deep(x, times, None, **kwargs)
            b.deep = kept_deep(b.deep, features, begin, len(x), self.guidance.outputs * self.batch)
            return out

        return call

    def reduce(self, outputs: tuple[Tensor, ...], index: int | Tensor) -> None:
        """What a row needs to know of each sample as a whole: guidance rescale's gain, thresholding's bounds."""
        o = self.operands
        row = o.table[index] if isinstance(index, int) else o.table.index_select(0, index)[0]
        m = mixed(outputs, row)
        if o.gain is not None:
            if len(outputs) > 1:
                self.each(self.guidance.gain, mixed(outputs[-1:], row), m, out=o.gain)
            else:
                o.gain.fill_(1.0)
            m = m * o.gain[:, None]
        if self.request.thresholding is not None and o.clip is not None:
            x0 = self.x.view(self.batch, -1) * row[P] + m * row[Q]
            self.each(self.request.thresholding.bounds, x0, out=o.clip)

    def each(self, function: Callable[..., None], *of_samples: Tensor, out: Tensor) -> None:
        """``function`` of tensors [B, …] and ``out``; sample by sample, where the network's bits do not depend on the
        batch: torch sums along a dimension in an order that does.
        """
        if not self.invariant:
            function(*of_samples, out)
            return
        for i in range(self.batch):
            one = alone(out, i)
            function(*(alone(t, i) for t in of_samples), one)
            out[i : i + 1].copy_(one)

    def guide(self, row: Row, index: int, variance: Tensor | None) -> None:
        """Take the classifier's gradient at the state, times the network's variance where the row has a learned one."""
        classifier, g = self.request.classifier, self.operands.gradient
        assert classifier is not None
        assert g is not None
        classifier.gradient(self.x, self.row_times[index][: self.batch], g)
        self.watch("cond_fn", g, index)
        if variance is not None and row.variance is not None and row.log_variance is not None:
            g.mul_(learned_sigma(variance.to(torch.float32), *row.log_variance).square())

    def draw(self, row: Row, index: int) -> None:
        """Take the row's noise, and a known image's, from ``generator`` or ``noise_fn``."""
        z = known = None
        if row.uses("z"):
            z = self.noise.noise(row.stream, index, self.request.backend)
            self.watch("noise_fn", z, index)
        masked = row.calls_model and self.operands.mask is not None and index + 1 < len(self.plan)
        if masked and self.plan[index + 1].sigma != 0:
            known = self.noise.noise(KNOWN, index, self.request.backend)
            self.watch("noise_fn", known, index)
        (self.update if row.calls_model else self.change).set_noise(z, known)

    def stack(self) -> None:
        """Repeat the network's input for the guided calls."""
        for k in range(1, self.guidance.stacked):
            self.net_in[k * self.batch : (k + 1) * self.batch].copy_(self.net_in[: self.batch])

    # ---- whether all is finite

    def watch(self, author: str, tensor: Tensor, index: int) -> None:
        """Raise if what ``author`` made for row ``index`` is not finite; on a GPU remember it, without waiting."""
        if tensor.device.type == "cpu":
            if not np.isfinite(tensor.numpy()).all():
                raise self._not_finite(author, index)
            return
        first = self.culprits.setdefault(author, torch.full_like(self.buffers.nonfinite, len(self.plan)))
        first.copy_(torch.where(tensor.isfinite().all(), first, first.clamp(max=index)))

    def check_finite(self, rows: int) -> None:
        """Raise FloatingPointError if something was not finite in the first ``rows`` rows. Waits for the device."""
        row, author = int(self.buffers.nonfinite), "the model"
        for name, first in self.culprits.items():
            if int(first) < row:
                row, author = int(first), name
        if row < rows:
            raise self._not_finite(author, row)

    def _not_finite(self, author: str, row: int) -> FloatingPointError:
        t, told = self.plan[row].t, ""
        before = [c for r in self.plan.rows[self.start : row] for c in (r.x, r.anchor, r.slot) if c is not None]
        reach = max((abs(value) for coefficients in before for value in coefficients.values()), default=0.0)
        if author != "noise_fn" and reach > 1e15:
            told = f"; the plan's numbers reach {reach:g} in earlier rows, which may have led its x beyond float32"
        return FloatingPointError(
            f"{author} returned NaN or infinity at row {row} of {len(self.plan)} (t = {t:g}){told}"
        )

    def finish(self) -> Tensor:
        """The state after the last row; FloatingPointError where it or a network output was not finite."""
        x, last = self.x, len(self.plan.rows)
        if x.device.type == "cpu":
            self.check_finite(last)
            finite = bool(np.isfinite(x.numpy()).all())  # torch's threads would hang in a forked child
        else:  # one number is read back, whatever it says
            word = int(torch.where(x.isfinite().all(), self.buffers.nonfinite, self.buffers.nonfinite - last - 1))
            finite = word >= 0
            if not finite or word < last or self.culprits:
                self.check_finite(last)
        if not finite:
            raise FloatingPointError(
                f"the state after the last row of the plan {self.plan.name!r} holds NaN or infinity, though every "
                "network output was finite: its numbers went beyond float32"
            )
        return x

    # ---- states

    def log_prob(self, rows: int) -> Tensor | None:
        """log p(x' | x) of the first ``rows`` rows, float32 [rows, B]; None where it was not asked for."""
        sums = self.operands.deviance
        if self.log_probs is None or sums is None:
            return None
        if rows > self.known_rows:
            new = slice(self.known_rows, rows)
            drawn = [row.x.get("z", 0.0) for row in self.plan.rows[new]]
            self.log_probs[new] = log_probs(sums[new], drawn, self.elements)
            self.known_rows = rows
        return self.log_probs[:rows].clone()

    def numbered(self) -> Buffers:
        """The buffers with seeds and sample numbers as tensors [B], as a captured step reads them."""
        seeds, samples = self.noise.key.tensors(self.batch, self.network.device)
        return replace(self.buffers, seeds=seeds, samples=samples)

    def state(self, row: int) -> State:
        """A copy of the state, ``row`` being the next to run."""
        b, x0 = self.buffers, self.operands.x0_out
        slots = tuple(None if slot is None else slot.clone() for slot in b.slots)
        anchor = None if b.anchor is None else b.anchor.clone()
        seen = x0 is not None and any(self.calls[self.start : row])
        level = None
        if row < len(self.plan):
            begins = self.plan[row]
            level = Level(float(begins.t), float(begins.alpha), float(begins.sigma), float(begins.c_in))
        return State(
            b.x.clone(), x0.clone() if seen and x0 is not None else None, anchor, slots, row, level,
            plan_identity(self.plan), self.noise.identity, self.log_prob(row),
            *(t if t is None else t.clone() for t in (b.output, b.deep)),
        )  # fmt: skip

    def _restore(self, state: State) -> None:
        """Take the anchor, the slots, the log-densities, the output and the deep features of an earlier run."""
        if self.log_probs is not None:
            saved, shape = state.log_prob, [state.row, self.batch]
            if not isinstance(saved, Tensor) or list(saved.shape) != shape:
                got = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
                raise ValueError(f"resume.log_prob must be a tensor of shape {shape}, one entry a row; got {got}")
            self.log_probs[: state.row] = saved
        b = self.buffers
        names = ["resume.anchor", "resume.output", *(f"resume.slots[{i}]" for i in range(SLOTS))]
        pairs = zip(names, [b.anchor, b.output, *b.slots], [state.anchor, state.output, *state.slots], strict=True)
        for name, mine, saved in pairs:
            if mine is None:
                continue
            if not isinstance(saved, Tensor) or saved.shape != mine.shape:
                raise ValueError(f"{name} must be a tensor of shape {list(mine.shape)}: is the state of another plan?")
            mine.copy_(saved)
        if self.deep is None:
            return
        count = self.guidance.outputs * self.batch
        if isinstance(state.deep, Tensor) and len(state.deep) == count:
            b.deep = state.deep.to(b.x.device, copy=True)
        elif state.deep is not None or (state.row < len(self.plan) and "deep" in self.plan.needs[state.row]):
            raise ValueError(f"resume.deep must be a tensor of shape [{count}, …]: is the state of another plan?")


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No gradients, and tensors that are no inference tensors: a run's are written to, and kept, from call to call."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
