"""The fused operations. Each folder holds one: formula and checks, reference, native and Triton implementations."""

from fastdiff.ops.add_noise import add_noise
from fastdiff.ops.randn import randn
from fastdiff.ops.update import update

__all__ = ["add_noise", "randn", "update"]
