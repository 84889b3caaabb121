"""Sets of matrices that ship with the library."""

from pathlib import Path

from matrigami._words import nearest
from matrigami.studies.analysis._language_model import language_model_sources
from matrigami.studies.analysis._networks import cifar100_sources, network_sources
from matrigami.studies.analysis._numerics import numerical_sources
from matrigami.studies.analysis._sources import Source

PRESETS = ("hpc_vs_ai",)
"""Names of the sets."""


def preset_sources(name: str, model: Path | None = None, data: Path | None = None) -> list[Source]:
    """The matrices of a set: `hpc_vs_ai`, of scientific computing and of neural networks.

    Args:
        name: Of the set.
        model: Folder of a small Llama, whose weights and attention are added.
        data: Data folder with CIFAR-100, on which networks are trained whose weights are added.

    Raises:
        ValueError: If there is no such set, or no such model.
    """
    if name not in PRESETS:
        raise ValueError(
            f"--preset {name}: presets are {', '.join(PRESETS)}.\n"
            f"Did you mean {nearest(name, PRESETS)!r}?"
        )
    images = [] if data is None else cifar100_sources(data)
    language = [] if model is None else language_model_sources(model)
    return [*numerical_sources(), *network_sources(), *images, *language]
