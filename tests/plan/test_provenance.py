"""A learned plan's provenance: kept beside the rows, no part of what two plans are compared by."""

import json
from dataclasses import replace

import pytest

import fastdiff
from fastdiff.plan.plan import Plan
from fastdiff.plan.provenance import Provenance

TOLD = Provenance(
    model="a.Network", model_sha256="ab" * 32, shape=[3, 8, 8], guidance_scale=[2.0, 1.5], start="dpmpp_2m",
    start_levels=[None, 3.0], steps=2, learned="levels, t, coefficients", teacher="dpmpp_2m", teacher_calls=64,
    teacher_error=0.001, seed=3, iterations=240, images=192, held_out=64, measured_in="x",
    errors={"tuned": {"2": 0.05}, "start": {"2": 0.2}, "ddim": {"2": 0.4, "4": 0.21, "8": 0.11}},
    made_with={"torch": "2.13"},
)  # fmt: skip


def test_it_is_kept(tmp_path):
    plain = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 2)
    plan = replace(plain, provenance=TOLD)
    assert Plan.from_json(plan.to_json()).provenance == TOLD
    assert Plan.load(plan.save(tmp_path / "plan.json")).to_json() == plan.to_json()
    assert (plan, hash(plan)) == (plain, hash(plain))
    assert '"provenance"' not in plain.to_json()
    assert Plan.from_json(plain.to_json()).provenance is None
    assert TOLD.error == 0.05


def test_it_is_a_table():
    heading, *rows = str(TOLD).splitlines()
    assert heading.startswith("distance (x, root of the mean square) to dpmpp_2m in 64 calls, on 64 held-out samples")
    assert heading.endswith("; doubling its steps moved it by 0.001")
    assert [row.split() for row in rows] == [
        ["network", "calls", "2", "4", "8"], ["tuned", "0.05", "·", "·"], ["start", "0.2", "·", "·"],
        ["ddim", "0.4", "0.21", "0.11"],
    ]  # fmt: skip
    assert len({len(row) for row in rows}) == 1


def test_what_is_none():
    plain = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 2)
    with pytest.raises(TypeError, match="provenance must be a Provenance or None; got dict"):
        Plan(plain.rows, provenance={})
    content = json.loads(replace(plain, provenance=TOLD).to_json())
    for change in ({"steps": "two"}, {"more": 1}):
        with pytest.raises(ValueError, match=r"does not fit its format.*provenance"):
            Plan.from_json(json.dumps({**content, "provenance": {**content["provenance"], **change}}))
