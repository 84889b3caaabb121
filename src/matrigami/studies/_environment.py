"""Where a study ran: enough to repeat it, and to judge its seconds."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from matrigami import __version__


def environment(device: str, workers: int | None, threads: int) -> dict[str, Any]:
    """Versions, machine and command line."""
    packages = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib")
    return {
        "command": shlex.join(["matrigami", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {"matrigami": __version__} | {name: _version(name) for name in packages},
        "platform": platform.platform(terse=True),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": _device(device),
        "workers": workers,
        "threads": threads,
    }


def machine(device: torch.device) -> str:
    """What computes on a device: the name of the card, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()


def _device(device: str) -> str:
    """A device, with the name of the card and the precision of its products."""
    if not device.startswith("cuda"):
        return device
    return f"{device}: {torch.cuda.get_device_name(device)}, products in TensorFloat-32"


def _version(package: str) -> str | None:
    """Installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _cpu() -> str:
    """Name of the processor."""
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
