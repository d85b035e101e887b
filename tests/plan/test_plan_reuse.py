"""Plans with rows that reuse a call: which rows may, how they are told, and the greedy choice."""

import itertools
import json
import math

import pytest

import fastdiff
from fastdiff import NoiseSchedule, Plan, Row, samplers
from fastdiff.plan.reuse import choose_reused, sources

LINEAR = NoiseSchedule.linear()


def row(**changes) -> Row:
    return Row(**{"t": 3, "alpha": 0.5, "sigma": 0.8, "x": {"x": 1.0}, **changes})


@pytest.mark.parametrize("kind", ["output", "deep"])
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "repaint", "pndm"])
def test_one_call_in_so_many(name, kind):
    plan = samplers.SAMPLERS[name](LINEAR, 30)
    calling = [i for i, r in enumerate(plan) if r.calls_model]
    for every in (1, 2, 3, len(calling), 1000):
        thinned = plan.reuse(every=every, kind=kind)
        exact = [i for i in calling if thinned[i].reuse is None]
        assert exact == calling[::every]
        assert thinned.calls == len(exact)
        assert thinned.reuse(every=1) == plan
        assert thinned.table().equal(plan.table())  # what kernels read does not change
        assert thinned.reuse([i for i in calling if i not in exact], kind=kind) == thinned
    assert plan.reuse(every=1) == plan
    assert plan.reuse([]) == plan


def test_rows_by_their_numbers_are_added():
    plan = samplers.ddim(LINEAR, 8)
    mixed = plan.reuse([2, 5]).reuse([3], kind="deep", branch=2)
    assert [r.reuse for r in mixed] == [None, None, "output", "deep", None, "output", None, None]
    assert [r.branch for r in mixed] == [0, 0, 0, 2, 0, 0, 0, 0]
    assert (mixed.calls, mixed.branch, mixed.reused) == (5, 2, {"output", "deep"})
    assert sources(mixed.rows) == (None, None, 1, 1, None, 4, None, None)
    assert sources(plan.reuse([1], kind="deep").reuse([2]).rows)[2] == 1  # a shallow call has an output, too
    assert mixed != plan
    assert mixed.reuse([3]) == plan.reuse([2, 3, 5])


def test_where_a_run_can_begin():
    """At no row that reuses a call, nor where a later row reuses an earlier one's."""
    plan = samplers.ddim(LINEAR, 8)
    assert plan.reuse(every=3).entries == (0, 3, 6)
    deep = plan.reuse([2, 4], kind="deep").reuse([3])
    assert deep.entries == (0, 1, 5, 6, 7)
    assert deep.needs[3] == {"output", "deep"}
    assert deep.needs[4] == {"deep"}
    multistep = samplers.dpmpp_2m(LINEAR, 6).reuse(every=2)
    assert set(multistep.entries) <= set(samplers.dpmpp_2m(LINEAR, 6).entries)
    for i, needed in enumerate(multistep.needs):
        assert ("output" in needed) == (i % 2 == 1)


@pytest.mark.parametrize("kind", ["output", "deep"])
def test_as_text(tmp_path, kind):
    plan = samplers.ddim(LINEAR, 6).reuse(every=3, kind=kind)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.load(plan.save(tmp_path / "plan.json")).to_json() == plan.to_json()
    for old in (plan.to_json().replace(f', "reuse": "{kind}"', ""), samplers.ddim(LINEAR, 6).to_json()):
        assert "reuse" not in old
        assert Plan.from_json(old) == samplers.ddim(LINEAR, 6)  # a file of a version that knew no reuse
    heading, _, titles, *lines = str(plan).splitlines()
    counted = {"output": "2 network calls, 4 reused outputs", "deep": "2 network calls, 4 shallow calls of branch 0"}
    assert f"ddim: 6 rows, {counted[kind]}, x_T = 1 z" == heading
    call, reuse = (titles.split().index(title) for title in ("call", "reuse"))
    told = [line.split() for line in lines]
    assert [cells[reuse] for cells in told] == ["·", kind, kind, "·", kind, kind]
    again = {"output": "no", "deep": "yes"}[kind]
    assert [cells[call] for cells in told] == ["yes", again, again] * 2
    assert "reuse" not in str(samplers.ddim(LINEAR, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reuse": "input"}, r"Invalid enum value 'input' - at `\$\.rows\[1\]\.reuse`"),
        ({"reuse": 1}, r"at `\$\.rows\[1\]\.reuse`"),
        ({"reuse": "deep", "branch": -1}, "branch"),
        ({"branch": 1}, "branch is 1, but it goes with reuse='deep'"),
        ({"reuse": "output", "calls_model": False, "q": 0.0, "x": {}}, "a row without a network call has no output"),
    ],
)
def test_broken_text(change, message):
    content = json.loads(samplers.ddim(LINEAR, 3).to_json())
    content["rows"][1] |= change
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(content))


def test_what_is_refused():
    plan = samplers.repaint(LINEAR, 6, jump_length=2, jump_n_sample=2)
    silent = next(i for i, r in enumerate(plan) if not r.calls_model)
    bad = [
        ({}, ValueError, "give either rows"),
        ({"rows": [1], "every": 2}, ValueError, "give either rows"),
        ({"every": 0}, ValueError, "every must be in"),
        ({"every": 1.5}, TypeError, "every must be"),
        ({"rows": [0]}, ValueError, "row 0 reuses an output, but no row before it calls the network"),
        ({"rows": [0], "kind": "deep"}, ValueError, "row 0 reuses deep features, but no row before it calls the whole"),
        ({"rows": [len(plan)]}, ValueError, r"rows\[0\] must be in"),
        ({"rows": [-1]}, ValueError, r"rows\[0\] must be in"),
        ({"rows": 3}, TypeError, "rows must be a sequence of rows' numbers; got int"),
        ({"rows": "12"}, TypeError, "rows must be a sequence"),
        ({"rows": [silent]}, ValueError, f"row {silent} makes no network call"),
        ({"every": 2, "kind": "shallow"}, ValueError, "kind must be one of output, deep; got 'shallow'"),
        ({"every": 2, "kind": "deep", "branch": -1}, ValueError, "branch must be in"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            plan.reuse(**arguments)
    with pytest.raises(ValueError, match="one branch; got 0 in row 1, 2 in row 2"):
        samplers.ddim(LINEAR, 4).reuse([1], kind="deep").reuse([2], kind="deep", branch=2)
    with pytest.raises(ValueError, match="no row before it calls the whole network"):
        Plan((row(calls_model=False), row(reuse="deep")))


def test_a_plans_fingerprint_tells_reuse():
    from fastdiff.sampling.state import plan_identity

    plan = samplers.ddim(LINEAR, 6)
    deep = [plan.reuse(every=2, kind="deep", branch=branch) for branch in (0, 1)]
    thinned = [plan, plan.reuse(every=2), plan.reuse(every=3), *deep]
    assert len(set(map(plan_identity, thinned))) == 5


# ---- the greedy choice


def test_the_greedy_choice(rng):
    """Each step is the best of all one-row changes, by an error of random numbers a set of rows."""
    plan, known = samplers.ddim(LINEAR, 7), {}

    def error(candidate: Plan) -> float:
        chosen = frozenset(i for i, r in enumerate(candidate) if r.reuse)
        return known.setdefault(chosen, math.nan if rng.random() < 0.1 else rng.random())

    path = choose_reused(plan, 2, error, kind="deep", branch=1)
    assert [p.calls for p, _ in path] == [7, 6, 5, 4, 3, 2]
    assert path[0][0] == plan
    before = frozenset()
    for chosen, found in path[1:]:
        now = frozenset(i for i, r in enumerate(chosen) if r.reuse)
        assert before < now
        assert {(r.reuse, r.branch) for i, r in enumerate(chosen) if i in now} == {("deep", 1)}
        others = [known[before | {i}] for i in range(1, 7) if i not in before]
        assert found == min(math.inf if math.isnan(e) else e for e in others)
        before = now
    assert choose_reused(plan, 7, error) == [(plan, path[0][1])]


def test_the_greedy_choice_on_a_network(seed):
    """Never worse than any plan with the same number of calls that it tried; at one row, the best there is."""
    shape, schedule = (2, 3, 4, 4), LINEAR
    plan = samplers.dpmpp_2m(schedule, 6)
    model = lambda x, t: x * (t / 1000).view(-1, 1, 1, 1)  # noqa: E731
    teacher = fastdiff.sample(model, shape, sampler="dpmpp_2m", steps=40, seed=seed)

    def error(candidate: Plan) -> float:
        images = fastdiff.sample(model, shape, sampler=candidate, seed=seed)
        return (images - teacher).square().mean().sqrt().item()

    path = choose_reused(plan, 4, error)
    assert path[1][1] == min(error(plan.reuse([i])) for i in range(1, 6))
    for chosen, found in path:
        assert error(chosen) == found
    pairs = [error(plan.reuse(rows)) for rows in itertools.combinations(range(1, 6), 2)]
    assert min(pairs) <= path[2][1] <= max(pairs)


def test_the_greedy_choice_refuses():
    plan = samplers.ddim(LINEAR, 5)
    for calls in (0, 6):
        with pytest.raises(ValueError, match=r"calls must be in \[1, 5\]"):
            choose_reused(plan, calls, lambda plan: 0.0)
    with pytest.raises(TypeError, match="error must be a function of a plan"):
        choose_reused(plan, 3, 0.5)
