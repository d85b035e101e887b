"""The command line, a file a command: ``fastdiff sample``, ``plan``, ``train``, ``tune``, ``compare`` …."""

# A command registers itself with the application as its module is imported.
from fastdiff.cli import bench, compare, evaluate, gallery, generate, info, plan, poser, reproduce, sample, train, tune
from fastdiff.cli.app import app

ORDER = (  # in which help lists them
    "sample", "generate", "verify", "train", "tune", "plan", "compare", "reproduce", "evaluate", "gallery", "bench",
    "info",
)  # fmt: skip
app.registered_commands.sort(key=lambda command: ORDER.index(getattr(command.callback, "__name__", "")))

__all__ = [
    "app", "bench", "compare", "evaluate", "gallery", "generate", "info", "plan", "poser", "reproduce", "sample",
    "train", "tune",
]  # fmt: skip
