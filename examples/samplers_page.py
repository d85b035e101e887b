"""Measure every sampler's convergence and write docs/samplers.md and docs/convergence.png.

python examples/samplers_page.py [--out docs]        about a minute on one core; needs matplotlib and scipy
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convergence import (
    CASES,
    NOISY,
    PROCESSES,
    STEPS,
    VP,
    Case,
    distilled,
    exact_error,
    sampled,
    shipped_error,
    slope,
    variance_error,
)

from fastdiff.files import atomic_write
from fastdiff.samplers import SAMPLERS

PAPERS = {
    "ddpm": "Ho et al. 2020",
    "ddim": "Song et al. 2021",
    "ddim_inverse": "Song et al. 2021",
    "euler": "Karras et al. 2022",
    "euler_ancestral": "k-diffusion",
    "heun": "Karras et al. 2022",
    "dpm2": "k-diffusion; Lu et al. 2022a",
    "dpm2_ancestral": "k-diffusion",
    "lcm": "Luo et al. 2023",
    "tcd": "Zheng et al. 2024",
    "lms": "k-diffusion; Adams & Bashforth",
    "pndm": "Liu et al. 2022",
    "dpm_multistep": "Lu et al. 2022a, b",
    "dpm_singlestep": "Lu et al. 2022a, b",
    "dpm_solver_2": "Lu et al. 2022a",
    "dpm_solver_3": "Lu et al. 2022a",
    "dpmpp_1s": "Lu et al. 2022b",
    "dpmpp_2s": "Lu et al. 2022b",
    "dpmpp_2s_ancestral": "k-diffusion",
    "dpmpp_sde": "k-diffusion",
    "dpmpp_2m": "Lu et al. 2022b",
    "dpmpp_2m_sde": "Lu et al. 2022b; k-diffusion",
    "dpmpp_3m": "Lu et al. 2022b",
    "dpmpp_3m_sde": "k-diffusion",
    "deis": "Zhang & Chen 2023",
    "unipc": "Zhao et al. 2023",
}

INTRODUCTION = """\
# Samplers

Every sampler is a function of a schedule that returns a `Plan`: `fastdiff plan --sampler NAME` prints one. This page was
written by `python examples/samplers_page.py`, which measured every number on it; `tests/test_convergence.py` asserts
them.

The target is a mixture of two Gaussians on the line. Its score is known at every level, and so is the solution of its
probability-flow ODE, since in one dimension the flow keeps every point's quantile. States are float64.

![error against steps](convergence.png)

## Deterministic samplers

The order is the slope of ln error against ln steps, {first} to {last}, where the error lies in [1e-11, 1e-2]. *Exact*: ln σ
falls evenly from σ/α = 8 to 0.1, the history before the first step is exact, and no step is of lower order than the method
(`lower_order_final=False`). The three columns are the linear schedule with an ε network, EDM's with an F network, and
flow matching's with a velocity network. *As shipped*: the defaults, over EDM's Karras levels to σ = 0, the walk's own start
and end included; the sampler's last jump, from σ = 0.002, alone errs by about 3e-6.

"""

NOTES = """
- Published multistep third order (`dpmpp_3m`, `dpm_solver_3` with `method="multistep"`) has half of its quadratic's
  integral, and therefore converges with order 2; `solver_type="exact"` has the whole integral and order 3.
- `pndm` weighs past outputs as if steps were equal. Where they are equal in σ/α it is Adams & Bashforth's method of order 4;
  elsewhere its order is 2, as its paper says.
- UniPC's corrector raises the order of its predictor by one.

## Stochastic samplers

The weak order is the slope of the error of the variance that data N(0, 0.8²) come out with, from σ/α = 1 to 0.1. Every
row is linear there, so that variance is known without sampling. The other columns are of 100,000 samples of the mixture
from σ/α = 4 to 0.1 (LCM and TCD, as shipped, with the network that their distillation aims at): the largest error of the
first four moments, in standard errors, and the Kolmogorov–Smirnov distance from as many draws of the mixture, with its p.

"""


def deterministic() -> tuple[list[list[str]], dict[str, list[float]]]:
    """The table's lines, and the errors by title for the plot."""
    lines, errors = [], {}
    for case in CASES:
        exact = {name: [exact_error(case, name, steps) for steps in STEPS] for name in PROCESSES}
        errors[case.title] = exact["VP"]
        shipped = f"{slope(STEPS, [shipped_error(case, n) for n in STEPS]):.2f}" if case.shipped else ""
        orders = [f"{slope(STEPS, values):.2f}" for values in exact.values()]
        lines.append([case.title, PAPERS[case.sampler], calls(case), str(case.order), *orders, shipped])
        print(*lines[-1], flush=True)
    return lines, errors


def stochastic() -> list[list[str]]:
    lines = []
    for case in NOISY:
        order = slope(STEPS, [variance_error(case, "VP", steps) for steps in STEPS])
        lines.append([case.title, PAPERS[case.sampler], calls(case), str(case.order), f"{order:.2f}",
                      *_told(sampled(case), case.steps)])  # fmt: skip
        print(*lines[-1], flush=True)
    for name in ("lcm", "tcd"):
        lines.append([f"`{name}`", PAPERS[name], "n", "", "", *_told(distilled(name, 4), 4)])
    return lines


def _told(found: Any, steps: int) -> list[str]:
    worst = max(found.moments, key=abs)
    return [str(steps), f"{worst:.1f}", f"{found.distance:.4f}", f"{found.p:.2f}"]


def calls(case: Any) -> str:
    """Network calls of n steps, counted in two plans as shipped: "n", "2n − 1"."""
    counts = []
    for steps in (20, 40):
        plan = SAMPLERS[case.sampler](VP, steps, **case.options)
        counts.append(sum(row.calls_model for row in plan))
    factor = (counts[1] - counts[0]) // 20
    rest = counts[0] - 20 * factor
    sign = f" {'+' if rest > 0 else '−'} {abs(rest)}" if rest else ""
    return f"{factor if factor > 1 else ''}n{sign}"


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", "---", *["---:"] * (len(titles) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, rule, *lines]) + "\n"


def plot(errors: dict[str, list[float]], path: Path) -> None:
    """Error against steps of the exact walk, one colour an order."""
    from matplotlib.figure import Figure

    shown: dict[str, Case] = {case.title: case for case in CASES if case.options.get("order") != 1}
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots()
    markers, used = "osD^vP*X<>", {order: 0 for order in range(1, 5)}
    for title, case in shown.items():
        values = errors[title]
        if title.replace("`", "") in ("euler", "dpmpp_1s", "dpm_multistep", "dpm_singlestep"):
            continue  # the same curve as another's
        marker = markers[used[case.order] % len(markers)]
        used[case.order] += 1
        axes.loglog(STEPS, values, color=f"C{case.order - 1}", marker=marker, markersize=4, linewidth=0.9,
                    label=f"{case.order}: {title.replace('`', '')}")  # fmt: skip
    for order in range(1, 5):
        start = (0.2, 0.06, 0.008, 0.004)[order - 1]
        axes.loglog(STEPS, [start * (STEPS[0] / n) ** order for n in STEPS], "k--", linewidth=0.7, alpha=0.6)
    axes.set(xlabel="steps", ylabel="error", title="Error on the Gaussian mixture; dashed: slopes of 1 to 4")
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    ordered = sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0][0])
    figure.legend([h for _, h in ordered], [name for name, _ in ordered], loc="outside right upper", fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    with atomic_write(path) as file:
        file.write(picture.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="the folder to write to")
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    lines, errors = deterministic()
    titles = ["sampler", "paper", "network calls", "order in theory", "exact, VP", "VE", "flow", "as shipped"]
    page = INTRODUCTION.format(first=STEPS[0], last=STEPS[-1]) + table(titles, lines) + NOTES
    titles = [
        "sampler",
        "paper",
        "network calls",
        "weak order in theory",
        "measured",
        "steps",
        "moments",
        "distance",
        "p",
    ]
    page += table(titles, stochastic())
    plot(errors, out / "convergence.png")
    with atomic_write(out / "samplers.md") as file:
        file.write(page.encode())
    print(out / "samplers.md")


if __name__ == "__main__":
    main()
