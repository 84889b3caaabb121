"""The structures: one file each, value, recipe, projection and rules."""

import matrigami.krylov  # noqa: F401 - registers the answers for large matrices
from matrigami.operators import DenseMatrix, DiagonalMatrix, Structure
from matrigami.structures._banded import Banded, BandedMatrix
from matrigami.structures._block_diagonal import BlockDiagonal, BlockDiagonalMatrix
from matrigami.structures._block_low_rank import (
    BlockLowRank,
    BlockLowRankMatrix,
    as_block_low_rank,
    as_monarch,
)
from matrigami.structures._block_low_rank_factors import TileFactors
from matrigami.structures._block_tensor_train import BlockTensorTrain, BlockTensorTrainMatrix
from matrigami.structures._circulant import Circulant, CirculantMatrix
from matrigami.structures._dense import Dense
from matrigami.structures._diagonal import Diagonal
from matrigami.structures._einsum import Einsum, EinsumMatrix
from matrigami.structures._fourier import FourierMatrix, SineMatrix
from matrigami.structures._h2 import H2Matrix, PlacedBlocksMatrix, summed_products
from matrigami.structures._h2_rules import by_conjugate_gradients, nystroem_inverse
from matrigami.structures._hadamard import Hadamard, HadamardMatrix
from matrigami.structures._hodlr import HODLR, HODLRMatrix
from matrigami.structures._hodlr_factors import HODLRFactors
from matrigami.structures._hodlr_root import HODLRRootMatrix
from matrigami.structures._hodlr_rules import is_corner  # noqa: F401 - registers the rules
from matrigami.structures._kronecker import Kronecker, KroneckerMatrix
from matrigami.structures._kronecker_sum import KroneckerSum, KroneckerSumMatrix
from matrigami.structures._low_rank import LowRank, LowRankMatrix
from matrigami.structures._monarch import Monarch, MonarchMatrix
from matrigami.structures._multi_level import (
    MultiLevelLowRank,
    MultiLevelLowRankMatrix,
    as_hodlr,
)
from matrigami.structures._parsing import parse_recipe
from matrigami.structures._permuted import PermutedMatrix
from matrigami.structures._sparse import ScipyMatrix, SparseMatrix, from_scipy
from matrigami.structures._tensor_train import TensorTrain, TensorTrainMatrix
from matrigami.structures._toeplitz import Toeplitz, ToeplitzMatrix
from matrigami.structures._update import SHARE  # noqa: F401 - registers the lemmas

EXAMPLES: dict[str, Structure] = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "banded": Banded(),
    "circulant": Circulant(),
    "toeplitz": Toeplitz(),
    "block_diagonal": BlockDiagonal(blocks=2),
    "lowrank": LowRank(rank=2),
    "kronecker": Kronecker(),
    "kronecker_sum": KroneckerSum(),
    "hadamard": Hadamard(rank=2),
    "monarch": Monarch(blocks=2, pad=True),
    "tt": TensorTrain(rank=2),
    "btt": BlockTensorTrain(rank=1),
    "blr": BlockLowRank(tile=4, rank=1),
    "hodlr": HODLR(leaf=4, rank=1),
    "mlr": MultiLevelLowRank(ranks=(1, 1)),
    "einsum": Einsum(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25)),
}
"""One recipe of each structure by its command-line name: laws, tables and CLI walk over it."""


def parse(text: str) -> Structure:
    """The recipe that a text names.

    Raises:
        ValueError: If the name is unknown (the nearest is suggested) or the arguments do not fit.

    Examples:
        >>> parse("btt(rank=2)"), parse("lowrank(rank=0.25)")
        (BlockTensorTrain(rank=2, cores=2, interleaved=False), LowRank(rank=0.25))
    """
    recipes = {name: type(recipe) for name, recipe in EXAMPLES.items()}
    return parse_recipe(text, recipes, {"einsum": "theta", "mlr": "ranks"})


__all__ = [
    "EXAMPLES",
    "HODLR",
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
    "Dense",
    "DenseMatrix",
    "Diagonal",
    "DiagonalMatrix",
    "Einsum",
    "EinsumMatrix",
    "FourierMatrix",
    "H2Matrix",
    "HODLRFactors",
    "HODLRMatrix",
    "HODLRRootMatrix",
    "Hadamard",
    "HadamardMatrix",
    "Kronecker",
    "KroneckerMatrix",
    "KroneckerSum",
    "KroneckerSumMatrix",
    "LowRank",
    "LowRankMatrix",
    "Monarch",
    "MonarchMatrix",
    "MultiLevelLowRank",
    "MultiLevelLowRankMatrix",
    "PermutedMatrix",
    "PlacedBlocksMatrix",
    "ScipyMatrix",
    "SineMatrix",
    "SparseMatrix",
    "TensorTrain",
    "TensorTrainMatrix",
    "TileFactors",
    "Toeplitz",
    "ToeplitzMatrix",
    "as_block_low_rank",
    "as_hodlr",
    "as_monarch",
    "by_conjugate_gradients",
    "from_scipy",
    "nystroem_inverse",
    "parse",
    "summed_products",
]
