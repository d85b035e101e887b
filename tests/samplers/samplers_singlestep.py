"""The published updates of singlestep samplers, written out as in samplers_multistep.py: in y = x/α and σ/α."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from samplers_multistep import Model, integral
from torch import Tensor

from fastdiff.schedules.level import Level


def at_ratio(schedule, ratio: float, ve: bool) -> Level:
    if hasattr(schedule, "shift"):
        return schedule.at(ratio / (1 + ratio))
    return (schedule.as_ve() if ve else schedule).at(ratio)


def ancestral(s: float, t: float, eta: float) -> tuple[float, float]:
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    return math.sqrt(t**2 - up**2), up


def third_order_integral(s: float, t: float, values: list[Tensor]) -> Tensor:
    a, b = -math.log(s), -math.log(t)
    nodes = [a, a + (b - a) / 3, a + 2 * (b - a) / 3]
    return t * integral(lambda u: math.exp(b - u), nodes, values, a, b)


def singlestep_reference(
    points: Sequence[Level], x: Tensor, f: Model, z: Iterator[Tensor], at: Callable[[float], Level], *, name: str,
    eta: float = 0.0, r: float = 0.5,
) -> Iterator[Tensor]:  # fmt: skip
    def call(y: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return f(level.alpha * y, level)

    for here, there in itertools.pairwise(points):
        s, t = here.sigma / here.alpha, there.sigma / there.alpha
        y = x / here.alpha
        x0, epsilon = call(y, here)
        down, up = ancestral(s, t, eta) if eta else (t, 0.0)
        if down == 0:
            x = there.alpha * (x0 + up * next(z))
            yield x
            continue
        if name == "dpmpp_2s_ancestral":
            h = math.log(s / down)
            middle = at(math.exp(-(-math.log(s) + h / 2)))
            y2 = math.exp(-h / 2) * y - math.expm1(-h / 2) * x0
            next(z)
            yield middle.alpha * y2
            y = math.exp(-h) * y - math.expm1(-h) * call(y2, middle)[0] + up * next(z)
        elif name == "dpmpp_sde":
            m = math.exp(math.log(s) + r * (math.log(t) - math.log(s)))
            middle = at(m)
            d, u = ancestral(s, m, eta)
            y2 = d / s * y + (1 - d / s) * x0 + u * next(z)
            yield middle.alpha * y2
            D = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * call(y2, middle)[0]
            y = down / s * y + (1 - down / s) * D + up * next(z)
        elif name == "dpm_solver_2":
            h = math.log(s / t)
            middle = at(s * math.exp(-h / 2))
            y2 = y - s * math.exp(-h / 2) * math.expm1(h / 2) * epsilon
            yield middle.alpha * y2
            y = y - t * math.expm1(h) * call(y2, middle)[1]
        elif name in ("dpm_solver_3", "dpm_solver_3_taylor"):
            h = math.log(s / t)
            one, two = at(s * math.exp(-h / 3)), at(s * math.exp(-2 * h / 3))
            y1 = y - s * math.exp(-h / 3) * math.expm1(h / 3) * epsilon
            yield one.alpha * y1
            e1 = call(y1, one)[1]
            y2 = (
                y - s * math.exp(-2 * h / 3) * math.expm1(2 * h / 3) * epsilon
                - s * math.exp(-2 * h / 3) * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * (e1 - epsilon)
            )  # fmt: skip
            yield two.alpha * y2
            e2 = call(y2, two)[1]
            if name == "dpm_solver_3":
                y = y - t * math.expm1(h) * epsilon - t * 1.5 * (math.expm1(h) / h - 1) * (e2 - epsilon)
            else:
                y = y - third_order_integral(s, t, [epsilon, e1, e2])
        x = there.alpha * y
        yield x
