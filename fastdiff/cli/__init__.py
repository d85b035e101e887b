"""The command line: ``fastdiff sample``, ``plan``, ``train``, ``reproduce``, ``compare``, ``bench``, ``info``; a file each."""

# A command registers itself with the application.
from fastdiff.cli import bench, compare, info, plan, reproduce, sample, train  # noqa: F401
from fastdiff.cli.app import app as app
