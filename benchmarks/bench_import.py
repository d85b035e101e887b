"""What ``import fastdiff`` costs beyond ``import torch``: at most 0.3 s."""

import subprocess
import sys

TIMED = "import time, torch; start = time.perf_counter(); import fastdiff; print(time.perf_counter() - start)"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import(contest):
    """A contest of processes; what is asked for is the difference of the two times."""
    assert 0 < float(python(TIMED)) < 60

    contest(
        "import",
        "a Python process that imports",
        {"fastdiff": lambda: python("import torch, fastdiff"), "torch alone": lambda: python("import torch")},
        targets=[{"kind": "beyond", "contestant": "torch alone", "goal": 0.3}],
        seconds=20,
    )
