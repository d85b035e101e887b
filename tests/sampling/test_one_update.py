"""What a row of the loop costs: one fused update, the reductions that were asked for, and no wait for the device."""

from collections import Counter

import pytest
import torch
from helpers import prepared
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.ops.update import native_impl

SHAPE = (3, 2, 8, 8)
VIEWS = {"view", "slice", "select", "unbind", "detach", "alias", "split", "unsqueeze", "_unsafe_view", "expand",
         "as_strided", "t", "reshape"}  # fmt: skip
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "_to_copy", "unique"}
Y = torch.tensor([0.2, 0.4, 0.6])
GUIDED = {"model_kwargs": {"y": Y}, "uncond_kwargs": {"y": Y * 0}, "guidance_scale": 2.0}
MASKED = {"mask": torch.ones(8, 8).triu() == 1, "known": torch.zeros(SHAPE)}
# u·w0 + c·w1, φ·std(c)/std(m) + 1 − φ but where std(m) is 0, m·gain
RESCALE = Counter(mul=4, add=2, std=2, div=1, eq=1, scalar_tensor=1, where=1)
BOUNDS = Counter(mul=2, add=1, abs=1, topk=2, lerp=1, clamp=1, reciprocal=1)  # p x + q m, its quantile


class Recorded(TorchDispatchMode):
    """The tensor operations that are not views, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


OUTPUTS = {count: torch.full((count * 3, *SHAPE[1:]), 0.25) for count in (1, 2)}


def model(x, t, y=None):
    """No operation of its own."""
    return OUTPUTS[len(x) // 3]


CASES = {
    "ddpm": ({"sampler": "ddpm"}, Counter()),
    "ddim": ({"sampler": "ddim", "eta": 0.5, "clip": 1.0}, Counter()),
    "guided": (GUIDED, Counter(copy_=1)),  # the network's input, once more for the second half of the batch
    "in two calls": ({**GUIDED, "uncond_kwargs": {"y": None}}, Counter(clone=1)),  # of the first output
    "interval": ({**GUIDED, "guidance_interval": (0.5, 2.0)}, Counter(copy_=1)),
    "rescaled": ({**GUIDED, "guidance_rescale": 0.5}, Counter(copy_=1) + RESCALE),
    "thresholded": ({"thresholding": 0.9}, BOUNDS),
    "both": ({**GUIDED, "guidance_rescale": 0.5, "thresholding": 0.9}, Counter(copy_=1) + RESCALE + BOUNDS),
    "masked": (MASKED, Counter()),
    "repaint": (
        {**MASKED, "sampler": "repaint", "sampler_options": {"jump_length": 2, "jump_n_sample": 2}},
        Counter(),
    ),
    "guided by a classifier": ({"cond_fn": lambda x, t: OUTPUTS[1]}, Counter(copy_=1)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_row_is_one_update(seed, monkeypatch, case):
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    options, allowed = CASES[case]
    run = prepared(model, SHAPE, **{"steps": 6, "backend": "native", **options})
    launched, call = [], native_impl.Update.__call__
    monkeypatch.setattr(native_impl.Update, "__call__", lambda update, row: (launched.append(row), call(update, row)))
    with torch.no_grad():
        run.first_input()
        for index, row in enumerate(run.plan):
            with Recorded() as recorded:
                run.step(index)
            assert launched == [index]
            launched.clear()
            assert not WAITS & set(recorded.names)
            if (
                row.calls_model
                and run.calls[index] == run.guidance.outputs
                and (run.request.classifier is None or row.uses("g"))
            ):
                assert recorded.names == allowed
            else:
                assert recorded.names <= allowed  # no network call, outside of the interval, or no gradient to take


def test_the_loop_itself_only_checks_for_finite_outputs(seed):
    """The CPU's check reads one number a row; nothing else waits."""
    fastdiff.sample(model, SHAPE, steps=6, backend="native")  # the first run makes the plan, which is kept
    with Recorded() as recorded:
        fastdiff.sample(model, SHAPE, steps=6, backend="native")
    assert recorded.names["_local_scalar_dense"] == 7  # a row each, and the last look
