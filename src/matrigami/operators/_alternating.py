"""Projection in a metric by alternating least squares, one tensor after the other.

A structured matrix is linear in each of its tensors: `A = P C Q + rest`, `C` a stack of blocks (see
`_contraction`). With all others fixed, the best tensor in `||left^(1/2) (W - A) right^(1/2)||_F`
solves `P.H left P C Q right Q.H = P.H left (W - rest) right Q.H` on its blocks. That is done by
conjugate gradients, preconditioned with the blocks on the diagonal, `G_b C_b H_b`; nothing larger
than the matrix and one state is ever formed. In the end all tensors are moved together.

Shapes: m = rows, n = columns, p, q = states after and before the tensor, b = blocks, s = shared
positions, o, i = rows and columns of a block.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from matrigami.operators._base import LinearOperator, Value
from matrigami.operators._contraction import Contraction, contractions
from matrigami.operators._dense import DenseMatrix
from matrigami.operators._metric import Metric, Target
from matrigami.operators._tree import named_tensors, with_tensors

TURN = 0.05
"""Relative gain of a round over the tensors below which they are moved together."""

SOLVE_STEPS = 5
"""Most conjugate-gradient steps for one tensor."""

SOLVED = 1e-2
"""Relative residual that ends them: the other tensors will change, too."""

PAIRS = 10
"""Moves that are remembered."""

REFRESH = 10
"""Steps after which the preconditioner is made anew."""

WINDOW = 5
"""Steps whose gain decides whether to go on."""

HALVINGS = 12
"""Of a step that is too long."""

EXACT = 1e-28
"""Share of the matrix that is no error."""

SMALL = 2**24
"""Multiply-adds up to which a product is taken with dense surroundings: fewer, larger calls."""

RIDGE = 1e-7
"""Added to the preconditioner, relative to its mean, so that singular metrics do no harm."""


class Part:
    """One tensor in the product, `C -> P C Q`, on blocks that are laid out once.

    Args:
        part: The tensor, and the products before and after it.
        metric: The metric.
    """

    def __init__(self, part: Contraction, metric: Metric) -> None:
        self.matrix, self.metric, self.after = part.matrix, metric, part.after
        p, q = self.matrix.shape
        self.order = self._positions(p, self.matrix.split_outputs)  # b s o
        self.at = self._positions(q, self.matrix.split_inputs)  # b s i
        self.before = part.before
        self.n = q if part.before is None else part.before.shape[-1]
        m = p if part.after is None else part.after.shape[-2]
        small = part.after is not None and m * p * self.n <= SMALL
        self.P = self._columns() if small else None  # m (b s o)

    @cached_property
    def states(self) -> Inexact[Tensor, "b s i n"] | None:
        """`Q`; None for the identity."""
        return None if self.before is None else self.matrix.split_inputs(self.before.dense())

    @cached_property
    def felt(self) -> Inexact[Tensor, "b s i n"] | None:
        """`Q right`; None where nothing comes before and the metric is quicker by itself."""
        right = self.metric.right
        if self.before is not None:
            return self.matrix.split_inputs(self.metric.right_of(self.before))
        return right.dense()[self.at] if isinstance(right, DenseMatrix) else None

    def blocks(self) -> Inexact[Tensor, "b o i"]:
        """The tensor as it is."""
        return self.matrix.blocks()

    def core(self, C: Inexact[Tensor, "b o i"]) -> Tensor:
        """Blocks in the shape of the tensor."""
        return self.matrix.with_blocks(C)

    def weighed(self, C: Inexact[Tensor, "b o i"]) -> Inexact[Tensor, "m n"]:
        """`left P C Q right`."""
        if self.felt is None:
            return self.metric.apply(self._placed(self._inserted(C).flatten(0, 2)))
        Z = (C[:, None] @ self.felt).flatten(0, 2)
        return Metric(self.metric.left).apply(self._placed(Z))

    def pulled(self, M: Inexact[Tensor, "m n"]) -> Inexact[Tensor, "b o i"]:
        """`P.H M Q.H` on the blocks."""
        if self.P is not None:
            Y = self.P.mH @ M
        else:
            Y = (M if self.after is None else self.after.H.matmat(M))[self.order.flatten()]
        Y = Y.reshape(*self.order.shape, -1)
        Y = Y.gather(-1, self._columns_of(Y)) if self.states is None else Y @ self.states.mH
        return Y.sum(1)

    def output_blocks(self) -> Inexact[Tensor, "b o o"]:
        """The blocks of `P.H left P`, averaged over the shared positions."""
        if self.after is None:
            return self._diagonal(self.metric.left, self.order).mean(1)
        P = self._columns() if self.P is None else self.P
        weighed = Metric(self.metric.left).apply(P)
        half, weighed = (t.mH.reshape(*self.order.shape, -1) for t in (P, weighed))  # b s o m
        return (half @ weighed.mH).mean(1)

    def input_blocks(self) -> Inexact[Tensor, "b i i"]:
        """The blocks of `Q right Q.H`, summed over the shared positions."""
        if self.states is None or self.felt is None:
            return self._diagonal(self.metric.right, self.at).sum(1)
        return (self.states @ self.felt.mH).sum(1)

    def _placed(self, Z: Inexact[Tensor, "p n"]) -> Inexact[Tensor, "m n"]:
        """`P Z`, of a state in the order of the blocks."""
        if self.P is not None:
            return self.P @ Z
        Y = torch.empty_like(Z)
        Y[self.order.flatten()] = Z
        return Y if self.after is None else self.after.matmat(Y)

    def _positions(self, size: int, split: Callable[[Tensor], Tensor]) -> Tensor:
        """Where the entries of a state come to lie among the blocks."""
        count = torch.arange(size, device=self.matrix.device, dtype=torch.float64)
        return split(count[:, None])[..., 0].long()

    def _columns_of(self, Y: Inexact[Tensor, "b s o n"]) -> Tensor:
        """The columns that each block sees, where nothing comes before: b s o i."""
        return self.at[:, :, None].expand(*Y.shape[:3], self.at.shape[-1])

    def _inserted(self, C: Inexact[Tensor, "b o i"]) -> Inexact[Tensor, "b s o n"]:
        """The blocks in their columns, where nothing comes before."""
        Z = C.new_zeros(*self.order.shape, self.n)
        at = self._columns_of(Z)
        return Z.scatter_(-1, at, C[:, None].expand(at.shape))

    def _diagonal(self, M: LinearOperator | None, at: Tensor) -> Inexact[Tensor, "b s k k"]:
        """The blocks on the diagonal of a metric, at given positions."""
        if M is None:
            eye = torch.eye(at.shape[-1], dtype=self.matrix.dtype, device=at.device)
            return eye.expand(*at.shape, -1)
        return M.dense()[at[..., :, None], at[..., None, :]]

    def _columns(self) -> Inexact[Tensor, "m p"]:
        """`P`, its columns in the order of the blocks."""
        p = self.matrix.shape[-2]
        m = p if self.after is None else self.after.shape[-2]
        eye = torch.eye(m, dtype=self.matrix.dtype, device=self.matrix.device)
        return (eye if self.after is None else self.after.H.matmat(eye).mH)[:, self.order.flatten()]


def alternate(
    A: Value,
    target: Target,
    *,
    tol: float,
    steps: int,
    progress: Callable[[int, float], None] | None = None,
) -> Value:
    """Improve a value of a structure until steps gain less than `tol`; the error never grows.

    First rounds over the tensors, one after the other, which get far from any start; then steps in
    all tensors at once, whose directions remember the last ones (L-BFGS, Nocedal 1980).

    Args:
        A: Where to start; its tensors have a rule of `contractions`.
        target: The matrix to come near to, in a metric.
        tol: Relative decrease of the squared error in `WINDOW` steps below which it ends.
        steps: Most steps.
        progress: Told the step and the relative error.
    """
    whole, memory, joint = target.whole, _Memory(), False
    at = _Point.of(A, target)
    errors = [at.error]
    for step in range(steps):
        if errors[-1] <= EXACT * whole:
            break
        at = _step(at, target, memory) if joint else _round(at, target)
        errors.append(at.error)
        if progress is not None:
            progress(step + 1, (at.error / whole) ** 0.5)
        if joint and memory.ended(errors, tol):
            break
        joint = joint or at.error > (1 - TURN) * errors[-2]
    return at.A  # pyright: ignore[reportReturnType]


def in_turn(A: LinearOperator, target: Target, tensors: Iterable[int]) -> LinearOperator:
    """Some tensors, by their numbers, one after the other the best for all others."""
    at = _Point.of(A, target)
    for i in tensors:
        at = _turn(at, i, target)
    return at.A


class _Point(NamedTuple):
    """A value, `left (W - A) right`, and the squared error in the metric."""

    A: LinearOperator
    pull: Tensor
    error: float

    @staticmethod
    def of(A: LinearOperator, target: Target) -> "_Point":
        """That of a value."""
        return _Point(A, *target.pull(A))

    def moved(self, parts: dict[int, Part], moves: list[Tensor]) -> LinearOperator:
        """The value with some tensors changed by as much."""
        tensors = list(named_tensors(self.A).values())
        for (i, part), move in zip(parts.items(), moves, strict=True):
            tensors[i] = part.core(part.blocks() + move)
        return with_tensors(self.A, iter(tensors))


class _Memory:
    """Pairs of moves and changes of the gradient, and the directions that follow from them.

    All tensors together are one vector, of k numbers.
    """

    def __init__(self) -> None:
        self.moves: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.last: tuple[Tensor, Tensor] | None = None
        self.preconditioners: list[_Preconditioner] = []
        self.count = 0

    def direction(self, parts: list[Part], gradients: list[Tensor]) -> list[Tensor]:
        """Minus the inverse Hessian, as far as it is known, times the gradient."""
        x, g = _vector([part.blocks() for part in parts]), _vector(gradients)
        if self.last is not None:
            self._note(x - self.last[0], g - self.last[1])
        if self.count % REFRESH == 0:
            self.preconditioners = [_Preconditioner(part) for part in parts]
        self.count, self.last = self.count + 1, (x, g)
        return _split(-self._product(g), gradients)

    def forget(self) -> bool:
        """Start anew where a direction was of no use; whether there was something to forget."""
        had = bool(self.moves)
        self.moves, self.changes, self.last, self.count = [], [], None, 0
        return had

    def ended(self, errors: list[float], tol: float) -> bool:
        """Whether the last steps gained too little, or the last one nothing from no memory."""
        if self.count and errors[-1] >= errors[-2]:
            return not self.forget()
        return len(errors) > WINDOW and errors[-1] > (1 - tol) * errors[-1 - WINDOW]

    def _note(self, move: Inexact[Tensor, " k"], change: Inexact[Tensor, " k"]) -> None:
        """Keep a pair if the error curves upwards along it."""
        if _dot(move, change) > 1e-12 * _dot(move, move):
            self.moves = [*self.moves, move][-PAIRS:]
            self.changes = [*self.changes, change][-PAIRS:]

    def _product(self, g: Inexact[Tensor, " k"]) -> Inexact[Tensor, " k"]:
        """The two loops of L-BFGS around the preconditioner."""
        q, pairs, weights = g, list(zip(self.moves, self.changes, strict=True)), []
        for s, y in reversed(pairs):
            weights.append(_dot(s, q) / _dot(s, y))
            q = q - weights[-1] * y
        q = self._preconditioned(q)
        if pairs:  # of the length that the last step would have had (Nocedal and Wright, 7.20)
            s, y = pairs[-1]
            q = q * (_dot(s, y) / _dot(y, self._preconditioned(y)))
        for (s, y), weight in zip(pairs, reversed(weights), strict=True):
            q = q + (weight - _dot(y, q) / _dot(s, y)) * s
        return q

    def _preconditioned(self, q: Inexact[Tensor, " k"]) -> Inexact[Tensor, " k"]:
        """The inverse of the blocks of every tensor by itself."""
        every = self.preconditioners
        parts = _split(q, [D.like for D in every])
        return _vector([D.solve(t) for D, t in zip(every, parts, strict=True)])


def _vector(tensors: list[Tensor]) -> Inexact[Tensor, " k"]:
    """Tensors as one vector."""
    return torch.cat([t.flatten() for t in tensors])


def _split(x: Inexact[Tensor, " k"], like: list[Tensor]) -> list[Tensor]:
    """A vector as tensors of given shapes."""
    parts = x.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


class _Preconditioner:
    """The inverse of `C -> G_b C_b H_b`, the normal equations of every block by itself."""

    def __init__(self, part: Part) -> None:
        self.left, self.right = _inverse(part.output_blocks()), _inverse(part.input_blocks())
        self.like = part.blocks()

    def solve(self, C: Inexact[Tensor, "b o i"]) -> Inexact[Tensor, "b o i"]:
        """The blocks whose image is given."""
        return self.left @ C @ self.right


def _round(at: _Point, target: Target) -> _Point:
    """The best of each tensor for all others, one after the other."""
    for i in range(len(named_tensors(at.A))):
        at = _turn(at, i, target)
    return at


def _turn(at: _Point, i: int, target: Target) -> _Point:
    """The best of one tensor for all others."""
    part = Part(contractions(at.A)[i], target.metric)
    found = _Point.of(at.moved({i: part}, [_solved(part, part.pulled(at.pull))]), target)
    return found if found.error < at.error else at


def _step(at: _Point, target: Target, memory: _Memory) -> _Point:
    """A step in all tensors, halved until it is better."""
    parts = [Part(part, target.metric) for part in contractions(at.A)]
    d = memory.direction(parts, [-part.pulled(at.pull) for part in parts])
    for halvings in range(HALVINGS):
        moves = [t / 2**halvings for t in d]
        found = _Point.of(at.moved(dict(enumerate(parts)), moves), target)
        if found.error < at.error:
            return found
    return at


def _solved(part: Part, r: Inexact[Tensor, "b o i"]) -> Inexact[Tensor, "b o i"]:
    """Preconditioned conjugate gradients for the normal equations of one tensor."""
    inverse = _Preconditioner(part)
    x, z = torch.zeros_like(r), inverse.solve(r)
    p, rho = z, _dot(r, z)
    target = SOLVED**2 * rho
    for _ in range(SOLVE_STEPS):
        if not rho > target:
            break
        q = part.pulled(part.weighed(p))
        curvature = _dot(p, q)
        if not curvature > 0:
            break
        step = rho / curvature
        x, r = x + step * p, r - step * q
        z = inverse.solve(r)
        rho, last = _dot(r, z), rho
        p = z + rho / last * p
    return x


def _dot(X: Tensor, Y: Tensor) -> float:
    """The real inner product."""
    return float(torch.sum(X.conj() * Y).real)


def _inverse(G: Inexact[Tensor, "b o o"]) -> Inexact[Tensor, "b o o"]:
    """The inverses of positive semi-definite blocks, with a small ridge."""
    n = G.shape[-1]
    size = G.diagonal(dim1=-2, dim2=-1).real.mean(-1).clamp_min(0)
    ridge = torch.where(size > 0, RIDGE * size, torch.ones_like(size))
    eye = torch.eye(n, dtype=G.dtype, device=G.device)
    return torch.linalg.inv(G + ridge[..., None, None] * eye)
