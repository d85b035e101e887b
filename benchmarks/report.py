"""Renders what ``pytest benchmarks --benchmark-json=…`` measured: every number comes from the JSON.

    python benchmarks/report.py out.json [more.json …] [--out SPEED.md]

Without --out the tables go to the terminal. With it they are written there, and beside each JSON its plot as a PNG.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUIET = 0.05  # a machine is called quiet while other processes take less than this share of its time
NOTE = (
    "Each ratio is a contestant's median over fastdiff's in the same run, with the quartiles of the rounds' own ratios "
    "in brackets. GB/s counts the tensors that must be read and written, once; copy is torch's copy of 512 MiB on the "
    "same threads. Tensors that fit a cache can exceed it. Memory is the most that a first call takes beyond what the "
    "process held before it; of whole networks that are named so, their weights and what is packed of them are in it."
)

GUIDED_STEP, DECODING = ", a guided step of the UNet", ", decoding"  # how bench_text.py ends a case's name
FEW_STEPS = (1, 2, 4, 8, 20)

Case = dict[str, Any]


class Unreadable(Exception):
    """A file that is no result of these benchmarks."""


def load(path: Path) -> tuple[dict[str, Any], list[Case]]:
    """The machine and the cases of one JSON file."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Unreadable(f"{path} is not JSON: {error}") from None
    try:
        machine = {**content["machine_info"]["fastdiff"], "datetime": content["datetime"], "file": path.stem}
        cases = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        for case in cases:
            case["contestants"]["fastdiff"]["median"], case["op"], case["case"]
    except (KeyError, TypeError):
        raise Unreadable(f"{path} was not written by these benchmarks") from None
    if not cases:
        raise Unreadable(f"{path} holds no benchmark: did they all fail or skip?")
    return machine, cases


# ---- tables


def render(machine: dict[str, Any], cases: list[Case]) -> Iterator[str]:
    """Markdown lines for one machine."""
    yield f"## {machine['device']}: {machine['file']}\n"
    yield from describe(machine, cases)
    yield "\n### Targets\n"
    yield from targets(cases)
    for op in dict.fromkeys(case["op"] for case in cases):
        yield f"\n### {op}"
        mine = [case for case in cases if case["op"] == op]
        stepped = [case for case in mine if "operations" in case]
        counted = [case for case in mine if "counts" in case]
        for case in mine:
            if case not in stepped and case not in counted:
                yield from table(case)
        yield from steps(stepped)
        yield from counts(counted)
        yield from decoders(mine)


def describe(machine: dict[str, Any], cases: list[Case]) -> Iterator[str]:
    busiest = max((case["elsewhere"] for case in cases if case["elsewhere"] is not None), default=None)
    if busiest is None:
        quiet = "how quiet it was is not known"
    elif busiest < QUIET:
        quiet = f"quiet: other processes took at most {busiest:.0%} of its time during a benchmark"
    else:
        quiet = f"**not quiet**: other processes took up to {busiest:.0%} of its time during a benchmark"
    waiting = machine.get("waiting")  # not known of older results
    waits = "" if waiting is None else f", OMP_WAIT_POLICY {waiting.lower() or 'not set'}"
    by = {"matrix": ", bfloat16 by AMX", "vector": ", bfloat16 by AVX-512"}.get(machine.get("bfloat16", ""), "")
    yield f"- {machine['cpu']}, {machine['threads']} threads{waits}, kernels {machine['simd']}{by}"
    yield f"- torch {machine['torch']}, diffusers {machine['diffusers'] or 'absent'}, fastdiff {machine['fastdiff']}"
    yield f"- copy bandwidth {cases[0]['copy_bandwidth'] / 1e9:.1f} GB/s"
    yield f"- {machine['datetime'][:10]}, load average {machine['load'][0]:.1f} at the start; {quiet}"


def targets(cases: list[Case]) -> Iterator[str]:
    yield "| | measured | to reach | |"
    yield "|---|---:|---:|---|"
    for case in cases:
        for target in case["targets"]:
            found = measured(case, target)
            if found is None:
                yield f"| {title(case)}: {target['contestant']} | absent | | |"
                continue
            value, kind = found, target["kind"]
            goal, stretch = target["goal"], target.get("stretch")
            reached = value <= goal if kind == "beyond" else value >= goal
            ours, enough = case["contestants"]["fastdiff"]["median"], target.get("or_under")
            reached |= enough is not None and ours <= enough
            text = {
                "ratio": "{:.2f}×" if value < 3 else "{:.1f}×", "of_copy": "{:.0%}", "beyond": "{:.2f} s",
                "images": "{:.3g}",
            }[kind]  # fmt: skip
            copy = (
                "the copy bandwidth"
                if target["contestant"] == "fastdiff"
                else f"the bandwidth of {target['contestant']}"
            )
            what = {
                "ratio": f"{target['contestant']} ÷ {target.get('ours', 'fastdiff')}",
                "of_copy": f"share of {copy}",
                "images": f"{target['contestant']}, images a second in {case.get('timesteps')} steps",
                "beyond": f"seconds beyond {target['contestant']}",
            }[kind]
            verdict = "reached" if reached else "**missed**"
            if reached and stretch:
                verdict += f", stretch {text.format(stretch)} {'too' if value >= stretch else 'not'}"
            limit = ("≤ " if kind == "beyond" else "≥ ") + text.format(goal)
            found_text = text.format(value)
            if enough is not None:
                limit, found_text = f"{limit}, or ≤ {duration(enough)}", f"{found_text}, {duration(ours)}"
            yield f"| {title(case)}: {what} | {found_text} | {limit} | {verdict} |"


def measured(case: Case, target: dict[str, Any]) -> float | None:
    """What a target asks of a case, or None where the contestant was absent."""
    contestant, ours = case["contestants"].get(target["contestant"]), case["contestants"]["fastdiff"]
    if contestant is None:
        return None
    if target["kind"] == "ratio":
        return contestant["median"] / case["contestants"][target.get("ours", "fastdiff")]["median"]
    if target["kind"] == "images":
        return images(case, contestant)
    if target["kind"] == "of_copy":
        return ours["bandwidth"] / (case["copy_bandwidth"] if contestant is ours else contestant["bandwidth"])
    return ours["median"] - contestant["median"]


def images(case: Case, contestant: dict[str, float]) -> float:
    """Images a second of a sampling, where a call is one of its steps for the whole batch."""
    return float(case["shape"][0] / (case["timesteps"] * contestant["median"]))


def table(case: Case) -> Iterator[str]:
    moved, per = case["bytes"], " a step" if case["steps"] > 1 else ""
    yield f"\n**{title(case)}** ({case['rounds']} rounds)\n"
    flops = case.get("flops", 0)
    if flops:
        rates = ", ".join(f"{rate / 1e9:.0f} in {dtype}" for dtype, rate in case["ceiling"].items())
        yield f"{flops / 1e9:.0f} GFLOP. A 3×3 convolution of 256 channels alone reaches, in GFLOP/s: {rates}.\n"
    number = case.get("timesteps", 0)
    more = [*(["GB/s", "of copy"] if moved else []), *(["GFLOP/s"] if flops else [])]
    more += [f"images/s in {number} steps"] if number else []
    memory = case.get("memory", {})
    more += ["memory at most"] if memory else []
    yield " | ".join(["|", f"median{per}", "fastest", "÷ fastdiff", *more]) + " |"
    yield "|---|" + "---:|" * (3 + len(more))
    for name, c in case["contestants"].items():
        ratio = "1" if name == "fastdiff" else f"{c['ratio']:.2f} [{c['ratio_q1']:.2f} … {c['ratio_q3']:.2f}]"
        line = f"| {name} | {duration(c['median'])} | {duration(c['min'])} | {ratio} |"
        if moved:
            line += f" {c['bandwidth'] / 1e9:.1f} | {c['bandwidth'] / case['copy_bandwidth']:.0%} |"
        if flops:
            line += f" {flops / c['median'] / 1e9:.0f} |"
        if number:
            line += f" {images(case, c):.3g} |"
        if memory:
            line += " |" if memory.get(name) is None else f" {amount(memory[name])} |"
        yield line
    for name in case["absent"]:
        yield f"| {name} | absent | | |" + " |" * len(more)


def counts(cases: list[Case]) -> Iterator[str]:
    """Kernels and memory, where they were counted."""
    if not cases:
        return
    yield "\nKernels that run for one step, and the most memory that weights and a step together take.\n"
    yield "| | | kernels | memory |"
    yield "|---|---|---:|---:|"
    for case in cases:
        for name, count in case["counts"].items():
            shape = "×".join(map(str, case["shape"]))
            yield f"| {case['case']}, {shape} | {name} | {count['kernels']} | {count['memory'] / 2**20:.0f} MiB |"


def decoders(cases: list[Case]) -> Iterator[str]:
    """The decoder's share of a picture, of models whose guided step and decoder were both timed."""
    of_model: dict[tuple[str, int], dict[str, float]] = {}
    for case in cases:
        for part in (GUIDED_STEP, DECODING):
            if case["case"].endswith(part):
                key = case["case"].removesuffix(part), case["shape"][0]
                of_model.setdefault(key, {})[part] = case["contestants"]["fastdiff"]["median"]
    both = {key: parts for key, parts in of_model.items() if len(parts) == 2}
    if not both:
        return
    yield "\nThe decoder's share of fastdiff's time, by the guided steps that a sampler takes.\n"
    yield "| | " + " | ".join(map(str, FEW_STEPS)) + " | the largest part of a call |"
    yield "|---|" + "---:|" * len(FEW_STEPS) + "---|"
    for (model, batch), parts in both.items():
        step, decoder = parts[GUIDED_STEP], parts[DECODING]
        shares = [f"{decoder / (decoder + n * step):.0%}" for n in FEW_STEPS]
        most = int(decoder / step)
        largest = f"the decoder, in {most} or fewer steps" if most else "the UNet, in any number of steps"
        yield f"| {model}, batch {batch} | {' | '.join(shares)} | {largest} |"


def steps(cases: list[Case]) -> Iterator[str]:
    """One line for each case whose tensor operations were counted: a step, ours and diffusers'."""
    if not cases:
        return
    yield "\nA step; in parentheses the tensor operations that it calls.\n"
    yield "| | fastdiff | GB/s | of copy | with torch's noise | diffusers | ÷ fastdiff |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for case in cases:
        ours, shown = case["contestants"]["fastdiff"], {}
        for name, c in case["contestants"].items():
            shown[name] = f"{duration(c['median'])} ({case['operations'][name]:g})"
        theirs = case["contestants"]["diffusers"]
        yield (
            f"| {case['case']}, {'×'.join(map(str, case['shape']))} | {shown['fastdiff']} "
            f"| {ours['bandwidth'] / 1e9:.1f} | {ours['bandwidth'] / case['copy_bandwidth']:.0%} "
            f"| {shown.get('fastdiff, torch generator', '')} | {shown['diffusers']} "
            f"| {theirs['ratio']:.1f} [{theirs['ratio_q1']:.1f} … {theirs['ratio_q3']:.1f}] |"
        )


def title(case: Case) -> str:
    shape = f", {'×'.join(map(str, case['shape']))}" if case["shape"] else ""
    return f"{case['op']}, {case['case']}{shape}"


def amount(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


# ---- plot


def plot(cases: list[Case], machine: dict[str, Any], path: Path) -> bool:
    """Horizontal bars: every contestant's time over fastdiff's, on a logarithmic axis. False where there are none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        (title(case), name, c["ratio"])
        for case in cases
        if "operations" not in case
        for name, c in case["contestants"].items()
        if name in ("textbook", "torch.compile", "diffusers")
    ]
    if not rows:
        return False
    colours = {"textbook": "#7f7f7f", "torch.compile": "#ff7f0e", "diffusers": "#1f77b4"}
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.24 * len(rows)), layout="constrained")
    labelled: set[str] = set()
    for y, (_, name, ratio) in enumerate(rows):
        axes.barh(y, ratio, color=colours[name], label=None if name in labelled else name)
        axes.text(ratio, y, f" {ratio:.1f}", va="center", fontsize=7)
        labelled.add(name)
    first = [y for y, row in enumerate(rows) if y == 0 or rows[y - 1][0] != row[0]]
    axes.set_yticks(first, [rows[y][0] for y in first], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("time of each contestant ÷ time of fastdiff (logarithmic)")
    axes.set_title(f"{machine['device']}, torch {machine['torch']}", fontsize=9)
    axes.legend(fontsize=7)
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=120, metadata={"Software": None})
    os.replace(part, path)
    plt.close(figure)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path, help="what pytest benchmarks --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="the Markdown file to write")
    arguments = parser.parse_args()
    lines = ["# Speed", "", "Rendered by benchmarks/report.py from the JSON that a run of benchmarks wrote.", "", NOTE]
    try:
        for path in arguments.json:
            machine, cases = load(path)
            lines += ["", *render(machine, cases)]
            if arguments.out is not None:
                image = path.with_suffix(".png")
                if plot(cases, machine, image):
                    link = os.path.relpath(image, arguments.out.resolve().parent)
                    lines += ["", f"![Times relative to fastdiff]({Path(link).as_posix()})"]
        text = "\n".join(lines) + "\n"
        if arguments.out is None:
            print(text, end="")
        else:
            part = arguments.out.with_name(f".{arguments.out.name}.part")
            part.write_text(text)
            os.replace(part, arguments.out)
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
