"""The version, on its own: modules that `fastdiff` itself imports can read it, too."""

__version__ = "0.1.0"
