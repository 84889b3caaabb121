"""To SciPy and back: operators, and sparse matrices."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from matrigami.operators._base import LinearOperator, require
from matrigami.operators._convert import as_array, as_tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


def to_scipy(A: LinearOperator) -> "ScipyOperator":
    """`A` as a `scipy.sparse.linalg.LinearOperator` on the CPU, for SciPy's solvers.

    Raises:
        ValueError: If `A` is a stack of matrices.
    """
    from scipy.sparse.linalg import aslinearoperator  # noqa: PLC0415 - heavy, and rarely needed

    require("to_scipy", A)
    if len(A.shape) > 2:
        raise ValueError(
            f"to_scipy(A): A is a stack of shape {tuple(A.shape)}; SciPy knows single matrices.\n"
            "Convert them one at a time: to_scipy(A[i])."
        )

    def product(operator: LinearOperator) -> Any:
        """NumPy in, NumPy out."""
        return lambda X: as_array(operator @ as_tensor(X, A))

    forward, backward = product(A), product(A.H)
    protocol = SimpleNamespace(
        shape=A.shape,
        dtype=torch.empty(0, dtype=A.dtype).numpy().dtype,
        matvec=forward,
        rmatvec=backward,
        matmat=forward,
        rmatmat=backward,
    )
    return aslinearoperator(protocol)


def sylvester(L: Any, R: Any, F: Any) -> Any:
    """Solve `L Y + Y R.T = F` for arrays, `Y` for each column of `F` as an `n1 x n2` matrix.

    Both matrices are reduced once, to complex Schur form. Source: Bartels and Stewart (1972).

    Raises:
        torch.linalg.LinAlgError: If an eigenvalue of one is minus one of the other.
    """
    import numpy as np  # noqa: PLC0415 - for SciPy alone
    from scipy.linalg import get_lapack_funcs, schur  # noqa: PLC0415 - heavy, and rarely needed

    n1, n2 = len(L), len(R)
    S, U = schur(L, output="complex")[:2]
    T, V = schur(R.T, output="complex")[:2]
    sums = np.abs(S.diagonal()[:, None] + T.diagonal()[None])
    size = max(np.abs(S).max(initial=0.0), np.abs(T).max(initial=0.0))
    if sums.min(initial=np.inf) <= size * np.finfo(F.dtype).eps:
        raise torch.linalg.LinAlgError("two eigenvalues cancel")
    trsyl: Any = get_lapack_funcs("trsyl", (S, T))
    solved = []
    for column in F.T:
        Y, scale, _ = trsyl(S, T, U.conj().T @ column.reshape(n1, n2) @ V)
        solved.append((U @ (Y / scale) @ V.conj().T).reshape(-1))
    X: Any = np.stack(solved, 1) if solved else np.empty((n1 * n2, 0), F.dtype)
    return (X if np.iscomplexobj(F) else X.real).astype(F.dtype)
