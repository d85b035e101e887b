"""The noise stream: known answers, the same bits everywhere, accuracy, and what it refuses."""

import hashlib
import math
import os
import select
import signal
import threading

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff.ops.randn import reference

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
SHAPES = ((1,), (2,), (3,), (5,), (127,), (129,), (3, 32, 32), (2, 0))
SEEDS = (0, (1 << 63) + 5, U64)
# SHA-256 of 2**20 float32 normals, little-endian: seed 0, sample 0, draw 0, stream 0. It is the stream's version 1.
VERSION_1 = "88d45108bb966e928b12ccd6900a1618048e3c1896ed58c01e2a882399421710"

# Random123's kat_vectors, philox4x32-10: counter, key, answer.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([U32] * 4, [U32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def words(n: int, seed: int, sample: int = 0, draw: int = 0, stream: int = 0) -> tuple[Tensor, ...]:
    quad = torch.arange((n + 3) // 4)
    rest = (torch.full_like(quad, word) for word in (sample, draw, stream))
    return reference.philox4x32((quad, *rest), seed & U32, seed >> 32)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter, key, answer):
    got = reference.philox4x32(tuple(torch.tensor([word]) for word in counter), *key)
    assert [int(word) for word in got] == answer
    _C = pytest.importorskip("fastdiff._C", reason="the extension is not built")
    assert _C.philox4x32(counter, *key) == answer


def test_the_version_is_pinned(backend):
    z = fastdiff.randn((1, 1 << 20), seed=0, backend=backend)
    assert hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest() == VERSION_1


# ---- the same bits


@pytest.mark.parametrize("seed_", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_has_the_bits_of_the_reference(simd, shape, seed_):
    for offset in (0, 1, U32 - 2):
        for draw, stream in ((0, 0), (999, 1), (U32, U32)):
            key = {"seed": seed_, "sample_offset": offset, "draw": draw, "stream": stream}
            a = fastdiff.randn((3, *shape), backend="native", **key)
            assert_same_bits(a, fastdiff.randn((3, *shape), backend="reference", **key), str(key))


@pytest.mark.parametrize("n", [10**6, 10**6 + 3])
def test_native_has_the_bits_of_the_reference_over_a_million(simd, n, rng):
    key = {"seed": rng.getrandbits(64), "sample_offset": rng.getrandbits(32), "draw": rng.getrandbits(32)}
    key["stream"] = rng.getrandbits(32)
    print(key)
    a, b = (fastdiff.randn((1, n), backend=backend, **key) for backend in ("native", "reference"))
    assert_same_bits(a, b)


def test_the_address_is_what_the_contract_says():
    """seed: key; (element // 4, sample, draw, stream): counter."""
    w = words(8, (5 << 32) + 7, sample=11, draw=13, stream=17)
    z = torch.stack([*reference.box_muller(w[0], w[1]), *reference.box_muller(w[2], w[3])], dim=1).flatten()
    got = fastdiff.randn((1, 2, 4), seed=(5 << 32) + 7, sample_offset=11, draw=13, stream=17)
    assert_same_bits(got.flatten(), z)


def test_batch_and_offset_change_nothing(backend, rng):
    seed = rng.getrandbits(64)
    whole = fastdiff.randn((9, 3, 5, 7), seed=seed, draw=4, stream=1, backend=backend)
    for first, count in ((0, 1), (0, 4), (8, 1), (3, 5), (5, 0)):
        part = fastdiff.randn((count, 3, 5, 7), seed=seed, draw=4, stream=1, sample_offset=first, backend=backend)
        assert_same_bits(part, whole[first : first + count])
    # An image's normals depend on their number alone: a smaller image has a larger one's first ones.
    assert_same_bits(fastdiff.randn((9, 50), seed=seed, draw=4, stream=1, backend=backend), whole.flatten(1)[:, :50])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5), (3, 3, 33, 31), (1, 100_003)])
def test_a_half_is_the_float32_rounded(backend, dtype, shape):
    z = fastdiff.randn(shape, seed=3, backend=backend)
    assert_same_bits(fastdiff.randn(shape, seed=3, dtype=dtype, backend=backend), z.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_moves_no_normal(backend, dtype):
    for shape, memory_format in (((3, 5, 7, 9), torch.channels_last), ((2, 3, 5, 7, 2), torch.channels_last_3d)):
        strided = fastdiff.randn(shape, seed=3, dtype=dtype, memory_format=memory_format, backend=backend)
        assert strided.is_contiguous(memory_format=memory_format)
        assert_same_bits(strided, fastdiff.randn(shape, seed=3, dtype=dtype, backend=backend))


def test_one_seed_a_sample(backend):
    seeds = [5, U64, 5, 1 << 63]
    z = fastdiff.randn((4, 3, 7), seeds=seeds, draw=2, stream=1, backend=backend)
    for k, seed in enumerate(seeds):
        assert_same_bits(z[k : k + 1], fastdiff.randn((1, 3, 7), seed=seed, draw=2, stream=1, backend=backend))
    assert_same_bits(fastdiff.randn((2, 3), seeds=torch.tensor([5, 6]), backend=backend),
                     fastdiff.randn((2, 3), seeds=(5, 6), backend=backend))  # fmt: skip


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(simd, threads):
    threads(1)
    whole = fastdiff.randn((7, 100_003), seed=9, backend="native")
    for count in (2, 3, 7, 16):
        threads(count)
        for _ in range(3):
            assert_same_bits(fastdiff.randn((7, 100_003), seed=9, backend="native"), whole, f"{count} threads")


def test_several_python_threads_at_once(threads):
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    threads(2)
    expected = [fastdiff.randn((3, 50_001), seed=k, backend="native") for k in range(6)]
    wrong: list[tuple[int, int]] = []
    gate = threading.Barrier(6)

    def work(k: int) -> None:
        gate.wait()
        for i in range(20):
            if not torch.equal(fastdiff.randn((3, 50_001), seed=k, backend="native"), expected[k]):
                wrong.append((k, i))

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork(threads):
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    threads(2)
    here = fastdiff.randn((4, 100_003), seed=1, backend="native")  # the parent's pool has threads, the child has none
    digest = hashlib.sha256(here.numpy().tobytes()).digest()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            again = fastdiff.randn((4, 100_003), seed=1, backend="native")
            os.write(send, hashlib.sha256(again.numpy().tobytes()).digest())
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    try:
        ready, _, _ = select.select([receive], [], [], 60)
        if not ready:
            os.kill(child, signal.SIGKILL)
        answer = os.read(receive, 64) if ready else b"the child hung"
    finally:
        os.close(receive)
        _, status = os.waitpid(child, 0)
    assert answer == digest
    assert os.waitstatus_to_exitcode(status) == 0
    # And the parent's pool is whole.
    assert torch.equal(fastdiff.randn((4, 100_003), seed=1, backend="native"), here)


# ---- accuracy


def test_accurate_to_1e_6(backend):
    for seed in (0, 1, U64):
        n = 1 << 20
        w = words(n, seed)
        exact = torch.empty(n // 4, 4, dtype=torch.float64)
        for k in (0, 2):
            u = (w[k].to(torch.float32) * 2.0**-32 + 2.0**-33).double()
            assert float(u.min()) > 0
            r, theta = (-2 * u.log()).sqrt(), w[k + 1].double() * (2 * math.pi * 2.0**-32)
            exact[:, k], exact[:, k + 1] = r * theta.cos(), r * theta.sin()
        z = fastdiff.randn((1, n), seed=seed, backend=backend)[0].double()
        error = (z - exact.flatten()).abs() / exact.flatten().abs().clamp(min=1)
        assert float(error.max()) <= 1e-6


@pytest.mark.parametrize("w0", [0, 1, 2, 255, 256, U32 - 128, U32 - 1, U32, 0x7FFFFFFF, 0xB504F333])
def test_the_ends_of_box_muller(w0):
    """Every octant's ends at the words where the logarithm is at its ends."""
    angles = sorted({(k << 29) + d & U32 for k in range(8) for d in (-1, 0, 1)})
    w1 = torch.tensor(angles)
    z0, z1 = reference.box_muller(torch.full_like(w1, w0), w1)
    u = float((torch.tensor(w0).to(torch.float32) * 2.0**-32 + 2.0**-33).double())
    r, theta = math.sqrt(-2 * math.log(u)), w1.double() * (2 * math.pi * 2.0**-32)
    for z, exact in ((z0, r * theta.cos()), (z1, r * theta.sin())):
        assert bool(((z.double() - exact).abs() <= 1e-6 * exact.abs().clamp(min=1)).all())
    assert max(float(z0.abs().max()), float(z1.abs().max())) <= 6.77  # sqrt(2 ln 2**33)


# ---- what it refuses


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"shape": ()}, ValueError, "shape"),
        ({"shape": 3}, TypeError, "shape"),
        ({"shape": "12"}, TypeError, "shape"),
        ({"shape": (2, -1)}, ValueError, r"shape\[1\]"),
        ({"shape": (2, 1.5)}, TypeError, r"shape\[1\]"),
        ({"shape": (1, 1 << 20, 1 << 15)}, ValueError, r"2\*\*34"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"seed": True}, TypeError, "seed"),
        ({"draw": 1 << 32}, ValueError, "draw"),
        ({"stream": -1}, ValueError, "stream"),
        ({"sample_offset": 1 << 32}, ValueError, "sample_offset"),
        ({"sample_offset": U32}, ValueError, "sample_offset"),  # the second sample would be number 2**32
        ({"seeds": [1]}, ValueError, "seeds"),
        ({"seeds": [1, 1 << 64]}, ValueError, r"seeds\[1\]"),
        ({"seeds": [1, 2], "sample_offset": 1}, ValueError, "sample_offset"),
        ({"seeds": 7}, TypeError, "seeds"),
        ({"seeds": [1, 2], "seed": 3}, ValueError, "seed or seeds"),
        ({"shape": ((1 << 32) + 1, 0)}, ValueError, "batch"),
        ({"dtype": torch.float64}, ValueError, "dtype"),
        ({"dtype": "float32"}, ValueError, "dtype"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"memory_format": torch.channels_last}, ValueError, "memory_format"),
        ({"memory_format": "channels_last"}, TypeError, "memory_format"),
        ({"device": "nowhere"}, ValueError, "device"),
        ({"device": 1.5}, TypeError, "device"),
        ({"device": "hpu"}, ValueError, "device"),
        ({"device": "meta"}, RuntimeError, "meta tensors"),
    ],
)
def test_refuses(arguments, error, names):
    with pytest.raises(error, match=names):
        fastdiff.randn(**{"shape": (2, 3), **arguments})
