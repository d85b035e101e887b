"""One CUDA graph for the whole step: network, guidance, update and step counter, replayed once a row.

A guidance interval makes two kinds of row, one stacked and one plain call, and so two graphs over the same buffers; so
do rows that reuse deep features. Rows that reuse an output launch their update without a graph.

A graph belongs to a module and a kind of run (shapes, dtypes, number of rows); it owns its buffers, into which a run's
state, table, timesteps, seeds and keywords are copied. A graph is leased to one run at a time: a second run at the same
time gets one of its own, or runs eagerly once the module has ``LIMIT`` of them. The least recently used is dropped.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdiff.plan.row import Reuse
from fastdiff.sampling.accelerated import fingerprint, is_accelerated, kept_weights
from fastdiff.sampling.stepper import Stepper

LIMIT = 4
_graphs: weakref.WeakKeyDictionary[nn.Module, list[Captured]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_capturing = threading.RLock()  # a capture waits for the whole device, which must not be while another is under way
_failed: list[torch.cuda.CUDAGraph] = []  # torch's allocator still points to them


@contextmanager
def stepping(run: Stepper) -> Iterator[Callable[[int], None]]:
    """What runs a row of ``run``: a graph's replay where one can be had, else ``run.checked_step``."""
    cuda_graph = run.request.cuda_graph
    captured = None
    if cuda_graph is not False and run.rows:
        reason = why_eager(run)
        if reason is None:
            captured = _lease(run, cuda_graph)
        elif cuda_graph is True:
            raise ValueError(f"cuda_graph=True cannot capture this run: {reason}")
    if captured is None:
        yield run.checked_step
        return
    try:
        captured.load(run)
        yield captured.step
        captured.unload(run)
    finally:
        captured.release()


def why_eager(run: Stepper) -> str | None:
    """Why a run cannot be captured, or None."""
    if run.network.device.type != "cuda":
        return "the device is no CUDA device"
    if not run.noise.from_stream:
        return "generator and noise_fn draw on the host"
    if run.request.classifier is not None:
        return "cond_fn runs eagerly"
    if not kinds(run):
        return "no row calls the network"
    if run.request.backend == "reference":
        return "the reference backend reads its rows on the host"
    if not isinstance(run.network.model, nn.Module):
        return "the model is no torch.nn.Module, so what it reads cannot be told"
    if run.buffers.signature(run.network.device) is None:
        return "model_kwargs hold values that are neither tensors nor hashable"
    if run.x.numel() == 0:
        return "the batch is empty"
    if torch.cuda.is_current_stream_capturing():
        return "the caller is capturing a graph already"
    return None


def _lease(run: Stepper, cuda_graph: bool | str) -> Captured | None:
    """A graph for a run that can be captured; None where it must run eagerly all the same."""
    model: Any = run.network.model
    key = _key(run)
    with _lock:
        mine = _graphs.setdefault(model, [])
        for captured in mine:
            if captured.key == key and not captured.leased:
                captured.leased = True
                mine.remove(captured)
                mine.append(captured)
                return captured
        full = sum(captured.leased for captured in mine) >= LIMIT
        refused = key in _refused.get(model, ())
    if full and cuda_graph is True:
        raise ValueError(f"cuda_graph=True cannot capture this run: {LIMIT} graphs of this model are in use")
    if full or (refused and cuda_graph == "auto"):
        return None
    try:
        captured = Captured(run, key, check=cuda_graph == "auto" and not is_accelerated(model))
    except (RuntimeError, ValueError) as error:
        if cuda_graph is True:
            raise RuntimeError(f"cuda_graph=True: the step could not be captured: {error}") from error
        warnings.warn(f"fastdiff runs this model without a CUDA graph: {error}", stacklevel=5)
        with _lock:
            _refused.setdefault(model, set()).add(key)
        return None
    with _lock:
        mine = _graphs.setdefault(model, [])
        mine.append(captured)
        idle = [other for other in mine if not other.leased][: max(len(mine) - LIMIT, 0)]
        for other in idle:
            mine.remove(other)
    for other in idle:
        other.used.synchronize()  # its memory is given to others
    return captured


def forget(model: nn.Module) -> None:
    """Drop the graphs of a module whose forward was exchanged."""
    with _lock:
        graphs = _graphs.pop(model, [])
        _refused.pop(model, None)
    for captured in graphs:
        captured.used.synchronize()


class Captured:
    """A captured step and the buffers it works on."""

    def __init__(self, run: Stepper, key: Any, check: bool) -> None:
        self.key, self.leased = key, True
        buffers = run.numbered().clone()
        # What the buffers hold, the request need not: it would keep a caller's tensors alive.
        guidance = replace(run.guidance, calls=(), plain={})
        request = replace(
            run.request, x=buffers.x, mask=buffers.mask, known=buffers.known, resume=None, guidance=guidance
        )
        self.run = Stepper(request, buffers)
        self.index = torch.zeros(1, dtype=torch.int64, device=run.network.device)
        self.used = torch.cuda.Event()
        self.graphs = {kind: self._capture(run, kind, check) for kind in kinds(run)}
        self.weights = kept_weights(run.network.model)
        # The graph holds the weights' addresses; the module itself must be free to go.
        self.run.network, self.run.deep = replace(run.network, model=_gone), None
        self.run.request = replace(request, network=self.run.network, deep=None)

    def _capture(self, run: Stepper, kind: Kind, check: bool) -> torch.cuda.CUDAGraph:
        """The step of a kind of rows, tried at the first of them."""
        first = next(i for i in run.rows if kind_of_row(run, i) == kind)
        device = run.network.device
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        # Copies of weights that autocast keeps for its block would be freed under the graph: each call makes its own.
        cast = torch.autocast(
            "cuda", enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"),
            cache_enabled=False,
        )  # fmt: skip
        try:
            with _capturing, torch.cuda.device(device), torch.cuda.stream(side), cast:
                for _ in range(2):  # libraries choose their algorithms and make their handles on first use
                    self.load(run, first)
                    self._step(*kind)
                eager = self.run.x.clone()
                self.load(run, first)
                graph = _captured(device, lambda: self._step(*kind))
        finally:
            current.wait_stream(side)
        if check:
            self.load(run, first)
            graph.replay()
            if not torch.equal(self.run.x, eager):
                raise RuntimeError("the first replay differs from the eager step (cuda_graph=True would take it)")
        return graph

    def _step(self, calls: int, reuse: Reuse | None) -> None:
        run = self.run
        run.call(run.buffers.times.index_select(0, self.index).view(-1), self.index, calls, reuse)
        run.update(self.index)
        run.stack()
        self.index.add_(1)

    def load(self, run: Stepper, first: int | None = None) -> None:
        """Copy a run's state and numbers into the graph's buffers, to go on from its start or from row ``first``."""
        mine = self.run
        torch.cuda.current_stream(run.network.device).wait_event(self.used)
        mine.buffers.copy_from(run.numbered())
        first = run.start if first is None else first
        self.index.fill_(first)
        mine.plan, mine.start, mine.calls = run.plan, first, run.calls
        mine.first_input()

    def step(self, index: int) -> None:
        """Run row ``index``, which the device's counter has reached."""
        kind = kind_of_row(self.run, index)
        if kind in self.graphs:
            self.graphs[kind].replay()
        elif self.run.plan[index].reuse == "output":
            self._step(*kind)
        else:
            self.run.change.set_outputs(())
            self.run.change(self.index)
            self.run.stack()
            self.index.add_(1)

    def unload(self, run: Stepper) -> None:
        """Give a run its state back, and what was found not finite."""
        run.buffers.x.copy_(self.run.buffers.x)
        run.buffers.nonfinite.copy_(self.run.buffers.nonfinite)

    def release(self) -> None:
        self.used.record(torch.cuda.current_stream(self.run.network.device))
        with _lock:
            self.leased = False


def _captured(device: torch.device, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The graph of a step, captured on a stream of its own: cuBLAS's workspace for it then lies in the graph's pool."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    collects = gc.isenabled()
    gc.disable()  # another graph, if it were destroyed meanwhile, would break the capture
    try:
        with torch.cuda.graph(
            graph, pool=pool, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
        ):  # fmt: skip
            step()
    except BaseException:
        _failed.append(graph)
        _recover(device, pool)
        raise
    finally:
        if collects:
            gc.enable()
    return graph


def _recover(device: torch.device, pool: Any) -> None:
    """After a capture that failed, end it for what still believes that it goes on.

    Before version 2.12 that is torch's allocator, which would not free memory any more; and its generators, which an
    empty capture lets go.
    """
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    empty, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with suppress(RuntimeError), torch.cuda.graph(empty, stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=device)


Kind = tuple[int, Reuse | None]  # how many outputs a row mixes, and what it reuses


def kind_of_row(run: Stepper, index: int) -> Kind:
    return run.calls[index], run.plan[index].reuse


def kinds(run: Stepper) -> list[Kind]:
    """The kinds of rows that need a graph each; shallow ones last, whose features the others make."""
    found = {kind_of_row(run, i) for i in run.rows if run.plan[i].runs_network}
    return sorted(found, key=lambda kind: (kind[1] is not None, kind[0]))


def _gone(*_: object, **__: object) -> Any:
    raise RuntimeError("a captured step calls no module")


def _key(run: Stepper) -> Any:
    """What two runs must share to share a graph: all that is baked into its kernels. Weights' values are not."""
    model: Any = run.network.model
    weights = [*model.parameters(), *model.buffers()]
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    backends: Any = torch.backends
    return (
        run.buffers.signature(run.network.device), run.network.device, run.network.dtype, run.network.layout,
        run.request.backend, run.shares_x, run.plan.learned_variance, run.plan.reads_variance, run.guidance.outputs,
        run.guidance.stacked, run.guidance.rescale, tuple(kinds(run)), 0 in run.calls, run.plan.branch,
        run.request.thresholding, fingerprint(model), hash(tuple((w.data_ptr(), w.dtype) for w in weights)), autocast,
        backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision,
    )  # fmt: skip
