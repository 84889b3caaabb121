"""Matrix + origami: structured matrices for scientific computing and deep learning.

A matrix is a value (`KroneckerMatrix(left, right)`), a structure is a recipe (`Kronecker()`),
everything else is a function (`solve`, `logdet`, `project`). Names and packages load when they
are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matrigami.compress import load, save
    from matrigami.operators import (
        Cost,
        DenseMatrix,
        DiagonalMatrix,
        Eigh,
        LinearOperator,
        Structure,
        Svd,
        cholesky,
        cost,
        diagonal,
        direct_sum,
        eigh,
        entries,
        exp,
        face_split,
        hadamard,
        identity,
        inverse,
        khatri_rao,
        kron,
        kron_sum,
        logdet,
        lstsq,
        norm,
        outer,
        pinv,
        power,
        project,
        shift,
        slogdet,
        solve,
        sqrt,
        svd,
        svdvals,
        take_rows,
        to_scipy,
        trace,
    )
    from matrigami.structures import (
        HODLR,
        Banded,
        BandedMatrix,
        BlockDiagonal,
        BlockDiagonalMatrix,
        BlockLowRank,
        BlockLowRankMatrix,
        BlockTensorTrain,
        BlockTensorTrainMatrix,
        Circulant,
        CirculantMatrix,
        Dense,
        Diagonal,
        Einsum,
        EinsumMatrix,
        H2Matrix,
        Hadamard,
        HadamardMatrix,
        HODLRMatrix,
        Kronecker,
        KroneckerMatrix,
        KroneckerSum,
        KroneckerSumMatrix,
        LowRank,
        LowRankMatrix,
        Monarch,
        MonarchMatrix,
        MultiLevelLowRank,
        MultiLevelLowRankMatrix,
        PermutedMatrix,
        ScipyMatrix,
        SparseMatrix,
        TensorTrain,
        TensorTrainMatrix,
        Toeplitz,
        ToeplitzMatrix,
        from_scipy,
        parse,
    )

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


def __getattr__(name: str) -> Any:
    """Load a name or a package when it is first used."""
    if name in PACKAGES:
        return import_module(f"matrigami.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'matrigami' has no attribute {name!r}")
    packages = ("compress",) if name in FILES else ("structures", "operators")
    homes = (import_module(f"matrigami.{package}") for package in packages)
    globals()[name] = getattr(next(home for home in homes if name in home.__all__), name)
    return globals()[name]


def __dir__() -> list[str]:
    """Names and packages."""
    return sorted([*__all__, *PACKAGES])


__all__ = [  # noqa: RUF022 - in the order of the letters, HODLR too
    "Banded",
    "BandedMatrix",
    "BlockDiagonal",
    "BlockDiagonalMatrix",
    "BlockLowRank",
    "BlockLowRankMatrix",
    "BlockTensorTrain",
    "BlockTensorTrainMatrix",
    "Circulant",
    "CirculantMatrix",
    "Cost",
    "Dense",
    "DenseMatrix",
    "Diagonal",
    "DiagonalMatrix",
    "Eigh",
    "Einsum",
    "EinsumMatrix",
    "H2Matrix",
    "HODLR",
    "HODLRMatrix",
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
    "MultiLevelLowRank",
    "MultiLevelLowRankMatrix",
    "PermutedMatrix",
    "ScipyMatrix",
    "SparseMatrix",
    "Structure",
    "Svd",
    "TensorTrain",
    "TensorTrainMatrix",
    "Toeplitz",
    "ToeplitzMatrix",
    "cholesky",
    "cost",
    "diagonal",
    "direct_sum",
    "eigh",
    "entries",
    "exp",
    "face_split",
    "from_scipy",
    "hadamard",
    "identity",
    "inverse",
    "khatri_rao",
    "kron",
    "kron_sum",
    "load",
    "logdet",
    "lstsq",
    "norm",
    "outer",
    "parse",
    "pinv",
    "power",
    "project",
    "save",
    "shift",
    "slogdet",
    "solve",
    "sqrt",
    "svd",
    "svdvals",
    "take_rows",
    "to_scipy",
    "trace",
]
