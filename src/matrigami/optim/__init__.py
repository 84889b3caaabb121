"""Optimisers that precondition a matrix from both sides, on dense and on structured layers."""

from collections.abc import Callable, Collection, Mapping
from typing import cast

import torch
from torch import nn

from matrigami.curvature import Capture, Moments
from matrigami.optim._adam import Adam
from matrigami.optim._grafting import ADAM_SIZE, SGD_SIZE, Graft
from matrigami.optim._kfac import KFAC
from matrigami.optim._method import MatrixMethod, Method, Options, State
from matrigami.optim._muon import Muon, rms_match, spectral
from matrigami.optim._optimizer import MatrixOptimizer
from matrigami.optim._plan import Plan, planned
from matrigami.optim._polynomials import CANS, POLAR_EXPRESS, QUINTIC, Polynomial, cans
from matrigami.optim._roots import Root, cans_root, eigh_root, measured_root, newton_root
from matrigami.optim._shampoo import Shampoo
from matrigami.optim._soap import SOAP
from matrigami.optim.distributed import Exchange, Local, Update

OPTIMIZERS: dict[str, type[MatrixOptimizer]] = {
    "kfac": KFAC,
    "muon": Muon,
    "shampoo": Shampoo,
    "soap": SOAP,
}
"""Each optimiser by its command-line name: laws, tables and CLI walk over it."""


def plan(
    model: nn.Module,
    optimizer: Callable[..., MatrixOptimizer] | str = SOAP,
    *,
    head: Collection[str] | None = None,
    elementwise: Collection[str] = (),
    moments: Capture | Mapping[str, Moments] | None = None,
) -> Plan:
    """Which method each parameter of a model takes, its blocks, state bytes and work per step.

    Dense weights, convolutions and the cores of structured layers are matrices; embeddings, tied
    heads, norms, biases and gains take Adam. Each is recognised by the module that owns it (see
    `nn.parts`), none by its shape.

    Args:
        model: The model; frozen parameters are left out.
        optimizer: A class, one with some options filled in by `functools.partial`, or a name of
            `OPTIMIZERS`.
        head: Names of the output layers; by default the last linear layer. Muon leaves them to
            Adam, as its field does.
        elementwise: Names of parameters that take Adam whatever they are.
        moments: What layers saw in the batch whose gradients the parameters hold now, such as a
            `curvature.capture` around it: the plan says for which layers a spectral step pays.

    Returns:
        The plan: print it, then pass it to the optimiser.

    Raises:
        ValueError: If a matrix belongs to a module without a rule, or a name is unknown.

    Examples:
        >>> print(plan(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))))
        parameter  role           method  blocks    state bytes  FLOPs a step
        0.weight   hidden matrix  SOAP    1 of 4x3          304           492
        0.bias     bias           Adam    4                  32            48
        2.weight   output head    SOAP    1 of 2x4          232           290
        2.bias     bias           Adam    2                  16            24
        total                                               584           854
        start with lr=0.01
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"plan(model, {optimizer!r}): there is no such optimiser.\n"
                f"The optimisers are {sorted(OPTIMIZERS)}.\nUse one of these names, or a class."
            )
        optimizer = OPTIMIZERS[optimizer]
    make = cast("Callable[..., MatrixOptimizer]", optimizer)
    probe = make([nn.Parameter(torch.zeros(()))])  # knows the options and their defaults
    return planned(
        model, type(probe), probe.defaults, head=head, elementwise=elementwise, moments=moments
    )


__all__ = [
    "ADAM_SIZE",
    "CANS",
    "KFAC",
    "OPTIMIZERS",
    "POLAR_EXPRESS",
    "QUINTIC",
    "SGD_SIZE",
    "SOAP",
    "Adam",
    "Exchange",
    "Graft",
    "Local",
    "MatrixMethod",
    "MatrixOptimizer",
    "Method",
    "Muon",
    "Options",
    "Plan",
    "Polynomial",
    "Root",
    "Shampoo",
    "State",
    "Update",
    "cans",
    "cans_root",
    "eigh_root",
    "measured_root",
    "newton_root",
    "plan",
    "rms_match",
    "spectral",
]
