"""``ops.attention`` beside torch's scaled_dot_product_attention, each of its kernels by itself, and the reference."""

import pytest
import torch
import torch.nn.functional as F
from gates import close, graphed
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.ops.attention import attention, choice

CPU = not torch.cuda.is_available()
BATCH = 8 if CPU else 64
TOKENS = 1024 if CPU else 4096  # of SD 1.5's first level at 32×32 and 64×64
CASES = {  # heads, queries, keys, channels of a head
    "CIFAR-10": (1, 256, 256, 256),
    "CelebA-256": (1, 256, 256, 512),
    "SD 1.5, self": (8, TOKENS, TOKENS, 40),
    "SD 1.5, prompt": (8, TOKENS, 77, 40),
}
KERNELS = {
    "torch, math": SDPBackend.MATH,
    "torch, flash": SDPBackend.FLASH_ATTENTION,
    "torch, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch, cudnn": SDPBackend.CUDNN_ATTENTION,
}
GOALS = {"CelebA-256": 3.0, "CIFAR-10": 1.0}  # times the fastest of torch's, on a GPU


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention(contest, device, case, dtype):
    H, N, M, D = CASES[case]
    q, k, v = (torch.randn(BATCH, n, H, D, device=device).to(dtype).transpose(1, 2) for n in (N, M, M))

    def ours():
        return attention(q, k, v)

    def torchs(kernel):
        def call():
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return call if works(call) else None

    def theirs():
        return F.scaled_dot_product_attention(q, k, v)

    kernels = {"torch, math": SDPBackend.MATH} if device.type == "cpu" else KERNELS
    rivals = {name: torchs(kernel) for name, kernel in kernels.items()}
    rivals = {"torch": theirs, **rivals, "reference": lambda: attention(q, k, v, backend="reference")}
    exact = attention(q.float(), k.float(), v.float(), backend="reference")
    for contestant in (ours, *filter(None, rivals.values())):
        close(contestant().float(), exact, 1e-4 if dtype == torch.float32 else 2e-2)

    goal = None if device.type == "cpu" or dtype == torch.float32 else GOALS.get(case)
    present = [name for name in ("torch", *kernels) if rivals[name] is not None]
    contest(
        "attention",
        f"{case}, {str(dtype).removeprefix('torch.')}, by {choice(device.type, dtype, D)[0]}",
        {**graphed(ours, device), **rivals},
        shape=(BATCH, H, N, M, D),
        flops=4 * BATCH * H * N * M * D,
        # The fastest of torch's is reached where every one of them is.
        targets=[{"kind": "ratio", "contestant": name, "goal": goal} for name in present] if goal else [],
    )


def works(call) -> bool:
    """Whether torch has such a kernel for these tensors."""
    try:
        call()
    except RuntimeError:
        return False
    return True
