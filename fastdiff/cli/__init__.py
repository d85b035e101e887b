"""The command line, a file a command: ``fastdiff sample``, ``plan``, ``train``, ``reproduce``, ``compare`` …."""

# A command registers itself with the application as its module is imported.
from fastdiff.cli import bench, compare, info, plan, reproduce, sample, train
from fastdiff.cli.app import app

__all__ = ["app", "bench", "compare", "info", "plan", "reproduce", "sample", "train"]
