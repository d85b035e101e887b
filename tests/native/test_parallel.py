"""Who does the CPU kernels' work: torch's team, until it comes late, or in a forked child; then a pool of our own.

csrc/cpu/parallel.cpp, compiled alone, meets a stand-in for torch (tests/native/team.cpp) in processes of their own.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GXX = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GXX is None or sys.platform != "linux", reason="needs g++ and Linux"),
]

BEGIN = """
import ctypes, os, sys, threading, time
folder, with_team = sys.argv[1], sys.argv[2] == "team"
team = ctypes.CDLL(folder + "/libtorch_cpu.so") if with_team else None
pool = ctypes.CDLL(folder + "/parallel_for.so")

def work(units=1000, grain=10, threads=4, milliseconds=0):
    counts = (ctypes.c_int * units)()
    pool.count(ctypes.c_int64(units), ctypes.c_int64(grain), threads, milliseconds, counts)
    assert list(counts) == [1] * units, "each unit is to be done once"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("parallel")
    built = {
        "libtorch_cpu.so": ["team.cpp", "-Wl,-soname,libtorch_cpu.so"],
        "parallel_for.so": ["parallel_for.cpp", f"-I{ROOT / 'csrc'}", "-ldl"],
    }
    for name, (source, *flags) in built.items():
        command = [GXX, "-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", f"tests/native/{source}", *flags]
        subprocess.run([*command, "-o", str(target / name)], check=True, cwd=ROOT)
    return target


def run(folder: Path, code: str, which: str = "team") -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, str(folder), which], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("which", ["team", "alone"])
def test_each_unit_is_done_once(folder, which):
    run(
        folder,
        """
for units in (1, 2, 3, 7, 64, 65, 1000, 12345):
    for grain in (1, 2, 10, 5000):
        for threads in (1, 2, 3, 8):
            work(units, grain, threads)
work(0)
""",
        which,
    )


def test_the_team_has_what_is_worth_two_threads(folder):
    run(
        folder,
        """
work(units=10, grain=10)
work(units=1000, grain=10, threads=1)
assert team.team_calls() == 0
work(units=11, grain=10)
assert team.team_calls() == 1
""",
    )


def test_a_late_team_is_left_alone_for_a_second(folder):
    run(
        folder,
        """
team.come_late(20)
work()
assert team.team_calls() == 1
team.come_late(0)
begin = time.monotonic()
while time.monotonic() - begin < 0.5:
    work()
assert team.team_calls() == 1, "it was left alone"
for _ in range(6):  # a busy machine makes it late in earnest
    time.sleep(1)
    before = team.team_calls()
    work()
    assert team.team_calls() == before + 1, "it is asked again"
    work()
    if team.team_calls() == before + 2:
        break  # it came in time, and is asked again at once
else:
    raise AssertionError("it is left alone for ever")
""",
    )


def test_slow_work_does_not_make_a_team_late(folder):
    """A cold first call of a large norm is one: a few units of milliseconds each."""
    run(
        folder,
        """
for _ in range(6):  # a busy machine makes it late in earnest
    before = team.team_calls()
    work(units=4, grain=1, threads=2, milliseconds=5)
    work()
    if team.team_calls() == before + 2:
        break
    time.sleep(1.1)
else:
    raise AssertionError("the team is left alone, though all it did was work")
""",
    )


def test_a_child_does_not_call_the_team(folder):
    run(
        folder,
        """
work()
assert team.team_calls() == 1
child = os.fork()
if child == 0:
    work()
    work()
    os._exit(0 if team.team_calls() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
work()
""",
    )


@pytest.mark.parametrize("which", ["team", "alone"])
def test_several_threads_at_once(folder, which):
    run(
        folder,
        """
failed = []

def many():
    try:
        for _ in range(200):
            work()
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=many) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
""",
        which,
    )
