"""Image-POSER (Mohebbi et al. 2026): a policy that learns which expert to call for which part of a request.

experts.py, remote.py and simulated.py draw and edit; critics.py rates; domain.py reads requests and words
commands; ledger.py pays and remembers; poser.py is the decision process, environment.py gymnasium's view of it;
trainer.py learns a policy.py. Only environment.py and trainer.py import gymnasium.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "Critique": "records", "Policy": "policy", "Poser": "poser", "PoserEnv": "environment", "replay": "replay",
    "run": "run", "train": "trainer",
}  # fmt: skip
__all__ = ["Critique", "Policy", "Poser", "PoserEnv", "register", "replay", "run", "train"]


def register() -> None:
    """Make ``gymnasium.make("fastdiff/Poser-v0")`` known; ``gymnasium.make("fastdiff.poser.environment:fastdiff/…")``
    does so by itself. Raises ImportError with the command that helps where gymnasium is missing.
    """
    import_module("fastdiff.poser.environment")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdiff.poser' has no attribute {name!r}")
    return getattr(import_module(f"fastdiff.poser.{_LAZY[name]}"), name)
