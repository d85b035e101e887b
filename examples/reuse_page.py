"""What is a network's call worth? Fewer steps, reused calls, DeepCache's package and tuned plans beside each other.

    python examples/reuse_page.py [--samples 500] [--emoji 16] [--only digits]     minutes on one core
    python examples/reuse_page.py --model FOLDER --out FOLDER                      of a model of one's own

Writes reuse.json (the figures, as they are found) and reuse.md. Every method starts from the same noise. Its cost is
counted in calls of the whole network, and measured: the processor's time of ``sample`` on one thread, per image. Its
quality is the root-mean-square distance to the images of a teacher, a fine solution from the
same noise, and, of the packaged digits, the Fréchet distance of ``digits_quality.py`` to held-out digits; of the emoji
model the judge's score (``fastdiff evaluate``): how often the nearest of all real pictures is the one asked for.

All networks are accelerated, in float32. DeepCache's package (``pip install DeepCache==0.1.1 --no-deps``) runs on
diffusers' UNets by the same plans and from the same noise; without it its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from digits_quality import frechet_distances, train_classifier
from quality_steps import HIGH, karras
from torch import Tensor
from tqdm import tqdm

import fastdiff
from fastdiff import Plan
from fastdiff.evaluation.judge import Judge
from fastdiff.evaluation.run import choose_targets, draw
from fastdiff.files import atomic_write
from fastdiff.pictures.recipe import IN_THE_PLAN
from fastdiff.plan.reuse import choose_reused
from fastdiff.samplers.resolve import resolve_plan
from fastdiff.training.captioned import load_captioned
from fastdiff.training.data import load_digits

HERE = Path(__file__).resolve().parent
STEPS = 20  # of the plan whose calls are reused
TEACHER = ("ddim", 60)
SAMPLERS = ("dpmpp_2m", "ddim")
FEWER = (5, 7, 10, STEPS)
EVERY = (2, 3, 5)
TUNED, LEARNED_FROM = 10, 128  # steps of the plan with reused rows that is learned, and from how many samples
CHOSEN_FROM, CHOSEN = 14, (10, 7)  # steps of the plan of which rows are chosen greedily, and calls that this leaves
HELD_OUT = 8  # images by which rows are chosen
SEED, CHOOSING = 0, 1  # of the noise that is judged, and of the noise that rows are chosen by


@dataclass(frozen=True)
class Method:
    """A plan and its network; ``package`` is DeepCache's interval, where the package decides what is computed."""

    name: str
    plan: Plan
    package: int = 1

    @property
    def calls(self) -> int:
        return len(range(0, self.plan.calls, self.package))

    @property
    def shallow(self) -> int:
        return sum(row.reuse == "deep" for row in self.plan) + self.plan.calls - self.calls


def methods(sampler: str, planned: Callable[[str, int], Plan], packaged: bool) -> list[Method]:
    """Fewer steps, outputs and deep features again, and DeepCache's package, of a sampler."""
    found = [Method(f"{sampler}, {n} steps", planned(sampler, n)) for n in FEWER]
    plan = planned(sampler, STEPS)
    for every in EVERY:
        name = f"{sampler}, {STEPS} steps, one call in {every}"
        found.append(Method(f"{name}, output again", plan.reuse(every=every)))
        found.append(Method(f"{name}, deep features again", plan.reuse(every=every, kind="deep")))
        if packaged:
            found.append(Method(f"{name}, DeepCache's package", plan, every))
    return found


def chosen(planned: Callable[[str, int], Plan], error: Callable[[Plan], float]) -> list[Method]:
    """Rows that the greedy choice reuses, of the multistep sampler."""
    found = []
    for kind, what in (("output", "outputs"), ("deep", "deep features")):
        path = choose_reused(planned(SAMPLERS[0], CHOSEN_FROM), min(CHOSEN), error, kind=kind)  # type: ignore[arg-type]
        of_calls = {plan.calls: plan for plan, _ in path}
        name = f"{SAMPLERS[0]}, {CHOSEN_FROM} steps, chosen rows take {what} again"
        found += [Method(f"{name}, {n} calls", of_calls[n]) for n in CHOSEN]
    return found


def tuned(study: Study) -> Iterator[Method]:
    """The model's own learned plans, and what learning makes of one that takes every other output again."""
    for n, path in study.trained.plans.items():
        yield Method(f"tuned, {n} steps", Plan.load(path))
    start = study.planned(SAMPLERS[0], TUNED).reuse(every=2)
    told = {k: v for k, v in study.arguments(study.labels[:LEARNED_FROM]).items() if k not in IN_THE_PLAN}
    plan = fastdiff.tune(
        study.network, (LEARNED_FROM, *study.trained.image_shape), steps=start.calls, start=start,
        teacher=study.planned(*TEACHER), iterations=100, batch=16, **told,
    )  # fmt: skip
    yield Method(f"tuned, {TUNED} steps, one call in 2, output again", plan)


def has_package() -> bool:
    try:
        import DeepCache  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def deepcache(unet: Any, method: Method) -> Iterator[None]:
    """DeepCache's package at work on a UNet of diffusers, branch 0."""
    from DeepCache import DeepCacheSDHelper

    scheduler = SimpleNamespace(timesteps=torch.tensor(method.plan.timesteps))
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=method.package, cache_branch_id=0)
    helper.enable()
    enabled = unet.forward
    unet.forward = lambda x, t, *args, **kwargs: enabled(x, t[:1], *args, **kwargs)  # it looks one number up
    try:
        yield
    finally:
        helper.disable()


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    result = run()
    return result, time.process_time() - begin


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


# ---- the digits, or a model of one's own


class Study:
    """A class-conditional or unconditional model, its plans, and what is measured of them."""

    def __init__(self, folder: Path | None, samples: int) -> None:
        self.trained = fastdiff.models.digits() if folder is None else fastdiff.models.load(folder)
        self.digits = folder is None
        self.network = self.trained.unet
        where = Path(fastdiff.__file__).parent / "assets" / "digits" if folder is None else folder
        self.diffusers = _diffusers(where) if has_package() else None
        for network in filter(None, (self.network, self.diffusers)):
            fastdiff.accelerate(network, dtype=torch.float32)
        self.labels = torch.arange(samples) % (len(self.trained.classes) or 1)
        self.teacher = self.draw(self.planned(*TEACHER), self.labels, SEED)
        if self.digits:
            held_out = load_digits("held_out")
            self.classifier = train_classifier(load_digits("train"))
            self.real = self.features(held_out.images()), held_out.labels.numpy()

    @torch.no_grad()
    def features(self, images: Tensor) -> Any:
        return self.classifier.features(images).numpy()

    def arguments(self, labels: Tensor, **changes: Any) -> dict[str, Any]:
        return self.trained.arguments(labels if self.trained.classes else None, **changes)

    def planned(self, sampler: str, steps: int) -> Plan:
        """A sampler's plan over the levels of ``quality_steps.py``, where the schedule has σ."""
        schedule = self.trained.sampling["schedule"]
        if isinstance(schedule, fastdiff.NoiseSchedule):
            sigmas = karras(min(HIGH, schedule.sigma_max), schedule.sigma_min, steps)
            levels = {"steps": None, "spacing": None, "sampler_options": {"sigmas": sigmas}}
        else:
            levels = {"steps": steps}
        told = self.arguments(self.labels, sampler=sampler, **levels)
        return resolve_plan(**{name: told[name] for name in IN_THE_PLAN if name in told})

    def draw(self, plan: Plan, labels: Tensor, seed: int, network: Any = None) -> Tensor:
        told = {name: value for name, value in self.arguments(labels).items() if name not in IN_THE_PLAN}
        network = self.network if network is None else network
        return fastdiff.sample(network, (len(labels), *self.trained.image_shape), sampler=plan, seed=seed, **told)

    def choosing_error(self) -> Callable[[Plan], float]:
        labels = self.labels[:HELD_OUT]
        teacher = self.draw(self.planned(*TEACHER), labels, CHOOSING)
        return lambda plan: distance(self.draw(plan, labels, CHOOSING), teacher)

    def measure(self, method: Method) -> dict[str, Any]:
        ours = method.package == 1
        network = self.network if ours else self.diffusers
        with nullcontext() if ours else deepcache(network, method):
            self.draw(method.plan, self.labels[:1], SEED, network)  # what is packed once is no cost of a call
            images, seconds = timed(partial(self.draw, method.plan, self.labels, SEED, network))
        found = {"ms": 1000 * seconds / len(images), "distance": distance(images, self.teacher)}
        if self.digits:
            found["frechet"] = self.frechet(images)[0]
        return found

    def frechet(self, images: Tensor) -> tuple[float, float, int]:
        return frechet_distances(self.features(images), self.labels.numpy(), *self.real)


def _diffusers(folder: Path) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers.UNet2DModel.from_pretrained(folder).eval()


def of_model(folder: Path | None, samples: int, keep: Callable[[dict[str, Any]], None]) -> None:
    study = Study(folder, samples)
    told = {"samples": samples, "teacher": list(TEACHER), "torch": torch.__version__}
    if study.digits:
        told["frechet_of_teacher"], told["real"], told["n"] = study.frechet(study.teacher)

    def every() -> Iterator[Method]:  # made one after the other: some take minutes to choose or to tune
        for sampler in SAMPLERS:
            yield from methods(sampler, study.planned, study.diffusers is not None)
        yield from chosen(study.planned, study.choosing_error())
        yield from tuned(study)

    rows: list[dict[str, Any]] = []
    for method in tqdm(every(), desc="methods"):
        rows.append({"method": method.name, "calls": method.calls, "shallow": method.shallow, **study.measure(method)})
        keep({**told, "rows": rows})


# ---- the emoji model


def of_emoji(cells: int, keep: Callable[[dict[str, Any]], None]) -> None:
    pipe, data = fastdiff.load("emoji"), load_captioned("emoji", part=None, subset=None)
    pipe.accelerate(torch.float32)
    judge, targets = Judge(data.rows, data.pixels), choose_targets(data.rows, "held_out", cells)
    captions = [data.rows[i]["caption"] for i in targets.tolist()]

    def planned(sampler: str, steps: int) -> Plan:
        told = {**pipe.sampling, "sampler": sampler, "steps": steps}
        options = {name: v for name, v in told.pop("sampler_options", {}).items() if name != "final"}
        return resolve_plan(**{name: told[name] for name in IN_THE_PLAN if name in told}, sampler_options=options)

    def drawn(plan: Plan) -> Tensor:
        return draw(pipe, captions, SEED, sampler=plan)

    teacher = drawn(planned(*TEACHER))
    told = {"samples": cells, "teacher": list(TEACHER), "torch": torch.__version__}
    told["teacher_exact"] = judge.judge(teacher, targets).means()["exact"]
    rows: list[dict[str, Any]] = []
    for method in tqdm(methods(SAMPLERS[0], planned, has_package()), desc="methods"):
        with nullcontext() if method.package == 1 else deepcache(pipe.pipe.unet, method):
            images, seconds = timed(partial(drawn, method.plan))
        scores = judge.judge(images, targets).means()
        rows.append({
            "method": method.name, "calls": method.calls, "shallow": method.shallow, "ms": 1000 * seconds / cells,
            "distance": distance(images, teacher), "exact": scores["exact"], "psnr": scores["psnr"][0],
        })  # fmt: skip
        keep({**told, "rows": rows})


# ---- the page


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the cheapest first."""
    last = {"frechet": "Fréchet", "exact": "as asked (95%)"}
    names = [name for name in last if name in rows[0]]
    head = ["method", "calls", "shallow", "ms an image", "to the teacher", *(last[name] for name in names)]
    lines = [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]
    for row in sorted(rows, key=lambda row: row["ms"]):
        cells = [row["method"], row["calls"], row["shallow"] or "", f"{row['ms']:.1f}", f"{row['distance']:.3f}"]
        if "frechet" in row:
            cells.append(f"{row['frechet']:.2f}")
        if "exact" in row:
            mean, low, high = row["exact"]
            cells.append(f"{mean:.2f} ({low:.2f}–{high:.2f})")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def winners(rows: list[dict[str, Any]]) -> str:
    """Of all that take no more than a share of the whole plan's time: the best by each measure."""
    whole = next((row["ms"] for row in rows if row["method"] == f"{SAMPLERS[0]}, {STEPS} steps"), 0.0)
    lines = []
    for share in (0.75, 0.5, 0.35):
        within = [row for row in rows if row["ms"] <= share * whole]  # none while the whole plan is not measured
        if not within:
            continue
        best = min(within, key=lambda row: row["distance"])
        said = f"nearest to the teacher is **{best['method']}** ({best['distance']:.3f})"
        if "frechet" in best:
            best = min(within, key=lambda row: row["frechet"])
            said += f", and the least Fréchet distance has **{best['method']}** ({best['frechet']:.2f})"
        lines.append(f"- Within {share:.0%} of the time of {SAMPLERS[0]}'s {STEPS} calls, {said}.\n")
    return "".join(lines)


def render(found: dict[str, Any]) -> str:
    parts = [
        "# Reused calls, measured\n\n"
        "Rendered by `python examples/reuse_page.py`. A row of a plan may take the network's\n"
        "last output again, or the deep features of its last whole call (DeepCache, Ma et al. 2024):\n"
        '`plan.reuse(every=3)` and `plan.reuse(every=3, kind="deep")`. Are they worth more than fewer steps?\n\n'
        "*Calls* are those of the whole network, *shallow* those of its shallow layers (branch 0) alone. The time\n"
        "is the processor's, of one thread, per image, on the machine that measured; the distance is the root mean\n"
        "square to a teacher's images from the same noise, in [−1, 1].\n"
    ]
    names = {"digits": "The packaged digits", "emoji": "The packaged emoji model", "model": "A model of one's own"}
    for part, title in names.items():
        if part not in found:
            continue
        one = found[part]
        sampler, steps = one["teacher"]
        parts.append(f"\n## {title}\n\nn = {one['samples']}, one seed; the teacher is {sampler} at {steps} steps")
        if "real" in one:
            parts.append(
                f". Fréchet\ndistances are of {one['n']} images a side: the teacher's is "
                f"{one['frechet_of_teacher']:.2f}, that of real digits to real digits {one['real']:.2f}"
            )
        if "teacher_exact" in one:
            mean, low, high = one["teacher_exact"]
            parts.append(f", of which the judge finds {mean:.2f}\n({low:.2f}–{high:.2f}) as asked")
        parts.append(f".\n\n{winners(one['rows'])}\n{table(one['rows'])}")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of a trained UNet, in place of the packaged models")
    parser.add_argument("--samples", type=int, default=500, help="images of each method; of the digits at least 250")
    parser.add_argument("--emoji", type=int, default=16, help="held-out cells that the judge sees; 0 leaves them out")
    parser.add_argument("--only", choices=("digits", "emoji"), help="one of the two; figures of the other stay")
    parser.add_argument("--render", action="store_true", help="the page alone, of the figures that there are")
    parser.add_argument("--out", type=Path, help="a folder for reuse.json and reuse.md [default: examples and docs]")
    options = parser.parse_args()
    if options.model is None and options.samples < 250:
        parser.error(f"--samples must be at least 250, 25 a class; got {options.samples}")
    if options.model is not None and options.out is None:
        parser.error("--model needs --out: the figures in examples/ are those of the packaged models")
    kept = (options.out or HERE) / "reuse.json"
    page = (options.out or HERE.parent / "docs") / "reuse.md"

    def figures() -> dict[str, Any]:
        return json.loads(kept.read_text()) if kept.exists() else {}

    def keep(name: str, value: dict[str, Any]) -> None:
        found = figures() | {name: value}  # read again: another part may have been measured meanwhile
        for path, text in ((kept, json.dumps(found, indent=1) + "\n"), (page, render(found))):
            with atomic_write(path) as file:
                file.write(text.encode())

    torch.set_num_threads(1)
    if options.render:
        for name, value in figures().items():
            keep(name, value)
        return 0
    if options.model is not None:
        of_model(options.model, options.samples, partial(keep, "model"))
        return 0
    if options.only != "emoji":
        of_model(None, options.samples, partial(keep, "digits"))
    if options.only != "digits" and options.emoji:
        of_emoji(options.emoji, partial(keep, "emoji"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
