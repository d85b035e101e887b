"""What learned plans bring, measured: docs/tune.md.

    python examples/tuned_plans.py [--only mixtures networks digits cost] [--seeds 0 1 2] [--iterations 160]

Distances are to a fine solver's states on held-out noise, root of the mean square, as ``plan.provenance`` has them.
Seconds are the processor's, so that other work on the machine does not count. Each part's numbers go to
examples/tuned_plans.json as they come, beside what it held of other parts, and the page is rendered from that file
(``--render`` alone does no more). All parts take about fifteen minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mixture_network import MixtureNetwork
from torch import Tensor, nn

import fastdiff
from fastdiff.files import atomic_write
from fastdiff.tuning.folder import tune_trained
from fastdiff.tuning.learned import Learned
from fastdiff.tuning.runs import Runs, frozen
from fastdiff.tuning.start import Start
from fastdiff.tuning.units import units
from fastdiff.tuning.walk import walk

HERE = Path(__file__).resolve().parent
NUMBERS, PAGE = HERE / "tuned_plans.json", HERE.parent / "docs" / "tune.md"
BEST = (("ddim", 15), ("dpmpp_2m_sde", 15), ("dpmpp_2m_sde", 30))  # untuned: at 15 calls and at any, quality_steps.json
PROCESSES = {
    "VP": (fastdiff.NoiseSchedule.cosine(), "epsilon"),
    "flow": (fastdiff.FlowSchedule(), "flow_prediction"),
    "EDM": (fastdiff.EDMSchedule(), "edm"),
}


def kept(plan: fastdiff.Plan, seconds: float) -> dict[str, Any]:
    """Of a learned plan what the page needs."""
    told = plan.provenance
    assert told is not None
    return {"errors": told.errors, "teacher_error": told.teacher_error, "teacher_calls": told.teacher_calls,
            "iterations": told.iterations, "seconds": round(seconds, 1)}  # fmt: skip


def timed(model: Any, shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    begun = time.process_time()
    plan = fastdiff.tune(model, shape, **options)
    return kept(plan, time.process_time() - begun)


# ---- a mixture of Gaussians, whose score is exact


def mixtures(seeds: list[int], iterations: int) -> Iterator[tuple[str, Any]]:
    for dimensions in (2, 64):
        for name, (schedule, prediction) in PROCESSES.items():
            model = MixtureNetwork(dimensions, schedule, prediction)
            options = {"steps": 6, "schedule": schedule, "prediction": prediction, "batch": 64}
            yield (
                f"{name}, {dimensions} dimensions",
                timed(model, (512, dimensions), **options, iterations=iterations, seed=seeds[0]),
            )


# ---- small networks of other predictions, and guidance


class Small(nn.Module):
    """A network of points in the plane, of three classes and a null class; t is in [0, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(4, 16)
        self.layers = nn.Sequential(
            nn.Linear(2 + 16 + 16, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 5, 8)))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = t.float()[:, None] / 1000 * self.frequencies
        return self.layers(torch.cat([x, angles.sin(), angles.cos(), self.classes(labels)], 1))


def train_small(prediction: str, schedule: Any, steps: int = 1500) -> Small:
    """Three arcs, a class each, by Adam."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / steps)
        labels = torch.randint(3, (256,))
        angle = 2.1 * labels + 1.6 * torch.rand(256)
        x0 = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(256, 2)
        t, noise = torch.randint(1000, (256,)), torch.randn(256, 2)
        if prediction == "flow_prediction":
            sigma = (t[:, None] + 1) / 1000
            alpha, told, target = 1 - sigma, t + 1, noise - x0
        else:
            alpha, sigma = (part.float()[t][:, None] for part in (schedule.alphas, schedule.sigmas))
            told, target = t, alpha * noise - sigma * x0
        given = torch.where(torch.rand(256) < 0.15, 3, labels)
        loss = (model(alpha * x0 + sigma * noise, told, given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def networks(seeds: list[int], iterations: int) -> Iterator[tuple[str, Any]]:
    count = 256
    labels = torch.arange(count) % 3
    for prediction, schedule in (("flow_prediction", fastdiff.FlowSchedule()),
                                 ("v_prediction", fastdiff.NoiseSchedule.cosine())):  # fmt: skip
        model = train_small(prediction, schedule)
        for scale in (1.0, 3.0):
            options: dict[str, Any] = {"model_kwargs": {"labels": labels}}
            if scale != 1:
                options |= {"uncond_kwargs": {"labels": torch.full_like(labels, 3)}, "guidance_scale": scale}
            name = f"{prediction}{'' if scale == 1 else ', guidance 3'}"
            yield name, timed(model, (count, 2), steps=6, schedule=schedule, prediction=prediction, batch=64,
                              iterations=iterations, seed=seeds[0], **options)  # fmt: skip


# ---- the packaged digits


def digits(seeds: list[int], iterations: int) -> Iterator[tuple[str, Any]]:
    """Distances, and the Fréchet distance of examples/quality_steps.py: of the packaged plans, and of plans of five
    calls by other seeds, made as those were. One classifier judges them and the untuned ones beside them: trained on
    another machine or number of threads it has other bits, and moves all distances by some hundredths of themselves.
    """
    from digits_quality import CLASSES, frechet_distances, train_classifier
    from quality_steps import draw

    from fastdiff.training.data import load_digits

    trained, held_out = fastdiff.models.digits(), load_digits("held_out")
    classifier = train_classifier(load_digits("train"))
    asked = torch.arange(500) % CLASSES
    with torch.no_grad():
        real = classifier.features(held_out.images()).numpy()

    def frechet(samples: Tensor) -> float:
        with torch.no_grad():
            features = classifier.features(samples).numpy()
        return round(frechet_distances(features, asked.numpy(), real, held_out.labels.numpy())[0], 3)

    def frechet_of(plan: fastdiff.Plan) -> float:
        told = trained.arguments(asked, sampler=plan)
        told = {name: told[name] for name in ("sampler", "model_kwargs", "uncond_kwargs", "guidance_scale")}
        return frechet(fastdiff.sample(trained.unet, (len(asked), *trained.image_shape), seed=0, **told))

    yield "untuned", {f"{name} at {calls}": frechet(draw(trained, asked, name, calls, 0)[0]) for name, calls in BEST}
    for steps, path in sorted(trained.plans.items()):
        plan = fastdiff.Plan.load(path)
        yield f"{steps} calls", {**kept(plan, 0.0), "frechet": frechet_of(plan)}
    for seed in seeds[1:]:
        begun = time.process_time()
        plan = tune_trained(trained, steps=5, seed=seed, iterations=iterations)
        yield f"5 calls, seed {seed}", {**kept(plan, time.process_time() - begun), "frechet": frechet_of(plan)}


# ---- time and memory


def cost(seeds: list[int], iterations: int) -> Iterator[tuple[str, Any]]:
    """An iteration on the digits, batch 16: its seconds, the bytes that its graph keeps between rows, and the most
    memory that the process ever had, which includes torch and the network.
    """
    trained = fastdiff.models.digits()
    for steps in (2, 4, 8, 16):
        told = trained.arguments(torch.arange(16) % 10, sampler="dpmpp_2m", steps=steps, spacing="karras")
        beside = {name: told.pop(name) for name in ("model_kwargs", "uncond_kwargs", "guidance_scale")}
        plan = fastdiff.samplers.dpmpp_2m(told["schedule"], steps, clip=1.0, spacing="karras")
        learned = Learned(Start(plan), units(plan, 0.7, True, told["schedule"]), False)
        runs = Runs(trained.unet, (16, *trained.image_shape), 16, 0, beside)
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with frozen(trained.unet), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            begun = time.process_time()
            table = learned.table()
            x = walk(runs.request(learned.wide(table), 0, 16), table)
            held = sum(sizes.values())
            torch.autograd.grad(x.square().mean(), learned.parameters())
        seconds, peak = time.process_time() - begun, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield f"{steps} steps", {"seconds": round(seconds, 3), "bytes": held, "peak": peak}


# ---- the page


def render(found: dict[str, Any]) -> str:
    lines = [(HERE / "tuned_plans.md").read_text(encoding="utf-8").rstrip(), ""]
    for part, title in (("mixtures", "A mixture of Gaussians, its score exact, at 6 calls"),
                        ("networks", "Small networks of points in the plane, at 6 calls"),
                        ("digits", "The packaged digits")):  # fmt: skip
        rows = [_row(name, told) for name, told in found.get(part, {}).items() if "errors" in told]
        if rows:
            extra = "Fréchet | " if part == "digits" else ""
            columns = f"| | tuned | best, n calls | DPM++ 2M, n | DPM++ 2M, 2n | best, 4n | {extra}seconds |"
            lines += [f"## {title}", "", columns, f"|---|---|---|---|---|---|{'---|' * bool(extra)}---|", *rows, ""]
    if "digits" in found:
        lines += [*_verdicts(found["digits"]), ""]
    if costs := found.get("cost"):
        said = (
            "An iteration on the digits, batch 16 under guidance: seconds of a thread, what is kept between rows, and "
        )
        lines += ["## Time and memory", "", said + "the most that the process ever had.", ""]
        lines += ["| | seconds | kept | peak |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {told['seconds']:.2f} | {told['bytes'] / 1024:.0f} KiB | {told['peak'] / 2**20:.0f} MiB |"
            for name, told in costs.items()
        ]
        lines.append("")
    return "\n".join(lines)


def _verdicts(found: dict[str, Any]) -> list[str]:
    """What was asked of the digits' plans, and whether it was met."""
    told, untuned = dict(found), found["untuned"]
    del told["untuned"]
    at_15, best = (min((untuned[name], name) for name in untuned if name.endswith(end)) for end in (" at 15", ""))
    lines = ["| asked of the digits | is | limit | |", "|---|---|---|---|"]

    def said(what: str, value: float, limit: str, most: float) -> None:
        lines.append(f"| {what} | {value:.3g} | {limit} | {'met' if value <= most else '**missed**'} |")

    judged = [name for name in told if "frechet" in told[name]]
    for name in (name for name in judged if name.startswith("5 calls")):
        limit = f"{at_15[0]:.3g}, {at_15[1]} calls, the best untuned there"
        said(f"Fréchet distance, {name}", told[name]["frechet"], limit, at_15[0])
    limit = f"{1.05 * best[0]:.3g}, 1.05 of {best[1]}, the best of all"
    if "8 calls" in judged:
        said("Fréchet distance, 8 calls", told["8 calls"]["frechet"], limit, 1.05 * best[0])
    for name in told:
        errors, n = told[name]["errors"], int(name.split()[0])
        most = errors["dpmpp_2m"][str(2 * n)]
        said(f"distance to the teacher, {name}", errors["tuned"][str(n)], f"{most:.3g}, DPM++ 2M at {2 * n}", most)
    return lines


def _row(name: str, told: dict[str, Any]) -> str:
    errors = dict(told["errors"])
    tuned, others = errors.pop("tuned"), {k: v for k, v in errors.items() if k not in ("tuned", "start")}
    (n, error), *_ = tuned.items()

    def best(count: int) -> str:
        found = [(of[str(count)], sampler) for sampler, of in others.items() if str(count) in of]
        return f"{min(found)[0]:.3g} ({min(found)[1]})" if found else "·"

    def of_2m(count: int) -> str:
        return f"{others['dpmpp_2m'][str(count)]:.3g}" if str(count) in others.get("dpmpp_2m", {}) else "·"

    n = int(n)
    cells = [name, f"**{error:.3g}**", best(n), of_2m(n), of_2m(2 * n), best(4 * n)]
    cells += [f"{told['frechet']:.2f}" if "frechet" in told else "·"] if "calls" in name else []
    return f"| {' | '.join(cells)} | {told['seconds'] or '·'} |"


PARTS = {"mixtures": mixtures, "networks": networks, "digits": digits, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the tuning")
    parser.add_argument("--iterations", type=int, default=160, help="of each tuning")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    for part in () if arguments.render else arguments.only:
        for name, told in PARTS[part](arguments.seeds, arguments.iterations):
            found.setdefault(part, {})[name] = told
            print(part, name, told.get("errors", {}).get("tuned", told), flush=True)
            with atomic_write(NUMBERS) as file:
                file.write((json.dumps(found, indent=1) + "\n").encode())
    with atomic_write(PAGE) as file:
        file.write(render(found).encode())
    print(f"{PAGE}: rendered")


if __name__ == "__main__":
    main()
