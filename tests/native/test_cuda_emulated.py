"""What the threads of the CUDA kernels do, run on the CPU: bit for bit what the CPU kernels give."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from ctypes import c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch

from fastdiff.ops.update.deviance import block_sums, blocks
from fastdiff.ops.view import strides_of
from fastdiff.plan.plan import COLUMNS

_C = pytest.importorskip("fastdiff._C", reason="the extension is not built")
ROOT = Path(__file__).resolve().parents[2]
GXX = shutil.which("g++")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GXX is None, reason="needs g++")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class View(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int)] + [
        (name, c_int64) for name in ("batch_stride", "inner", "outer_stride", "inner_stride")
    ]


class NoiseKey(ctypes.Structure):
    _fields_ = [("seeds", c_void_p), ("samples", c_void_p), ("seed", c_uint64), ("sample_offset", c_int64)]


class RandnParams(ctypes.Structure):
    _fields_ = [("batch", c_int64), ("n", c_int64), ("out", View), ("key", NoiseKey)] + [
        (name, c_uint32) for name in ("draw", "stream")
    ]


class AddNoiseParams(ctypes.Structure):
    _fields_ = (
        [(name, c_int64) for name in ("batch", "n", "T")]
        + [(name, View) for name in ("x0", "noise", "out", "noise_out")]
        + [("coefficients", c_void_p), ("timesteps", c_void_p), ("timestep", c_int64), ("key", NoiseKey)]
        + [(name, c_uint32) for name in ("draw", "stream")]
    )


class UpdateParams(ctypes.Structure):
    _fields_ = (
        [("batch", c_int64), ("n", c_int64), ("table", c_void_p), ("row", c_int64), ("step", c_void_p)]
        + [("n_outputs", c_int), ("outputs", View * 3), ("variance", View)]
        + [("x", c_void_p), ("anchor", c_void_p), ("slots", c_void_p * 4)]
        + [(name, c_void_p) for name in ("noise", "gain", "clip", "gradient", "mask", "known", "known_noise")]
        + [("x_out", c_void_p), ("anchor_out", c_void_p), ("slots_out", c_void_p * 4), ("x0_out", c_void_p)]
        + [("model_input", View), ("key", NoiseKey), ("nonfinite", c_void_p), ("deviance", c_void_p)]
    )


class Both:
    """The same parameters for the CPU kernel and for the emulation, each with its own copies of the tensors."""

    def __init__(self, cpu: object, emulated: ctypes.Structure) -> None:
        self.cpu, self.emulated = cpu, emulated
        self.pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # whole buffers, so that a stray write shows

    def copies(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = []
        for _ in range(2):
            buffer = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size() + 8, dtype=tensor.dtype)
            whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            buffer = buffer[-buffer.data_ptr() // tensor.element_size() % (16 // tensor.element_size()) :]
            buffer = buffer[: len(whole)].copy_(whole)
            result.append(buffer)
        self.pairs.append((name, result[0], result[1]))
        at = (tensor.shape, tensor.stride(), tensor.storage_offset())
        return tuple(buffer.as_strided(at[0], at[1], at[2] + buffer.storage_offset()) for buffer in result)

    def address(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            a, b = self.copies(name, tensor)
            setattr(self.cpu, name, a.data_ptr())
            setattr(self.emulated, name, b.data_ptr())

    def slot(self, i: int, tensor: torch.Tensor, out: bool) -> None:
        a, b = self.copies(f"slot {i}", tensor)
        self.cpu.set_slot(i, a.data_ptr())
        self.emulated.slots[i] = b.data_ptr()
        if out:
            self.cpu.set_slot_out(i, a.data_ptr())
            self.emulated.slots_out[i] = b.data_ptr()

    def view(self, name: str, tensor: torch.Tensor, output: int | None = None) -> None:
        a, b = self.copies(name, tensor)
        fields = (DTYPES.index(tensor.dtype), *strides_of(tensor))
        if output is None:
            setattr(self.cpu, name, _C.View(a.data_ptr(), *fields))
            setattr(self.emulated, name, View(b.data_ptr(), *fields))
        else:
            self.cpu.set_output(output, _C.View(a.data_ptr(), *fields))
            self.emulated.outputs[output] = View(b.data_ptr(), *fields)

    def set(self, **values: int) -> None:
        for name, value in values.items():
            setattr(self.cpu, name, value)
            setattr(self.emulated, name, value)

    def key(self, rng: random.Random, batch: int) -> None:
        b = NoiseKey()
        b.seed, b.sample_offset = rng.getrandbits(64), rng.choice((0, 5, 2**32 - 1))
        self.keys = [torch.randint(-(2**63), 2**63 - 1, (batch,)), torch.randint(0, 2**32, (batch,))]
        if rng.random() < 0.5:
            b.seeds = self.keys[0].data_ptr()
        if rng.random() < 0.5:
            b.samples = self.keys[1].data_ptr()
        self.cpu.key = _C.NoiseKey(b.seed, b.sample_offset, b.seeds or 0, b.samples or 0)
        self.emulated.key = b

    def assert_equal(self) -> None:
        for name, a, b in self.pairs:
            bits = torch.int64 if a.dtype == torch.int64 else {4: torch.int32, 2: torch.int16}[a.element_size()]
            same = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())  # which NaN is not defined
            assert same.all(), f"{name} differs in {int((~same).sum())} of {same.numel()} elements"


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulation") / "emulate_cuda.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
    source = ROOT / "tests" / "native" / "emulate_cuda.cpp"
    subprocess.run([GXX, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    module = ctypes.CDLL(str(library))
    module.size_of.restype = c_int64
    for i, params in enumerate((RandnParams, AddNoiseParams, UpdateParams)):
        assert module.size_of(i) == ctypes.sizeof(params), f"{params.__name__} no longer mirrors csrc/fastdiff.h"
    return module


@pytest.mark.parametrize("reverse", [False, True])
def test_a_block_adds_up_its_deviances(tmp_path: Path, seed: int, reverse: bool) -> None:
    """csrc/cuda/deviance_block.h, every thread, barrier and shuffle, gives the tree's bits, twice in a row."""
    library, tests = tmp_path / "emulate_deviance.so", ROOT / "tests" / "native"
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-shared", "-fPIC"]
    includes = [f"-I{tests / 'cuda_on_cpu'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([GXX, *flags, *includes, str(tests / "emulate_deviance.cpp"), "-o", str(library)], check=True)
    values, sums = torch.randn(5, 2048), torch.full((5, 2), float("nan"))
    ctypes.CDLL(str(library)).emulate_deviance_sums(
        c_void_p(values.data_ptr()), c_void_p(sums.data_ptr()), 5, ctypes.c_bool(reverse)
    )
    assert torch.equal(sums, block_sums(values))


def shape_of(rng: random.Random) -> tuple[int, ...]:
    spatial = rng.choice(((8, 8), (5, 7), (3, 2), (16, 24), (33, 4), (1, 1), (40, 40)))
    return (rng.choice((1, 2, 3, 5)), rng.choice((1, 3, 4)), *spatial)


def floats(rng: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    """Contiguous float32, now and then not at a multiple of 16 bytes."""
    count, offset = torch.Size(shape).numel(), rng.choice((0, 0, 0, 1))
    return torch.randn(count + offset)[offset:].view(shape)


def strided(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Some layout that a View can walk: contiguous, channels_last, or a slice of a wider one."""
    b, c, h, w = shape
    dtype = dtype or rng.choice(DTYPES)
    layout = rng.choice(("contiguous", "contiguous", "channels_last", "half", "half last", "misaligned"))
    if layout == "misaligned":
        return torch.randn(b * c * h * w + 1).to(dtype)[1:].view(shape)
    wide = torch.randn(b, 2 * c if "half" in layout else c, h, w).to(dtype)
    wide = wide.contiguous(memory_format=torch.channels_last if "last" in layout else torch.contiguous_format)
    return wide[:, :c]


@pytest.mark.parametrize("case", range(100))
def test_randn(emulation: ctypes.CDLL, case: int) -> None:
    rng = random.Random(case)
    torch.manual_seed(case)
    shape = shape_of(rng)
    both = Both(_C.RandnParams(), RandnParams())
    both.set(batch=shape[0], n=torch.Size(shape[1:]).numel(), draw=rng.getrandbits(20), stream=rng.randrange(6))
    both.key(rng, shape[0])
    both.view("out", strided(rng, shape))
    _C.randn_cpu(both.cpu, 1)
    emulation.emulate_randn(ctypes.byref(both.emulated), rng.random() < 0.2)
    both.assert_equal()


@pytest.mark.parametrize("case", range(100))
def test_add_noise(emulation: ctypes.CDLL, case: int) -> None:
    rng = random.Random(case)
    torch.manual_seed(case)
    shape = shape_of(rng)
    both = Both(_C.AddNoiseParams(), AddNoiseParams())
    both.set(batch=shape[0], n=torch.Size(shape[1:]).numel(), T=10, draw=rng.getrandbits(20), stream=2)
    both.set(timestep=rng.randrange(-1, 11))
    both.key(rng, shape[0])
    both.address("coefficients", torch.rand(10, 2))
    if rng.random() < 0.5:
        both.address("timesteps", torch.randint(-1, 11, (shape[0],)))
    for name, chance in (("x0", 1.0), ("out", 1.0), ("noise", 0.4), ("noise_out", 0.5)):
        if rng.random() < chance:
            both.view(name, strided(rng, shape))
    _C.add_noise_cpu(both.cpu, 1)
    emulation.emulate_add_noise(ctypes.byref(both.emulated), rng.random() < 0.2)
    both.assert_equal()


def random_row(rng: random.Random, available: set[str]) -> list[float]:
    """Columns whose coefficients are often 0, and always where the tensor is absent."""
    row = {name: rng.gauss(0, 1) for name in COLUMNS}
    for output in ("x", "anchor", "slot"):
        for term in ("x", "anchor", "x0", "m", "slot0", "slot1", "slot2", "z", "g"):
            if term not in available or rng.random() < 0.4:
                row[f"{output}.{term}"] = 0.0
    row |= {"clip": rng.choice((1.0, float("inf"))), "read0": 2.0, "read1": 0.0, "read2": 3.0, "t": 7.0}
    row |= {"draw": float(rng.randrange(1000)), "stream": float(rng.randrange(6)), "calls_model": 1.0}
    row["write"] = rng.choice((-1.0, 1.0, 2.0)) if "slot0" in available else -1.0
    row["keeps_anchor"] = float("anchor" in available and rng.random() < 0.5)
    row["known_sigma"] *= rng.random() < 0.7
    return [row[name] for name in COLUMNS]


@pytest.mark.parametrize("case", range(300))
def test_update(emulation: ctypes.CDLL, case: int) -> None:
    rng = random.Random(case)
    torch.manual_seed(case)
    shape = shape_of(rng)
    plain, crowded = case % 3 == 0, rng.random() < 0.6  # where it is not crowded, one feature often stands alone
    both = Both(_C.UpdateParams(), UpdateParams())
    both.set(batch=shape[0], n=torch.Size(shape[1:]).numel())
    both.key(rng, shape[0])

    def maybe(name: str, tensor: torch.Tensor) -> bool:
        given = not plain and rng.random() < (0.5 if crowded else 0.1)
        if given:
            both.address(name, tensor)
        return given

    available = {"x", "x0", "z"}
    n_outputs = 1 if plain or not crowded else rng.randrange(4)
    both.set(n_outputs=n_outputs)
    for i in range(n_outputs):
        output = strided(rng, shape)
        if rng.random() < 0.2:
            output[-1, -1, -1, -1] = rng.choice((float("inf"), float("nan")))
        both.view("output", output, output=i)
        available.add("m")
    if not plain and n_outputs and rng.random() < (0.5 if crowded else 0.1):
        both.view("variance", strided(rng, shape))
    both.address("x", floats(rng, shape))
    if rng.random() < 0.3:  # in place
        both.cpu.x_out, both.emulated.x_out = both.cpu.x, both.emulated.x
    else:
        both.address("x_out", floats(rng, shape))
    if maybe("anchor", floats(rng, shape)):
        both.address("anchor_out", floats(rng, shape))
        available.add("anchor")
    if not plain and rng.random() < (0.6 if crowded else 0.1):
        for slot in range(4):
            both.slot(slot, floats(rng, shape), out=True)
        available |= {"slot0", "slot1", "slot2"}
    if maybe("gradient", floats(rng, shape)):
        available.add("g")
    if maybe("mask", torch.rand(shape)):
        both.address("known", floats(rng, shape))
        maybe("known_noise", floats(rng, shape))
    maybe("gain", torch.rand(shape[0]))
    maybe("clip", torch.rand(shape[0], 2))
    if rng.random() < 0.3:
        both.address("noise", floats(rng, shape))
    if rng.random() < 0.5:
        both.address("x0_out", floats(rng, shape))
    if rng.random() < 0.7:
        both.view("model_input", strided(rng, shape))
    both.address("nonfinite", torch.tensor([rng.choice((1, 2**62))]))
    if rng.random() < 0.4:
        both.address("deviance", torch.zeros(4, shape[0], blocks(torch.Size(shape[1:]).numel())))
    both.address("table", torch.tensor([random_row(rng, available) for _ in range(4)]))
    if rng.random() < 0.5:
        both.address("step", torch.tensor([rng.randrange(4)]))
    else:
        both.set(row=rng.randrange(4))
    _C.update_cpu(both.cpu, 1)
    emulation.emulate_update(ctypes.byref(both.emulated), rng.random() < 0.2, rng.random() < 0.2)
    both.assert_equal()


@pytest.mark.parametrize("n", [1, 3, 4, 5, 4096, 12288, 786433, 2**31 - 4, 2**31 + 4, 2**34 - 1])
@pytest.mark.parametrize("batch", [1, 3, 64, 2**20])
def test_quads_are_numbered_through(emulation: ctypes.CDLL, batch: int, n: int) -> None:
    quads = (n + 3) // 4
    rng = random.Random(n)
    units = {0, quads - 1, quads % (batch * quads), batch * quads - 1}
    units |= {rng.randrange(batch * quads) for _ in range(50)}
    units |= {b * quads + d for b in (rng.randrange(1, batch) for _ in range(50 if batch > 1 else 0)) for d in (-1, 0)}
    out = (c_int64 * 4)()
    for unit in units:
        emulation.emulate_locate(c_int64(batch), c_int64(n), c_int64(unit), out)
        b, quad = divmod(unit, quads)
        assert tuple(out) == (b, 4 * quad, min(4, n - 4 * quad), b * n + 4 * quad)
