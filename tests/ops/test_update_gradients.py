"""update's gradients by the numbers of its row, by x and by the network's outputs, over random rows."""

import math
import random

import pytest
import torch
from helpers import assert_same_bits
from update_cases import random_case

import fastdiff
from fastdiff.plan.plan import COLUMNS, TERMS, Plan, Row

FIXED = {"t", "read0", "read1", "read2", "write", "keeps_anchor", "draw", "stream", "calls_model"}


def learnable(case):
    """The columns of a case's row that have a gradient: numbers of terms that are at hand."""
    row, options, found = case.plan[case.row], case.options, []
    there = {"x": True, "x0": True, "m": bool(case.outputs), "anchor": "anchor" in options, "g": "gradient" in options,
             "z": "noise" in options or row.uses("z")}  # fmt: skip
    there |= {f"slot{k}": options["slots"][slot] is not None for k, slot in enumerate(row.reads)}
    for i, name in enumerate(COLUMNS):
        output, _, term = name.partition(".")
        if name in FIXED or (term and (getattr(row, output) is None or not there.get(term, False))):
            continue
        if (name == "clip" and (math.isinf(row.clip) or "clip" in options)) or name == "scale" in options:
            continue
        if name.startswith("log_") and not case.plan.reads_variance:
            continue
        if name == "known_sigma" and case.row + 1 == len(case.plan):
            continue  # 0 in the last row, where the known image's noise is not read
        found.append(i)
    return found


def run(case, values, columns, x, outputs, dtype=torch.float64):
    table = case.plan.table(case.options.get("guidance", ())).clone()
    table[case.row, columns] = values
    options = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in
               case.options.items()}  # fmt: skip
    options["slots"] = [slot if slot is None else slot.to(dtype) for slot in options["slots"]]
    got = fastdiff.ops.update(x, outputs, case.plan, case.row, seed=case.seed, table=table, return_x0=True,
                              model_dtype=torch.float32, **options)  # fmt: skip
    return got


@pytest.mark.parametrize("number", range(24))
def test_gradcheck_of_a_random_row(rng, number):
    """All terms, clip on and off, guidance of one to three outputs, learned variance, masks, rows without a call."""
    rng = random.Random(rng.random() + number)
    torch.manual_seed(rng.getrandbits(32))
    case = random_case(rng, 2, (2, 2))
    columns = learnable(case)
    values = case.plan.table(case.options.get("guidance", ()))[case.row, columns].clone().requires_grad_(True)
    x = case.x.double().requires_grad_(True)
    outputs = tuple(output.detach().double().requires_grad_(True) for output in case.outputs)

    def results(values, x, *outputs):
        got = run(case, values, columns, x, outputs)
        kept = [got.x, got.anchor, got.slot, got.x0]
        return tuple(tensor for tensor in kept if tensor is not None and tensor.requires_grad)

    assert torch.autograd.gradcheck(results, (values, x, *outputs), eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("number", range(12))
def test_a_gradient_changes_no_bit(rng, number):
    """A table that asks for a gradient gives the bits of every backend, though its zeros are added, too."""
    rng = random.Random(rng.random() + number)
    torch.manual_seed(rng.getrandbits(32))
    case = random_case(rng, 3, (5, 4))
    if case.plan.reads_variance:
        pytest.skip("under a gradient the learned variance's exponential is torch's")
    plain = case.run("auto")
    columns = list(range(2, 5))
    values = case.plan.table(case.options.get("guidance", ()))[case.row, columns].clone().requires_grad_(True)
    got = run(case, values, columns, case.x, case.outputs, torch.float32)
    for name in ("x", "anchor", "slot", "x0"):
        if getattr(plain, name) is not None:
            assert_same_bits(getattr(got, name).detach(), getattr(plain, name), name)


def test_a_coefficient_of_0_has_a_gradient(seed):
    plan = Plan((Row(t=1.0, alpha=1.0, sigma=1.0, x={"x": 1.0}, p=1.0, q=-1.0, reads=(2,)),))
    table = plan.table().clone().requires_grad_(True)
    x, out, slot = torch.randn(3, 2, 4).double()
    got = fastdiff.ops.update(x, out, plan, 0, table=table, slots=[None, None, slot, None])
    (grad,) = torch.autograd.grad(got.x.sum(), table)
    at = COLUMNS.index("x.x")
    exact = {"x": x.sum(), "x0": (x - out).sum(), "m": out.sum(), "slot0": slot.sum()}
    for term, value in exact.items():
        torch.testing.assert_close(grad[0, at + TERMS.index(term)], value)


def test_a_table_without_a_gradient_runs_on_every_backend(backend, seed):
    plan = Plan((Row(t=1.0, alpha=1.0, sigma=1.0, x={"x": 1.0, "x0": 0.5}, p=1.0, q=-1.0),))
    x, out = torch.randn(2, 2, 4)
    table = plan.table().clone()
    for factor in (2.0, 3.0):  # the same tensor, written to: nothing remembers what it held
        table[0, COLUMNS.index("x.x")] = factor
        got = fastdiff.ops.update(x, out, plan, 0, table=table, backend=backend)
        torch.testing.assert_close(got.x, factor * x + 0.5 * (x - out))


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (torch.zeros(1, 48), "float64 tensor on the CPU; got torch.float32"),
        ([[0.0]], "float64 tensor on the CPU; got list"),
        (torch.zeros(2, 48, dtype=torch.float64), r"shape \[1, 48\]; got \[2, 48\]"),
        (torch.zeros(1, 48, dtype=torch.float64), "the plan's slots, writes"),
    ],
)
def test_bad_tables(table, why):
    plan = Plan((Row(t=1.0, alpha=1.0, sigma=1.0, x={"x": 1.0}),))
    with pytest.raises((TypeError, ValueError), match=why):
        fastdiff.ops.update(torch.zeros(1, 2), torch.zeros(1, 2), plan, 0, table=table)


def test_a_gradient_asks_for_the_reference():
    plan = Plan((Row(t=1.0, alpha=1.0, sigma=1.0, x={"x": 1.0}),))
    with pytest.raises(ValueError, match="backend='native' has no autograd"):
        fastdiff.ops.update(torch.zeros(1, 2), torch.zeros(1, 2), plan, 0, backend="native",
                            table=plan.table().clone().requires_grad_(True))  # fmt: skip
