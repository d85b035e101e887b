"""``ops.attention`` beside torch's scaled_dot_product_attention, each of its kernels by itself, and the reference.

On a GPU everyone is timed as a node of a graph, without what a launch from Python costs; fastdiff eager too.
"""

import pytest
import torch
import torch.nn.functional as F
from gates import GPU, close, graph, graphed
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.ops import native
from fastdiff.ops.attention import KERNELS as BACKENDS
from fastdiff.ops.attention import attention
from fastdiff.ops.backend import select

BATCH = 64 if GPU else 8
TOKENS = 4096 if GPU else 1024  # of SD 1.5's first level at 64×64 and 32×32
CASES = {  # batch, heads, queries, keys, channels of a head
    "CIFAR-10": (BATCH, 1, 256, 256, 256),
    "CelebA-256": (BATCH, 1, 256, 256, 512),
    "SD 1.5, self": (8, 8, TOKENS, TOKENS, 40),
    "SD 1.5, prompt": (8, 8, TOKENS, 77, 40),
    "narrow heads": (8, 8, TOKENS, TOKENS, 10),
}
KERNELS = {
    "torch, math": SDPBackend.MATH,
    "torch, flash": SDPBackend.FLASH_ATTENTION,
    "torch, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch, cudnn": SDPBackend.CUDNN_ATTENTION,
}
GOALS = {"CelebA-256": 3.0, "CIFAR-10": 1.0}  # times the fastest of torch's, on a GPU; 1 on a CPU


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_attention(contest, device, case, dtype):
    B, H, N, M, D = CASES[case]
    q, k, v = (torch.randn(B, n, H, D, device=device).to(dtype).transpose(1, 2) for n in (N, M, M))

    matrix = dtype == torch.bfloat16 and native.bfloat16() == "matrix"
    facts = {"bits": 8 * dtype.itemsize, "head": D, "keys": M, "matrix": matrix}
    taken = select("attention", "auto", q.device, facts, BACKENDS)

    def ours():
        return attention(q, k, v)

    def torchs(kernel):
        def call():
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return working(call)

    def theirs():
        return F.scaled_dot_product_attention(q, k, v)

    kernels = {"torch, math": SDPBackend.MATH} if device.type == "cpu" else KERNELS
    rivals = {name: torchs(kernel) for name, kernel in kernels.items()}
    rivals = {"torch": theirs, **rivals, "reference": lambda: attention(q, k, v, backend="reference")}
    exact = attention(q.float(), k.float(), v.float(), backend="reference")
    for contestant in (ours, *filter(None, rivals.values())):
        close(contestant().float(), exact, 1e-4 if dtype == torch.float32 else 2e-2)
    if GPU:
        del rivals["reference"]  # a check; torch's math kernel does the same
        rivals = {name: call and working(call, graph) for name, call in rivals.items()}

    goal = 1.0 if device.type == "cpu" else None if dtype == torch.float32 else GOALS.get(case)
    present = [name for name in ("torch", *kernels) if rivals[name] is not None]
    contest(
        "attention",
        f"{case}, {str(dtype).removeprefix('torch.')}, by {taken}",
        {**graphed(ours, device), **rivals},
        shape=(B, H, N, M, D),
        flops=4 * B * H * N * M * D,
        # The fastest of torch's is reached where every one of them is.
        targets=[{"kind": "ratio", "contestant": name, "goal": goal} for name in present] if goal else [],
    )


def working(call, how=None):
    """The call, or what ``how`` makes of it, where torch has such a kernel for these tensors; else None."""
    try:
        call()
        return how(call) if how else call
    except RuntimeError:
        return None
