"""Which process updates which parameter, and what they tell each other."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from matrigami.optim._method import MatrixMethod
from matrigami.optim.distributed._exchange import (
    Exchange,
    Groups,
    Local,
    Update,
    is_sharded,
    local,
    working_dtype,
)


def exchange_between(
    parameters: Iterable[Tensor], replicas: Any, method: type[MatrixMethod]
) -> Exchange:
    """The exchange of some parameters: among owners if they are sharded, or have replicas.

    Args:
        parameters: The parameters.
        replicas: The process group that holds equal copies of the plain ones, or None.
        method: The method of matrices.
    """
    if replicas is None and not any(map(is_sharded, parameters)):
        return Local()
    from matrigami.optim.distributed._owners import Owners  # noqa: PLC0415 - DTensor takes a second to import

    return Owners(replicas, method)


__all__ = [
    "Exchange",
    "Groups",
    "Local",
    "Update",
    "exchange_between",
    "is_sharded",
    "local",
    "working_dtype",
]
