"""DDIM inversion: the deterministic DDIM walked upward, from an image to the noise that gives it back."""

from __future__ import annotations

from itertools import pairwise

from fastdiff.checks import check_clip
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import Row
from fastdiff.schedules.level import Schedule, epsilon_terms, x0_terms
from fastdiff.schedules.spacing import Spacing, levels


def ddim_inverse(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    spacing: str | Spacing | None = None,
) -> Plan:
    """x' = α' x̂_0 + σ' ε over the levels of ``ddim``, from the last to the first (Song et al. 2021, Section 4.3).

    Each row undoes the row of ``ddim`` between the same two levels: the network is told (and shown c_in of) the noisier
    one, where that row called it, but sees the state of the cleaner one, since the other is not known yet. For ε that
    depends on t alone the two are inverse to rounding; otherwise the difference falls with the number of steps.

    A plan to be started from images, without noise::

        latents = fastdiff.sample(model, x.shape, sampler=ddim_inverse(schedule, 50), x_init=x)
        again = fastdiff.sample(model, x.shape, sampler=ddim(schedule, 50), x_T=latents)

    The result is the state at the noisiest level, from which any sampler goes on that has the same states. Under
    ``Spacing(final="sigma_min")`` the plan starts at the schedule's least σ, to which ``x_init`` would be noised: hand
    the image over as ``x_T``, too, where it is to be taken for the state there.

    ε is the network's (``schedules.level.epsilon_terms``) and not (x − α x̂_0)/σ, since σ is 0 at the start.

    Args:
        prediction: what the network predicts (``schedules.level.x0_terms``); "sample" names no noise in a clean image
            and needs ``Spacing(final="sigma_min")``; "edm" and "score" are scaled for one σ, and are refused.
        clip: the bound of |x̂_0|, None for none.
        spacing: where to stop, a name or a ``Spacing``; None is leading, or the schedule's own where it has no table.
    """
    bound = check_clip(clip)
    if prediction in ("edm", "score"):
        raise ValueError(
            f"ddim_inverse takes no prediction={prediction!r}: the state's σ is not what the network is told"
        )
    stops = levels(schedule, steps, spacing, default="leading")[::-1]
    rows = []
    for here, there in pairwise(stops):
        p, q = x0_terms(prediction, here)
        epsilon = epsilon_terms(prediction, here)
        if not epsilon:
            raise ValueError(f"prediction={prediction!r} says nothing of the noise of a clean image: final='sigma_min'")
        x = {term: there.sigma * value for term, value in epsilon.items()} | {"x0": there.alpha}
        rows.append(Row(t=there.t, alpha=here.alpha, sigma=here.sigma, c_in=there.c_in, x=x, p=p, q=q, clip=bound))
    return Plan(tuple(rows), name="ddim_inverse")
