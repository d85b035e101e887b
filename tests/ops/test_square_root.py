"""Every backend's square root is correctly rounded: all 2**24 significands of an even and an odd exponent."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
GXX = shutil.which("g++")
# The flags of CMakeLists.txt. A CPU runs those that it has.
VARIANTS = {
    "portable": (4, [], ""),
    "avx2": (8, ["-mavx2", "-mf16c"], "avx2"),
    "avx512": (16, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"], "avx512vl"),
}


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Every float32 in [1, 4): the others differ from these by a power of four."""
    first, last = (int(torch.tensor(f).view(torch.int32)) for f in (1.0, 4.0))
    values = torch.arange(first, last, dtype=torch.int32).view(torch.float32)
    assert values.numel() == 1 << 24
    return values


def wrong(x: Tensor, root: Tensor) -> int:
    """How many roots are not the nearest float32. Half-way points have 25 bits: their squares are exact in float64."""
    assert root.dtype == torch.float32
    exact, half_ulp = root.double(), 2.0**-24  # in [1, 2]
    return int(((exact - half_ulp).square() >= x.double()).sum() + ((exact + half_ulp).square() <= x.double()).sum())


def test_the_references(inputs):
    # As ops/randn/reference.py writes it.
    assert wrong(inputs, inputs.to(torch.float64).sqrt().to(torch.float32)) == 0


def test_the_check_sees_one_ulp(inputs):
    root = inputs[:1000].double().sqrt().float()
    root[500] = root[500].nextafter(torch.tensor(9.0))
    assert wrong(inputs[:1000], root) == 1


@pytest.mark.slow
@pytest.mark.skipif(GXX is None, reason="needs g++")
@pytest.mark.parametrize("name", VARIANTS)
def test_native(inputs, tmp_path, name):
    width, flags, needs = VARIANTS[name]
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 CPU")
    if needs and needs not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this CPU has no {needs}")
    library = tmp_path / f"{name}.so"
    exact = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    defines = [f"-DFASTDIFF_SIMD={name}", f"-DFASTDIFF_WIDTH={width}", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests" / "native" / "square_root.cpp"
    command = [GXX, "-std=c++17", "-O3", *exact, *flags, *defines, "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    module = ctypes.CDLL(str(library))
    assert module.width() == width
    for function in ("square_root", "scalar_square_root"):
        root = torch.full_like(inputs, float("nan"))
        getattr(module, function)(*(ctypes.c_void_p(t.data_ptr()) for t in (inputs, root)), ctypes.c_int64(1 << 24))
        assert not root.isnan().any()
        assert wrong(inputs, root) == 0, function
