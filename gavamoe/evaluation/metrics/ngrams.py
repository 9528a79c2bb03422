"""What two sequences of tokens have in common: n-grams, longest common subsequence."""

from collections import Counter
from collections.abc import Sequence

Gram = tuple[str, ...]


def ngrams(tokens: Sequence[str], order: int) -> list[Gram]:
    """All n-grams in order; [] for fewer tokens than `order`."""
    return list(zip(*(tokens[start:] for start in range(order)), strict=False))


def matches(first: Counter[Gram], second: Counter[Gram]) -> int:
    """How many n-grams both have, each as often as it occurs in both (BLEU's clipped count)."""
    return sum(min(count, second[gram]) for gram, count in first.items() if gram in second)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of one big integer (Hyyrö 2004): memory linear in `first`."""
    places: dict[str, int] = {}
    for position, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << position
    everything = (1 << len(first)) - 1
    row = everything  # a 0 bit marks a position at which the subsequence grew
    for token in second:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(first) - row.bit_count()
