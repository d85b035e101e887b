"""Multistep and exponential-integrator samplers in whole runs, what their rows read and write, and what they refuse."""

import itertools

import pytest
import torch
from helpers import Affine, assert_same_bits, half, planned
from multistep_cases import FULL, NAMES, VP

import fastdiff
from fastdiff import samplers


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_straight_and_backends_agree(seed, name):
    model, shape = Affine(), (3, 2, 5, 5)
    options = {"sampler": name, "steps": 6, "seed": seed, "sampler_options": FULL.get(name), "clip": 2.0}
    straight = fastdiff.sample(model, shape, backend="reference", **options)
    assert bool(straight.isfinite().all())
    for cut in (0, 1, 2, 4):
        state = next(itertools.islice(fastdiff.sample_iter(model, shape, backend="reference", **options), cut, None))
        assert_same_bits(fastdiff.sample(model, shape, backend="reference", resume=state, **options), straight)
    assert_same_bits(fastdiff.sample(model, (2, *shape[1:]), backend="reference", **options), straight[:2])
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    assert_same_bits(fastdiff.sample(model, shape, backend="native", **options), straight)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_network(seed, name):
    """The state stays float32: a bfloat16 network moves it by no more than its own rounding does."""
    options = {"sampler": name, "steps": 5, "seed": seed, "prediction": "sample", "sampler_options": FULL.get(name)}
    coarse = fastdiff.sample(half, (2, 3, 4, 4), model_dtype=torch.bfloat16, **options)
    fine = fastdiff.sample(half, (2, 3, 4, 4), **options)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, fine)
    assert float((coarse - fine).abs().max()) < 0.05 * max(1.0, float(fine.abs().max()))


def test_what_rows_read_and_write():
    """C3: three slots read at most; nothing is written that no later row reads."""
    for name in NAMES:
        plan = planned(getattr(samplers, name), VP, 9, **FULL.get(name, {}))
        for i, row in enumerate(plan):
            assert len(row.reads) <= 3
            assert all(row.uses(f"slot{k}") for k in range(len(row.reads))), (name, i)
            if row.write is not None:
                reader = next((r for r in plan.rows[i + 1 :] if row.write in r.reads or r.write == row.write), None)
                assert reader is not None, (name, i)
                assert row.write in reader.reads, (name, i)
    plms = samplers.pndm(VP, 9)
    assert plms[1].write is None
    assert plms.slots_used == (0, 1, 2)
    assert samplers.lms(VP, 9).slots_used == (0, 1, 2)
    corrected = samplers.unipc(VP, 9, order=3)
    assert corrected[4].anchor.keys() == {"anchor", "x0", "slot0", "slot1", "slot2"}


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("dpm_multistep", {"order": 4}, ValueError, "order"),
        ("dpm_multistep", {"order": 0}, ValueError, "order"),
        ("dpm_multistep", {"order": 2.0}, TypeError, "order"),
        ("lms", {"order": 5}, ValueError, "order"),
        ("deis", {"order": 4}, ValueError, "order"),
        ("unipc", {"order": 4}, ValueError, "order"),
        ("dpm_multistep", {"solver_type": "bh1"}, ValueError, "solver_type is 'bh1'"),
        ("dpmpp_2m", {"solver_type": "midpont"}, ValueError, "did you mean 'midpoint'"),
        ("unipc", {"solver_type": "midpoint"}, ValueError, "solver_type"),
        ("dpm_multistep", {"algorithm": "dpmsolver+"}, ValueError, r"did you mean 'dpmsolver\+\+'"),
        ("dpm_solver_2", {"method": "multi"}, ValueError, "method"),
        ("dpm_solver_2", {"method": "multistep", "stages": "listed"}, ValueError, "stages"),
        ("dpm_singlestep", {"stages": "none"}, ValueError, "stages"),
        ("dpm_singlestep", {"r": 1.5}, ValueError, "r must"),
        ("dpm_singlestep", {"r": 0.3}, ValueError, "r goes with"),
        ("dpm_singlestep", {"eta": 1.0, "algorithm": "dpmsolver"}, ValueError, "eta"),
        ("dpm_singlestep", {"order": 3, "lower_order_final": False, "steps": 10}, ValueError, "3 divides"),
        ("dpm_multistep", {"eta": 1.0, "algorithm": "dpmsolver"}, ValueError, "sigma_min"),
        ("dpmpp_2m_sde", {"eta": 1.5}, ValueError, "eta"),
        ("dpmpp_2m_sde", {"eta": "1"}, TypeError, "eta"),
        ("dpmpp_sde", {"s_noise": -1.0}, ValueError, "s_noise"),
        ("unipc", {"disable_corrector": "0"}, TypeError, "disable_corrector"),
        ("unipc", {"disable_corrector": [-1]}, ValueError, "disable_corrector"),
        ("pndm", {"skip_prk_steps": False, "steps": 3}, ValueError, "at least 4"),
        ("pndm", {"skip_prk_steps": 1}, TypeError, "skip_prk_steps"),
        ("pndm", {"averages": "v"}, ValueError, "averages"),
        ("pndm", {"averages": "output", "clip": 1.0}, ValueError, "clip"),
        ("dpmpp_2m", {"prediction": "noise"}, ValueError, "prediction"),
        ("dpmpp_2m", {"clip": -1.0}, ValueError, "clip"),
        ("dpmpp_2m", {"spacing": "leadin"}, ValueError, "spacing"),
        ("dpmpp_2m", {"steps": 1001}, ValueError, "steps"),
        ("dpmpp_2m", {"sigmas": (1.0, 2.0, 0.0), "steps": None}, ValueError, "fall"),
    ],
)
def test_bad_input(name, options, error, message):
    with pytest.raises(error, match=message):
        planned(getattr(samplers, name), VP, **{"steps": 10, **options})
