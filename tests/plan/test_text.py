"""A plan as text: JSON that gives back every float64 and refuses all else by name, and the printed table."""

import json
import math
import random
import re
import struct

import pytest
from helpers import history_plan

from fastdiff import NoiseSchedule, Plan, Row, samplers
from fastdiff.plan.plan import TERMS

LINEAR = NoiseSchedule.linear()


def any_float(rng: random.Random) -> float:
    """A finite float64 of random bits, so of any exponent."""
    while True:
        (value,) = struct.unpack("<d", rng.randbytes(8))
        if math.isfinite(value):
            return value


def random_plan(rng: random.Random) -> Plan:
    rows = []
    for _ in range(40):
        calls = rng.random() < 0.7
        terms = [term for term in TERMS if calls or term != "m"]

        def combination(terms=terms):
            return {term: any_float(rng) for term in rng.sample(terms, rng.randint(0, len(terms)))}

        keeps_slot = rng.random() < 0.5
        rows.append(
            Row(
                t=rng.choice([any_float(rng), rng.randint(0, 999), -0.0]),
                alpha=any_float(rng), sigma=any_float(rng), x=combination(), p=any_float(rng),
                q=any_float(rng) if calls else 0.0, clip=rng.choice([math.inf, abs(any_float(rng)) + 5e-324]),
                scale=any_float(rng), anchor=combination() if rng.random() < 0.5 else None,
                slot=combination() if keeps_slot else None, write=rng.randrange(4) if keeps_slot else None,
                reads=tuple(rng.randrange(4) for _ in range(3)), c_in=any_float(rng),
                log_variance=(any_float(rng), any_float(rng)), stream=rng.randrange(1 << 24), calls_model=calls,
            )
        )  # fmt: skip
    return Plan(tuple(rows), name='of "random" bits, σ', init_sigma=any_float(rng), learned_variance=rng.random() < 0.5)


def assert_same(a: Plan, b: Plan) -> None:
    # repr tells 0.0 from -0.0 and 3 from 3.0, and two floats of other bits apart
    assert [repr(row) for row in a] == [repr(row) for row in b]
    assert repr((a.name, a.init_sigma, a.learned_variance)) == repr((b.name, b.init_sigma, b.learned_variance))
    assert a.timesteps == b.timesteps
    assert a.integer_timesteps == b.integer_timesteps


def test_every_float_comes_back(rng):
    for _ in range(20):
        plan = random_plan(rng)
        text = plan.to_json()
        json.loads(text, parse_constant=pytest.fail)  # neither NaN nor Infinity, which JSON has not
        assert_same(Plan.from_json(text), plan)
        assert Plan.from_json(text.encode()).to_json() == text


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_every_sampler_comes_back(name):
    plan = samplers.SAMPLERS[name](LINEAR, 12)
    again = Plan.from_json(plan.to_json())
    assert_same(again, plan)
    assert again.table().equal(plan.table())


def test_files(tmp_path):
    plan = history_plan()
    path = plan.save(tmp_path / "plan.json")
    assert_same(Plan.load(path), plan)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"plan\.json: not a plan's JSON"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"must end in \.json"):
        plan.save(tmp_path / "plan.txt")


def test_a_plan_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = history_plan().save(tmp_path / "plan.json")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        samplers.ddim(LINEAR, 5).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


GOOD = {
    "format": "fastdiff.plan", "version": 1, "name": "mine", "init_sigma": 1.0, "learned_variance": False,
    "rows": [{"t": 3, "alpha": 0.5, "sigma": 0.8, "x": {"x": 1.0}}],
}  # fmt: skip


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


def with_row(**changes) -> dict:
    return {**GOOD, "rows": [GOOD["rows"][0], {**GOOD["rows"][0], **changes}]}


def test_the_smallest_plan():
    assert_same(Plan.from_json(json.dumps(GOOD)), Plan((Row(t=3, alpha=0.5, sigma=0.8, x={"x": 1.0}),), name="mine"))


BROKEN = [
    ("", "not a plan's JSON"),
    ("{", "not a plan's JSON"),
    (b"\xff\xfe\xff", "not a plan's JSON"),
    ("[" * 100_000, "not a plan's JSON"),
    ("[1, 2]", "a JSON list"),
    ("3", "a JSON int"),
    ({}, "format None"),
    ({"_class_name": "DDIMScheduler"}, "format None"),
    ({**GOOD, "format": "other"}, "format 'other'"),
    (without("version"), "version is None"),
    ({**GOOD, "version": 2}, "version is 2; this fastdiff reads version 1"),
    ({**GOOD, "version": True}, "version is True"),
    (without("rows"), "missing required field `rows`"),
    (without("init_sigma"), "missing required field `init_sigma`"),
    ({**GOOD, "colour": "red"}, "unknown field `colour`"),
    ({**GOOD, "name": 3}, r"Expected `str`, got `int` - at `\$\.name`"),
    ({**GOOD, "learned_variance": 1}, r"Expected `bool`, got `int` - at `\$\.learned_variance`"),
    ({**GOOD, "init_sigma": "1"}, r"Expected `float`, got `str` - at `\$\.init_sigma`"),
    ({**GOOD, "rows": {}}, r"Expected `array`, got `object` - at `\$\.rows`"),
    ({**GOOD, "rows": []}, "at least one row"),
    ({**GOOD, "rows": [3]}, r"Expected `object`, got `int` - at `\$\.rows\[0\]`"),
    (with_row(colour=1), r"unknown field `colour` - at `\$\.rows\[1\]`"),
    (with_row(t=None), r"Expected `float`, got `null` - at `\$\.rows\[1\]\.t`"),
    (with_row(t=True), r"Expected `float`, got `bool` - at `\$\.rows\[1\]\.t`"),
    (with_row(p="0.5"), r"Expected `float`, got `str` - at `\$\.rows\[1\]\.p`"),
    (with_row(x=[1]), r"Expected `object.*`, got `array` - at `\$\.rows\[1\]\.x`"),
    (with_row(x={"x": None}), r"Expected `float`, got `null` - at `\$\.rows\[1\]\.x\[\.\.\.\]`"),
    (with_row(x={"y": 1.0}), r"x has a coefficient of 'y'.* - at `\$\.rows\[1\]`"),
    (with_row(q=10**400), r"out of range - at `\$\.rows\[1\]\.q`"),
    (with_row(clip=-1.0), r"clip must be positive.* - at `\$\.rows\[1\]`"),
    (with_row(reads=2), r"Expected `array`, got `int` - at `\$\.rows\[1\]\.reads`"),
    (with_row(reads=[0.5]), r"Expected `int`, got `float` - at `\$\.rows\[1\]\.reads\[0\]`"),
    (with_row(reads=[4]), r"reads must name.* - at `\$\.rows\[1\]`"),
    (with_row(log_variance=[1.0]), r"Expected `array.*` of length 2.* - at `\$\.rows\[1\]\.log_variance`"),
    (with_row(write=1), r"slot and write go together.* - at `\$\.rows\[1\]`"),
    (with_row(write="1", slot={}), r"Expected `int.*`, got `str` - at `\$\.rows\[1\]\.write`"),
    (with_row(calls_model="yes"), r"Expected `bool`, got `str` - at `\$\.rows\[1\]\.calls_model`"),
    (json.dumps(GOOD).replace("0.8", "NaN"), "NaN"),
    (json.dumps(GOOD).replace("0.8", "Infinity"), "Infinity"),
    (json.dumps(GOOD).replace("0.8", "1e999"), "1e999 is beyond float64"),
    (json.dumps(GOOD).replace('"sigma"', '"alpha"'), "'alpha' twice"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_text_is_refused_by_name(content, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(content if isinstance(content, (str, bytes)) else json.dumps(content))


def test_a_missing_number_and_a_wrong_type():
    row = {key: value for key, value in GOOD["rows"][0].items() if key != "sigma"}
    with pytest.raises(ValueError, match=r"missing required field `sigma` - at `\$\.rows\[0\]`"):
        Plan.from_json(json.dumps({**GOOD, "rows": [row]}))
    with pytest.raises(TypeError, match="text must be str or bytes; got dict"):
        Plan.from_json(GOOD)


# ---- the table


def lines_of(plan: Plan) -> list[str]:
    heading, empty, *lines = str(plan).splitlines()
    assert empty == ""
    assert heading.startswith(f"{plan.name}: ")
    return lines


def test_the_table_is_aligned_and_true():
    plan = samplers.ddim(LINEAR, 10, eta=0.5, clip=1.0)
    assert "10 rows, 10 network calls, x_T = 1 z, clip 1" in str(plan)
    titles, *lines = lines_of(plan)
    names = titles.split()
    assert names == ["row", "t", "alpha", "sigma", "call", "p", "q", "·x0", "·m", "noise"]
    ends = [m.end() for m in re.finditer(r"\S+", titles)]
    for i, (line, row) in enumerate(zip(lines, plan, strict=True)):
        assert [m.end() for m in re.finditer(r"\S+", line)] == ends
        cells = dict(zip(names, line.split(), strict=True))
        assert (cells["row"], cells["t"], cells["call"]) == (str(i), str(row.t), "yes")
        numbers = {"alpha": row.alpha, "sigma": row.sigma, "p": row.p, "q": row.q,
                   "·x0": row.x["x0"], "·m": row.x["m"], "noise": row.x["z"]}  # fmt: skip
        for name, value in numbers.items():
            assert (float(cells[name]) == pytest.approx(value, rel=1e-4)) if value else cells[name] == "·"


def test_slots_anchors_and_rows_without_a_call():
    titles, *lines = lines_of(history_plan())
    for title in ("·anchor", "·slot 0", "·slot 1", "c_in", "noise", "keeps"):
        assert title in titles
    assert lines[0].endswith("slot 0 = x0 + 0.5 x")
    assert lines[1].endswith("anchor = x")
    assert [line.split()[5] for line in lines] == ["yes", "yes", "yes", "no", "yes", "yes"]
    keeps = Row(t=0, alpha=1, sigma=0, x={"slot1": 2}, anchor={"slot0": -0.5, "x": 1}, slot={}, reads=(3, 1), write=2)
    assert str(Plan((keeps,))).endswith("anchor = −0.5 slot 3 + x; slot 2 = 0")
    assert "·slot 1" in str(Plan((keeps,)))


def test_a_long_plan_is_shortened_in_the_middle():
    lines = lines_of(samplers.ddpm(LINEAR))[1:]
    assert len(lines) == 41
    assert lines[20].split() == ["⋮", "960", "more", "rows"]
    assert [line.split()[0] for line in lines if "⋮" not in line] == [*map(str, range(20)), *map(str, range(980, 1000))]
    assert repr(samplers.ddpm(LINEAR)) == "Plan(name='ddpm', rows=1000)"
    assert len(lines_of(samplers.ddim(LINEAR, 40))) == 41
