"""Texts as token numbers: characters, or pairs of them joined again and again.

Byte-pair encoding after Sennrich et al. (2016), arXiv:1508.07909, on characters: the most frequent
pair within words becomes a token, until there are as many as were asked for. Ties are broken by the
alphabet, so that a vocabulary is a function of the text.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

WORD = re.compile(r"\s?\S+|\s")
"""A word with the space before it, or a space alone: no token crosses from one to the next."""

Pair = tuple[str, str]


@dataclass
class Tokens:
    """A vocabulary.

    Args:
        tokens: Each token, by its number.
        ranks: For each pair that is joined, when.
    """

    tokens: list[str]
    ranks: dict[Pair, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The inverse of `tokens`."""
        self.numbers = {token: i for i, token in enumerate(self.tokens)}
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token numbers; every character must be known."""
        if not self.ranks:
            return [self.numbers[c] for c in text]
        return [i for word in WORD.findall(text) for i in self._word(word)]

    def decode(self, numbers: list[int]) -> str:
        """The text again."""
        return "".join(self.tokens[i] for i in numbers)

    def _word(self, word: str) -> list[int]:
        """One word, its pairs joined in the order in which they were learned."""
        if word not in self._known:
            parts = list(word)
            while len(parts) > 1:
                pair = min(pairwise(parts), key=self._rank)
                if pair not in self.ranks:
                    break
                parts = joined(parts, pair)
            self._known[word] = [self.numbers[p] for p in parts]
        return self._known[word]

    def _rank(self, pair: Pair) -> int:
        """When a pair is joined; the last if never."""
        return self.ranks.get(pair, len(self.ranks))


def characters(text: str) -> Tokens:
    """A token for each character.

    Examples:
        >>> characters("abba").encode("baa")
        [1, 0, 0]
    """
    return Tokens(sorted(set(text)))


def byte_pairs(text: str, size: int, alphabet: str) -> Tokens:
    """A vocabulary of `size` tokens from the pairs of a text.

    Args:
        text: What pairs are counted in.
        size: Tokens; fewer if every word is one before.
        alphabet: All characters that may come.

    Examples:
        >>> byte_pairs("low lower lowest", 9, "low erst").encode("lowest")
        [2, 8, 1, 5, 6]
    """
    words = {tuple(w): n for w, n in sorted(Counter(WORD.findall(text)).items())}
    parts, counts = [list(w) for w in words], list(words.values())
    pairs, where = _count(parts, counts)
    tokens, ranks = sorted(set(alphabet)), {}
    while len(tokens) < size and pairs:
        best = max(pairs, key=lambda p: (pairs[p], p))
        if pairs[best] < 2:
            break
        ranks[best] = len(ranks)
        if (new := "".join(best)) not in tokens:
            tokens.append(new)
        for i in sorted(where[best]):
            _move(pairs, where, parts[i], -counts[i], i)
            parts[i] = joined(parts[i], best)
            _move(pairs, where, parts[i], counts[i], i)
        pairs.pop(best, None)
    return Tokens(tokens, ranks)


def joined(parts: list[str], pair: Pair) -> list[str]:
    """A word in which a pair is one token.

    Examples:
        >>> joined(["a", "a", "a", "b"], ("a", "a"))
        ['aa', 'a', 'b']
    """
    found, i = [], 0
    while i < len(parts):
        both = tuple(parts[i : i + 2]) == pair
        found.append("".join(pair) if both else parts[i])
        i += 2 if both else 1
    return found


def _count(
    parts: list[list[str]], counts: list[int]
) -> tuple[dict[Pair, int], dict[Pair, set[int]]]:
    """How often each pair comes, and in which words."""
    pairs: dict[Pair, int] = {}
    where: dict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(parts):
        _move(pairs, where, word, counts[i], i)
    return pairs, where


def _move(
    pairs: dict[Pair, int],
    where: dict[Pair, set[int]],
    word: list[str],
    count: int,
    i: int,
) -> None:
    """Add the pairs of a word to the counts, or take them off."""
    for pair in pairwise(word):
        pairs[pair] = pairs.get(pair, 0) + count
        where[pair].add(i)
        if pairs[pair] <= 0:
            del pairs[pair]
