"""What the schedulers share: a list of timesteps, the plans made for it, and steps that run a plan's rows.

diffusers' own class, which each of ours subclasses, keeps the config, loading and saving, and the making of the lists.
``Steps`` holds the rest: per step it names addresses, allocates the result and calls one bound update.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.noise import NoiseKey, noise_key
from fastdiff.ops.backend import choose
from fastdiff.ops.randn import DTYPES, randn
from fastdiff.ops.update import BoundUpdate, bind, split_outputs, update
from fastdiff.ops.update.operands import Operands
from fastdiff.ops.view import viewable
from fastdiff.plan import COLUMNS, SLOTS, Plan

PREDICTIONS = ("epsilon", "sample", "v_prediction")


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

    def on(self, device: torch.device) -> Tensor:
        """The float32 table on a device; the copy does not wait for it."""
        return self.table.to(torch.float32).to(device, non_blocking=True)


class Steps:
    """The rows of a scheduler's list, and the tensors that they run on.

    Attributes:
        listed: the tensors of the list (timesteps, and σ where there are) that ``times`` and ``sigmas`` were read from.
        times, sigmas: the same on the host; ``places`` has the number of each timestep.
        base, itemsize: where the list of timesteps lies, and the bytes of an entry; 0 where entries have no address.
        start: the number of the step that the run began with, None before it began.
        key: the seed and sample numbers of the noise stream where the steps' noise is ours, as arguments of noise_key.
        state: the anchor and the slots, by name, between steps.
    """

    def __init__(self) -> None:
        self.key: dict[str, Any] | None = None
        self.listed: tuple[Tensor | None, ...] = ()
        self.times: list[float] = []
        self.sigmas: list[float] = []
        self.places: dict[float, int] = {}
        self.base = self.itemsize = 0
        self.forget()

    def forget(self) -> None:
        """Begin anew: no plan, no history."""
        self.rows: dict[tuple[Any, ...], Rows] = {}
        self.start: int | None = None
        self.state: dict[str | int, Tensor] = {}
        self.unbind()

    def unbind(self) -> None:
        self.bound: BoundUpdate | None = None
        self.bound_rows: Rows | None = None
        self.shape: torch.Size | None = None
        self.device: torch.device | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: all but the bound update, which holds addresses, and tables that can be remade."""
        return self.__dict__ | {"bound": None, "bound_rows": None, "shape": None, "device": None, "rows": {}}

    # ---- one step

    def bind(self, rows: Rows, index: int, x: Tensor, thresholds: bool) -> BoundUpdate:
        """The update for the steps of these rows and this shape, from step ``index`` on."""
        key = NoiseKey() if self.key is None else noise_key(x.shape[0], x.device, **self.key)
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


class Stepping:
    """The part of a scheduler that is ours; diffusers' class comes after it among the bases.

    A subclass says how its plans are made (``_plan``) and what its ``step`` takes.
    """

    # What ``step`` returns beside x': "x0" or nothing; or, whatever this says, a combination in the rows' anchor.
    _second: ClassVar[str | None] = "x0"
    # Its dtype, and that of x' where sample and model_output differ ("promoted", "sample" or "output"): diffusers'.
    _second_is_float32: ClassVar[bool] = False
    _dtype_from: ClassVar[str] = "promoted"
    _predictions: ClassVar[tuple[str, ...]] = PREDICTIONS
    _has_history: ClassVar[bool] = False

    # diffusers' attributes that steps read.
    config: Any
    timesteps: Any
    num_inference_steps: int | None
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    _step_index: int | None
    _begin_index: int | None

    _steps: Steps  # set by the constructor, as is this:
    _thresholds: bool

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if not issubclass(cls, SchedulerMixin):
            return  # what several schedulers share
        cls.__init__ = _constructor(cls.__init__)  # type: ignore[method-assign]
        cls.set_timesteps = _lister(cls.set_timesteps)  # type: ignore[attr-defined]

    def use_fastdiff_noise(
        self, seed: int | None = 0, *, seeds: Sequence[int] | None = None, sample_offset: int = 0
    ) -> None:
        """Draw the steps' noise from fastdiff's own stream, inside the update, from now on.

        A generator given to ``step`` is then not drawn from; pipelines hand theirs on.

        Args:
            seed, seeds, sample_offset: as for ``fastdiff.randn``. ``seed=None`` goes back to torch's generators.
        """
        if seed is None and seeds is None:
            self._steps.key = None
        else:
            count = 1 if seeds is None else len(seeds)
            self._steps.key = {"seed": seed or 0, "seeds": seeds, "sample_offset": sample_offset}
            noise_key(count, torch.device("cpu"), **self._steps.key)
        self._steps.unbind()

    # ---- for subclasses

    def _check_config(self) -> None:
        """Raise ValueError for an option that is not served; subclasses add theirs."""
        prediction = self.config.get("prediction_type")
        if prediction is not None and prediction not in self._predictions:
            self._refuse("prediction_type", f"must be one of {', '.join(self._predictions)}")

    def _refuse(self, option: str, why: str) -> None:
        raise ValueError(f"{option}={self.config[option]!r} of {type(self).__name__} {why}")

    def _plan(self, start: int, *options: Any) -> Plan:
        """The plan for the steps from ``start`` on, under the options of a step."""
        raise NotImplementedError

    def _rows(self, index: int, *options: Any) -> Rows:
        """The rows for step ``index``, made when a run first needs them."""
        steps = self._steps
        if self._has_history and steps.start is None:
            steps.start = index
        start = steps.start if self._has_history else 0
        assert start is not None
        rows = steps.rows.get((start, *options))
        if rows is None:
            if self._has_history and index != start and any(key[0] == start for key in steps.rows):
                raise ValueError(
                    f"the options of a step must stay the same within a run; got {options} at step {index}"
                )
            rows = steps.rows[(start, *options)] = Rows(self._plan(start, *options), start, self._second)
        if not rows.start <= index < rows.end:
            raise IndexError(
                f"there is no step {index}: the run has the steps {rows.start} … {rows.end - 1}; call set_timesteps"
            )
        return rows

    def _advance(
        self, rows: Rows, index: int, model_output: Tensor, sample: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run step ``index``: x' and the second result."""
        variance = None
        dtype = sample.dtype
        if model_output.shape != sample.shape or rows.learned_variance or model_output.device != sample.device:
            (model_output,), variance = split_outputs(
                (model_output,), sample.shape, rows.learned_variance, sample.device, "model_output", torch.float64
            )
        if (
            dtype not in DTYPES
            or model_output.dtype not in DTYPES
            or type(sample) is not Tensor
            or type(model_output) is not Tensor
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad))
        ):
            return self._advance_slowly(rows, index, model_output, variance, sample, noise)
        x = sample
        if dtype is not torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32, memory_format=torch.contiguous_format)
        if not model_output.is_contiguous():
            model_output = viewable(model_output)
        if noise is not None and (noise.dtype is not torch.float32 or not noise.is_contiguous()):
            noise = noise.to(torch.float32, memory_format=torch.contiguous_format)
        clip = self._threshold(rows, index, x, model_output) if self._thresholds else None
        out, other = self._steps.run(rows, index, x, model_output, variance, noise, clip)
        if model_output.dtype is not dtype:
            dtype = self._result_dtype(dtype, model_output.dtype)
        if x is not sample or dtype is not torch.float32:
            out = torch.empty_like(sample, dtype=dtype).copy_(out)
            if other is not None and not self._second_is_float32:
                other = torch.empty_like(sample, dtype=dtype).copy_(other)
        return out, other

    def _advance_slowly(
        self, rows: Rows, index: int, model_output: Tensor, variance: Tensor | None, sample: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The same on float64, with gradients, or under torch.compile."""
        if not (sample.is_floating_point() and model_output.is_floating_point()):
            raise TypeError(f"sample and model_output must be floating point; got {sample.dtype}, {model_output.dtype}")
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x, m = sample.to(wide).contiguous(), model_output.to(wide)
        noise = None if noise is None else noise.to(wide).contiguous()
        clip = self._threshold(rows, index, x, m) if self._thresholds else None
        if variance is not None:
            m = torch.cat([m, variance.to(wide)], dim=1)
        out, other = self._steps.run_functional(rows, index, x, m, noise, clip)
        out = out.to(self._result_dtype(sample.dtype, model_output.dtype))
        if other is not None and not self._second_is_float32:
            other = other.to(out.dtype)
        return out, other

    def _result_dtype(self, sample: torch.dtype, output: torch.dtype) -> torch.dtype:
        if sample is output:
            return sample
        if self._dtype_from == "promoted":
            return torch.promote_types(sample, output)
        return sample if self._dtype_from == "sample" else output

    def _threshold(self, rows: Rows, index: int, x: Tensor, m: Tensor) -> Tensor:
        """Dynamic thresholding's (s, 1/s), [B, 2]: s is the quantile of |x̂_0| in [1, sample_max_value]."""
        row = rows.plan[index - rows.start]
        size = (x * row.p + m.to(x.dtype) * row.q).abs().flatten(1)
        s = torch.quantile(size, self.config.dynamic_thresholding_ratio, dim=1)
        s = s.clamp(min=1, max=self.config.sample_max_value)
        return torch.stack([s, 1 / s], dim=1)

    def _draw(self, generator: Any, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Noise of ``like``'s shape as diffusers would draw it, or None where the update draws it."""
        if self._steps.key is not None:
            return None
        return randn_tensor(tuple(like.shape), generator=generator, device=like.device, dtype=dtype)

    # ---- the list

    def _list(self) -> Steps:
        """The steps of the current list, read anew where it was replaced."""
        steps = self._steps
        sigmas = self.__dict__.get("sigmas")
        if not steps.listed or self.timesteps is not steps.listed[0] or sigmas is not steps.listed[1]:
            times = [] if self.timesteps is None else self.timesteps.tolist()
            values = [] if sigmas is None else sigmas.tolist()
            if times != steps.times or values != steps.sigmas:
                steps.forget()
            steps.listed, steps.times, steps.sigmas = (self.timesteps, sigmas), times, values
            steps.places = {t: i for i, t in enumerate(times)}
            steps.base, steps.itemsize = 0, 0
            if times and self.timesteps.is_contiguous():
                steps.base, steps.itemsize = self.timesteps.data_ptr(), self.timesteps.element_size()
        return steps

    def _place(self, timestep: Any) -> int | None:
        """Which entry of the list a tensor is, by its address."""
        steps = self._steps
        if not isinstance(timestep, Tensor) or steps.itemsize == 0 or timestep.numel() != 1:
            return None
        place = (timestep.data_ptr() - steps.base) // steps.itemsize
        return place if 0 <= place < len(steps.times) else None

    def _value(self, timestep: Any) -> float:
        """A timestep as a number. One that is an entry of the list is known by its address: no device is read."""
        if not isinstance(timestep, Tensor):
            return timestep
        place = self._place(timestep)
        if place is not None:
            return self._steps.times[place]
        values = set(timestep.flatten().tolist())
        if len(values) != 1:
            raise ValueError(f"timestep must be one number for the whole batch; got {sorted(values)}")
        return values.pop()

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The number of the step that starts at a timestep; of two such steps, the second."""
        times = self._list().times if schedule_timesteps is None else schedule_timesteps.tolist()
        value = self._value(timestep)
        found = [i for i, t in enumerate(times) if t == value]
        if not found:
            return self._missing(value, times)
        return found[min(1, len(found) - 1)]

    def _missing(self, value: float, times: list[float]) -> int:
        raise ValueError(f"timestep {value} is not one of scheduler.timesteps: {times}")

    def _init_step_index(self, timestep: Any) -> None:
        """Where a run begins: at ``begin_index`` if it was set, or else at the timestep."""
        steps, place = self._list(), self._begin_index
        if place is None:
            place = self._place(timestep)
        self._step_index = steps.start = self.index_for_timestep(timestep) if place is None else place

    def _index(self, timestep: Any) -> int:
        """The number of this step, which is known on the host after the first."""
        self._list()
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        return self._step_index


def _constructor(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)  # whose signature from_config reads
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        if "_steps" not in self.__dict__:
            self._steps = Steps()
        init(self, *arguments, **options)
        self._thresholds = bool(self.config.get("thresholding", False))
        self._check_config()

    return __init__


def _lister(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_timesteps)  # whose signature pipelines read
    def listed(self: Any, *arguments: Any, **options: Any) -> None:
        set_timesteps(self, *arguments, **options)
        self._steps.forget()
        self._list()

    return listed


def result(kind: type[BaseOutput], **values: Tensor | None) -> Any:
    """What kind(**values) makes, in a fifth of its 2.3 µs: a dictionary whose entries are its attributes too."""
    made = kind.__new__(kind)
    made.__dict__.update(values)
    for name, value in values.items():
        OrderedDict.__setitem__(made, name, value)
    return made


def last_apart(sigmas: Sequence[float]) -> list[float]:
    """σ that fall to the end: where the last two are the same, the step between them is made of length 1e-12."""
    values = list(sigmas)
    if len(values) > 1 and values[-1] == values[-2]:
        values[-1] *= 1 - 1e-12
    return values


def spread(values: Sequence[float], like: Tensor) -> Tensor:
    """A number for each sample as a tensor that multiplies ``like``, of its precision but at least float32."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(values, dtype=wide, device=like.device).view(-1, *[1] * (like.ndim - 1))


def mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a·x + b·y, computed in the precision of a and b, in x's dtype."""
    return (a * x.to(a.dtype) + b * y.to(b.dtype)).to(x.dtype)
