"""What README says of a fork: the kernels work in the child, after torch's threads have worked in the parent."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, signal, torch, fastdiff
from fastdiff import ops

torch.set_num_threads(2)
x = torch.randn(4, 64, 64, 64)
plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 5)
(torch.randn(1000, 1000) @ torch.randn(1000, 1000)).sum(), x.permute(0, 2, 3, 1).contiguous()
calls = [
    lambda: ops.randn((4, 3, 256, 256)),
    lambda: ops.add_noise(x, 3, "linear")[0],
    lambda: ops.update(x, x, plan, 1).x,
    lambda: ops.group_norm_silu(x, None, None, 8),
    lambda: ops.conv_epilogue(x, residual=x),
    lambda: fastdiff.sample(lambda x, t: x, (4, 3, 64, 64), steps=3),
]
wanted = [call() for call in calls]
for number, (call, want) in enumerate(zip(calls, wanted)):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        os._exit(0 if call().numpy().tobytes() == want.numpy().tobytes() else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"call {number} in a child: status {status}"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_kernels_work_in_a_forked_child():
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
