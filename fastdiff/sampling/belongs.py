"""Whether a learned plan was learned for the run that it is to make."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fastdiff.plan.provenance import Provenance

_hashes: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], str]] = WeakKeyDictionary()


def warn_of_another(provenance: Provenance, model: Any, shape: Sequence[int], scale: Any, stacklevel: int) -> None:
    """Warn, saying what differs, where a plan was learned for another network, shape or guidance scale."""
    differs = []
    found = sha256_of(model)
    if None not in (found, provenance.model_sha256) and found != provenance.model_sha256:
        differs.append(
            f"the network, whose SHA-256 was {provenance.model_sha256} and is {found} (weights of another dtype have "
            "another one)"
        )
    if list(shape[1:]) != provenance.shape:
        differs.append(f"the shape of a sample, which was {provenance.shape} and is {list(shape[1:])}")
    if as_told(scale) != provenance.guidance_scale:
        differs.append(f"the guidance scale, which was {provenance.guidance_scale} and is {as_told(scale)}")
    if differs:
        warnings.warn(f"the plan was tuned for another run: {'; '.join(differs)}", stacklevel=stacklevel)


def as_told(scale: Any) -> Any:
    """A guidance scale as a provenance holds it."""
    if callable(scale):
        return "function"
    scale = scale.tolist() if hasattr(scale, "tolist") else scale
    if isinstance(scale, (list, tuple)):
        return [as_told(entry) for entry in scale]
    return float(scale)


def sha256_of(model: Any) -> str | None:
    """A network's SHA-256, computed anew only after a weight was written or replaced; None for a function."""
    from fastdiff.pictures.network import weights_sha256

    module = getattr(model, "_orig_mod", model)
    if not isinstance(module, nn.Module):
        return None
    now = tuple(number for tensor in module.state_dict(keep_vars=True).values() if hasattr(tensor, "data_ptr")
                for number in (tensor.data_ptr(), tensor._version))  # fmt: skip
    known = _hashes.get(module)
    if known is None or known[0] != now:
        known = _hashes[module] = (now, weights_sha256(module))
    return known[1]
