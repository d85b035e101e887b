"""The one mechanism of choice: tables, the environment's variable, names that are none."""

import pytest
import torch

from fastdiff.ops import backend, conv2d, randn, triton_support
from fastdiff.ops.attention import KERNELS as ATTENTION
from fastdiff.ops.conv2d.choice import KERNELS as CONVOLUTION
from fastdiff.ops.conv2d.choice import facts_of
from fastdiff.ops.conv2d.geometry import Geometry
from fastdiff.ops.group_norm_silu import KERNELS as NORM

KERNELS = {"attention": ATTENTION, "conv2d": CONVOLUTION, "group_norm_silu": NORM}
FACTS = {
    "attention": {"bits", "head", "keys", "matrix"},
    "group_norm_silu": {"pixels", "bytes"},
    "conv2d": set(facts_of(torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1), Geometry(), 0, False)),
}


@pytest.mark.parametrize("op", backend.TABLES)
def test_tables_name_kernels_and_facts(op):
    table = backend.table(op)
    assert {"gpu", "cpu"} <= set(table)
    for chip, entry in table.items():
        assert entry.source
        assert entry.rules[-1].bounds == {}, f"{chip} ends with a kernel that serves everything"
        for rule in entry.rules:
            assert rule.kernel in KERNELS[op]
            assert set(rule.bounds) <= FACTS[op]
            assert all(low <= high for low, high in rule.bounds.values())


def test_the_first_that_holds_and_serves():
    rules = (backend.Rule("native", {"size": (10, 20)}), backend.Rule("triton", {}), backend.Rule("reference", {}))
    entry = {"cpu": backend.Entry(rules, "tested"), **{name: backend.Entry(rules, "") for name in ("avx2", "avx512")}}
    kernels = {name: name for name in backend.FUSED}

    def chosen(size, named="auto", refused=()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "table", lambda op: entry)
            patch.setattr(backend, "why_missing", lambda *_: None)
            return backend.select("update", named, torch.device("cpu"), {"size": size}, kernels,
                                  lambda kernel: "of the weather" if kernel in refused else None)  # fmt: skip

    assert [chosen(size) for size in (9, 10, 20, 21)] == ["triton", "native", "native", "triton"]
    assert chosen(10, refused=("native",)) == "triton"
    assert chosen(10, refused=("native", "triton")) == "reference"
    assert chosen(9, named="native") == "native"  # a named backend serves whatever the table prefers
    with pytest.raises(RuntimeError, match="backend='native' cannot serve this update on cpu: of the weather"):
        chosen(10, named="native", refused=("native",))
    with pytest.raises(RuntimeError, match="no backend serves this update on cpu: of the weather"):
        chosen(10, refused=tuple(kernels))
    with pytest.raises(ValueError, match="update has no torch kernel"):
        chosen(10, named="torch")


@pytest.mark.parametrize("name", ["", "auto", "native", "torch", "reference", "triton"])
def test_the_variable(seed, monkeypatch, name):
    """It speaks of all operations: those that lack what it names choose for themselves."""
    monkeypatch.setenv("FASTDIFF_BACKEND", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3)
    if name == "triton":
        for call in (lambda: conv2d(x, weight), lambda: randn((2, 3))):
            with pytest.raises(RuntimeError, match=r"FASTDIFF_BACKEND.*TRITON_INTERPRET"):
                call()
        return
    if name == "native":  # there is, but not for this window
        assert conv2d(x, weight).equal(conv2d(x, weight, backend="torch"))
    else:
        expected = name if name in ("torch", "reference") else "auto"
        assert conv2d(x, weight).equal(conv2d(x, weight, backend=expected))
    assert randn((2, 3)).shape == (2, 3)


def test_the_variable_names_what_an_operation_lacks_on_a_device(monkeypatch):
    """As native attention on a GPU: the table chooses; named for this operation, it is refused."""
    monkeypatch.setattr(
        backend.native, "missing", lambda device_type, op="randn": "there is none" if op == "attention" else None
    )
    monkeypatch.setattr(backend, "chip_of", lambda device: "unknown")
    facts, device = {"bits": 16, "head": 64, "keys": 77, "matrix": False}, torch.device("cuda", 0)
    monkeypatch.setenv("FASTDIFF_BACKEND", "native")
    assert backend.select("attention", "auto", device, facts, ATTENTION) == "torch"
    with pytest.raises(RuntimeError, match="backend='native' cannot serve this attention on cuda: there is none"):
        backend.select("attention", "native", device, facts, ATTENTION)


def test_an_unknown_name(monkeypatch):
    x = torch.randn(2, 8, 5, 5)
    for call in (lambda: randn((2, 3), backend="torch"), lambda: conv2d(x, x[:, :, :3, :3], backend="fastest")):
        with pytest.raises(ValueError, match="backend is"):
            call()
    monkeypatch.setenv("FASTDIFF_BACKEND", "fastest")
    for call in (lambda: randn((2, 3)), lambda: conv2d(x, x[:, :, :3, :3])):
        with pytest.raises(ValueError, match="FASTDIFF_BACKEND is 'fastest'"):
            call()


def test_chips(monkeypatch):
    assert backend.chip_of(torch.device("cpu")) in ("avx512", "avx2", "portable", "cpu")
    assert backend.chip_of(torch.device("meta")) == "cpu"
    assert triton_support.why_missing("meta") is not None
