"""Run the laws of optimisers and say which one breaks, for what."""

from collections.abc import Callable, Iterable

from matrigami.testing._optimizer_citizenship import CITIZENSHIP_LAWS
from matrigami.testing._optimizer_laws import MATHEMATICS_LAWS
from matrigami.testing._optimizer_targets import Factory
from matrigami.testing._suite import enforce

OPTIMIZER_LAWS = (*MATHEMATICS_LAWS, *CITIZENSHIP_LAWS)
"""Every law of an optimiser."""


def check_optimizer(factory: Factory, laws: Iterable[Callable[..., None]] = OPTIMIZER_LAWS) -> None:
    """Check an optimiser: its mathematics and its life with torch.

    Args:
        factory: A class of `MatrixOptimizer`, or one with options filled in by
            `functools.partial`; it is called with parameters or a model, `lr` and `weight_decay`.
        laws: The laws to check; all of them by default.

    Raises:
        AssertionError: If a law is broken; the message names the law and the optimiser.

    Examples:
        >>> from matrigami.optim import Muon
        >>> from matrigami.testing import OPTIMIZER_LAWS
        >>> check_optimizer(Muon, laws=OPTIMIZER_LAWS[1:3])
    """
    for law in laws:
        enforce(law, str(factory), factory)
