"""The launchers by name: where the workers of a study run."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from matrigami._words import nearest
from matrigami.structures._parsing import parse_options
from matrigami.studies._launch import Launcher, Place, Processes
from matrigami.studies._launch_ray import Ray
from matrigami.studies._launch_slurm import Slurm

LAUNCHERS: dict[str, Callable[..., Launcher]] = {
    "processes": Processes,
    "slurm": Slurm,
    "ray": Ray,
}
"""Called with a `Place` and the options of the text."""


PACKAGES = {"slurm": "submitit", "ray": "ray"}
"""What a launcher stands on, an extra."""


def launcher_of(text: str, place: Place) -> Launcher:
    """The launcher that a text names, such as `processes` or `slurm(timeout_min=600)`.

    Raises:
        ValueError: If there is none of this name, an option is unknown, a package is missing, or
            the cluster is not there.
    """
    name, options = _parsed(text)
    try:
        _find(PACKAGES.get(name))
        return LAUNCHERS[name](place, **options)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Launcher {name!r}: the package {error.name!r} is not installed.\n"
            f"pip install 'matrigami[{name}]'"
        ) from error
    except TypeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Launcher {text!r}: it does not take these options: {reason}.\n"
            "The page of studies tells them."
        ) from error


def _find(package: str | None) -> None:
    """See whether an extra is installed: a folder of its name, which Python would import, is none.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if package is None:
        return
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(name=package)


def is_here(text: str) -> bool:
    """Whether the workers of a launcher are on this machine.

    Raises:
        ValueError: If there is none of this name.

    Examples:
        >>> is_here("processes"), is_here("ray(address=auto)")
        (True, False)
    """
    return _parsed(text)[0] == "processes"


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options."""
    refusal = (
        f"Launcher {text[:200]!r}: it is not a name with literal options.\n"
        f"Write one of {', '.join(LAUNCHERS)}; or, with options, slurm(timeout_min=600)."
    )
    name, options = parse_options(text, refusal)
    if name not in LAUNCHERS:
        near = nearest(name, LAUNCHERS)
        raise ValueError(
            f"Launcher {name!r}: known are {', '.join(LAUNCHERS)}.\nDid you mean {near!r}?"
        )
    return name, options
