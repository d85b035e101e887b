"""Five hundred of the random calls that ``make fuzz`` makes, the same in every run."""

import pytest
from fuzz.__main__ import one
from fuzz.calls import MAKERS
from fuzz.draws import Call, Wrong, attempt

SEED, EACH = 0, 46  # of a kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_calls(kind):
    reports = [report for number in range(EACH) if (report := one(SEED, number, kind))]
    assert not reports, "\n".join(reports)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Call("", lambda: _raise(ValueError("x must be positive; got 0"))), "refused"),
        (Call("", lambda: _raise(ValueError("no")), refused=True), "unclear ValueError"),
        (Call("", lambda: _raise(TypeError("it is none of those")), refused=True, names=("x",)), "unclear TypeError"),
        (Call("", lambda: _raise(IndexError("x must be in range")), refused=True), "IndexError"),
        (Call("", lambda: _raise(RuntimeError("mat1 and mat2")), refused=True), "RuntimeError"),
        (Call("", lambda: 1, lambda result: _raise(AssertionError("off by one"))), "a wrong result.*off by one"),
    ],
)
def test_what_fails(call, words):
    with pytest.raises(Wrong, match=words):
        attempt(call)


def test_what_does_not():
    attempt(Call("", lambda: 1))
    attempt(Call("", lambda: _raise(ValueError("x must be positive; got 0")), refused=True, names=("x",)))


def test_a_call_is_repeated_by_its_number():
    for kind, make in MAKERS.items():
        from fuzz.calls import make as again

        assert again(3, 7, kind).text == again(3, 7, kind).text, make
