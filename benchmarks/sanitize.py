"""Small calls of the GPU kernels, to run under compute-sanitizer: native and Triton, odd sizes and plain ones."""

from __future__ import annotations

import sys

import torch

import fastdiff
from fastdiff.ops.backend import why_missing


def call_sampling(backend: str) -> None:
    schedule = fastdiff.NoiseSchedule.linear(10)
    ddpm, ddim = fastdiff.samplers.ddpm(schedule, clip=1.0), fastdiff.samplers.ddim(schedule, 5)
    for shape in ((3, 3, 8, 8), (2, 5, 7, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            x0 = fastdiff.randn(shape, seed=1, device="cuda", dtype=dtype, backend=backend)
            t = torch.arange(shape[0], device="cuda")
            noised, noise = fastdiff.add_noise(x0, t, schedule, backend=backend)
            fastdiff.add_noise(x0, 3, schedule, noise=noise, backend=backend)
            output = noised.contiguous(memory_format=torch.channels_last)
            for plan in (ddpm, ddim):
                fastdiff.ops.update(
                    x0.float(), output, plan, 1, backend=backend, return_x0=True, model_dtype=dtype, channels_last=True
                )
    torch.cuda.synchronize()


def call_network(backend: str) -> None:
    """What an accelerated network calls, in the dtype and memory format that it has there."""
    dtype, last = torch.bfloat16, torch.channels_last

    def images(channels: int, size: int) -> torch.Tensor:
        return torch.randn(2, channels, size, size, device="cuda").to(dtype).contiguous(memory_format=last)

    for channels, size in ((32, 8), (24, 5)):
        x, x2, residual = (images(channels, size) for _ in range(3))
        weight, bias, add = (torch.randn(n, 2 * channels, device="cuda", dtype=dtype).squeeze(0) for n in (1, 1, 2))
        fastdiff.ops.group_norm_silu(x, weight, bias, 8, x2=x2, add=add, backend=backend)
        if backend == "native":
            break  # the CUDA kernel takes groups of whole vectors; no other operation has one
        fastdiff.ops.conv_epilogue(
            x, bias=bias[:channels], add=add[:, :channels], residual=residual, scale=0.5, backend=backend
        )
    for tokens, keys, head in ((64, 64, 32), (17, 21, 40)) if backend == "triton" else ():
        q, k, v = (torch.randn(2, 2, n, head, device="cuda", dtype=dtype) for n in (tokens, keys, keys))
        fastdiff.ops.attention(q, k, v, backend=backend)
    torch.cuda.synchronize()


def main() -> int:
    reasons = {backend: why_missing(backend, "cuda") for backend in ("native", "triton")}
    for backend, reason in reasons.items():
        if reason is None:
            call_sampling(backend)
            call_network(backend)
        print(f"{backend}: {reason or 'every kernel called'}")
    return int(any(reasons.values()))


if __name__ == "__main__":
    sys.exit(main())
