"""``python -m fastdiff`` is the command line."""

from fastdiff.cli import app

app(prog_name="fastdiff")
