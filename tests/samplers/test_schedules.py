"""Every sampler on every kind of schedule: where it walks, that it ends on the image, what docs/samplers.md says."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from helpers import planned
from samplers_multistep import walk

import fastdiff
from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, Spacing, samplers
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules.level import Level, x0_terms

LINEAR = NoiseSchedule.linear()
ZERO_SNR = NoiseSchedule.scaled_linear().rescale_zero_terminal_snr()
KINDS = {
    "betas": (LINEAR, ("epsilon", "v_prediction", "sample", "score")),
    "cosine": (NoiseSchedule.cosine(), ("epsilon", "v_prediction", "sample")),
    "zero SNR": (ZERO_SNR, ("v_prediction", "sample")),
    "floor": (NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(2.0**-24), ("v_prediction", "epsilon")),
    "EDM": (EDMSchedule(), ("edm", "sample", "epsilon")),
    "flow": (FlowSchedule(3.0), ("flow_prediction", "sample")),
    "LTX": (FlowSchedule(2.0, shift_terminal=0.1), ("flow_prediction",)),
}
FORWARD = sorted(set(SAMPLERS) - {"ddim_inverse"})
# What ends on the image under these options alone.
OPTIONS = {"lcm": {"timestep_scaling": 1e9}, "tcd": {"final": "zero"}, "flow_sde": {"final_noise": False}}


def network(plan, prediction, point):
    """What is exact for data at one point: m of x̂_0 = point and the ε that is then in x."""

    def m(x, row):
        level = Level(row.t, row.alpha, row.sigma, row.c_in, data)
        p, q = x0_terms(prediction, level)
        return (point - p * x) / q

    data = 0.5 if prediction == "edm" else 1.0
    return m


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORWARD)
def test_data_at_one_point_is_reached(seed, rng, name, kind):
    """Whatever the steps, the spacing's ends and the noise, an exact network's walk ends on its point."""
    schedule, predictions = KINDS[kind]
    if (name, kind) == ("tcd", "EDM"):
        with pytest.raises(ValueError, match="share"):
            samplers.tcd(schedule, 5)
        return
    point = torch.randn(1, 3, dtype=torch.float64)
    for steps in (1, 2, 5):
        prediction = rng.choice(predictions)
        if name == "repaint":
            options = {"jump_length": 2, "jump_n_sample": 2}
        else:
            options = OPTIONS.get(name, {})
        plan = planned(SAMPLERS[name], schedule, steps, prediction=prediction, **options)
        assert plan.integer_timesteps <= (schedule.table_length is not None)
        exact = network(plan, prediction, point)
        x = plan[0].alpha * point + plan.init_sigma * torch.randn(1, 3, dtype=torch.float64)
        noises = torch.randn(len(plan), 1, 3, dtype=torch.float64)
        *_, last = walk(plan, x, lambda x, row, i, exact=exact: exact(x / row.c_in, row), noises)
        torch.testing.assert_close(last, point, rtol=0, atol=1e-6, msg=f"{name}, {kind}, {steps} steps, {prediction}")


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"heun", "dpm2", "restart", "tcd", "pndm"}))
def test_states_are_one_process(seed, name):
    """x/α over σ/α does not know its schedule: a table's, EDM's and a flow's walks over the same σ/α are one.

    Heun's and DPM2's straight lines are the flow's own, not these; TCD's landing is a share of the schedule's t.
    """
    ratios = [9.0, 4.0, 1.5, 0.6, 0.2, 0.05, 0.0]
    table = NoiseSchedule.from_alphas_cumprod([1 / (1 + r**2) for r in (0.02, *ratios[-2::-1])])  # LCM's f(x, 0) is x
    walks = {
        "table": (table, ratios),
        "EDM": (EDMSchedule(0.05, 9.0), ratios),
        "flow": (FlowSchedule(), [r / (1 + r) for r in ratios]),
    }
    z = torch.randn(40, 2, 3, dtype=torch.float64)
    results = {}
    for kind, (schedule, sigmas) in walks.items():
        options = {"jump_length": 2, "jump_n_sample": 2} if name == "repaint" else {}
        prediction = "epsilon" if name == "ddim_inverse" else "sample"
        options |= {"timestep_scaling": 1e9} if name == "lcm" else {}
        plan = planned(SAMPLERS[name], schedule, spacing=Spacing(sigmas=sigmas), prediction=prediction, **options)
        states = schedule.as_ve() if plan[0].alpha == 1 and kind == "table" and name != "ddim_inverse" else schedule
        start = z[-1] if name == "ddim_inverse" else plan[0].alpha * ratios[0] * z[-1]

        def model(x, row, i):
            return torch.sin(x / row.c_in / row.alpha + 0.3 * i)

        *_, last = walk(plan, start, model, z)
        end = states.at(sigmas[0] if name == "ddim_inverse" else 0.0)
        results[kind] = last / end.alpha
    torch.testing.assert_close(results["EDM"], results["table"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(results["flow"], results["table"], rtol=1e-8, atol=1e-8)


def test_euler_of_zero_snr_is_ddim(seed):
    """The same images: its first step leads from noise alone to a state x_0 + σ ε, the others within these."""
    euler = samplers.euler(ZERO_SNR, 6, prediction="v_prediction")
    ddim = samplers.ddim(ZERO_SNR, 6, prediction="v_prediction", spacing="trailing")
    assert (euler.init_sigma, euler[0].alpha, euler[1].alpha) == (1, 0, 1)
    x = torch.randn(2, 3, dtype=torch.float64)
    a, b = (list(walk(plan, x, lambda x, row, i: torch.tanh(x + i)))[-1] for plan in (euler, ddim))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "euler_ancestral", "dpm2_ancestral", "lms", "pndm", "deis",
                                  "dpm_solver_2", "dpm_solver_3", "ipndm", "restart", "sa_solver"])  # fmt: skip
def test_zero_snr_by_name(name):
    """v-prediction with zero terminal SNR through ``sample``, as its models are mostly run."""
    image = fastdiff.sample(
        lambda x, t: torch.tanh(x), (1, 2, 4, 4), sampler=name, steps=9, schedule=ZERO_SNR, prediction="v_prediction"
    )
    assert bool(image.isfinite().all())
    assert float(image.abs().max()) < 20


# ---- t


class Told(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def forward(self, x, t):
        self.dtypes.add(t.dtype)
        return x * 0.1


@pytest.mark.parametrize("name", FORWARD)
def test_the_kind_of_t_is_the_schedule_s(name):
    """float32 for flows and EDM, in any number of steps; a table's is the same in any number."""
    few = {"jump_length": 2, "jump_n_sample": 2} if name == "repaint" else {}
    for kind in ("betas", "EDM", "flow"):
        if (name, kind) == ("tcd", "EDM"):
            continue
        schedule, (prediction, *_) = KINDS[kind]
        told = Told()
        for steps in (1, 2, 3, 4, 5, 8, 10):
            fastdiff.sample(
                told, (1, 2), sampler=name, steps=steps, schedule=schedule, prediction=prediction, sampler_options=few
            )
        assert len(told.dtypes) == 1
        assert told.dtypes == {torch.float32} or kind == "betas"
    told = Told()
    for steps, spacing in itertools.product((1, 2, 5), ("karras", "trailing", "sgm_uniform")):
        options = {**few, "quantize": True}
        fastdiff.sample(told, (1, 2), sampler=name, steps=steps, spacing=spacing, sampler_options=options)
    assert told.dtypes == {torch.int64}


def test_the_kind_of_t_of_churn_and_of_flows_in_unit_time():
    told = Told()
    for steps in (1, 2, 5):
        fastdiff.sample(told, (1, 2), sampler="euler", steps=steps, sampler_options={"s_churn": 1.0, "s_tmax": 1.0})
        fastdiff.sample(told, (1, 2), sampler="euler", steps=steps, schedule=FlowSchedule(T=1), prediction="sample")
        fastdiff.sample(told, (1, 2), sampler="euler", steps=steps, schedule="flow", prediction="sample",
                        sampler_options={"quantize": True})  # fmt: skip
    assert told.dtypes == {torch.float32}


# ---- docs/samplers.md

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / "examples" / "samplers_page.py").exists(), reason="no examples beside the tests")
def test_the_page_s_table():
    """The table is rendered from the code: what walks which schedule, with its reason where it does not."""
    sys.path.insert(0, str(ROOT / "examples"))
    from samplers_page import walks

    assert walks() in (ROOT / "docs" / "samplers.md").read_text()
    assert all(f"| `{name}` |" in walks() for name in SAMPLERS)
