"""Which weights may stay: patterns of zeros, as functions of how important each entry is.

Shapes: m = rows, n = columns.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

Support = Callable[[Tensor], Bool[Tensor, "m n"]]
"""Which entries of a matrix of importances stay."""


def unstructured(sparsity: float) -> Support:
    """A share of all weights goes, wherever they are.

    Examples:
        >>> unstructured(0.5)(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
        tensor([[False,  True],
                [ True, False]])
    """
    _check_share("unstructured", "the weights", sparsity)

    def chosen(importance: Tensor) -> Tensor:
        """The largest."""
        return _largest(importance.abs().flatten(), sparsity).reshape(importance.shape)

    chosen.__name__ = f"unstructured({sparsity})"
    return chosen


def n_of_m(n: int, m: int) -> Support:
    """Of every `m` neighbouring inputs of an output `n` stay, e.g. 2 of 4.

    Examples:
        >>> n_of_m(1, 2)(torch.tensor([[1.0, -3.0, 2.0, 0.0]]))
        tensor([[False,  True,  True, False]])
    """
    if not 0 < n <= m:
        raise ValueError(
            f"n_of_m({n}, {m}): of every {m} inputs at least 1 and at most {m} can stay.\n"
            "Write the smaller number first: n_of_m(2, 4), on the command line 2:4."
        )

    def chosen(importance: Tensor) -> Tensor:
        """The largest of every group."""
        columns = importance.shape[-1]
        if columns % m:
            raise ValueError(
                f"n_of_m({n}, {m}): the matrix has {columns} columns, not a multiple of {m}.\n"
                "Leave the layer by ignore=, or take another pattern."
            )
        groups = importance.abs().unflatten(-1, (-1, m))
        best = groups.topk(n, dim=-1, sorted=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flatten(-2)

    chosen.__name__ = f"n_of_m({n}, {m})"
    return chosen


def whole_rows(sparsity: float) -> Support:
    """A share of the rows goes, each with all its weights: those outputs are their bias then.

    Examples:
        >>> whole_rows(0.5)(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
        tensor([[ True,  True],
                [False, False]])
    """
    return _whole(sparsity, "whole_rows", 1)


def whole_columns(sparsity: float) -> Support:
    """A share of the columns goes, each with all its weights: those inputs are not read then.

    Examples:
        >>> whole_columns(0.5)(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
        tensor([[False,  True],
                [False,  True]])
    """
    return _whole(sparsity, "whole_columns", 0)


def _whole(sparsity: float, name: str, axis: int) -> Support:
    """Of the sums of squares along an axis the largest."""
    _check_share(name, "them", sparsity)

    def chosen(importance: Tensor) -> Tensor:
        """The largest."""
        kept = _largest(importance.square().sum(axis), sparsity)
        return kept.unsqueeze(axis).expand(importance.shape).clone()

    chosen.__name__ = f"{name}({sparsity})"
    return chosen


def _check_share(name: str, what: str, sparsity: float) -> None:
    """Refuse what is no share that can go."""
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"{name}({sparsity}): a share from 0.0 to below 1.0 can go.\n"
            f"Half of {what} is {name}(0.5)."
        )


def _largest(values: Tensor, sparsity: float) -> Bool[Tensor, " k"]:
    """All but the share of the smallest."""
    kept = len(values) - round(sparsity * len(values))
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.topk(kept, sorted=False).indices] = True
    return mask
