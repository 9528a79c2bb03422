"""Which token comes next: greedy, or drawn by a row's own random numbers.

A row's draws depend on its seed and on how many tokens it has written, never on the rows beside it.

Shape letters: B rows, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one row's text is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int = 0
    no_repeat_ngram: int = 0
    """Refuse to repeat n-grams of this length that the text has; 0: off."""
    repetition_penalty: float = 1.0
    """Makes tokens that the text already has less likely; 1: off."""
    min_new_tokens: int = 0
    """Tokens before the text may end."""


@dataclass
class Choice:
    """The state of choosing one row's tokens."""

    sampling: Sampling
    tokens: list[int]
    """Prompt and text so far."""
    end: int = -1
    """Token that ends a text."""
    draws: random.Random = field(init=False)
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.draws = random.Random(self.sampling.seed)
        self.prompt_length = len(self.tokens)

    @property
    def written(self) -> list[int]:
        """The text so far."""
        return self.tokens[self.prompt_length :]

    def banned(self) -> list[int]:
        """Tokens that can't come next: the end, where it is too early, and what would repeat an n-gram."""
        early = len(self.tokens) - self.prompt_length < self.sampling.min_new_tokens
        return self._repeated() + ([self.end] if early else [])

    def penalize(self, scores_V: Tensor) -> None:
        """Apply the repetition penalty, as transformers does, in place."""
        penalty = self.sampling.repetition_penalty
        if penalty != 1.0 and (written := self.written):
            index = torch.tensor(sorted(set(written)), device=scores_V.device)
            scores = scores_V[index]
            scores_V[index] = torch.where(scores < 0, scores * penalty, scores / penalty)

    def _repeated(self) -> list[int]:
        n = self.sampling.no_repeat_ngram
        written = self.written if n else []
        if len(written) < n or not n:
            return []
        last = written[len(written) - n + 1 :]
        starts = range(len(written) - n + 1)
        return [written[at + n - 1] for at in starts if written[at : at + n - 1] == last]


def choose_tokens(logits_BV: Tensor, choices: Sequence[Choice], forbidden: Tensor) -> list[int]:
    """The next token of each row; appends it to the row's tokens.

    Args:
        forbidden: token ids that no row may write.
    """
    scores_BV = logits_BV.float()  # as transformers' generate does, and its argmax must be ours
    if scores_BV is logits_BV:
        scores_BV = scores_BV.clone()
    scores_BV[:, forbidden] = -torch.inf
    for row, choice in enumerate(choices):
        choice.penalize(scores_BV[row])
        banned = [token for token in choice.banned() if token < scores_BV.shape[1]]
        if banned:
            scores_BV[row, banned] = -torch.inf
    tokens = scores_BV.argmax(-1).tolist()
    for row, choice in enumerate(choices):
        if choice.sampling.temperature > 0:
            tokens[row] = _draw(scores_BV[row], choice)
        choice.tokens.append(tokens[row])
    return tokens


def _draw(scores_V: Tensor, choice: Choice) -> int:
    """One draw from the tokens that make up the first `top_p` of the probability, by inverting its distribution."""
    # float64, and the sort stable: rounding must not let the rows beside this one decide between two tokens.
    probability_V = (scores_V.double() / choice.sampling.temperature).softmax(-1)
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    total_V = sorted_V.cumsum(-1)
    kept = int(torch.searchsorted(total_V, min(choice.sampling.top_p, 1.0) - 1e-12)) + 1
    kept = min(kept, len(sorted_V))
    target = choice.draws.random() * float(total_V[kept - 1])
    drawn = int(torch.searchsorted(total_V[:kept], target, right=True))
    return int(order_V[min(drawn, kept - 1)])
