"""SOAP against its published algorithm, and its own identities."""

import pytest
import torch
from tests.optim.reference_soap import ReferenceSOAP
from torch import nn

from matrigami.optim import SOAP


def gradients(steps: int, m: int, n: int) -> list[torch.Tensor]:
    scale = torch.rand(m, 1) + 0.1
    return [scale * torch.randn(m, n) for _ in range(steps)]


def trained(p: nn.Parameter, optimizer: torch.optim.Optimizer, stream: list[torch.Tensor]):
    for G in stream:
        p.grad = G.clone()
        optimizer.step()


@pytest.mark.parametrize(("m", "n"), [(7, 5), (6, 6), (3, 12)])
def test_trajectory_is_that_of_the_reference(m: int, n: int):
    W, (first, *stream) = torch.randn(m, n), gradients(51, m, n)
    p = nn.Parameter(W.clone())
    ours = SOAP([p], lr=0.0, stagger=False)
    trained(p, ours, [first])
    reference = ReferenceSOAP(W, first, 0.02, (0.95, 0.95), 10)
    state = ours.state[p]
    for name in "LRPQ":  # the first gradient is a step of ours, but not of theirs
        setattr(reference, name, state[name][0].clone())
    for name in ("M", "V", "step"):
        state[name].zero_()
    ours.param_groups[0].update(lr=0.02, clock=0)

    for G in stream:
        trained(p, ours, [G])
        reference.step(G, 0.01)
    assert (p.detach() - reference.W).abs().max() < 1e-8
    torch.testing.assert_close(state["V"][0], reference.V)
