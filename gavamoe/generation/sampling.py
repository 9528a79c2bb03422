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

    def penalized(self) -> list[int]:
        """Tokens that the repetition penalty makes less likely."""
        return sorted(set(self.written)) if self.sampling.repetition_penalty != 1.0 else []

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

    All rows are chosen for together, and the device is waited for once.

    Args:
        forbidden: token ids that no row may write.
    """
    scores_BV = logits_BV.float()  # as transformers' generate does, and its argmax must be ours
    if scores_BV is logits_BV:
        scores_BV = scores_BV.clone()
    scores_BV.index_fill_(1, forbidden, -torch.inf)
    _penalize(scores_BV, choices)
    banned = [(row, token) for row, choice in enumerate(choices) for token in choice.banned()]
    if banned := [(row, token) for row, token in banned if token < scores_BV.shape[1]]:
        scores_BV[_index(banned, scores_BV.device)] = -torch.inf
    tokens_B = scores_BV.argmax(-1)
    sampled = [row for row, choice in enumerate(choices) if choice.sampling.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=scores_BV.device)
        tokens_B[rows] = _draw(scores_BV[rows], [choices[row] for row in sampled])
    tokens: list[int] = tokens_B.tolist()
    for choice, token in zip(choices, tokens, strict=True):
        choice.tokens.append(token)
    return tokens


def _penalize(scores_BV: Tensor, choices: Sequence[Choice]) -> None:
    """Apply the rows' repetition penalties, as transformers does, in place."""
    written = [(row, token) for row, choice in enumerate(choices) for token in choice.penalized()]
    if not written:
        return
    index = _index(written, scores_BV.device)
    penalty = _column([choices[row].sampling.repetition_penalty for row, _ in written], scores_BV)
    scores = scores_BV[index]
    scores_BV[index] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _draw(scores_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """A draw for each of R rows from the tokens that make up the first `top_p` of its probability, by inverting its
    distribution: int64 (R,)."""
    # float64, and the sort stable: rounding must not let the rows beside one decide between two of its tokens.
    wide = scores_RV.double()
    probability_RV = (wide / _column([each.sampling.temperature for each in choices], wide)[:, None]).softmax(-1)
    sorted_RV, order_RV = probability_RV.sort(descending=True, stable=True)
    total_RV = sorted_RV.cumsum(-1)
    top_R1 = _column([min(each.sampling.top_p, 1.0) - 1e-12 for each in choices], wide)[:, None]
    last_R1 = torch.searchsorted(total_RV, top_R1).clamp_(max=scores_RV.shape[1] - 1)
    target_R1 = _column([each.draws.random() for each in choices], wide)[:, None] * total_RV.gather(1, last_R1)
    drawn_R1 = torch.minimum(torch.searchsorted(total_RV, target_R1, right=True), last_R1)
    return order_RV.gather(1, drawn_R1)[:, 0]


def _index(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of some entries."""
    rows, columns = torch.tensor(pairs, device=device).T
    return rows, columns


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)
