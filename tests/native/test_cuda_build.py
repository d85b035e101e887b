"""Every CUDA kernel compiles for each architecture, within its registers, and draws noise with exact operations."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]

# The general update has up to eight tensors to read at a time: three blocks of 256 threads, 24 warps a multiprocessor,
# keep more than 40 KiB on their way, which is more than the latency of any memory asks for.
REGISTERS = {"randn": 64, "add_noise": 64, "update": 80}
KERNELS = {"randn": 2, "add_noise": 2, "update": 8}
ARCHITECTURES = ("80", "90")


def compile_one(op: str, folder: Path, *flags: str) -> tuple[str, dict[str, str]]:
    """What ptxas says, and the PTX of each architecture."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", *flags, f"-I{ROOT / 'csrc'}", *targets, "-Xptxas=-v", "-keep"]
    folder = folder / op
    folder.mkdir()
    command += ["-keep-dir", str(folder), "-c", str(ROOT / "csrc" / "cuda" / f"{op}.cu"), "-o", str(folder / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr, {path.name: path.read_text() for path in folder.glob("*.ptx")}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNELS, pool.map(lambda op: compile_one(op, folder, "-fmad=false"), KERNELS), strict=True))


@pytest.mark.parametrize("op", KERNELS)
def test_resources(builds: dict[str, tuple[str, dict[str, str]]], op: str) -> None:
    log = builds[op][0]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == KERNELS[op] * len(ARCHITECTURES), log
    assert max(registers) <= REGISTERS[op]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) == len(registers)
    assert all(numbers == ("0", "0", "0") for numbers in frames), frames


def test_the_common_update_holds_four_blocks(builds: dict[str, tuple[str, dict[str, str]]]) -> None:
    log = builds["update"][0]
    # update_kernel<kPlain = true, …>
    plain = re.findall(r"entry function '\w*update_kernelILb1E\w*'.*?Used (\d+) registers", log, re.DOTALL)
    assert len(plain) == 4 * len(ARCHITECTURES)
    assert max(map(int, plain)) <= 64


@pytest.mark.parametrize("op", KERNELS)
def test_arithmetic_is_exact(builds: dict[str, tuple[str, dict[str, str]]], op: str) -> None:
    ptx = builds[op][1]
    assert len(ptx) == len(ARCHITECTURES), list(ptx)
    for name, text in ptx.items():
        operations = set(
            re.findall(r"\b((?:fma|mad|mul|add|sub|sqrt|rsqrt|div|rcp|sin|cos|lg2|ex2)[.\w]*\.f32)\b", text)
        )
        assert operations <= {
            "mul.f32",
            "add.f32",
            "sub.f32",
            "sqrt.rn.f32",
            "mul.rn.f32",
            "add.rn.f32",
            "sub.rn.f32",
        }, name
        assert "sqrt.rn.f32" in operations
        assert ".ftz" not in text


@pytest.mark.parametrize("op", KERNELS)
def test_aligned_samples_move_16_bytes_at_a_time(builds: dict[str, tuple[str, dict[str, str]]], op: str) -> None:
    for text in builds[op][1].values():
        for body in re.split(r"\.visible \.entry ", text)[1:]:
            # <op>_kernel<…, kWide = true>; update's has kPlain before it and kDeviance after it
            name = re.match(r"\w*kernelI(Lb[01]E)?Lb1E(Lb[01]E)?E", body)
            if name:
                stores = set(re.findall(r"\b(st\.global\S*)", body))
                sum_of_a_block = {"st.global.f32"} if name[2] == "Lb1E" else set()
                assert stores <= {"st.global.v4.f32", "st.global.v2.u32"} | sum_of_a_block
                assert op == "randn" or "ld.global.v4.f32" in body


def test_group_norm_silu_stays_in_its_registers(tmp_path: Path) -> None:
    """Every variant on every architecture: no spills, and within the registers that its launch bounds are for."""
    log = compile_one("group_norm_silu", tmp_path)[0]
    # group_norm_silu_kernel<kDType, kVecs, kPieces, kAdds, kMax>
    entry = r"entry function '\w*kernelILi\dELi(\d)ELi\dELb\dELi(\d+)E\w*'"
    found = re.findall(rf"{entry}.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.DOTALL)
    assert len(found) == 4 * (2 + 3 + 3) * 2 * len(ARCHITECTURES), log
    for vecs, most, spilled, used in found:
        assert spilled == "0", (vecs, most, spilled)
        assert int(used) <= int(most)
