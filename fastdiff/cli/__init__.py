"""The command line, a file a command: ``fastdiff sample``, ``plan``, ``train``, ``reproduce``, ``compare`` …."""

# A command registers itself with the application as its module is imported.
from fastdiff.cli import bench, compare, evaluate, info, plan, reproduce, sample, train
from fastdiff.cli.app import app

ORDER = ("sample", "train", "plan", "compare", "reproduce", "evaluate", "bench", "info")  # in which help lists them
app.registered_commands.sort(key=lambda command: ORDER.index(getattr(command.callback, "__name__", "")))

__all__ = ["app", "bench", "compare", "evaluate", "info", "plan", "reproduce", "sample", "train"]
