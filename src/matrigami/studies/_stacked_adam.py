"""AdamW for several runs at once: of each run and group one long tensor, not many short ones.

The weights, moments and numbers of steps of the runs become parts of these, so that each run reads,
saves and goes on with what is its own. The arithmetic is that of torch's fused step.

Shapes: S = runs, D = weights of a group in one run, P = parameters of a run.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state of a parameter, beside the number of its steps."""


class JoinedAdamW:
    """One step of `torch.optim.AdamW` for several runs.

    Args:
        optimizers: Those of the runs, with a state.
        tables: The parameters of each run by name.

    Attributes:
        weights: By name, the stack of all runs.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        tables: Sequence[Mapping[str, nn.Parameter]],
    ) -> None:
        self.optimizers, self.tables = optimizers, tables
        names = {id(p): name for name, p in tables[0].items()}
        groups = optimizers[0].param_groups
        self.names = [[names[id(p)] for p in group["params"]] for group in groups]
        self.weights: dict[str, Tensor] = {}
        self.rows = [self._joined(names) for names in self.names]
        self.steps = torch.stack([torch.stack(list(s)) for s in self._states("step")])
        for s, (optimizer, table) in enumerate(zip(optimizers, tables, strict=True)):
            for p, step in zip(table.values(), self.steps[s], strict=True):
                optimizer.state[p]["step"] = step

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is the optimiser whose step is known here."""
        other = optimizer.defaults.get("amsgrad") or optimizer.defaults.get("maximize")
        return type(optimizer) is torch.optim.AdamW and not other

    def _states(self, kind: str, names: Sequence[str] | None = None) -> list[list[Tensor]]:
        """A part of the state of all parameters, or of some, of each run."""
        return [
            [optimizer.state[table[name]][kind] for name in names or table]
            for optimizer, table in zip(self.optimizers, self.tables, strict=True)
        ]

    def _joined(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The long tensors of a group, weights and moments; all else becomes a part of them."""
        parameters = [[table[name] for name in names] for table in self.tables]
        P, M, V = _rows(parameters), *[_rows(self._states(kind, names)) for kind in MOMENTS]
        sizes = [p.numel() for p in parameters[0]]
        parts = zip(names, *[t.split(sizes, 1) for t in (P, M, V)], strict=True)
        for name, W, *moments in parts:
            self._share(name, W, moments)
        return P, M, V

    def _share(self, name: str, W: Tensor, moments: Sequence[Tensor]) -> None:
        """Let a parameter of each run, and its moments, be a part of the long tensors."""
        shape = self.tables[0][name].shape
        self.weights[name] = W.view(len(W), *shape)
        for s, (optimizer, table) in enumerate(zip(self.optimizers, self.tables, strict=True)):
            table[name].data = self.weights[name][s]
            for kind, m in zip(MOMENTS, moments, strict=True):
                optimizer.state[table[name]][kind] = m[s].view(shape)

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Move the weights of all runs; the gradients are stacks, too."""
        runs = len(self.optimizers)
        G = [torch.cat([gradients[n].reshape(runs, -1) for n in own], 1) for own in self.names]
        self.steps += 1
        numbers = itemgetter("lr", "weight_decay", "betas", "eps")
        parts = [
            (numbers(group), s, k)
            for s, optimizer in enumerate(self.optimizers)
            for k, group in enumerate(optimizer.param_groups)
        ]
        for (lr, decay, (beta1, beta2), eps), alike in groupby(sorted(parts), itemgetter(0)):
            tensors = [
                (P[s], G[k][s], M[s], V[s], self.steps[s, 0])
                for _, s, k in alike
                for P, M, V in (self.rows[k],)
            ]
            weights, own, means, squares, steps = map(list, zip(*tensors, strict=True))
            torch._fused_adamw_(
                weights,
                own,
                means,
                squares,
                [],
                steps,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
            )


def _rows(runs: Sequence[Sequence[Tensor]]) -> Tensor:
    """The numbers of each run in a row."""
    return torch.stack([torch.cat([t.detach().flatten() for t in own]) for own in runs])
