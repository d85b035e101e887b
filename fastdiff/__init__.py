"""fastdiff: fused, exactly reproducible diffusion sampling for PyTorch models."""

__version__ = "0.1.0"
