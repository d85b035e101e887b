"""The fused operations. Each folder holds one: formula and checks, reference, native and Triton implementations."""

from fastdiff.ops.add_noise import add_noise
from fastdiff.ops.attention import attention
from fastdiff.ops.conv2d import conv2d
from fastdiff.ops.conv_epilogue import conv_epilogue
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.randn import randn
from fastdiff.ops.update import update

__all__ = ["add_noise", "attention", "conv2d", "conv_epilogue", "group_norm_silu", "randn", "update"]
