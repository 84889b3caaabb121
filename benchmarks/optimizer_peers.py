"""Optimisers of other libraries, where they are installed, and the published SOAP as it stands."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._timing import interleaved
from matrigami.optim import Muon

Make = Callable[[nn.Module], torch.optim.Optimizer]

PACKAGES = ("pytorch_optimizer", "heavyball")


class PlainSOAP(torch.optim.Optimizer):
    """The algorithm of Vyas et al. (2024), arXiv:2409.11321, one matrix at a time, as published.

    The momentum is turned into the basis and back in every step, all bases are refreshed at once,
    and the first gradient only makes the basis. Vectors take Adam.
    """

    def __init__(self, params: Any, lr: float = 3e-3, frequency: int = 10) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.95, 0.95), "frequency": frequency})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no closure
        """All parameters, one by one."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    self._begin(p.grad, state)
                    continue
                state["t"] += 1
                p.sub_(self._update(p.grad, state, group), alpha=group["lr"])

    @staticmethod
    def _begin(G: Tensor, state: dict[str, Any]) -> None:
        """Moments, and the basis of the first gradient."""
        state |= {"t": torch.zeros(()), "M": torch.zeros_like(G), "V": torch.zeros_like(G)}
        if G.ndim == 2:
            for S, name in ((0.05 * G @ G.T, "P"), (0.05 * G.T @ G, "Q")):
                state["S" + name] = S
                state[name] = torch.linalg.eigh(S).eigenvectors.flip(-1)

    @staticmethod
    def _update(G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Five two-sided products for a matrix."""
        (b1, b2), t = group["betas"], float(state["t"])
        scale = (1 - b2**t) ** 0.5 / (1 - b1**t)
        P, Q = state.get("P"), state.get("Q")
        H = G if P is None else P.T @ G @ Q
        M = state["M"] if P is None else P.T @ state["M"] @ Q
        M = b1 * M + (1 - b1) * H
        state["V"] = b2 * state["V"] + (1 - b2) * H**2
        U = scale * M / (state["V"].sqrt() + 1e-8)
        if P is None:
            state["M"] = M
            return U
        state["M"], U = P @ M @ Q.T, P @ U @ Q.T
        state["SP"] = b2 * state["SP"] + (1 - b2) * G @ G.T
        state["SQ"] = b2 * state["SQ"] + (1 - b2) * G.T @ G
        if int(t) % group["frequency"] == 0:
            rows, columns = (_refresh(state, name) for name in ("P", "Q"))
            state["V"] = state["V"][rows][:, columns]
        return U


def _refresh(state: dict[str, Any], name: str) -> Tensor:
    """Sort by Rayleigh quotients, one power step, QR."""
    S, Q = state["S" + name], state[name]
    order = (Q.T @ S @ Q).diagonal().argsort(descending=True)
    state[name] = torch.linalg.qr(S @ Q[:, order]).Q
    return order


def _pytorch_optimizer(name: str, **options: Any) -> Make:
    """One of pytorch_optimizer."""
    make = getattr(import_module("pytorch_optimizer"), name)
    return lambda model: make(model.parameters(), **options)


def _heavyball() -> Make:
    """HeavyBall's SOAP without torch.compile."""
    heavyball = import_module("heavyball")
    import_module("heavyball.utils").compile_mode = None
    return lambda model: heavyball.SOAP(model.parameters(), lr=3e-3, precondition_frequency=10)


BUILDERS: dict[str, Callable[[], Make]] = {
    "SOAP as published": lambda: lambda model: PlainSOAP(model.parameters()),
    "pytorch_optimizer SOAP": partial(_pytorch_optimizer, "SOAP", precondition_frequency=10),
    "pytorch_optimizer Shampoo": partial(
        _pytorch_optimizer, "Shampoo", preconditioning_compute_steps=10
    ),
    "HeavyBall SOAP, eager": _heavyball,
}


def contestants() -> tuple[dict[str, Make], list[str]]:
    """What can be built here, by name, and a line for what cannot."""
    found, missing = {}, []
    for name, build in BUILDERS.items():
        try:
            found[name] = build()
        except (ImportError, AttributeError) as error:
            missing.append(f"Skipped {name}: {str(error).splitlines()[0]}.")
    return found, missing


def versions() -> dict[str, str]:
    """The libraries that are here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def muon_steps(matrices: int) -> str:
    """The times of a step of torch.optim.Muon, and of ours, on some 256 x 256 matrices."""
    steps = {}
    for make in (torch.optim.Muon, Muon):
        parameters = [nn.Parameter(torch.randn(256, 256)) for _ in range(matrices)]
        for W in parameters:
            W.grad = torch.randn(256, 256)
        steps[make.__module__] = make(parameters, lr=1e-3).step
    theirs, ours = (1e3 * t for t in interleaved(steps, 9).values())
    return f"of {matrices}: torch.optim.Muon {theirs:.1f} ms, ours {ours:.1f} ms"
