"""Matrix + origami: structured matrices for scientific computing and deep learning.

A matrix is a value (`KroneckerMatrix(left, right)`), a structure is a recipe (`Kronecker()`),
everything else is a function (`solve`, `logdet`, `project`). Names and packages load when they
are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matrigami.compress import load as load, save as save
    from matrigami.operators import (
        Cost as Cost,
        Eigh as Eigh,
        LinearOperator as LinearOperator,
        Structure as Structure,
        Svd as Svd,
        cholesky as cholesky,
        cost as cost,
        diagonal as diagonal,
        direct_sum as direct_sum,
        eigh as eigh,
        entries as entries,
        exp as exp,
        face_split as face_split,
        hadamard as hadamard,
        identity as identity,
        inverse as inverse,
        khatri_rao as khatri_rao,
        kron as kron,
        kron_sum as kron_sum,
        logdet as logdet,
        lstsq as lstsq,
        norm as norm,
        outer as outer,
        pinv as pinv,
        power as power,
        project as project,
        shift as shift,
        slogdet as slogdet,
        solve as solve,
        sqrt as sqrt,
        svd as svd,
        svdvals as svdvals,
        take_rows as take_rows,
        to_scipy as to_scipy,
        trace as trace,
    )
    from matrigami.structures import *

__version__ = "0.2.0"

PACKAGES = (
    "cli",
    "compress",
    "curvature",
    "demo",
    "geometry",
    "krylov",
    "nn",
    "operators",
    "optim",
    "plots",
    "structures",
    "studies",
    "testing",
)

FILES = ("load", "save")
"""Names of the package of compression, which reads and writes models."""

FUNCTIONS = (
    "Cost",
    "Eigh",
    "LinearOperator",
    "Structure",
    "Svd",
    "cholesky",
    "cost",
    "diagonal",
    "direct_sum",
    "eigh",
    "entries",
    "exp",
    "face_split",
    "hadamard",
    "identity",
    "inverse",
    "khatri_rao",
    "kron",
    "kron_sum",
    "logdet",
    "lstsq",
    "norm",
    "outer",
    "pinv",
    "power",
    "project",
    "shift",
    "slogdet",
    "solve",
    "sqrt",
    "svd",
    "svdvals",
    "take_rows",
    "to_scipy",
    "trace",
)
"""Names of the algebra that everybody needs; authors of structures find more in its package."""


def __getattr__(name: str) -> Any:
    """Load a name or a package when it is first used."""
    if name in PACKAGES:
        return import_module(f"matrigami.{name}")
    if name == "__all__":
        return sorted({*FILES, *FUNCTIONS, *_structures()})
    homes = {"operators": FUNCTIONS, "compress": FILES}
    home = next((home for home, names in homes.items() if name in names), "structures")
    package = import_module(f"matrigami.{home}")
    import_module("matrigami.structures")  # a function of the algebra is nothing without its rules
    if name.startswith("_") or name not in package.__all__:
        raise AttributeError(f"module 'matrigami' has no attribute {name!r}")
    globals()[name] = getattr(package, name)
    return globals()[name]


def _structures() -> set[str]:
    """Recipes and values, and how to read them; helpers stay in their package."""
    operators, structures = (import_module(f"matrigami.{p}") for p in ("operators", "structures"))
    kinds = (operators.Structure, operators.LinearOperator)
    named = {name: getattr(structures, name) for name in structures.__all__}
    types = {name for name, t in named.items() if isinstance(t, type) and issubclass(t, kinds)}
    return {*types, "from_scipy", "parse"}


def __dir__() -> list[str]:
    """Names and packages."""
    return sorted([*__getattr__("__all__"), *PACKAGES])
