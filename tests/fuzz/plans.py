"""Samplers, schedules, rows and plans' JSON."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Any

import torch
from helpers import assert_same_bits
from ops.update_cases import random_row
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.plan.plan import Plan, Row
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules.level import PREDICTIONS
from fastdiff.schedules.spacing import SIGMA_SPACINGS, Spacing
from fastdiff.schedules.timesteps import SPACINGS
from fuzz.draws import Call, Draw, call_text, spoiled

# These end elsewhere by design: distilled networks' samplers draw noise around x̂_0, and the inverse walks to noise.
ELSEWHERE = ("lcm", "tcd", "ddim_inverse")
OPTIONS: dict[str, Any] = {
    "eta": (0.0, 0.3, 1.0), "order": (1, 2, 3, 4), "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "algorithm": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"), "lower_order_final": (True, False),
    "euler_at_final": (True, False), "s_churn": (0.0, 5.0), "s_tmin": (0.0, 0.1), "s_tmax": (math.inf, 10.0),
    "s_noise": (1.0, 1.003), "use_clipped_model_output": (True, False), "stages": ("listed", "inserted"),
    "r": (0.5, 0.3), "predict_x0": (True, False), "disable_corrector": ((), (0, 1)), "ve": (True, False),
    "skip_prk_steps": (True, False), "averages": ("epsilon", "output"), "method": ("singlestep", "multistep"),
    "variance": ("fixed_small", "fixed_large", None), "jump_length": (1, 2, 3), "jump_n_sample": (1, 2),
    "original_inference_steps": (50, 20), "timestep_scaling": (10.0, 1.0), "sigma_data": (0.5, 1.0),
    "final_noise": (False, True), "noise_level": (0.7, 0.0, 1.5),
}  # fmt: skip


def schedule(draw: Draw) -> Any:
    T = draw.choice((1000, 1000, 100, 20))
    return draw.choice(
        (
            lambda: fastdiff.NoiseSchedule.linear(T), lambda: fastdiff.NoiseSchedule.scaled_linear(T),
            lambda: fastdiff.NoiseSchedule.cosine(T), lambda: fastdiff.NoiseSchedule.sigmoid(T),
            lambda: fastdiff.NoiseSchedule.linear(T).rescale_zero_terminal_snr(),
            lambda: fastdiff.EDMSchedule(), lambda: fastdiff.EDMSchedule(sigma_min=0.02, sigma_max=14.6),
            lambda: fastdiff.FlowSchedule(), lambda: fastdiff.FlowSchedule(shift=draw.uniform(0.5, 6)),
        )
    )()  # fmt: skip


def some_options(draw: Draw, function: Any) -> dict[str, Any]:
    """Some of a sampler's own options, mostly ones that go together."""
    chosen = {}
    for name in inspect.signature(function).parameters:
        if name in OPTIONS and draw.chance(0.1 if name in ("stages", "method", "algorithm") else 0.4):
            values = OPTIONS[name]
            if name == "solver_type" and draw.chance(0.9):
                values = ("bh1", "bh2") if function is SAMPLERS["unipc"] else ("midpoint", "heun")
            chosen[name] = draw.choice(values)
    return chosen


def sampler(draw: Draw) -> Call:
    """An exact network of data that is one point: the run ends on it."""
    name = draw.choice(sorted(SAMPLERS))
    function, given = SAMPLERS[name], schedule(draw)
    prediction = draw.choice(PREDICTIONS)
    options: dict[str, Any] = {
        "schedule": given, "steps": draw.choice((1, 2, 3, 5, 8, 20)), "prediction": prediction,
        **some_options(draw, function),
    }  # fmt: skip
    if draw.chance(0.6):
        options["spacing"] = draw.choice((*SPACINGS, *SIGMA_SPACINGS))
        if draw.chance(0.3):
            options["spacing"] = Spacing(options["spacing"], steps_offset=draw.choice((0, 1)))
    if draw.chance(0.3):
        call = spoiled(draw, function, options, draw.randint(1, 2))
        call.names, call.check = (), runs
        return call
    seed = draw.getrandbits(32)

    def check(plan: Plan) -> None:
        runs(plan)
        if name in ELSEWHERE or (options.get("averages") == "output" and prediction != "epsilon"):
            return  # outputs of several levels, averaged as they are, are no output of the point
        if name == "flow_sde" and options.get("final_noise", True):
            return  # the last step's noise stays
        point = torch.tensor([[0.7, -0.2, 0.0], [-1.0, 0.3, 0.5]], dtype=torch.float64)
        x = walked(plan, point, prediction, seed)
        # A table's last level may keep some noise, and a Runge-Kutta step there is ill-conditioned.
        allowed = 1e-2 if name == "pndm" else 1e-6
        left = float((x - point).abs().max())
        assert left <= allowed, f"it ends {left:.3g} away from the point"

    return Call(call_text(name, (), options), lambda: function(**options), check, refused=True)


def runs(plan: Plan) -> None:
    """A plan can be written, printed and put on a device; or its numbers are beyond float32, in words."""
    assert Plan.from_json(plan.to_json()) == plan
    assert str(plan)
    assert plan.table().isfinite()[:, [i for i in range(48) if i != 7]].all()  # all but clip
    try:
        plan.device_table()
    except ValueError as error:
        if "float32" not in str(error):
            raise


def walked(plan: Plan, point: Tensor, prediction: str, seed: int) -> Tensor:
    """The end of a run in float64 with the network that knows the point."""
    x = ops.randn(tuple(point.shape), seed=seed).double() * plan.init_sigma
    anchor, slots = None, [None] * 4
    for i, row in enumerate(plan):
        outputs = [exact_output(x, point, row, prediction)] if row.calls_model else []
        out = ops.update(x, outputs, plan, i, seed=seed, anchor=anchor, slots=slots)
        x = out.x
        anchor = anchor if out.anchor is None else out.anchor
        if row.write is not None:
            slots[row.write] = out.slot
    return x


def exact_output(x: Tensor, point: Tensor, row: Row, prediction: str) -> Tensor:
    """What the network returns for the state x = α·point + σ·ε."""
    if row.q:  # x̂_0 = p·x + q·m
        return (point - row.p * x) / row.q
    raise AssertionError("a row that calls the network does not read what it returns")


def rows(draw: Draw) -> Call:
    """Row and Plan of junk."""
    if draw.chance(0.3):
        fields = [f.name for f in dataclasses.fields(Row) if f.init]
        given = {name: getattr(random_row(draw, 1, 3), name) for name in fields}  # of rows that may not go together
        return Call(call_text("Row", (), given), lambda: Row(**given), lambda row: runs(Plan((row,))), refused=True)
    if draw.chance(0.5):
        good: dict[str, Any] = {"t": 1.0, "alpha": 0.5, "sigma": 0.5, "x": {"x": 1.0}}
        call = spoiled(draw, Row, good, draw.randint(1, 2))
        call.check = lambda row: runs(Plan((row,)))
    else:
        good = {"rows": [random_row(draw, 1, 3)]}
        call = spoiled(draw, Plan, good, draw.randint(1, 2))
        call.check = runs
    call.names = ()
    return call


def from_json(draw: Draw) -> Call:
    """A plan's JSON with a field exchanged, left out or doubled, or some bytes that are others."""
    plan = Plan([random_row(draw, 1, t) for t in range(draw.randint(1, 3))], name="é")
    text = plan.to_json()
    if draw.chance(0.5):
        content = json.loads(text)
        place = content if draw.chance(0.4) else draw.choice(content["rows"])
        if draw.chance(0.2):
            del place[draw.choice(sorted(place))]
        else:
            junk = (
                None,
                True,
                -1,
                0,
                3,
                1 << 70,
                10**400,
                0.5,
                "x",
                [],
                {},
                [1, 2],
                {"x": None},
                {"x": 1},
                [None],
                "NaN",
            )
            place[draw.choice((*place, "extra"))] = draw.choice(junk)
        text = json.dumps(content)
    else:
        data = bytearray(text.encode())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            what = draw.choice(("another byte", "nine bytes left out", "some doubled", "cut"))
            if what == "another byte":
                data[at] = draw.randrange(256)
            elif what == "some doubled":
                data[at:at] = data[at // 2 : at]
            else:
                del data[at : len(data) if what == "cut" else at + 9]
            if not data:
                break
        text = bytes(data)
    return Call(f"Plan.from_json({text!r})", lambda: Plan.from_json(text), runs, refused=True)


def sample(draw: Draw) -> Call:
    """Runs of random rows: the bits of the reference."""
    shape = draw.shape(1, 4)
    name = draw.choice(sorted(SAMPLERS))
    options: dict[str, Any] = {"sampler": name, "steps": draw.choice((1, 2, 3, 6)), "seed": draw.getrandbits(40)}
    if draw.chance(0.5):
        options["sample_offset"] = draw.randrange(1000)
    dtype = draw.choice((None, None, torch.bfloat16, torch.float16))
    if dtype is not None:
        options["model_dtype"] = dtype
    more = some_options(draw, SAMPLERS[name])
    for key in ("eta", "variance"):
        if key in more:
            options[key] = more.pop(key)
    if more:
        options["sampler_options"] = more

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.4 - 0.1

    def check(x: Tensor) -> None:
        assert_same_bits(x, fastdiff.sample(model, shape, backend="reference", **options))

    return Call(
        call_text("sample", (shape,), options), lambda: fastdiff.sample(model, shape, **options), check, refused=True
    )
