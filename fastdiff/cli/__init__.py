"""The command line, a file a command: ``fastdiff sample``, ``plan``, ``train``, ``reproduce``, and so on."""

# A command registers itself with the application.
from fastdiff.cli import bench, compare, info, plan, reproduce, sample, train  # noqa: F401
from fastdiff.cli.app import app as app
