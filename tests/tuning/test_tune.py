"""tune: iteration 0 is the start, to the bit; what comes out is nearer to the teacher, is kept, and runs everywhere."""

import itertools
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import fastdiff
from fastdiff.plan.plan import COLUMNS
from fastdiff.samplers.resolve import resolve_plan
from fastdiff.tuning import tune as loop
from fastdiff.tuning.learned import Learned, pruned
from fastdiff.tuning.plans import karras
from fastdiff.tuning.runs import Runs, probe, takes_floats
from fastdiff.tuning.start import movable
from fastdiff.tuning.units import terms_of, units
from fastdiff.tuning.walk import measured, walk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from mixture_network import MixtureNetwork

PROCESSES = {
    "vp": (fastdiff.NoiseSchedule.cosine(), "epsilon"),
    "flow": (fastdiff.FlowSchedule(), "flow_prediction"),
    "edm": (fastdiff.EDMSchedule(), "edm"),
}
FEW = {"iterations": 12, "batch": 8, "teacher_steps": 24}


def network(kind, dimensions=3, prediction=None):
    schedule, usual = PROCESSES[kind]
    return MixtureNetwork(dimensions, schedule, prediction or usual), schedule, prediction or usual


def tuned(kind="vp", steps=4, count=32, dimensions=3, **options):
    model, schedule, prediction = network(kind, dimensions, options.pop("prediction", None))
    told = {**FEW, **options}
    told |= {"steps": steps, "schedule": schedule, "prediction": prediction}
    return model, fastdiff.tune(model, (count, dimensions), **told)


def learner(kind, sampler, steps=4, spacing=None, **options):
    """A learner at iteration 0, and the start's plan."""
    schedule, prediction = PROCESSES[kind]

    def make(chosen):
        listed = isinstance(chosen, fastdiff.Spacing) and chosen.lists
        return resolve_plan(sampler, None if listed else steps, schedule, prediction, spacing=chosen, **options)

    plan = make(spacing)
    start = movable(plan, make, schedule, steps, spacing)
    return Learned(start, units(plan, 0.7, True, schedule), True), plan


# ---- iteration 0

STARTS = ["ddim", "euler", "heun", "dpm2", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpm_solver_3", "unipc", "deis", "lms",
          "ipndm"]  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("sampler", STARTS)
def test_iteration_0_is_the_start_to_the_bit(kind, sampler, seed):
    """Its plan; the numbers of its table, in wide rows, too; and the states that a walk with gradients reaches."""
    model, *_ = network(kind)
    try:
        learned, plan = learner(kind, sampler)
    except ValueError as error:
        pytest.skip(f"{sampler} does not walk it: {error}")
    assert learned.plan() == plan
    table = learned.table()
    wide = learned.wide(table)
    runs = Runs(model, (4, 3), 4, seed % 1000)
    expected = fastdiff.sample(model, (4, 3), **runs.of(plan, 0, 4))
    assert_same_bits(fastdiff.sample(model, (4, 3), **runs.of(wide, 0, 4)), expected)
    assert_same_bits(fastdiff.sample(model, (4, 3), **runs.of(pruned(wide), 0, 4)), expected)
    assert_same_bits(walk(runs.request(wide, 0, 4), table).detach(), expected)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras", "ays"])
def test_levels_of_any_spacing_move(spacing, seed):
    schedule = fastdiff.NoiseSchedule.linear() if spacing != "ays" else fastdiff.NoiseSchedule.scaled_linear()
    plan = resolve_plan("dpmpp_2m", 5, schedule, spacing=spacing)

    def make(chosen):
        return resolve_plan("dpmpp_2m", schedule=schedule, spacing=chosen)

    start = movable(plan, make, schedule, 5, spacing)
    assert len(start.gaps) == 6
    for shares in (torch.zeros(6), 3 * torch.randn(6), torch.tensor([50.0, 0, -50, 0, 0, 9])):
        ratios = [row.sigma / row.alpha for row in start.at(shares.double())]
        assert all(a > b for a, b in itertools.pairwise(ratios))


@pytest.mark.slow
def test_the_table_s_gradient_by_the_levels(seed):
    """Beside differences of another step, for a sampler whose every coefficient depends on its levels."""
    learned, _ = learner("vp", "unipc", 5)
    shares = (0.1 * torch.randn(len(learned.start.gaps))).double().requires_grad_(True)
    weights = torch.randn(5, 48).double()

    def total(s):
        return (learned.start.table(s).nan_to_num(0, 0, 0) * weights)[:, 5:].sum()  # t has a kink at each index

    (grad,) = torch.autograd.grad(total(shares), shares)
    with torch.no_grad():
        for i in range(len(shares)):
            step = torch.zeros_like(shares)
            step[i] = 1e-4
            slope = (total(shares + step) - total(shares - step)) / 2e-4
            torch.testing.assert_close(grad[i], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_gradient_of_a_walk(kind, seed):
    """By levels, t and coefficients, beside differences of the sampled states."""
    model, schedule, _ = network(kind)
    high = fastdiff.Spacing(sigmas=karras(80.0, schedule.sigma_min, 4)) if kind == "vp" else None
    learned, _ = learner(kind, "dpmpp_2m", 4, high)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    runs = Runs(model, (3, 3), 3, seed % 1000)
    table = learned.table()
    x = walk(runs.request(learned.wide(table), 0, 3), table)
    weights = torch.randn_like(x)
    grads = torch.autograd.grad((x * weights).sum(), learned.parameters())
    direction = [torch.randn_like(parameter) for parameter in learned.parameters()]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, step in zip(learned.parameters(), direction, strict=True):
                parameter.add_(sign * 2e-3 * step)
            ends.append((fastdiff.sample(model, (3, 3), **runs.of(learned.plan(), 0, 3)) * weights).sum())
            for parameter, step in zip(learned.parameters(), direction, strict=True):
                parameter.sub_(sign * 2e-3 * step)
    slope = float(ends[0] - ends[1]) / 4e-3
    exact = float(sum((g * d).sum() for g, d in zip(grads, direction, strict=True)))
    size = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert abs(slope - exact) < 0.05 * size + 1e-3, f"{slope} beside {exact}"


# ---- what comes out


@pytest.mark.parametrize("kind", ["vp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flow", "edm"))])
def test_a_tuned_plan(kind, seed):
    """Nearer to the teacher than the start, on noise held out; kept as JSON; the same bits on every backend."""
    model, plan = tuned(kind, seed=seed % 1000)
    told = plan.provenance
    assert told.error < told.errors["start"]["4"]
    again = fastdiff.Plan.from_json(plan.to_json())
    assert (again, again.provenance, again.to_json()) == (plan, told, plan.to_json())
    ends = [fastdiff.sample(model, (4, 3), sampler=plan, backend=backend) for backend in ("reference", "native")]
    assert_same_bits(*ends)
    assert {"tuned", "start", "ddim", "euler", "dpmpp_2m"} <= set(told.errors)
    assert set(told.errors["ddim"]) == {"4", "8", "16"}
    assert "4.0" not in str(told)
    assert str(told).count("\n") == len(told.errors) + 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_plan(seed):
    first, second = (tuned(seed=3)[1] for _ in range(2))
    assert first.to_json() == second.to_json()
    assert tuned(seed=4)[1] != first


@pytest.mark.slow
def test_resuming_in_the_middle_of_a_tuned_plan(seed):
    model, plan = tuned(steps=5)
    states = list(fastdiff.sample_iter(model, (2, 3), sampler=plan, seed=1))
    for state in states[:-1]:
        assert_same_bits(fastdiff.sample(model, (2, 3), sampler=plan, seed=1, resume=state), states[-1].x)


def test_never_worse(monkeypatch, seed):
    """A rate that ruins everything, however often it is halved, gives the start back."""
    monkeypatch.setattr(loop, "RATE", 1e7)
    _, plan = tuned(start="dpmpp_2m")
    assert plan.provenance.error == plan.provenance.errors["start"]["4"]
    spacing = fastdiff.Spacing(sigmas=karras(80.0, PROCESSES["vp"][0].sigma_min, 4))
    assert plan == resolve_plan("dpmpp_2m", schedule=PROCESSES["vp"][0], spacing=spacing)


@pytest.mark.parametrize("goes_back", [True, False])
def test_too_high_a_rate_is_halved(monkeypatch, goes_back, seed):
    """Where a look finds ruin, learning goes back to the least error; a learning that does not never recovers."""
    monkeypatch.setattr(loop, "RATE", 3.0)
    if not goes_back:
        monkeypatch.setattr(loop, "WORSE", math.inf)
    _, plan = tuned(iterations=24, seed=1)
    errors = plan.provenance.errors
    assert (errors["tuned"]["4"] < 0.9 * errors["start"]["4"]) == goes_back


def test_ctrl_c_gives_the_best_so_far(monkeypatch, seed):
    """And leaves the network as it was: its weights asking for gradients, its mode."""
    calls, original = [], loop.walk

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loop, "walk", interrupted)
    model, schedule, prediction = network("vp")
    model.train()
    with pytest.warns(UserWarning, match="interrupted: the plan is the best of the iterations"):
        plan = fastdiff.tune(model, (32, 3), steps=4, schedule=schedule, prediction=prediction, **FEW)
    assert plan.provenance.error < plan.provenance.errors["start"]["4"]
    assert model.training
    assert model.means.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "score"])
def test_predictions(prediction, seed):
    """Of one distribution, by every kind of output."""
    model, schedule, _ = network("vp", prediction="epsilon" if prediction == "score" else prediction)

    def asked(x, t):
        out = model(x, t)
        return out if prediction != "score" else -out / model.level(t)[1][:, None]

    plan = fastdiff.tune(asked, (32, 3), steps=4, schedule=schedule, prediction=prediction, **FEW)
    assert plan.provenance.error < plan.provenance.errors["start"]["4"]
    assert (plan.provenance.model_sha256, plan.provenance.learned) == (None, "levels, t, coefficients")


class Conditional(nn.Module):
    """The mixture, moved by a condition of each sample; under a paired condition twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t, by, also=None):
        alpha, _ = self.inner.level(t)
        moved = by if also is None else by + also
        return self.inner(x - alpha[:, None] * moved[:, None], t)


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_guidance(paired, seed):
    """Conditions of each sample go along in every batch; scales one a sampling call are the plan's."""
    inner, schedule, _ = network("vp")
    model, count = Conditional(inner), 24
    by = torch.linspace(-1, 1, count)
    options = {"model_kwargs": {"by": by}, "uncond_kwargs": {"by": torch.zeros(count)}, "guidance_scale": 2.0}
    if paired:
        options = {"model_kwargs": {"by": by, "also": by}, "guidance_scale": (2.0, 1.5),
                   "uncond_kwargs": [{"by": 0 * by, "also": 0 * by}, {"by": 0 * by, "also": by}]}  # fmt: skip
    plan = fastdiff.tune(model, (count, 3), steps=4, schedule=schedule, guidance_rescale=0.3, **options, **FEW)
    assert plan.provenance.error < plan.provenance.errors["start"]["4"]
    assert plan.provenance.guidance_scale == ([2.0, 1.5] if paired else 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff.sample(model, (count, 3), sampler=plan, **options)
    with pytest.warns(UserWarning, match="guidance scale, which was"):
        fastdiff.sample(model, (count, 3), sampler=plan, **{**options, "guidance_scale": (3.0, 1.0) if paired else 3.0})


def test_clip_features_and_images(seed):
    """Images of any shape, clipped, measured in what the caller gives."""
    schedule = fastdiff.NoiseSchedule.cosine()

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            nn.init.normal_(self.conv.weight, std=0.2)

        def forward(self, x, t):
            return torch.tanh(self.conv(x)) + 0.001 * t.float().view(-1, 1, 1, 1)

    def features(x):
        return x.mean((2, 3))

    plan = fastdiff.tune(Images(), (24, 2, 4, 4), steps=3, schedule=schedule, clip=1.0, features=features, **FEW)
    assert plan.provenance.measured_in == "features"
    assert all(row.clip == 1.0 for row in plan)
    assert plan.provenance.error <= plan.provenance.errors["start"]["3"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_other_dtypes(dtype, seed):
    inner, schedule, prediction = network("vp")

    def rounding(x, t):
        assert x.dtype == dtype
        return inner(x.float(), t).to(dtype)

    plan = fastdiff.tune(rounding, (32, 3), steps=4, schedule=schedule, prediction=prediction, model_dtype=dtype, **FEW)
    assert plan.provenance.error < plan.provenance.errors["start"]["4"]


class Indexed(nn.Module):
    """A network that looks its t up in a table, and so takes whole ones alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("times", torch.arange(1000.0))

    def forward(self, x, t):
        return self.inner(x, self.times[t])


@pytest.mark.parametrize("gradient_free", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_of_whole_timesteps(gradient_free, seed):
    """Its levels lie at them; with a gradient they stay there, and the coefficients are learned."""
    if gradient_free:
        pytest.importorskip("cma")
    inner, schedule, prediction = network("vp")
    plan = fastdiff.tune(
        Indexed(inner), (32, 3), steps=4, schedule=schedule, prediction=prediction, gradient_free=gradient_free, **FEW
    )
    assert plan.integer_timesteps
    assert plan.provenance.learned == ("levels" if gradient_free else "coefficients")
    assert plan.provenance.error <= plan.provenance.errors["start"]["4"]
    if not gradient_free:
        assert plan.provenance.error < plan.provenance.errors["start"]["4"]


@pytest.mark.slow
def test_gradient_free(seed):
    """Of a network without gradients: the start's own sampler, at other levels."""
    pytest.importorskip("cma")
    inner, schedule, prediction = network("vp")

    def black_box(x, t):
        return inner(x, t).detach()

    options = {"steps": 4, "schedule": schedule, "prediction": prediction, **FEW, "iterations": 40, "seed": 1}
    with pytest.raises(ValueError, match=r"model has no gradient by x, .* gradient_free=True"):
        fastdiff.tune(black_box, (32, 3), **options)
    plans = [fastdiff.tune(black_box, (32, 3), gradient_free=True, **options) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    told = plans[0].provenance
    assert told.error < told.errors["start"]["4"]
    again = resolve_plan("dpmpp_2m", schedule=schedule, spacing=fastdiff.Spacing(
        sigmas=[*(row.sigma / row.alpha for row in plans[0]), 0.0]))  # fmt: skip
    for row, other in zip(plans[0], again, strict=True):
        assert row.x == pytest.approx(other.x, rel=1e-6)


@pytest.mark.slow
def test_a_start_that_is_a_plan(seed):
    """Its levels stay; the t and the coefficients are learned."""
    schedule = PROCESSES["vp"][0]
    begins = fastdiff.samplers.pndm(schedule, 4)
    calls = sum(row.calls_model for row in begins)
    _, plan = tuned(start=begins, steps=calls)
    assert plan.provenance.learned == "t, coefficients"
    assert plan.provenance.error < plan.provenance.errors["start"][str(calls)]
    assert [(row.alpha, row.sigma) for row in plan] == [(row.alpha, row.sigma) for row in begins]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_rows_that_take_outputs_again(scale, seed):
    """A walk ends where ``sample`` does, to the bit; the plan that is learned takes the same outputs, and is nearer."""
    model, schedule, _ = network("vp")
    guided = Conditional(model)
    by = torch.linspace(-1, 1, 32)
    options = {"model_kwargs": {"by": by}, "uncond_kwargs": {"by": torch.zeros(32)}, "guidance_scale": scale}
    start = fastdiff.samplers.dpmpp_2m(schedule, 7).reuse([2, 3, 5])
    runs = Runs(guided, (32, 3), 8, seed % 1000, options)
    expected = fastdiff.sample(guided, (8, 3), **runs.of(start, 0, 8))
    table = start.table().clone().requires_grad_(True)
    walked = walk(runs.request(start, 0, 8), table)
    assert_same_bits(walked.detach(), expected)
    slope = torch.autograd.grad(walked.square().sum(), table)[0]
    assert slope[:, COLUMNS.index("x.x0")].all()
    assert not slope[[2, 3, 5], COLUMNS.index("t")].any()  # these rows tell the network nothing
    plan = fastdiff.tune(guided, (32, 3), steps=4, start=start, schedule=schedule, **options, **FEW)
    assert [row.reuse for row in plan] == [row.reuse for row in start]
    errors = plan.provenance.errors
    assert errors["tuned"]["4"] < errors["start"]["4"]


@pytest.mark.parametrize("kind", PROCESSES)
def test_axes_are_uncorrelated(kind, seed):
    """At the start a parameter of 1 moves x' by what the row writes, and no two of a row's parameters move it alike."""
    learned, plan = learner(kind, "dpmpp_2m", 6)
    runs = Runs(network(kind)[0], (64, 3), 64, seed % 1000)
    table = learned.table().detach()
    request = runs.request(learned.wide(table), 0, 64)
    moments = measured(request, table, learned.units)
    assert list(moments) == list(range(6))
    along = Learned(learned.start, learned.units, True, moments)
    assert along.plan() == plan
    assert len(along.numbers) == len(learned.numbers)
    assert torch.linalg.matrix_rank(along.directions.flatten(1)) == len(along.numbers)
    for i, of in moments.items():
        columns = terms_of(learned.units, i)
        changes = along.directions[along.directions[:, i, columns].any(1)][:, i, columns]
        moved = changes @ of.products @ changes.T / of.written**2
        apart = moved - moved.diagonal().diag()
        assert apart.abs().max() < 1e-6
        assert moved.diagonal().max() <= 1
        assert moved.diagonal().max() > 0.9


def test_moments_are_the_terms(seed):
    """Beside the products of states that ``sample_iter`` shows: of x and x̂_0, and of what the row writes."""
    learned, plan = learner("vp", "ddim", 4)
    model = network("vp")[0]
    runs = Runs(model, (16, 3), 16, seed % 1000)
    table = learned.table().detach()
    found = measured(runs.request(learned.wide(table), 0, 16), table, learned.units)[2]
    states = list(fastdiff.sample_iter(model, (16, 3), **runs.of(plan, 0, 16)))
    before, after = (state.x.double() for state in states[2:4])
    at = terms_of(learned.units, 2).index(COLUMNS.index("x.x"))
    assert found.products[at, at] == pytest.approx(float(before.square().mean()), rel=1e-5)
    assert found.written == pytest.approx(float(after.square().mean().sqrt()), rel=1e-5)
    x0 = (before - plan[2].sigma * model(before.float(), torch.full((16,), float(plan[2].t))).double()) / plan[2].alpha
    at = terms_of(learned.units, 2).index(COLUMNS.index("x.x0"))
    assert found.products[at, at] == pytest.approx(float(x0.square().mean()), rel=1e-4)


def test_the_unit_of_t(seed):
    """By the slope of ln(σ/α) at the row, which is steep near the top of a cosine schedule; as the network has it."""
    at = COLUMNS.index("t")
    learned, plan = learner("vp", "dpmpp_2m", 6)
    model, *_ = network("vp")
    first, second = plan[0], plan[1]
    unit = learned.units[0, at].item()
    alpha, sigma = model.level(torch.tensor([first.t - 0.01 * unit, first.t], dtype=torch.float64))
    moved, here = (sigma / alpha).log().tolist()
    gap = math.log(first.sigma / first.alpha * second.alpha / second.sigma)
    assert here - moved == pytest.approx(0.01 * gap, rel=0.02)
    assert unit < 0.5 * (first.t - second.t)
    learned, plan = learner("flow", "dpmpp_2m", 6)
    assert learned.units[0, at] == abs(plan[0].t - plan[1].t), "a level without signal has no logarithm"


def test_memory_does_not_grow_with_steps(seed):
    """Of each row only states are kept: no tensor of a network's inside is saved for the backward pass."""
    model, *_ = network("vp")
    saved = []
    for steps in (3, 9):
        learned, _ = learner("vp", "dpmpp_2m", steps)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        table = learned.table()
        request = Runs(model, (64, 3), 64, 0).request(learned.wide(table), 0, 64)
        sizes = [0]

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = walk(request, table)
        saved.append(max(sizes))
        assert x.requires_grad
    assert max(saved) < 64 * 8, f"{saved}: of a network of [64, 8, 3] tensors some were kept"


def test_what_a_network_takes(seed):
    inner, schedule, _ = network("vp")
    plan = resolve_plan("dpmpp_2m", 4, schedule)

    def asked(model):
        runs = Runs(model, (4, 3), 4, 0)
        found = probe(runs, plan) if takes_floats(runs, plan) else None
        return None if found is None else (found.differentiable, found.learns_t)

    assert asked(inner) == (True, True)
    assert asked(Indexed(inner)) is None
    assert asked(lambda x, t: inner(x, t.round())) == (True, False)
    assert asked(lambda x, t: inner(x, t.detach())) == (True, False)
    assert asked(lambda x, t: inner(x.detach(), t)) == (False, False)


# ---- bad input

SEVEN = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.cosine(), 7)


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({"steps": 0}, ValueError, "steps must be"),
        ({"steps": 2.5}, TypeError, "steps must be"),
        ({"steps": 2000, "spacing": "trailing"}, ValueError, "steps"),
        ({"start": "ddpm"}, ValueError, "start is 'ddpm', whose row 0 adds noise"),
        ({"start": "euler_ancestral"}, ValueError, "adds noise"),
        ({"start": "ddim_inverse"}, ValueError, "leads to noise"),
        ({"start": "nothing"}, ValueError, "sampler is 'nothing'"),
        ({"start": SEVEN}, ValueError, "a Plan of 7 network calls"),
        ({"start": SEVEN.reuse(every=2, kind="deep"), "steps": 7}, ValueError, "whose row 1 takes deep features again"),
        ({"start": SEVEN.reuse(every=2), "steps": 7}, ValueError, "a Plan of 4 network calls; steps is 7"),
        (
            {"teacher": SEVEN.reuse(every=2, kind="deep"), "teacher_steps": None},
            ValueError,
            "teacher: .* takes deep features again",
        ),
        ({"teacher": "ddpm"}, ValueError, "teacher: 'ddpm', whose row 0 adds noise"),
        ({"teacher": "lcm"}, ValueError, "teacher"),
        ({"teacher": SEVEN, "teacher_steps": 7}, ValueError, "fixes"),
        ({"teacher_steps": 0}, ValueError, "teacher_steps"),
        ({"features": 3}, TypeError, "features must be callable"),
        ({"features": lambda x: x.sum()}, ValueError, r"features must return a floating-point tensor \[8, …\]"),
        ({"features": lambda x: x[:2]}, ValueError, "features must return"),
        ({"features": lambda x: 3.0}, ValueError, "got float"),
        ({"held_out": 1.5}, ValueError, "held_out"),
        ({"held_out": 1.0}, ValueError, "must leave some to learn from"),
        ({"iterations": 0}, ValueError, "iterations"),
        ({"batch": 0}, ValueError, "batch"),
        ({"seed": -1}, ValueError, "seed"),
        ({"prediction": "noise"}, ValueError, "prediction"),
    ],
)
def test_bad_arguments(options, kind, why, seed):
    """Refused before the network is called more than to ask it what it takes."""
    model, schedule, prediction = network("vp")
    called = []

    def counted(x, t):
        called.append(1)
        return model(x, t)

    told = {"steps": 4, "schedule": schedule, "prediction": prediction, **FEW, **options}
    with pytest.raises(kind, match=why):
        fastdiff.tune(counted, (16, 3), **told)
    assert len(called) <= 3


def test_bad_shapes_and_models(seed):
    model, schedule, _ = network("vp")
    start = fastdiff.samplers.ddim(schedule, 4)
    with pytest.raises(ValueError, match="must leave some to learn from"):
        fastdiff.tune(model, (1, 3), steps=4, schedule=schedule)
    with pytest.raises(TypeError, match="model must be a network"):
        fastdiff.tune(MixtureNetwork, (8, 3), steps=4)
    with pytest.raises(ValueError, match="gradient_free learns the levels"):
        fastdiff.tune(model, (8, 3), steps=4, schedule=schedule, start=start, gradient_free=True, **FEW)


# ---- the teacher's ends in a file


def test_a_teacher_s_file(tmp_path, seed):
    """Written by the first tuning and read by the second, of other steps, which asks the teacher nothing: the plan is
    that of a tuning without a file.
    """
    model, schedule, prediction = network("vp")
    asked = []
    model.register_forward_hook(lambda module, given, out: asked.append(len(out)))
    options = {"schedule": schedule, "prediction": prediction, **FEW, "seed": seed % 1000}
    path = tmp_path / "ends.safetensors"
    totals, plans = [], []
    for kept in (None, path, path):
        asked.clear()
        plans.append(fastdiff.tune(model, (32, 3), steps=3, teacher_file=kept, **options))
        totals.append(sum(asked))
    assert plans[0].to_json() == plans[1].to_json() == plans[2].to_json()
    assert totals[1] == totals[0]
    assert totals[2] == totals[0] - 32 * 24
    asked.clear()
    other = fastdiff.tune(model, (32, 3), steps=5, teacher_file=path, **options)
    with_file = sum(asked)
    asked.clear()
    assert other.to_json() == fastdiff.tune(model, (32, 3), steps=5, **options).to_json()
    assert with_file == sum(asked) - 32 * 24
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_doubled_teacher_s_file(tmp_path, seed):
    """What doubling moved it by is kept, too."""
    model, schedule, prediction = network("vp")
    options = {"schedule": schedule, "prediction": prediction, "iterations": 2, "batch": 8,
               "teacher_file": tmp_path / "ends.safetensors"}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (fastdiff.tune(model, (16, 3), steps=3, **options) for _ in range(2))
    assert first.provenance.teacher_error is not None
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"seed": 1}, "its seed was 0 and is 1"),
        ({"shape": (24, 3)}, r"its shape was \[16, 3\] and is \[24, 3\]"),
        ({"schedule": fastdiff.NoiseSchedule.linear()}, "its schedule was .* and is"),
        ({"prediction": "v_prediction"}, "its prediction was epsilon and is v_prediction"),
        ({"clip": 1.0}, "its teacher, dpmpp_2m of 24 rows, is not the one that is asked for"),
        ({"teacher": "unipc"}, "its teacher, dpmpp_2m of 24 rows, is not"),
        ({"teacher_steps": 30}, "its teacher, dpmpp_2m of 24 rows, is not"),
        ({"spacing": "trailing"}, "its teacher, dpmpp_2m of 24 rows, is not"),
        ({"thresholding": 0.9}, "its thresholding was None and is 0.9"),
        ({"guidance_scale": 2.0}, "its guidance scale was 1.0 and is 2.0"),
        ({"model_kwargs": {"by": torch.ones(16)}}, "its conditions' SHA-256 was"),
        ({"network": 1}, "its network's SHA-256 was [0-9a-f]{64} and is [0-9a-f]{64}"),
    ],
)
def test_another_run_s_teacher_file_is_refused(changed, why, tmp_path, seed):
    inner, schedule, prediction = network("vp")
    by = torch.zeros(16)
    path = tmp_path / "ends.safetensors"
    options = {"steps": 3, "schedule": schedule, "prediction": prediction, "teacher_file": path, "shape": (16, 3),
               "model_kwargs": {"by": by}, "uncond_kwargs": {"by": by}, **FEW, "iterations": 1}  # fmt: skip
    fastdiff.tune(Conditional(inner), **options)
    before = path.read_bytes()
    options |= changed
    if "network" in options:
        inner = MixtureNetwork(3, schedule, seed=options.pop("network"))
    if len(by) != options["shape"][0]:
        options |= {name: {"by": torch.zeros(options["shape"])[:, 0]} for name in ("model_kwargs", "uncond_kwargs")}
    with pytest.raises(ValueError, match=f"teacher_file: .* of another run: .*{why}"):
        fastdiff.tune(Conditional(inner), **options)
    assert path.read_bytes() == before


def test_what_is_no_teacher_s_file(tmp_path, seed):
    model, schedule, prediction = network("vp")
    options = {"steps": 3, "schedule": schedule, "prediction": prediction, **FEW, "iterations": 1}
    path = tmp_path / "ends.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"teacher_file: .*ends.safetensors holds no teacher's ends"):
        fastdiff.tune(model, (16, 3), teacher_file=path, **options)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        fastdiff.tune(model, (16, 3), teacher_file=tmp_path / "ends.pt", **options)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fastdiff.tune(model, (16, 3), teacher_file=tmp_path / "nowhere" / "ends.safetensors", **options)
    with pytest.raises(ValueError, match="teacher_file: the model is a function, whose weights have no hash"):
        fastdiff.tune(lambda x, t: model(x, t), (16, 3), teacher_file=tmp_path / "a.safetensors", **options)


def test_nan_in_the_teacher_s_run_names_the_row(seed):
    model, schedule, prediction = network("vp")

    def broken(x, t):
        return torch.where(t[:, None] < 500, math.nan, model(x, t))

    with pytest.raises(FloatingPointError, match=r"the teacher's run, 'dpmpp_2m' of 24 rows: .* at row \d+ of 24"):
        fastdiff.tune(broken, (16, 3), steps=4, schedule=schedule, prediction=prediction, **FEW)


def test_a_plan_of_another_run_warns(seed):
    """Saying what differs: the network with both hashes, the shape. A plan that was not learned says nothing."""
    model, plan = tuned()
    other = MixtureNetwork(3, PROCESSES["vp"][0], seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff.sample(model, (2, 3), sampler=plan)
        fastdiff.sample(other, (2, 3), sampler="ddim", steps=3)
        fastdiff.sample(lambda x, t: other(x, t), (2, 3), sampler=plan)  # a function has no hash
    with pytest.warns(UserWarning, match=f"SHA-256 was {plan.provenance.model_sha256} and is [0-9a-f]{{64}}") as told:
        fastdiff.sample(other, (2, 3), sampler=plan)
    assert told[0].filename == __file__
    with torch.no_grad():
        model.means.mul_(1.5)  # a weight that is written to is another network
    with pytest.warns(UserWarning, match="SHA-256"):
        fastdiff.sample(model, (2, 3), sampler=plan)
    wide = MixtureNetwork(5, PROCESSES["vp"][0])
    with pytest.warns(UserWarning, match=r"the shape of a sample, which was \[3\] and is \[5\]"):
        fastdiff.sample(wide, (2, 5), sampler=plan)
