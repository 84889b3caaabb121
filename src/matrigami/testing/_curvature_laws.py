"""The laws of an approximation of curvature, on small models of several kinds.

The truth is the Fisher matrix as an operator, which knows nothing of layers.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.curvature import Approximation, CurvatureMatrix, fisher, positions
from matrigami.nn import StructuredLinear
from matrigami.structures import Monarch
from matrigami.testing._expectations import expect, expect_close, random
from matrigami.testing._suite import enforce

Method = Callable[..., CurvatureMatrix]
"""What is called with model, loss and data, as `kfac` is."""

Case = tuple[str, nn.Module, nn.Module, Tensor, Tensor]
"""A name, a model, a loss, inputs and targets."""

LABELS = ("exact", "empirical", "examples")
"""Those that are not drawn."""

EXAMPLES = 6
"""Of each case."""


class Sequence(nn.Module):
    """Positions that see one another; flattened into the batch, or with classes on axis 1."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.first, self.last, self.flat = nn.Linear(4, 3), nn.Linear(3, 3), flat

    def forward(self, x: Tensor) -> Tensor:
        """Scores of each position."""
        h = torch.tanh(self.first(x))
        scores = self.last(h + h.mean(1, keepdim=True))
        return scores.flatten(0, 1) if self.flat else scores.mT


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in double precision whose parameters depend on nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def _classes(*shape: int) -> Tensor:
    """Some labels."""
    return torch.arange(torch.Size(shape).numel()).view(shape) * 7 % 5 % 3


def _dense() -> nn.Module:
    """Two layers and a norm."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def _structured() -> nn.Module:
    """A layer of two factors."""
    return nn.Sequential(StructuredLinear(4, 4, Monarch(blocks=2)), nn.Tanh(), nn.Linear(4, 3))


def _convolution() -> nn.Module:
    """Patches are positions."""
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))


def cases() -> Iterator[Case]:
    """Models with vectors, patches and positions, and losses of three kinds."""
    x, N = random(EXAMPLES, 4), EXAMPLES
    yield "dense", _seeded(_dense), nn.CrossEntropyLoss(), x, _classes(N)
    yield "structured", _seeded(_structured), nn.MSELoss(), x, random(N, 3, seed=1)
    patches, signs = random(N, 2, 4), (random(N, 3) > 0).double()
    yield "convolution", _seeded(_convolution), nn.BCEWithLogitsLoss(), patches, signs
    words, scores = random(N, 3, 4), _seeded(lambda: Sequence(flat=False))
    yield "sequence", scores, nn.CrossEntropyLoss(), words, _classes(N, 3)


def covers_every_parameter(approximation: Approximation) -> None:
    """Each trainable parameter is in one block; frozen ones are in none; nothing else changes."""
    for name, model, loss, x, y in cases():
        frozen = [p.requires_grad_(False) for p in next(model.children()).parameters()]
        before = [p.detach().clone() for p in model.parameters()]
        state = torch.get_rng_state()
        F = approximation.make(model, loss, (x, y), labels=1)
        wanted = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        expect(F.sizes == wanted, f"{name}: the parameters are {F.sizes}, not {wanted}")
        held = sorted(itertools.chain.from_iterable(F.names))
        expect(held == sorted(wanted), f"{name}: the blocks hold {held}")
        same = all(map(torch.equal, before, model.parameters()))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        drawn = not torch.equal(state, torch.get_rng_state())
        expect(same and not grads and bool(frozen), f"{name}: the model is changed")
        expect(not drawn, f"{name}: torch's own random numbers are drawn")


def is_positive_semidefinite(approximation: Approximation) -> None:
    """Symmetric, without negative eigenvalues, with any labels."""
    for name, model, loss, x, y in cases():
        for labels in ("exact", "empirical", 2) if name == "sequence" else ("exact",):
            D = _dense_of(approximation, model, loss, (x, y), labels=labels)
            expect_close(D, D.mT, f"{name}: the transpose", 1e-12)
            low, high = torch.linalg.eigvalsh(D)[[0, -1]].tolist()
            expect(low >= -1e-10 * high, f"{name}, {labels}: an eigenvalue is {low:.2g}")


def keeps_the_trace(approximation: Approximation) -> None:
    """Of each block, if it is declared."""
    for name, model, loss, x, y in cases() if approximation.keeps_trace else ():
        for labels in LABELS if name == "sequence" else ("exact",):
            F = approximation.make(model, loss, (x, y), labels=labels)
            found, wanted = (
                M.dense().diagonal() for M in (F, fisher(model, loss, (x, y), labels=labels))
            )
            for names, at in positions(F).items():
                what = f"{name}, {labels}: the trace of {'+'.join(names)}"
                expect_close(found[at].sum(), wanted[at].sum(), what)


def is_exact_for_one_example(approximation: Approximation) -> None:
    """Where it is declared: a block of one example is a Kronecker product."""
    _, model, loss, x, y = next(cases())
    if not approximation.is_exact_for_one:
        return
    for labels in ("exact", "empirical"):
        one = (x[:1], y[:1])
        F = approximation.make(model, loss, one, labels=labels)
        found, wanted = F.dense(), fisher(model, loss, one, labels=labels).dense()
        for names, at in positions(F).items():
            if F[names[0]].shape[0] == 1:  # not a stack, such as one block for each feature
                what = f"{labels}: {'+'.join(names)} of one example"
                expect_close(found[at][:, at], wanted[at][:, at], what)


def does_not_depend_on_how_data_are_cut(approximation: Approximation) -> None:
    """Nor on their order, nor on how often all of them are there; a loader is as a list."""
    for name, model, loss, x, y in cases():
        whole = _dense_of(approximation, model, loss, (x, y))
        order = torch.arange(len(x)).flip(0)
        cut = list(zip(x[order].split([1, 3, 2]), y[order].split([1, 3, 2]), strict=True))
        found = _dense_of(approximation, model, loss, iter([*cut, (x, y)]))
        expect_close(found, whole, f"{name}: the matrix of data that are cut and doubled", 1e-8)


def scales_with_the_loss(approximation: Approximation) -> None:
    """A sum is a mean times its terms."""
    for name, model, loss, x, y in cases():
        mean = _dense_of(approximation, model, loss, (x, y))
        total = _dense_of(approximation, model, type(loss)(reduction="sum"), (x, y))
        expect_close(total / y.numel(), mean, f"{name}: the matrix of a sum, over its terms", 1e-8)


def leaves_out_what_does_not_count(approximation: Approximation) -> None:
    """Ignored examples are as if they were not there; a weight of two is there twice."""
    _, model, _, x, y = next(cases())
    loss = nn.CrossEntropyLoss()
    masked = torch.where(torch.arange(len(y)) < 4, y, loss.ignore_index)
    found = _dense_of(approximation, model, loss, (x, masked))
    wanted = _dense_of(approximation, model, loss, (x[:4], y[:4]))
    expect_close(found, wanted, "the matrix of data with ignored examples", 1e-8)


def knows_an_example(approximation: Approximation) -> None:
    """Positions that are flattened into the batch belong to their examples."""
    *_, (_, model, loss, x, y) = cases()
    flat = Sequence(flat=True).double()
    flat.load_state_dict(model.state_dict())
    found = _dense_of(approximation, flat, loss, (x, y.flatten()))
    wanted = _dense_of(approximation, model, loss, (x, y))
    expect_close(found, wanted, "the matrix of flattened outputs", 1e-8)


def draws_labels_by_its_seed(approximation: Approximation) -> None:
    """The same seed gives the same matrix, and many labels the exact one, nearly."""
    _, model, loss, x, y = next(cases())
    one, two = (_dense_of(approximation, model, loss, (x, y), labels=1, seed=3) for _ in "ab")
    expect(torch.equal(one, two), "the same seed gives another matrix")
    exact = _dense_of(approximation, model, loss, (x, y))
    many = _dense_of(approximation, model, loss, (x, y), labels=2000)
    error = float((many - exact).norm() / exact.norm())
    expect(error < 0.2, f"with 2000 labels it is off by {error:.2g}")


def refuses_what_it_cannot_read(approximation: Approximation) -> None:
    """Unknown matrices and losses, no data and NaN: in two or three lines."""
    _, model, loss, x, y = next(cases())
    unknown = nn.Sequential(nn.Bilinear(4, 4, 3))
    for what, call in {
        "an unknown layer": lambda: approximation.make(unknown, loss, (x, y)),
        "an unknown loss": lambda: approximation.make(model, nn.L1Loss(), (x, y)),
        "no data": lambda: approximation.make(model, loss, []),
        "NaN": lambda: approximation.make(model, loss, (x * torch.nan, y)),
    }.items():
        try:
            call()
        except (ValueError, TypeError) as error:
            lines = len(str(error).splitlines())
            expect(2 <= lines <= 3, f"the message for {what} has {lines} lines, not 2 or 3")
        else:
            expect(False, f"{what} is accepted")


def _dense_of(approximation: Approximation, *task: Any, **options: Any) -> Tensor:
    """The matrix itself."""
    return approximation.make(*task, **options).dense()


CURVATURE_LAWS = (
    covers_every_parameter,
    is_positive_semidefinite,
    keeps_the_trace,
    is_exact_for_one_example,
    does_not_depend_on_how_data_are_cut,
    scales_with_the_loss,
    leaves_out_what_does_not_count,
    knows_an_example,
    draws_labels_by_its_seed,
    refuses_what_it_cannot_read,
)
"""Every law of an approximation of curvature."""


def check_curvature(
    approximation: Approximation | Method, laws: Iterable[Callable[..., None]] = CURVATURE_LAWS
) -> None:
    """Check an approximation of curvature against the Fisher matrix, which knows no layers.

    Args:
        approximation: An entry of `curvature.APPROXIMATIONS`, or what is called as `kfac` is.
        laws: The laws to check; all of them by default.

    Raises:
        AssertionError: If a law is broken; the message names the law.

    Examples:
        >>> from matrigami.curvature import kfac
        >>> check_curvature(kfac, laws=CURVATURE_LAWS[:1])
    """
    known = approximation if isinstance(approximation, Approximation) else None
    for law in laws:
        enforce(law, str(approximation), known or Approximation(approximation))  # pyright: ignore[reportArgumentType]
