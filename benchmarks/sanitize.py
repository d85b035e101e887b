"""One small call of every GPU kernel, to run under compute-sanitizer: native and Triton, odd sizes and plain ones."""

from __future__ import annotations

import sys

import torch

import fastdiff
from fastdiff.ops.backend import why_missing


def call_everything(backend: str) -> None:
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


def main() -> int:
    reasons = {backend: why_missing(backend, "cuda") for backend in ("native", "triton")}
    for backend, reason in reasons.items():
        if reason is None:
            call_everything(backend)
        print(f"{backend}: {reason or 'every kernel called'}")
    return int(any(reasons.values()))


if __name__ == "__main__":
    sys.exit(main())
