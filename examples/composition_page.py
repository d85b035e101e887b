"""What DeepCache, tomesd and torchao bring on top of fastdiff.accelerate, measured: writes docs/composition.md.

    pip install -e ".[text]" DeepCache==0.1.1 tomesd==0.1.3 torchao==0.18.0
    python examples/composition_page.py [--model emoji] [--n 32] [--only emoji]

Each of them makes a call cheaper and another one. So does taking fewer steps, which needs no library: every method has
beside it the plain pipeline with as many steps as cost the same. Costs are CPU times, each over that of the exact call
beside it, medians of several blocks. Figures are kept in examples/composition.json as they are found; --only measures
one of the two pipelines again, the page is rendered from all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.evaluation.judge import FACTORS, Judge, Scores
from fastdiff.evaluation.run import choose_targets
from fastdiff.files import atomic_write
from fastdiff.integrations.diffusers import DPMSolverMultistepScheduler
from fastdiff.text.load import ASSETS
from fastdiff.training.autoencoder import psnr
from fastdiff.training.captioned import load_captioned

HERE = Path(__file__).resolve().parent
KEPT, PAGE = HERE / "composition.json", HERE.parent / "docs" / "composition.md"
BATCH, BLOCKS = 8, 3
TIMED = 2  # pictures of a call that is timed
FEWER = "the same cost by fewer steps"
NO_GAIN = 0.97  # of the exact call's cost; above, there is nothing to compare
CAPTIONS = ["a lighthouse in a storm"]  # of the pipeline that nothing can judge


# ---- the methods


def deepcache(interval: int) -> Callable[[Any], None]:
    """Only every so manieth call runs the whole UNet; the others reuse what its inner blocks gave (Ma et al. 2023)."""

    def put(pipe: Any) -> None:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()

    return put


def merged(ratio: float) -> Callable[[Any], None]:
    """A share of an image's tokens is merged before self-attention (Bolya & Hoffman 2023)."""

    def put(pipe: Any) -> None:
        import tomesd

        # The emoji UNet has its attention at half the latents' resolution.
        tomesd.apply_patch(pipe, ratio=ratio, max_downsample=2, use_rand=False)

    return put


def quantized(config: str) -> Callable[[Any], None]:
    """The UNet's projections in 8 bits."""

    def put(pipe: Any) -> None:
        from torchao import quantization

        quantization.quantize_(pipe.unet, getattr(quantization, config)())

    return put


@dataclass(frozen=True)
class Method:
    name: str
    put: Callable[[Any], None]
    interval: int = 1  # between calls of the whole UNet


METHODS = (
    Method("DeepCache, every 2nd call whole", deepcache(2), 2),
    Method("DeepCache, every 3rd call whole", deepcache(3), 3),
    Method("tomesd, half of the tokens merged", merged(0.5)),
    Method("torchao, weights in int8", quantized("Int8WeightOnlyConfig")),
    Method("torchao, weights and activations in int8", quantized("Int8DynamicActivationInt8WeightConfig")),
)
APART = {
    "DeepCache under `fastdiff.sample`": "it looks up the timestep of a call, one number, in the list of diffusers' "
    "scheduler, which only diffusers' loop sets. Here all run in diffusers' loop, with our scheduler and networks",
    "torchao and packed weights": "a quantised weight is a tensor of torchao's own class, so that its layers, and the "
    "attention that would read them, run their own code. Convolutions it leaves alone",
    "`torch.compile` and `accelerate`": "a compiled network runs what it traced, as fast as without `accelerate`",
}


# ---- one pipeline


class Study:
    """Draws the same noise by a pipeline's exact call, with methods, and in fewer steps."""

    def __init__(self, folder: Path | str, captions: Sequence[str], scale: float, steps: int) -> None:
        self.folder, self.captions, self.scale, self.steps = folder, list(captions), scale, steps
        self.exact = self.pipeline()
        self.truth = self.draw(self.exact, steps)

    def pipeline(self, method: Method | None = None) -> Any:
        """diffusers' pipeline with fastdiff's scheduler and fast path, and a method on top."""
        pipe = fastdiff.load(self.folder).pipe
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if method is not None:
            method.put(pipe)
        return pipe

    def draw(self, pipe: Any, steps: int, count: int | None = None) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] of the first captions, from the same noise in every call."""
        captions, images = self.captions[:count], []
        size = pipe.unet.config.sample_size
        for start in range(0, len(captions), BATCH):
            batch = captions[start : start + BATCH]
            noise = fastdiff.randn((len(batch), 4, size, size), seed=0, sample_offset=start)
            images.append(pipe(batch, latents=noise, num_inference_steps=steps, guidance_scale=self.scale,
                               output_type="pt").images * 2 - 1)  # fmt: skip
        return torch.cat(images).float()

    def row(self, name: str, pipe: Any, steps: int, interval: int = 1) -> tuple[dict[str, Any], Tensor]:
        """What is told of one line, and its images."""
        images = self.draw(pipe, steps)
        whole = -(-steps // interval)
        found = {
            "name": name, "calls": steps, "whole": whole, "cost": self.cost(pipe, steps),
            "psnr": round(psnr(images, self.truth).mean().item(), 2),
        }  # fmt: skip
        return found, images

    def cost(self, pipe: Any, steps: int) -> list[float]:
        """The CPU time of a call over the exact one's: median and quartiles of blocks."""
        self.draw(pipe, steps, TIMED)
        ratios = []
        for _ in range(BLOCKS):
            exact = seconds(lambda: self.draw(self.exact, self.steps, TIMED))
            ratios.append(seconds(lambda: self.draw(pipe, steps, TIMED)) / exact)
        low, middle, high = statistics.quantiles(ratios, n=4)
        return [round(value, 3) for value in (middle, low, high)]

    def compare(self, judged: Callable[[Tensor], dict[str, Any]]) -> list[dict[str, Any]]:
        """The exact line, and each method's with that of fewer steps after it."""
        found = [{"name": "exact", "calls": self.steps, "whole": self.steps, "cost": [1.0, 1.0, 1.0], "psnr": None}]
        found[0] |= judged(self.truth)
        fewer: dict[int, dict[str, Any]] = {}
        for method in METHODS:
            try:
                row, images = self.row(method.name, self.pipeline(method), self.steps, method.interval)
            except Exception as error:  # of a library that does not run here: the page says which, and goes on
                found.append({"name": method.name, "fails": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
                continue
            found.append(row | judged(images))
            print(json.dumps(found[-1]), flush=True)
            steps = min(self.steps, max(1, round(self.steps * row["cost"][0])))
            if row["cost"][0] > NO_GAIN or steps == self.steps:
                continue
            if steps not in fewer:
                plain, images = self.row(f"{FEWER}, {steps}", self.exact, steps)
                fewer[steps] = plain | judged(images)
            found.append(fewer[steps])
        return found


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def emoji(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out cells of the packaged model, judged."""
    data = load_captioned("emoji", part=None, subset=None)
    judge = Judge(data.rows, data.pixels)
    targets = choose_targets(data.rows, "held_out", options.n)
    study = Study(options.model, [data.rows[i]["caption"] for i in targets.tolist()], scale=2.0, steps=20)

    def judged(images: Tensor) -> dict[str, Any]:
        scores: Scores = judge.judge(images, targets)
        return {name: [round(v, 3) for v in scores.means()[name]] for name in ("exact", *FACTORS)}

    return study.compare(judged)


def quarter(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Stable Diffusion 1.5 at a quarter of the width and 256 pixels, of random weights, which nothing can judge."""
    with tempfile.TemporaryDirectory() as folder:
        write_quarter(Path(folder))
        return Study(folder, CAPTIONS, scale=7.5, steps=10).compare(lambda images: {})


def write_quarter(folder: Path) -> None:
    import diffusers

    from fastdiff.training.pipeline import write_pipeline
    from fastdiff.training.words import new_text_encoder, new_tokenizer

    torch.manual_seed(0)
    configs = ASSETS / "configs" / "sd15"
    unet = diffusers.UNet2DConditionModel.from_config({
        **diffusers.UNet2DConditionModel.load_config(configs / "unet"), "sample_size": 32, "norm_num_groups": 8,
        "block_out_channels": (80, 160, 320, 320), "attention_head_dim": 2, "cross_attention_dim": 192,
    })  # fmt: skip
    vae = diffusers.AutoencoderKL.from_config({
        **diffusers.AutoencoderKL.load_config(configs / "vae"), "sample_size": 256, "norm_num_groups": 8,
        "block_out_channels": (32, 64, 128, 128),
    })  # fmt: skip
    tokenizer = new_tokenizer(CAPTIONS, length=77, vocabulary=64)
    reader = new_text_encoder(tokenizer, width=192, layers=12)
    write_pipeline(folder, vae, unet, reader, tokenizer, "v_prediction")


# ---- the page

TITLES = {
    "emoji": "The packaged emoji model, 64 pixels, held-out captions",
    "quarter": "Stable Diffusion 1.5 at a quarter of the width, 256 pixels, random weights",
}
STUDIES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {"emoji": emoji, "quarter": quarter}


def table(rows: Sequence[dict[str, Any]]) -> str:
    shares = [name for name in ("exact", *FACTORS) if name in rows[0]]
    head = ["", "cost", "calls", *(f"{s} as asked" if s != "exact" else "exact cell" for s in shares), "PSNR to exact"]
    lines = [f"| {' | '.join(head)} |\n", "|---" + "|---:" * (len(head) - 1) + "|\n"]
    for row in rows:
        if "fails" in row:
            lines.append(f"| {row['name']} | fails: {row['fails']} |{' |' * (len(head) - 2)}\n")
            continue
        middle, low, high = row["cost"]
        cost = "1" if row["psnr"] is None else f"{middle:.2f} [{low:.2f} … {high:.2f}]"
        calls = f"{row['calls']}" if row["whole"] == row["calls"] else f"{row['calls']}, {row['whole']} of them whole"
        hits = [f"{row[s][0]:.2f} ({row[s][1]:.2f}–{row[s][2]:.2f})" for s in shares]
        psnr_text = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        lines.append(f"| {' | '.join([row['name'], cost, calls, *hits, psnr_text])} |\n")
    return "".join(lines)


def verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence a method: what wins at its cost."""
    lines = []
    for row, plain in zip(rows[1:], [*rows[2:], {}], strict=True):
        if "fails" in row or row["name"].startswith(FEWER):
            continue
        if not plain.get("name", "").startswith(FEWER):
            lines.append(f"- {row['name']}: brings nothing, at {row['cost'][0]:.2f} of the exact call's cost.\n")
            continue
        wins = row["psnr"] > plain["psnr"]
        line = f"- {row['name']}: **{'it wins' if wins else 'fewer steps win'}** by PSNR, {row['psnr']:.1f} dB against "
        line += f"{plain['psnr']:.1f} in {plain['calls']} steps"
        if "exact" in row:
            apart = row["exact"][1] > plain["exact"][2] or plain["exact"][1] > row["exact"][2]
            line += f"; exact cells, {row['exact'][0]:.2f} against {plain['exact'][0]:.2f}, "
            line += "differ by more than chance" if apart else "do not differ by more than chance"
        lines.append(f"{line}.\n")
    return "".join(lines)


def render(found: dict[str, Any]) -> str:
    machine = found["machine"]
    parts = [
        "# Other accelerations on top of ours\n\n"
        "Rendered by `examples/composition_page.py`. Every line is diffusers' pipeline with fastdiff's scheduler\n"
        "(dpmpp_2m) and networks (`fastdiff.accelerate`), in float32, with guidance, from the same\n"
        "noise. The cost is CPU time over that of the exact call, with the quartiles of its blocks. Under each method\n"
        "stands the plain pipeline with as many steps as cost the same. PSNR is to the exact call's pictures.\n\n"
        f"{', '.join(f'{name} {version}' for name, version in machine['versions'].items())}; {machine['cpu']}, "
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}.\n"
    ]
    for name in STUDIES:
        if name in found:
            rows = found[name]
            parts.append(f"\n## {TITLES[name]}\n\n{table(rows)}\n{verdicts(rows)}")
    parts.append("\n## What does not go together\n\n")
    parts += [f"- {what}: {why}.\n" for what, why in APART.items()]
    return "".join(parts)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    libraries = ("torch", "diffusers", "DeepCache", "tomesd", "torchao")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {"cpu": (names or [platform.processor()])[0], "threads": torch.get_num_threads(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--n", type=int, default=32, help="held-out cells")
    parser.add_argument("--only", choices=STUDIES, action="append")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    found["machine"] = machine()
    for name in options.only or STUDIES:
        found[name] = STUDIES[name](options)
        with atomic_write(KEPT) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
        with atomic_write(PAGE) as file:
            file.write(render(found).encode())


if __name__ == "__main__":
    main()
