"""What the mathematics of an optimiser is: two pure functions on a stack of equal matrices.

Neither knows a parameter, a learning rate, weight decay, a device or a process.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from matrigami.nn import Part
from matrigami.operators import BlockView

State = dict[str, Tensor]
"""Named tensors with one entry for each item of the stack along their first axis."""

Options = Mapping[str, Any]
"""The options of a parameter group, and `clock`, the number of the step, from 1."""


@runtime_checkable
class Method(Protocol):
    """`init` and `direction`; every item of a stack is on its own.

    The state that `direction` is given also holds `step`, the updates that an item has had, and
    what was observed for this step, with the items of which it was (`seen`). Where a method
    refreshes something expensive every `frequency` steps, `refresh_costs` says what, and the state
    holds `offset`, the step of the cycle at which each of them is due.
    """

    @staticmethod
    def init(G: Float[Tensor, "b *n"], options: Options) -> State:
        """The state before the first update, from the first gradient that is not zero.

        It may use the gradient to choose coordinates, but does not count it: `direction` will see
        it next.
        """
        ...

    @staticmethod
    def direction(
        G: Float[Tensor, "b *n"], state: State, options: Options
    ) -> tuple[Float[Tensor, "b *n"], State]:
        """The update (to be subtracted, times the learning rate) and the next state.

        It changes none of its arguments. Entries that stay the same may be left out.
        """
        ...


class MatrixMethod(ABC):
    """A method of matrices, and what is to be known of it before a step: see `Method`."""

    @staticmethod
    @abstractmethod
    def init(G: Float[Tensor, "b m n"], options: Options) -> State:
        """The state before the first update; see `Method`."""

    @staticmethod
    @abstractmethod
    def direction(
        G: Float[Tensor, "b m n"], state: State, options: Options
    ) -> tuple[Float[Tensor, "b m n"], State]:
        """The update and the next state; see `Method`."""

    @staticmethod
    @abstractmethod
    def flops(m: int, n: int, options: Options) -> float:
        """Floating-point operations of a mean step for one block, refreshes included."""

    @staticmethod
    def refresh_costs(m: int, n: int, options: Options) -> tuple[float, ...]:  # noqa: ARG004
        """Work of each refresh of a block, if there are any."""
        return ()

    @staticmethod
    def viewed(view: BlockView, options: Options) -> BlockView | None:  # noqa: ARG004
        """The view that this method uses, such as one cut into tiles; None: Adam takes it."""
        return view

    @staticmethod
    def is_equivariant(options: Options) -> bool:  # noqa: ARG004
        """Whether turning the gradients by orthogonal matrices turns the updates by them."""
        return True

    @staticmethod
    def is_scale_invariant(options: Options) -> bool:  # noqa: ARG004
        """Whether multiplying all gradients by a constant leaves the updates as they are."""
        return True

    @staticmethod
    def norm(m: float, n: float, options: Options) -> float:  # noqa: ARG004
        """Spectral norm of an update, up to a constant: learning rates that transfer need it."""
        return (m * n) ** 0.5  # entries of one size, as Adam's

    @staticmethod
    def starting_rate() -> float | None:
        """The learning rate to start a search from.

        The best or next to best of most runs of `docs/results/optimizers`, where 1e-3 to 1e-1
        (K-FAC: ten times as much) were tried; None: nobody has measured.
        """
        return None

    @staticmethod
    def takes(part: Part) -> bool:  # noqa: ARG004
        """Whether it is meant for such a stack of matrices; the others are given to Adam."""
        return True
