"""Measure every sampler's convergence and write docs/samplers.md and docs/convergence.png.

python examples/samplers_page.py [--out docs]        about a minute on one core; needs matplotlib and scipy
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convergence import (
    CASES,
    EDM,
    FLOW,
    NOISY,
    PROCESSES,
    STEPS,
    VP,
    distilled,
    exact_error,
    last_jump,
    sampled,
    shipped_error,
    slope,
    variance_error,
)

from fastdiff import NoiseSchedule
from fastdiff.files import atomic_write
from fastdiff.samplers import SAMPLERS

PAPERS = {
    "ddpm": "Ho et al. 2020",
    "repaint": "Lugmayr et al. 2022",
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
    "ipndm": "Zhang & Chen 2023; Liu et al. 2022",
    "sa_solver": "Xue et al. 2023",
    "restart": "Xu et al. 2023",
    "flow_sde": "Liu et al. 2025",
}

INTRODUCTION = """\
# Samplers

Every sampler is a function of a schedule that returns a `Plan`: `fastdiff plan --sampler NAME` prints one. This page
was written by `python examples/samplers_page.py`, which measured every number on it, and
`tests/samplers/test_convergence.py` asserts them.

The target is a mixture of two Gaussians on the line. Its score is known at every level, and so is the solution of its
probability-flow ODE, since in one dimension the flow keeps every point's quantile. States are float64.

{walks}
![error against steps](convergence.png)

## Deterministic samplers

The order is the slope of ln error against ln steps, {first} to {last}, where the error lies in [1e-11, 1e-2].

*Exact*: ln σ falls evenly from σ/α = 8 to 0.1 (`ddim_inverse`, `even σ/α`: 2), the history before the first step is
exact, and no step is of lower order than the method (`lower_order_final=False`). The three columns are the linear
schedule with an ε network, EDM's with an F network, and flow matching's with a velocity network.

*As shipped*: the defaults over EDM's Karras levels to σ = 0, with the walk's own start and end. The last jump, from
σ = {sigma_min} to 0, is of order 1 and does not shrink with the steps: it alone errs by {floor:.0e}, which shows in the
third-order ones.

"""

WALKS = """\
## Which sampler walks which schedule

With the schedule's default spacing, in any number of steps, to the image. Where the first level has no signal (ᾱ = 0;
a flow's σ = 1) a sampler that divides by it leaves it by a step of first order. Spacings in σ, such as karras, need a
finite σ: `schedule.rescale_zero_terminal_snr(floor=2**-24)` is diffusers' floor. What the network predicts is
`epsilon` unless it is said.

"""

NOTES = """
- Published multistep third order (`dpmpp_3m`, `dpm_solver_3` with `method="multistep"`) has half of its quadratic's
  integral, and therefore converges with order 2; `solver_type="exact"` has the whole integral and order 3.
- `pndm` weighs past outputs as if steps were equal. Where they are equal in σ/α it is Adams & Bashforth's method of
  order 4; elsewhere its order is 2, as its paper says.
- UniPC's corrector raises the order of its predictor by one.

## Stochastic samplers

The weak order is the slope of the error of the variance that data N(0, 0.8²) come out with at σ/α = 0.1, started at 1
(order 1) or 2. Every row is linear there, so that variance is known without sampling. The other columns are of 100,000
samples of the mixture from σ/α = 4 to 0.1 (LCM and TCD: as shipped, with the network that their distillation aims at):
the worst of the first four moments, in standard errors, and the Kolmogorov–Smirnov distance from as many draws of the
mixture, with its p.

"""

DRAWN = {
    "ddim": "DDIM, Euler",
    "heun": "Heun",
    "dpmpp_2s": "DPM-Solver++(2S)",
    "dpmpp_2m": "DPM-Solver++(2M)",
    "dpmpp_3m": "DPM-Solver++(3M)",
    "dpmpp_3m solver_type='exact'": "DPM-Solver++(3M), exact",
    "dpm_solver_3": "DPM-Solver-3",
    "deis order=3": "DEIS-3",
    "lms order=4": "LMS-4",
    "pndm": "PNDM",
    "unipc order=2, solver_type='bh2'": "UniPC-2",
    "unipc order=3, solver_type='bh2'": "UniPC-3",
}


WALKED = {
    "table of betas": (VP, "epsilon"),
    "zero terminal SNR": (NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(), "v_prediction"),
    "EDM": (EDM, "edm"),
    "flow": (FLOW, "flow_prediction"),
}


def walks() -> str:
    """Which sampler walks which schedule with its default spacing, found by asking for the plan, and why not."""
    lines, reasons = [], dict[str, int]()
    for name, sampler in SAMPLERS.items():
        cells = [f"`{name}`"]
        for schedule, prediction in WALKED.values():
            try:
                sampler(schedule, 5, prediction=prediction)
                cells.append("yes")
            except ValueError as error:
                cells.append(f"no ({reasons.setdefault(f'`{name}`: {error}', len(reasons) + 1)})")
        lines.append(cells)
    notes = "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    predictions = ", ".join(f"{kind}: {prediction}" for kind, (_, prediction) in WALKED.items())
    return WALKS + table(["sampler", *WALKED], lines, left=1) + "\n" + notes + f"\n({predictions}.)\n"


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


def table(titles: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> str:
    rule = [*["---"] * left, *["---:"] * (len(titles) - left)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, rule, *lines]) + "\n"


def plot(errors: dict[str, list[float]], path: Path) -> None:
    """Error against steps on the exact walk, one colour an order in theory."""
    from matplotlib.figure import Figure

    orders = {case.title.replace("`", ""): (case.order, errors[case.title]) for case in CASES}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for order in (1, 2, 3, 4):
        names = [name for name in DRAWN if orders[name][0] == order]
        for name, marker in zip(names, "osD^vP", strict=False):
            axes.loglog(STEPS, orders[name][1], color=f"C{order - 1}", marker=marker, markersize=4, linewidth=1,
                        label=f"{DRAWN[name]}, order {order}")  # fmt: skip
        last = max(orders[name][1][-1] for name in names) * 2
        axes.loglog(STEPS, [last * (STEPS[-1] / n) ** order for n in STEPS], "--", color=f"C{order - 1}", linewidth=0.7)
    axes.set(xlabel="steps", ylabel="error", title="Error on the Gaussian mixture; dashed: the slope of theory")
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="the folder to write to")
    parser.add_argument("--walks", action="store_true", help="only write the first table anew, which measures nothing")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(exist_ok=True)
    if arguments.walks:
        page = (out / "samplers.md").read_text()
        page = page[: page.index("## Which sampler")] + walks() + page[page.index("\n![error") :]
        with atomic_write(out / "samplers.md") as file:
            file.write(page.encode())
        return
    lines, errors = deterministic()
    titles = ["sampler", "paper", "network calls", "order in theory", "exact, VP", "VE", "flow", "as shipped"]
    known = {"walks": walks(), "first": STEPS[0], "last": STEPS[-1], "sigma_min": EDM.sigma_min, "floor": last_jump()}
    page = INTRODUCTION.format(**known) + table(titles, lines) + NOTES
    titles = [*titles[:3], "weak order in theory", "measured", "steps", "moments", "distance", "p"]
    page += table(titles, stochastic())
    plot(errors, out / "convergence.png")
    with atomic_write(out / "samplers.md") as file:
        file.write(page.encode())
    print(out / "samplers.md")


if __name__ == "__main__":
    main()
