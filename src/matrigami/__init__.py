"""Matrix + origami: structured matrices for scientific computing and deep learning.

A matrix is a value (`KroneckerMatrix(left, right)`), a structure is a recipe (`Kronecker()`),
everything else is a function (`solve`, `logdet`, `project`). Names and packages load when they
are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matrigami.operators import (
        Cost,
        DenseMatrix,
        Eigh,
        LinearOperator,
        Structure,
        cost,
        diagonal,
        direct_sum,
        eigh,
        face_split,
        hadamard,
        inverse,
        khatri_rao,
        kron,
        kron_sum,
        logdet,
        norm,
        outer,
        power,
        project,
        shift,
        slogdet,
        solve,
        sqrt,
        svdvals,
        to_scipy,
        trace,
    )
    from matrigami.structures import (
        BlockDiagonal,
        BlockDiagonalMatrix,
        BlockTensorTrain,
        BlockTensorTrainMatrix,
        Dense,
        Diagonal,
        DiagonalMatrix,
        Einsum,
        EinsumMatrix,
        Hadamard,
        HadamardMatrix,
        Kronecker,
        KroneckerMatrix,
        KroneckerSum,
        KroneckerSumMatrix,
        LowRank,
        LowRankMatrix,
        Monarch,
        MonarchMatrix,
        TensorTrain,
        TensorTrainMatrix,
        parse,
    )

__version__ = "0.1.0"

PACKAGES = ("cli", "curvature", "krylov", "nn", "optim", "plots", "studies", "testing")


def __getattr__(name: str) -> Any:
    """Load a name or a package when it is first used."""
    if name in PACKAGES:
        return import_module(f"matrigami.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'matrigami' has no attribute {name!r}")
    structures = import_module("matrigami.structures")
    home = structures if name in structures.__all__ else import_module("matrigami.operators")
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    """Names and packages."""
    return sorted([*__all__, *PACKAGES])


__all__ = [
    "BlockDiagonal",
    "BlockDiagonalMatrix",
    "BlockTensorTrain",
    "BlockTensorTrainMatrix",
    "Cost",
    "Dense",
    "DenseMatrix",
    "Diagonal",
    "DiagonalMatrix",
    "Eigh",
    "Einsum",
    "EinsumMatrix",
    "Hadamard",
    "HadamardMatrix",
    "Kronecker",
    "KroneckerMatrix",
    "KroneckerSum",
    "KroneckerSumMatrix",
    "LinearOperator",
    "LowRank",
    "LowRankMatrix",
    "Monarch",
    "MonarchMatrix",
    "Structure",
    "TensorTrain",
    "TensorTrainMatrix",
    "cost",
    "diagonal",
    "direct_sum",
    "eigh",
    "face_split",
    "hadamard",
    "inverse",
    "khatri_rao",
    "kron",
    "kron_sum",
    "logdet",
    "norm",
    "outer",
    "parse",
    "power",
    "project",
    "shift",
    "slogdet",
    "solve",
    "sqrt",
    "svdvals",
    "to_scipy",
    "trace",
]
