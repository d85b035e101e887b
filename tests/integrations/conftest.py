"""The libraries that the adapters imitate (the ``peers`` extra), importable beside a CPU build of torch."""

import importlib.util
import sys
from types import ModuleType

if importlib.util.find_spec("torchvision") is not None and "torchvision" not in sys.modules:
    # k-diffusion, smalldiffusion and denoising-diffusion-pytorch import torchvision for its Python alone. Its published
    # kernels need CUDA and do not load beside a CPU build of torch; describing their shapes then fails, and with it the
    # import. An empty module in the place of those descriptions lets the rest be imported.
    sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
