"""Compiles the Triton kernels ahead of time, without a GPU, and checks what came out.

    python tests/triton_aot.py          one variant a kernel and chip
    python tests/triton_aot.py --all    the whole matrix of dtypes, layouts and flags, in two processes
    python tests/triton_aot.py --json   one JSON object a line, for tests/test_triton_aot.py

The variants go through the package's own launch code: a stand-in for Triton's driver names the chip, and a kernel's
launch compiles it and stops there. It must not run where TRITON_INTERPRET is set, nor in a process that also launches
kernels, so tests run it as a script.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product

import aot_attention
import aot_conv
import aot_conv_epilogue
import aot_group_norm_silu
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastdiff.noise import NoiseKey
from fastdiff.ops.add_noise.triton_impl import add_noise
from fastdiff.ops.randn.triton_impl import randn
from fastdiff.ops.update.deviance import blocks
from fastdiff.ops.update.operands import Operands
from fastdiff.ops.update.triton_impl import Update
from fastdiff.plan.plan import COLUMNS

CHIPS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes that a program can have
EXACT = ("randn", "add_noise", "update")  # to the bit what the reference computes: no contraction, no approximation
EXACT_SHARED_LIMIT = 48 << 10  # bytes that every chip gives a program without being asked
OTHERS = (aot_attention, aot_conv, aot_group_norm_silu, aot_conv_epilogue)
SHAPE = (2, 4, 16, 16)
FEATURES = ("plain", "drawn", "given", "deviance")


class Chip:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.name]

    def get_current_device(self) -> int:
        return list(CHIPS).index(self.name)  # Triton caches compiled kernels by the device's number

    def get_current_stream(self, device: int) -> int:
        return 0


# ---- variants: a name, and a call that launches one kernel


def empty(dtype: str = "f32", layout: str = "contiguous") -> torch.Tensor:
    return torch.empty(SHAPE, dtype=DTYPES[dtype], memory_format=LAYOUTS[layout])


def keys() -> dict[str, NoiseKey]:
    numbers = torch.zeros(SHAPE[0], dtype=torch.int64)
    return {"seed": NoiseKey((1 << 64) - 1), "seeds": NoiseKey(seeds=numbers, samples=numbers)}


def update(outputs: int, dtype: str, layout: str, features: str) -> None:
    tensors = tuple(empty(dtype, layout) for _ in range(outputs))
    o = Operands(empty(), empty(), torch.zeros(1, len(COLUMNS)), NoiseKey(1), tensors, model_input=empty(dtype, layout))
    if features == "deviance":
        o.variance = empty(dtype, layout) if outputs else None
        o.deviance = torch.zeros(1, SHAPE[0], blocks(math.prod(SHAPE[1:])))
    elif features != "plain":
        o.variance = empty(dtype, layout) if outputs else None
        o.anchor, o.anchor_out, o.gradient, o.mask, o.known, o.x0_out = (empty() for _ in range(6))
        o.slots, o.slots_out = [empty() for _ in range(4)], [empty() for _ in range(4)]
        o.gain, o.clip, o.nonfinite = torch.ones(2), torch.ones(2, 2), torch.zeros(1, dtype=torch.int64)
    if features == "given":
        o.noise, o.known_noise = empty(), empty()
    Update(o)(0 if features == "plain" else torch.zeros(1, dtype=torch.int64))


def variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """The whole matrix."""
    for dtype, layout, key in product(DTYPES, LAYOUTS, keys()):
        yield f"randn {dtype} {layout} {key}", lambda d=dtype, m=layout, k=key: randn(empty(d, m), keys()[k], 0, 0)
    wide = torch.empty(1, 1).expand(1, 1 << 31)
    yield "randn f32 wide seed", lambda: randn(wide, NoiseKey(1), 0, 0)
    coefficients, number = torch.zeros(9, 2), torch.zeros(2, dtype=torch.int64)
    for dtype, layout, noise, t in product(DTYPES, LAYOUTS, ("drawn", "given"), ("int", "tensor")):
        yield (
            f"add_noise {dtype} {layout} {noise} {t}",
            lambda d=dtype, m=layout, z=noise, t=t: add_noise(
                empty(d, m), empty(d, m) if z == "drawn" else None, empty(d, m), empty(d, m) if z == "given" else None,
                3 if t == "int" else number, coefficients, NoiseKey(1), 0, 2,
            ),
        )  # fmt: skip
    for outputs, dtype, layout, features in product(range(4), DTYPES, LAYOUTS, FEATURES):
        yield (
            f"update {outputs} {dtype} {layout} {features}",
            lambda o=outputs, d=dtype, m=layout, f=features: update(o, d, m, f),
        )
    for module in OTHERS:
        yield from module.variants()


ONE_EACH = (
    "randn bf16 channels_last seeds", "add_noise f32 contiguous drawn tensor", "update 3 bf16 contiguous drawn",
    "update 1 f32 contiguous deviance", *(name for module in OTHERS for name in module.ONE_EACH),
)  # fmt: skip


# ---- what came out


def compile_variant(chip: str, name: str) -> dict:
    """Compile one variant for one chip: its registers, shared memory and problems."""
    driver.set_active(Chip(chip))
    compiled = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.JITFunction.run = compile_only
    try:
        dict(variants())[name]()
    finally:
        triton.JITFunction.run = run
    (kernel,) = compiled
    check = check_hip if CHIPS[chip].backend == "hip" else check_cuda
    exact = name.split()[0] in EXACT
    found = {"chip": chip, "variant": name, "shared": kernel.metadata.shared, **check(kernel.asm, exact)}
    if found["shared"] > (EXACT_SHARED_LIMIT if exact else SHARED_LIMIT[chip]):
        found["problems"].append(f"{found['shared']} bytes of shared memory")
    if found["spilled"]:
        found["problems"].append(f"{found['spilled']} bytes or registers spilled")
    return found


def check_cuda(asm: dict, exact: bool) -> dict:
    """Registers and spills of the cubin; in exact kernels no contraction, flush to zero or approximation in the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    bad = sorted(set(re.findall(r"\bfma\.\w+|\w+\.ftz\b|\w+\.approx\b", asm["ptx"]))) if exact else []
    return {
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "vector": "st.global.v4" in asm["ptx"],
        "problems": [f"{word} in the PTX" for word in bad],
    }


def check_hip(asm: dict, exact: bool) -> dict:
    """Registers and spills from the metadata; in exact kernels no contraction and no fast-math flag in the IR."""
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s", asm["amdgcn"])}
    bad = sorted(set(re.findall(r"\b(?:contract|reassoc|afn|arcp|fast|fmuladd)\b", asm["llir"])))
    # Triton 3.6 expands a correctly rounded square root in the IR: an approximate root and five fma each.
    if asm["llir"].count("call float @llvm.fma.f32") != 5 * asm["llir"].count("call float @llvm.amdgcn.rsq.f32"):
        bad.append("fma")
    return {
        "registers": numbers["vgpr_count"],
        "spilled": numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"] + numbers["private_segment_fixed_size"],
        "vector": re.search(r"(?:global|buffer)_store_dwordx4", asm["amdgcn"]) is not None,
        "problems": [f"{word} in the LLVM IR" for word in bad if exact],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the Triton kernels ahead of time")
    parser.add_argument("--all", action="store_true", help="every variant, in two processes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = [name for name, _ in variants()] if arguments.all else ONE_EACH
    work = list(product(CHIPS, names))
    failed = 0
    with multiprocessing.get_context("spawn").Pool(2 if arguments.all else 1) as pool:
        for found in pool.starmap(compile_variant, work, chunksize=1 if not arguments.all else 8):
            failed += bool(found["problems"])
            if arguments.json:
                print(json.dumps(found))
            else:
                verdict = "; ".join(found["problems"]) or "ok"
                print(f"{found['chip']:7} {found['variant']:42} {found['registers']:4} registers, "
                      f"{found['shared']:5} bytes shared, 16-byte stores {found['vector']!s:5}: {verdict}")  # fmt: skip
    print(f"{len(work)} variants, {failed} with problems (triton {triton.__version__})", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
