"""Is the text written for its user? Swap the user, keep all else, and see what changes.

Inputs: the writer, the requests as they were written, and the users' training texts. For each probed row another user
is drawn; item, rating and features stay those of the prompt, so only the user's slot and route differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.faithfulness.training_texts import sampled_texts
from gavamoe.evaluation.metrics.registry import word_grams, words

if TYPE_CHECKING:
    from gavamoe.generation.generator import Explanation
    from gavamoe.generation.request import ExplanationRequest


MAX_ALIGNED_TEXTS = 100_000
"""Training texts that users' words are taken from, at most."""

Write = Callable[["list[ExplanationRequest]"], "list[Explanation]"]


@dataclass(frozen=True)
class UserSwaps:
    """N texts and what was written for another user in their place."""

    users: np.ndarray
    others: np.ndarray
    items: np.ndarray
    texts: list[str]
    swapped: list[str]


def swap_users(
    dataset: Dataset,
    requests: "Sequence[ExplanationRequest]",
    explanations: "Sequence[Explanation]",
    write: Write,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> UserSwaps:
    """Write each request of a known user anew for another known user.

    Args:
        groups: (U,) planted groups; the other user is then one of another group.
    """
    from gavamoe.generation.request import ExplanationRequest

    known = dataset.catalog.known_users
    rows = [row for row, request in enumerate(requests) if request.user < known and known > 1]
    users = np.array([requests[row].user for row in rows], dtype=np.int64)
    others = _others(users, known, groups, np.random.default_rng(seed))
    asked = [
        ExplanationRequest(
            user=int(other),
            item=requests[row].item,
            rating=explanations[row].rating,
            features=explanations[row].features,
        )
        for row, other in zip(rows, others, strict=True)
    ]
    return UserSwaps(
        users=users,
        others=others,
        items=np.array([request.item for request in asked], dtype=np.int64),
        texts=[explanations[row].text for row in rows],
        swapped=[explanation.text for explanation in write(asked)] if asked else [],
    )


def changed(swaps: UserSwaps) -> np.ndarray:
    """Whether another user gets other words: (N,) 1 or 0."""
    pairs = zip(swaps.texts, swaps.swapped, strict=True)
    return np.array([float(words(text) != words(other)) for text, other in pairs])


def user_alignment(swaps: UserSwaps, dataset: Dataset, seed: int) -> np.ndarray:
    """Whether both texts are nearer to their own user's training texts than to the other's: (N,) 1, 0, or .5 for a tie.

    With s the cosine of a text and the mean of a user's training texts (TF-IDF of words and word pairs), t and t' the
    texts for users u and v: s(t, u) + s(t', v) against s(t, v) + s(t', u). Item and features are the same in both texts
    and cancel.
    """
    texts, authors = sampled_texts(dataset, MAX_ALIGNED_TEXTS, seed, "user")
    if not swaps.texts or not any(map(words, texts)):
        return np.full(len(swaps.texts), np.nan)
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer=word_grams, sublinear_tf=True, max_features=50_000)
    training = vectors.fit_transform(texts)
    own, other = (_profiles(training, authors, users) for users in (swaps.users, swaps.others))
    written, rewritten = vectors.transform(swaps.texts), vectors.transform(swaps.swapped)
    gain = sum(
        sign * np.asarray(text.multiply(profile).sum(axis=1)).ravel()  # both of length 1: their cosine
        for sign, text, profile in (
            (1, written, own),
            (1, rewritten, other),
            (-1, written, other),
            (-1, rewritten, own),
        )
    )
    return np.where(np.abs(gain) < 1e-9, 0.5, np.where(gain > 0, 1.0, 0.0))


def _others(users: np.ndarray, known: int, groups: np.ndarray | None, random: np.random.Generator) -> np.ndarray:
    """Another known user for each, of another group where there is one."""
    everyone = np.arange(known)
    others = np.zeros_like(users)
    for row, user in enumerate(users):
        allowed = everyone[everyone != user] if groups is None else everyone[groups[:known] != groups[user]]
        others[row] = random.choice(allowed if len(allowed) else everyone[everyone != user])
    return others


def _profiles(training: Any, authors: np.ndarray, users: np.ndarray) -> np.ndarray:
    """(N, words): the mean vector of each user's training texts, of length 1."""
    from sklearn.preprocessing import normalize

    probed = np.isin(authors, users)
    return normalize(np.equal.outer(users, authors[probed]).astype(np.float64) @ training[probed])
