"""The command line: ``fastdiff sample``, ``fastdiff plan``, ``fastdiff train``, ``fastdiff info``; a file each."""

from fastdiff.cli import info, plan, sample, train  # noqa: F401: a command registers itself with the application
from fastdiff.cli.app import app as app
