"""What the house promises about its own shape: prints each number beside its limit, and fails where one is missed.

    python tools/gates.py

Circles of imports are found in the source, calls counted by sys.setprofile in one warm call. A limit is lowered when
its number falls, and raised only by a change that says why.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fastdiff  # noqa: E402  this checkout's, whatever is installed
from fastdiff import ops  # noqa: E402

PACKAGE = ROOT / "fastdiff"

CIRCLES = 0  # sets of modules that import each other as they load
LAZY_CIRCLES = 0  # such sets, with the imports inside functions
FILES_AT_THE_ROOT = 12  # Python files
FUNCTIONS_OF_A_SAMPLE = 51  # ours that fastdiff.sample(model, shape, sampler="ddim", steps=5) calls
CALLS_A_LAYER = 6.0  # of functions of ours, in an accelerated forward of the packaged network at batch 1
LINES = {"fastdiff": 37130, "csrc": 4150}


def imports(node: ast.AST, known: set[str], lazily: bool) -> Iterator[str]:
    """The package's modules that a module imports as it loads or, ``lazily``, at any time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazily:
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in known)
        elif isinstance(child, ast.ImportFrom) and child.module in known:
            names = [f"{child.module}.{alias.name}" for alias in child.names if alias.name != "_C"]
            yield from (name if name in known else child.module for name in names)
        yield from imports(child, known, lazily)


def circles(lazily: bool) -> list[tuple[str, ...]]:
    sources = {}
    for path in PACKAGE.rglob("*.py"):
        sources[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path.read_text()
    edges = {name: set(imports(ast.parse(text), set(sources), lazily)) - {name} for name, text in sources.items()}
    reached = {name: set(edges[name]) for name in edges}
    for middle in edges:  # Warshall's transitive closure
        for start in edges:
            if middle in reached[start]:
                reached[start] |= reached[middle]
    return sorted({tuple(sorted(m for m in edges if m in reached[n] and n in reached[m])) for n in edges} - {()})


def profiled(run: Callable[[], Any]) -> list[tuple[str, FrameType, Any]]:
    """(event, frame, compiled function) of every call, in one run, of a function of the package or of a kernel."""
    seen = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        ours = event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE))
        kernel = event == "c_call" and getattr(argument, "__module__", "") == "fastdiff._C"
        if ours or (kernel and argument.__name__.endswith(("_cpu", "_cpu_at"))):
            seen.append((event, frame, argument))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def functions_of_a_sample() -> int:
    def run() -> None:
        fastdiff.sample(lambda x, t: x * 0.5, (1, 3, 8, 8), sampler="ddim", steps=5)

    run()
    codes = {frame.f_code for event, frame, _ in profiled(run) if event == "call"}
    # Comprehensions are functions in some versions of Python only.
    return len([code for code in codes if code.co_name not in ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")])


def calls_a_layer() -> float:
    model = fastdiff.models.UNet.from_pretrained(PACKAGE / "assets" / "digits").eval()
    x, t, label = torch.randn(1, 1, 8, 8), torch.tensor([10]), torch.tensor([3])
    fastdiff.accelerate(model, dtype=torch.float32)
    # What runs fused: norms with SiLU, convolutions, and an attention's projections and the product between them.
    kinds = [type(m).__name__ for m in model.modules()]
    layers = kinds.count("GroupNorm") + kinds.count("Conv2d") + 3 * kinds.count("Attention")
    with torch.no_grad():
        for _ in range(3):
            model(x, t, label)
        frames = [frame for event, frame, _ in profiled(lambda: model(x, t, label)) if event == "call"]
    calls = [frame for frame in frames if "models" not in Path(frame.f_code.co_filename).parts]  # the network's own
    return len(calls) / layers


def without_kernel() -> list[str]:
    """Public operations that, asked for nothing in particular, run a reference, or no compiled kernel."""
    x, w, ones = torch.randn(2, 64, 16, 16), torch.randn(64, 64, 3, 3), torch.ones(64)
    q, plan = torch.randn(1, 2, 64, 32), fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 5)
    calls: dict[str, Callable[[], Any]] = {
        "add_noise": lambda: ops.add_noise(x, 5, "linear"),
        "attention": lambda: ops.attention(q, q, q),
        "conv2d": lambda: ops.conv2d(x, w, padding=1),
        "conv_epilogue": lambda: ops.conv_epilogue(x, bias=ones),
        "group_norm_silu": lambda: ops.group_norm_silu(x, ones, ones, 8),
        "randn": lambda: ops.randn((2, 3, 8, 8)),
        "update": lambda: ops.update(x, x, plan, 0),
    }
    wrong = sorted(set(ops.__all__) - set(calls))  # without a call here, nothing is known of them
    for name in sorted(set(ops.__all__) & set(calls)):
        seen = profiled(torch.no_grad()(calls[name]))
        files = [Path(frame.f_code.co_filename).name for event, frame, _ in seen if event == "call"]
        # On a CPU the library's attention is the kernel.
        if "reference.py" in files or not (name == "attention" or any(event == "c_call" for event, _, _ in seen)):
            wrong.append(name)
    return wrong


def main() -> int:
    missed = 0

    def gate(what: str, found: float, limit: float, note: object = "") -> None:
        nonlocal missed
        missed += found > limit
        print(f"{'MISSED' if found > limit else 'ok':7} {what:48} {found:8g} <= {limit:g} {note or ''}")

    gate("circles of imports", len(found := circles(False)), CIRCLES, found)
    gate("circles, imports in functions too", len(found := circles(True)), LAZY_CIRCLES, found)
    gate("Python files at the package's root", len(list(PACKAGE.glob("*.py"))), FILES_AT_THE_ROOT)
    gate("functions called by sample(ddim)", functions_of_a_sample(), FUNCTIONS_OF_A_SAMPLE)
    gate("Python calls an accelerated layer", round(calls_a_layer(), 1), CALLS_A_LAYER)
    gate("operations without their kernel", len(wrong := without_kernel()), 0, ", ".join(wrong))
    for folder, limit in LINES.items():
        files = [f for f in (ROOT / folder).rglob("*") if f.suffix in {".py", ".h", ".cuh", ".cpp", ".cu"}]
        gate(f"lines of {folder}/", sum(len(f.read_text().splitlines()) for f in files), limit)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
