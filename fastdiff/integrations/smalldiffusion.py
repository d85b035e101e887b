"""smalldiffusion's ``samples``: import it from here instead.

from fastdiff.integrations.smalldiffusion import samples
*_, x0 = samples(model, schedule.sample_sigmas(20), gam=2)

Its models predict the noise of x = x_0 + σ ε, and its guidance w = cfg_scale is the usual scale less one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.common import initial, run_from
from fastdiff.plan.plan import Plan, Row
from fastdiff.sampling.model import eval_mode
from fastdiff.sampling.sample import sample_iter


def samples(
    model: Any,
    sigmas: Iterable[Any],
    gam: float = 1.0,
    mu: float = 0.0,
    cfg_scale: float = 0.0,
    batchsize: int = 1,
    xt: Tensor | None = None,
    cond: Tensor | None = None,
    accelerator: Any = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yield every x_t, float32 [batchsize, …]; DDPM is gam=1, mu=½, DDIM gam=1, mu=0, accelerated gam=2, mu=0.

    Args:
        model: has ``predict_eps(x, sigma, cond=None)`` and, where xt or a source of noise is not given,
            ``rand_input(batchsize)``. It is in eval mode while the steps run.
        sigmas: N + 1 falling numbers for N steps; the last may be 0.
        gam, mu: x' = x − (σ − σ_p)(gam ε + (1 − gam) ε_before) + √(σ'² − σ_p²) z, σ' = σ^mu σ_p^(1 − mu)
            (Permenter & Yuan 2024, "Interpreting and improving diffusion models from an optimization perspective").
        cfg_scale: w in ε_c + w (ε_c − ε_u), ε_u with ``model.cond_embed.null_cond`` in place of every cond.
        xt: the first state; else z·sigmas[0]. cond: tensor [batchsize, …].
        accelerator: its ``.device`` is where the run is; else xt's or the model's.
        options: of ``fastdiff.sample``: seed=, seeds=, generator=, backend=, …. Without a source of noise it is
            ``model.rand_input``.

    Raises:
        TypeError, ValueError: for arguments outside these.
    """
    plan = plan_of(sigmas, gam, mu)
    parameters = list(model.parameters()) if hasattr(model, "parameters") else []
    device = torch.device("cpu") if xt is None else xt.device
    if accelerator is not None:
        device = torch.device(accelerator.device)
    elif xt is None and parameters:
        device = parameters[0].device
    if xt is None:
        shape = (batchsize, *model.input_dims) if hasattr(model, "input_dims") else model.rand_input(batchsize).shape
        xt = initial(shape, device, options, lambda: model.rand_input(batchsize).to(device)) * plan.init_sigma

    if cond is not None:
        if cond.shape[:1] != xt.shape[:1]:
            raise ValueError(f"cond must have one entry an image, {len(xt)}; got {list(cond.shape)}")
        cond = cond.to(device)
    given: dict[str, Any] = {"model_kwargs": {"cond": cond}}
    if cfg_scale != 0:
        if cond is None:
            raise ValueError(f"cfg_scale={cfg_scale} needs cond")
        given["uncond_kwargs"] = {"cond": torch.full_like(cond, model.cond_embed.null_cond)}
        given["guidance_scale"] = 1.0 + cfg_scale

    def predict(x: Tensor, sigma: Tensor, cond: Tensor | None) -> Tensor:
        return model.predict_eps(x, sigma[0].to(x.dtype), cond=cond)

    def noise(stream: int, draw: int, shape: tuple[int, ...]) -> Tensor:
        return model.rand_input(shape[0])

    states = sample_iter(predict, xt.shape, sampler=plan, **given, **run_from(xt.to(device), xt.shape, options, noise))
    return _images(model, states)


def plan_of(sigmas: Iterable[Any], gam: float = 1.0, mu: float = 0.0) -> Plan:
    """The rows of ``samples``; slot 0 holds the ε of the row before."""
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or levels[-1] < 0 or any(not a > b for a, b in pairwise(levels)):
        raise ValueError(f"sigmas must be two or more numbers that fall and are not negative; got {levels}")
    if not math.isfinite(gam):
        raise ValueError(f"gam must be finite; got {gam}")
    if not 0 <= mu < 1:
        raise ValueError(f"mu must be in [0, 1); got {mu}")
    rows: list[Row] = []
    for sigma, following in pairwise(levels):
        target = (following / sigma**mu) ** (1 / (1 - mu))
        step, weight = sigma - target, gam if rows else 1.0
        x = {
            "x": 1.0,
            "m": -step * weight,
            "slot0": -step * (1 - weight),
            "z": math.sqrt(max(following**2 - target**2, 0.0)),
        }
        row = Row(t=sigma, alpha=1.0, sigma=sigma, x=x, p=1.0, q=-sigma, slot={"m": 1.0}, write=0, reads=(0,))
        rows.append(row)
    return Plan(tuple(rows), name="smalldiffusion", init_sigma=levels[0])


def _images(model: Any, states: Iterator[Any]) -> Iterator[Tensor]:
    with eval_mode(model):
        for state in islice(states, 1, None):  # the first is the given state
            yield state.x
