"""Which call a seed and a number stand for."""

from __future__ import annotations

import warnings

from fuzz import kernels, plans
from fuzz.draws import Call, Draw

MAKERS = {
    f.__name__: f
    for f in (
        kernels.randn, kernels.add_noise, kernels.update, kernels.conv_epilogue, kernels.group_norm_silu,
        kernels.attention, kernels.conv2d, plans.sampler, plans.rows, plans.from_json, plans.sample,
    )
}  # fmt: skip


def make(seed: int, number: int, kind: str = "") -> Call:
    """Each call has random numbers of its own, so that one is repeated without those before it."""
    kind = kind or list(MAKERS)[number % len(MAKERS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MAKERS[kind](Draw(f"{seed} {number} {kind}"))
