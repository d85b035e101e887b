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
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.checks import DTYPES
from fastdiff.integrations.diffusers.state import Rows, Steps, version_of
from fastdiff.noise import noise_key
from fastdiff.ops.update.checks import split_outputs
from fastdiff.ops.view import viewable
from fastdiff.plan.plan import Plan
from fastdiff.sampling.thresholding import Thresholding
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.schedules.level import Schedule

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Stepping:
    """The part of a scheduler that is ours; diffusers' class comes after it among the bases.

    A subclass says how its plans are made (``_plan``) and what its ``step`` takes.
    """

    # The tensors that plans are made from. Those replaced, or edited in place, are read anew by the next step.
    _reads: ClassVar[tuple[str, ...]] = ("timesteps", "sigmas")
    # What ``step`` returns beside x': "x0" or nothing; or, whatever this says, a combination in the rows' anchor.
    _second: ClassVar[str | None] = "x0"
    # Its dtype, and that of x' where sample and model_output differ ("promoted", "sample" or "output"): diffusers'.
    _second_is_float32: ClassVar[bool] = False
    _dtype_from: ClassVar[str] = "promoted"
    _predictions: ClassVar[tuple[str, ...]] = PREDICTIONS
    _has_history: ClassVar[bool] = False
    # diffusers' class of a step's results, whose fields are x' and, unless there is none, the second.
    _output_class: ClassVar[type[BaseOutput]] = SchedulerOutput

    # diffusers' attributes that steps read.
    config: Any
    timesteps: Any
    sigmas: Any
    num_inference_steps: int | None
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    set_timesteps: Callable[..., None]
    _step_index: int | None
    _begin_index: int | None

    _schedule_of: tuple[Tensor, Any, Schedule] | None = None
    _steps: Steps  # set by the constructor, as is this:
    _thresholds: bool

    # Each scheduler has its own: _plan(start, *options), the plan from step ``start`` on under a step's options.
    _plan: Callable[..., Plan]

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if not issubclass(cls, SchedulerMixin):
            return  # what several schedulers share
        cls.__init__ = _constructor(cls.__init__)  # type: ignore[method-assign]
        cls.set_timesteps = _lister(cls.set_timesteps)

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

    def _first_step(self, model_output: Tensor, sample: Tensor) -> None:
        """Step from the list's head, to see whether that is served."""
        self.step(model_output, self.timesteps[0], sample)  # type: ignore[attr-defined]

    def _refuse(self, option: str, why: str) -> None:
        raise ValueError(f"{option}={self.config[option]!r} of {type(self).__name__} {why}")

    def _rows(self, index: int, *options: Any) -> Rows:
        """The rows for step ``index``, made when a run first needs them."""
        steps = self._steps
        if self._has_history and steps.start is None:
            steps.start = index
        start = steps.start if self._has_history else 0
        assert start is not None
        key = (start, *options)
        rows = steps.rows.get(key)
        if rows is None:
            made, before = {*steps.earlier, *steps.rows}, steps.earlier.get(key)
            if self._has_history and index != start and key not in made and any(other[0] == start for other in made):
                raise ValueError(
                    f"the options of a step must stay the same within a run; got {options} at step {index}"
                )
            rows = Rows(self._plan(start, *options), start, self._second)
            if before is not None and before.layout(index) != rows.layout(index):
                steps.start, steps.state = index, {}  # a history that these rows cannot read: begin anew
                return self._rows(index, *options)
            steps.rows[key] = rows
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
            x = x.to(torch.float32).contiguous()
        if not model_output.is_contiguous():
            model_output = viewable(model_output)
        if noise is not None and (noise.dtype is not torch.float32 or not noise.is_contiguous()):
            noise = noise.to(torch.float32).contiguous()
        clip = self._threshold(rows, index, x, model_output) if self._thresholds else None
        out, other = self._steps.run(rows, index, x, model_output, variance, noise, clip)
        if model_output.dtype is not dtype:
            dtype = self._result_dtype(dtype, model_output.dtype)
        if x is not sample or dtype is not torch.float32:
            out = torch.empty_like(sample, dtype=dtype).copy_(out)
            if other is not None and not self._second_is_float32:
                other = torch.empty_like(sample, dtype=dtype).copy_(other)
        return out, other

    def _next(
        self, rows: Rows, index: int, model_output: Tensor, sample: Tensor, noise: Tensor | None, return_dict: bool
    ) -> Any:
        """Run step ``index`` and count it: its results, as diffusers returns them."""
        x, second = self._advance(rows, index, model_output, sample, noise)
        self._step_index = index + 1
        return self._results(return_dict, x, second)

    def _results(self, return_dict: bool, x: Tensor, second: Tensor | None = None) -> Any:
        values = (x,) if self._second is None else (x, second)
        return result(self._output_class, values) if return_dict else values

    def _check_listed(self) -> int:
        """How many steps the list has."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        return self.num_inference_steps

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
        row, config = rows.plan[index - rows.start], self.config
        x0 = (x * row.p + m.to(x.dtype) * row.q).flatten(1)
        if x0.requires_grad:
            s = torch.quantile(x0.abs(), config.dynamic_thresholding_ratio, dim=1)
            s = s.clamp(min=1, max=config.sample_max_value)
            return torch.stack([s, 1 / s], dim=1)
        bounds = x0.new_empty((x0.shape[0], 2))
        Thresholding(config.dynamic_thresholding_ratio, config.sample_max_value).bounds(x0, bounds)
        return bounds

    def _draw(self, generator: Any, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Noise of ``like``'s shape as diffusers would draw it, or None where the update draws it."""
        if self._steps.key is not None:
            return None
        return randn_tensor(tuple(like.shape), generator=generator, device=like.device, dtype=dtype)

    # ---- the tables and the list

    def _table(self) -> Tensor:
        """diffusers' table of ᾱ."""
        return self.alphas_cumprod.clone()

    def _schedule(self) -> Schedule:
        """The schedule that plans are made for: diffusers' table, as float64 numbers."""
        table = self.alphas_cumprod
        if self._schedule_of is None or self._schedule_of[0] is not table or self._schedule_of[1] != version_of(table):
            self._schedule_of = table, version_of(table), NoiseSchedule(self._table())
        return self._schedule_of[2]

    def _list(self) -> Steps:
        """The steps of the current list, read anew where its tensors were replaced or edited in place."""
        steps = self._steps
        if steps.changed(self.__dict__):
            steps.read(self.__dict__, self._reads)
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
        return found[1] if len(found) > 1 else found[0]

    def _missing(self, value: float, times: list[float]) -> int:
        raise ValueError(f"timestep {value} is not one of scheduler.timesteps: {times}")

    def _init_step_index(self, timestep: Any) -> None:
        """Where a run begins: at ``begin_index`` if it was set, or else at the timestep."""
        steps, place = self._list(), self._begin_index
        if place is None:
            place = self._place(timestep)
        self._step_index = steps.start = self._first_place(timestep) if place is None else place

    def _first_place(self, timestep: Any) -> int:
        """The step that a run begins with at a timestep: the first of those whose timesteps are rounded alike."""
        steps, value = self._steps, self._value(timestep)
        return steps.times.index(value) if value in steps.places else self._missing(value, steps.times)

    def _mend_list(self) -> None:
        """Change the list that diffusers made where it is mistaken; subclasses add theirs.

        Under "trailing" it has a timestep −1, one too many, in some numbers of steps.
        """
        if self.config.get("timestep_spacing") != "trailing":
            return
        kept = self.timesteps != -1  # continuous ones may be negative
        extra = len(kept) - int(kept.sum())
        if not extra:
            return
        if "sigmas" in self.__dict__:
            self.sigmas = torch.cat([self.sigmas[: -1 - extra], self.sigmas[-1:]])
        if self.num_inference_steps == len(self.timesteps):
            self.num_inference_steps -= extra
        self.timesteps = self.timesteps[kept]

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
        # A pipeline that is saved names the class that loads it by this: diffusers' own, so that it loads anywhere.
        self.__module__ = next(base for base in type(self).__mro__ if not issubclass(base, Stepping)).__module__
        init(self, *arguments, **options)
        self._thresholds = bool(self.config.get("thresholding", False))
        self._check_config()

    return __init__


def _lister(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_timesteps)  # whose signature pipelines read
    def listed(self: Any, *arguments: Any, **options: Any) -> None:
        set_timesteps(self, *arguments, **options)
        self._mend_list()
        self._steps.forget()
        self._list()

    return listed


def result(kind: Any, values: Sequence[Tensor | None]) -> Any:
    """What kind(*values) makes, in a fifth of its 2.3 µs: a dictionary whose entries are its attributes too."""
    made = kind.__new__(kind)
    for name, value in zip(kind.__dataclass_fields__, values, strict=False):
        made.__dict__[name] = value
        OrderedDict.__setitem__(made, name, value)
    return made


ROUNDING = 1e-6  # σ that are closer than this are equal but for float32's rounding


def last_apart(sigmas: Sequence[float]) -> list[float]:
    """σ that fall to the end: where the last two are the same but for rounding, their step is made of length 1e-12."""
    values = list(sigmas)
    return [*values[:-2], *all_apart(values[-2:], 1e-12)]


def all_apart(sigmas: Sequence[float], length: float = 1e-15) -> list[float]:
    """σ that fall where they fell or were the same but for rounding: such a step is made of this relative length."""
    values = list(sigmas)
    for i in range(1, len(values)):
        if 0 <= values[i] - values[i - 1] <= ROUNDING * values[i - 1]:
            values[i] = values[i - 1] * (1 - length)
    return values


def spread(values: Sequence[float], like: Tensor) -> Tensor:
    """A number for each sample as a tensor that multiplies ``like``, of its precision but at least float32."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(values, dtype=wide, device=like.device).view(-1, *[1] * (like.ndim - 1))


def mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a·x + b·y, computed in the precision of a and b, in x's dtype."""
    return (a * x.to(a.dtype) + b * y.to(b.dtype)).to(x.dtype)
