"""Scores of attention that are members of a structure, in the place of `q_i . k_j`.

*Multi-level low rank* is a structure of the matrix of all scores of a head: tokens are halved again
and again, and level `l` adds `q_i^(l) . k_j^(l)` where `i` and `j` are in the same of its `2^l`
blocks. The features of a head are split over the levels; far pairs see the coarse ones only.

Any other structure is one of a *bilinear form* of each head, `h_i' M h_j`, full rank where that of
a usual head is the number of its features.

Source of both: Kuang, Potapczynski, Wilson et al. (2025), arXiv:2509.07963.

Shapes: b = examples, h = heads, t = tokens, d = features of a head, e = those of a value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.structures import MultiLevelLowRank, parse


@dataclass(frozen=True)
class Products:
    """`softmax(q k' 8 / d) v`.

    Args:
        causal: A token sees itself and those before it.
    """

    causal: bool = False

    def __call__(
        self, q: Float[Tensor, "b h t d"], k: Float[Tensor, "b h t d"], v: Float[Tensor, "b h t e"]
    ) -> Float[Tensor, "b h t e"]:
        """The weighted sums of the values."""
        scale = 8 / q.shape[-1]
        return nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=scale
        )

    def macs(self, tokens: int, d: int) -> int:
        """Multiply-adds of the scores of a head."""
        return d * pairs(tokens, causal=self.causal)


@dataclass(frozen=True)
class Levels:
    """The same with multi-level scores.

    Args:
        ranks: Shares of the features that the levels have, coarse to fine.
        causal: A token sees itself and those before it.

    Examples:
        >>> levels = Levels((2, 1, 1))
        >>> levels.features(16), levels.macs(8, 16), Products().macs(8, 16)
        ([8, 4, 4], 704, 1024)
    """

    ranks: tuple[int, ...]
    causal: bool = False

    def __call__(
        self, q: Float[Tensor, "b h t d"], k: Float[Tensor, "b h t d"], v: Float[Tensor, "b h t e"]
    ) -> Float[Tensor, "b h t e"]:
        """The weighted sums of the values."""
        t, d = q.shape[-2:]
        S = self.scores(q, k)[..., :t, :t] * (8 / d)
        if self.causal:
            later = torch.ones(t, t, dtype=torch.bool, device=S.device).triu(1)
            S = S.masked_fill(later, -torch.inf)
        return S.softmax(-1) @ v

    def scores(
        self, q: Float[Tensor, "b h t d"], k: Float[Tensor, "b h t d"]
    ) -> Float[Tensor, "b h s s"]:
        """The sum over the levels, of tokens padded to equal blocks; from fine to coarse."""
        Q, K = self.parts(q), self.parts(k)
        S = Q[-1] @ K[-1].mT
        for a, b in zip(Q[-2::-1], K[-2::-1], strict=True):
            c = S.shape[-1]
            upper = nn.functional.pad(S[..., ::2, :, :], (0, c))
            lower = nn.functional.pad(S[..., 1::2, :, :], (c, 0))
            S = torch.cat([upper, lower], -2) + a @ b.mT
        return S.squeeze(-3)

    def parts(self, x: Float[Tensor, "b h t d"]) -> list[Float[Tensor, "b h p c r"]]:
        """The features of each level, coarse to fine, its tokens in blocks.

        Rotary positions turn the pairs `(x[f], x[f + d / 2])`, the first ones fastest: pairs stay
        together, and slow ones go to the coarse levels, which see far.
        """
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % 2 ** (len(self.ranks) - 1)))
        sizes = [r // 2 for r in self.features(x.shape[-1])]
        split = x.unflatten(-1, (2, -1)).flip(-1).split(sizes, -1)
        return [u.flatten(-2).unflatten(-2, (2**level, -1)) for level, u in enumerate(split)]

    def features(self, d: int) -> list[int]:
        """How many features each level has: even numbers in the ratio of the ranks.

        Raises:
            ValueError: If there are none.
        """
        total = sum(self.ranks)
        if not self.ranks or min(self.ranks) < 1 or d % (2 * total):
            raise ValueError(
                f"score mlr{self.ranks}: heads of {d} features do not split so into pairs.\n"
                f"The ranks are shares, positive, and twice their sum, {2 * total}, must divide "
                "the features of a head.\nGive another width, fewer heads, or other ranks."
            )
        return [d * r // total for r in self.ranks]

    def macs(self, tokens: int, d: int) -> int:
        """Multiply-adds of the scores of a head."""
        blocks = [-(-tokens // 2**level) for level in range(len(self.ranks))]
        return sum(
            r * 2**level * pairs(c, causal=self.causal)
            for level, (r, c) in enumerate(zip(self.features(d), blocks, strict=True))
        )


class Forms(nn.Module):
    """`M_h x` for each head: what the bilinear form of a head makes of a token.

    Args:
        width: Features of a token.
        heads: Heads.
        linear: Makes the matrix of a head.
    """

    def __init__(self, width: int, heads: int, linear: Callable[..., nn.Module]) -> None:
        super().__init__()
        made = [linear(width, width, bias=False, zero_init=True) for _ in range(heads)]
        self.heads = nn.ModuleList(made)

    def forward(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b t hw"]:
        """All heads beside each other."""
        return torch.cat([M(x) for M in self.heads], -1)


class Repeat(nn.Module):
    """The token itself for each head.

    Args:
        heads: How many.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b t hw"]:
        """All heads beside each other."""
        return x.repeat(1, 1, self.heads)


def pairs(tokens: int, *, causal: bool) -> int:
    """Pairs of tokens that see each other; a causal score counts its own half only."""
    return tokens * (tokens + 1) // 2 if causal else tokens**2


def attention_options(
    score: str, width: int, heads: int, make: Callable[[str], Callable[..., nn.Module]]
) -> dict[str, Any]:
    """What an `Attention` is given for a score.

    Args:
        score: A structure as text; empty for `q . k`.
        width: Features of a token.
        heads: Heads.
        make: Makes layers of a structure.

    Raises:
        ValueError: If it is no structure, or does not fit.
    """
    if not score:
        return {"mix": Products(causal=True), "features": width // heads}
    recipe = parse(score)
    if isinstance(recipe, MultiLevelLowRank):
        levels = Levels(tuple(recipe.ranks), causal=True)
        levels.features(width // heads)
        return {"mix": levels, "features": width // heads}
    pair = (Repeat(heads), Forms(width, heads, make(score)))
    return {"mix": Products(causal=True), "features": width, "pair": pair}
