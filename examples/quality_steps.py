"""How many network calls the packaged digits model needs with each sampler.

    python examples/quality_steps.py [--samples 500] [--out examples]        about ten minutes on two cores
    python examples/quality_steps.py --only tuned                            a minute, where the others were made

The Fréchet distance of ``digits_quality.py`` between samples and held-out digits against network calls, for eight
samplers and the model's tuned plans (``fastdiff tune``), and the same distance between two halves of the held-out
digits, n samples a side in each. All but the tuned plans, which have their own, walk the same levels: σ/α from 80 down
by Karras et al. 2022, Equation 5, then 0. Writes quality_steps.png, and quality_steps.json with the numbers in it.

Euler's ancestral sampler is DDPM's on these levels, so the two curves are one. x̂_0 is clipped, and ddim takes ε from
the network as it is, euler from the clipped x̂_0: they part, and ddim the more so the more steps there are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from digits_quality import CLASSES, frechet_distances, train_classifier
from tqdm import tqdm

import fastdiff
from fastdiff.files import atomic_write, check_writable
from fastdiff.training.data import load_digits

CALLS = (5, 10, 15, 20, 30, 50, 100)
SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "tuned")
HIGH = 80.0


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> list[float]:
    """σ from high to low, and 0."""
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)] + [0.0]


def draw(trained: Any, asked: torch.Tensor, sampler: str, calls: int, seed: int) -> tuple[torch.Tensor, int]:
    """Samples, and the network calls that each took: Heun's steps are two, but for the last."""
    if sampler == "tuned":
        told = trained.arguments(asked, sampler=sampler, steps=calls)
    else:
        steps = (calls + 1) // 2 if sampler == "heun" else calls
        options = {"sigmas": karras(HIGH, trained.sampling["schedule"].sigma_min, steps)}
        told = trained.arguments(asked, sampler=sampler, steps=None, spacing=None, sampler_options=options)
    made: list[int] = []

    def counted(x: torch.Tensor, t: torch.Tensor, **more: Any) -> Any:
        made.append(1)
        return trained.unet(x, t, **more)

    samples = fastdiff.sample(counted, (len(asked), *trained.image_shape), seed=seed, **told)
    return samples, len(made)


def measure(count: int, seed: int, names: Sequence[str] = SAMPLERS) -> dict[str, Any]:
    trained, held_out = fastdiff.models.digits(), load_digits("held_out")
    classifier = train_classifier(load_digits("train"))
    asked = torch.arange(count) % CLASSES
    labels = held_out.labels.numpy()
    found: dict[str, Any] = {"samples": count, "seed": seed, "sigma_max": HIGH, "distances": {}}
    with torch.no_grad():
        real = classifier.features(held_out.images()).numpy()
        for sampler in names:
            curve = found["distances"][sampler] = []
            for calls in tqdm(sorted(trained.plans) if sampler == "tuned" else CALLS, desc=sampler):
                samples, made = draw(trained, asked, sampler, calls, seed)
                features = classifier.features(samples).numpy()
                distance, between_real, n = frechet_distances(features, asked.numpy(), real, labels)
                curve.append({"calls": made, "distance": round(distance, 3)})
    return found | {"real": round(between_real, 3), "n": n}


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for (sampler, curve), marker in zip(found["distances"].items(), "osD^vPhX*", strict=True):
        line = [(point["calls"], point["distance"]) for point in curve]
        size, width, colour = (12, 2.2, "crimson") if sampler == "tuned" else (5, 1.2, None)
        axes.plot(
            *zip(*line, strict=True), marker=marker, markersize=size, linewidth=width, color=colour, label=sampler
        )
    axes.axhline(found["real"], color="k", linestyle="--", linewidth=1, label="real digits to real digits")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(CALLS, [str(n) for n in CALLS])
    axes.minorticks_off()
    least = 0.9 * found["real"]
    most = max(point["distance"] for curve in found["distances"].values() for point in curve)
    ticks = [n for n in (10, 12, 15, 20, 30, 50, 100, 200, 500) if least <= n <= most]
    axes.set_yticks(ticks, [str(n) for n in ticks])
    axes.set(xlabel="network calls", ylabel=f"Fréchet distance to held-out digits, n = {found['n']}",
             title="The packaged digits model", ylim=(least, None))  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500, help="of each sampler and number of calls; at least 250")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--out", type=Path, default=Path("examples"), help="the folder to write to")
    parser.add_argument(
        "--only", nargs="+", choices=SAMPLERS, help="samplers to measure; others stay as the file has them"
    )
    arguments = parser.parse_args()
    if arguments.samples < 250:
        parser.error(f"--samples must be at least 250, 25 a class; got {arguments.samples}")
    numbers = check_writable(arguments.out / "quality_steps.json")
    picture = check_writable(arguments.out / "quality_steps.png")
    kept = json.loads(numbers.read_text()) if arguments.only else {"samples": arguments.samples, "seed": arguments.seed}
    if (kept["samples"], kept["seed"]) != (arguments.samples, arguments.seed):
        parser.error(f"{numbers} has {kept['samples']} samples of seed {kept['seed']}: leave --only out")
    found = measure(arguments.samples, arguments.seed, arguments.only or SAMPLERS)
    if kept.get("real", found["real"]) != found["real"]:
        parser.error(
            f"{numbers} was judged by another classifier (real to real {kept['real']}, here {found['real']}): trained "
            "on another machine or number of threads it has other bits; leave --only out"
        )
    found["distances"] = kept.get("distances", {}) | found["distances"]
    with atomic_write(numbers) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    plot(found, picture)
    for sampler, curve in found["distances"].items():
        print(f"{sampler:<14}", *(f"{point['calls']:>4}: {point['distance']:<7.2f}" for point in curve))
    print(f"real digits to real digits: {found['real']:.2f}, n = {found['n']}")


if __name__ == "__main__":
    main()
