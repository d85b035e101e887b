"""The command line: ``fastdiff sample``, ``fastdiff plan``, ``fastdiff train``, ``fastdiff info``; a file each."""

# A command registers itself with the application as its module is imported.
from fastdiff.cli import info, plan, sample, train
from fastdiff.cli.app import app

__all__ = ["app", "info", "plan", "sample", "train"]
