"""The fused operations. Each folder holds one: formula and checks, reference, native and Triton implementations."""

from fastdiff.ops.add_noise import add_noise
from fastdiff.ops.attention import attention
from fastdiff.ops.attention_block import attention_block
from fastdiff.ops.conv2d.gemm import conv
from fastdiff.ops.conv2d.phases import upsample_conv
from fastdiff.ops.conv2d.winograd import winograd_conv
from fastdiff.ops.conv_epilogue import conv_epilogue
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.randn import randn
from fastdiff.ops.update import update

__all__ = [
    "add_noise",
    "attention",
    "attention_block",
    "conv",
    "conv_epilogue",
    "group_norm_silu",
    "randn",
    "update",
    "upsample_conv",
    "winograd_conv",
]
