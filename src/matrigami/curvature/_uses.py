"""Which parameters curvature can read, and what it says of the others."""

from collections.abc import Collection

from torch import nn

from matrigami.nn import OneHot, Use, Uses, parts, refusal, uses

__all__ = ["OneHot", "Use", "Uses", "unseen", "unsupported", "uses"]


def unseen(layer: nn.Module, names: Collection[str]) -> list[str]:
    """Those of some parameters of a layer whose inputs and gradients cannot be read."""
    found = parts(layer)
    return [name for name in names if name not in found or not found[name].is_seen]


def unsupported(name: str, layer: nn.Module, names: Collection[str]) -> str:
    """What to say of trainable parameters whose inputs and gradients cannot be read."""
    return refusal("curvature", name, layer, names)
