"""The structures: one file each, value, recipe, projection and rules.

One line for each file, in the order in which tables show the structures; a file says in its own
`__all__` what is public.
"""

# isort: off
from matrigami import krylov as _krylov  # noqa: F401 - registers the answers for large matrices
from matrigami.operators import (
    EXAMPLES as EXAMPLES,
    DenseMatrix as DenseMatrix,
    DiagonalMatrix as DiagonalMatrix,
)
from matrigami.structures._dense import *
from matrigami.structures._diagonal import *
from matrigami.structures._banded import *
from matrigami.structures._circulant import *
from matrigami.structures._toeplitz import *
from matrigami.structures._block_diagonal import *
from matrigami.structures._low_rank import *
from matrigami.structures._kronecker import *
from matrigami.structures._kronecker_sum import *
from matrigami.structures._hadamard import *
from matrigami.structures._monarch import *
from matrigami.structures._tensor_train import *
from matrigami.structures._block_tensor_train import *
from matrigami.structures._block_low_rank import *
from matrigami.structures._hodlr import *
from matrigami.structures._multi_level import *
from matrigami.structures._einsum import *
from matrigami.structures._block_low_rank_factors import *
from matrigami.structures._block_low_rank_layouts import *
from matrigami.structures._fourier import *
from matrigami.structures._h2 import *
from matrigami.structures._h2_rules import *
from matrigami.structures._hodlr_factors import *
from matrigami.structures._hodlr_root import *
from matrigami.structures._parsing import *
from matrigami.structures._permuted import *
from matrigami.structures._rounding import *
from matrigami.structures._sparse import *
from matrigami.structures._update_functions import *
from matrigami.structures import _hodlr_rules, _sparse_rules, _tensor_train_rounding, _update  # noqa: F401 - register rules

_order = list(globals())  # a file may import a later one, and is then registered after it
for _name, _recipe in sorted(EXAMPLES.items(), key=lambda e: _order.index(type(e[1]).__name__)):
    del EXAMPLES[_name]
    EXAMPLES[_name] = _recipe

_files = [value for value in globals().values() if getattr(value, "__package__", "") == __name__]
_names = {name for file in _files for name in getattr(file, "__all__", ())}
_names |= {"DenseMatrix", "DiagonalMatrix", "EXAMPLES"}
__all__ = [name for name in sorted(globals()) if name in _names]  # pyright: ignore[reportUnsupportedDunderAll]
