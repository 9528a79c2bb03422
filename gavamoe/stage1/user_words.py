"""What users write, as evidence of their cluster beside their ratings.

A user's training texts are a bag of words drawn from the cluster's own distribution phi_c over a small vocabulary of
frequent words and punctuation marks, which carry style as much as subject. Given the clusters, phi has a closed form:

    phi_cv = (sum_u q(c|u) n_uv + m p_v) / (sum_v sum_u q(c|u) n_uv + m)        p: all users together

and a user's words count as lambda_u sum_v n_uv log(phi_cv / p_v) nats for cluster c, lambda_u = min(1, cap / words of
u): words of one user are no independent draws, and 300 words of .06 nats each would decide alone.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse  # type: ignore[import-untyped]  # comes with scikit-learn, without stubs

from gavamoe.artifacts.files import write_file
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError, one_line

PRIOR_WORDS = 300.0
"""m: occurrences at the rate of the whole that each cluster has beside its users' own."""
_COORDINATES = 24
_RANDOM_CLUSTERS, _RESAMPLES = 5, 500
WORDS_FILE = "cluster_words.parquet"
LITTLE = 0.02
"""Nats a word that clusters should tell of texts: what is lost by dividing the rows among gates is about as much."""
_TOKEN = re.compile(r"\w+|[^\w\s]")


def words_in(text: str) -> list[str]:
    """Words in lower case and single punctuation marks, in order."""
    return _TOKEN.findall(text.lower())


@dataclass(frozen=True)
class UserWords:
    """How often each of U users wrote each of V words in the training texts."""

    vocabulary: tuple[str, ...]
    """The V words, the most frequent first."""
    counts_UV: scipy.sparse.csr_matrix
    """float64 (U, V)."""

    @classmethod
    def read(cls, dataset: Dataset, size: int) -> "UserWords":
        """Count the `size` most frequent words of a dataset's training texts by known user, a batch at a time."""
        totals: Counter[str] = Counter()
        for _, text in _texts(dataset, "train"):
            totals.update(words_in(text))
        ranked = sorted(totals, key=lambda word: (-totals[word], word))
        return cls._count(_texts(dataset, "train"), ranked[:size], dataset.catalog.known_users)

    @classmethod
    def _count(cls, texts: Iterable[tuple[int, str]], vocabulary: list[str], n_users: int) -> "UserWords":
        place = {word: index for index, word in enumerate(vocabulary)}
        counts: Counter[tuple[int, int]] = Counter()
        for user, text in texts:
            if user < n_users:
                counts.update((user, place[word]) for word in words_in(text) if word in place)
        users, words = np.array(list(counts), dtype=np.int64).reshape(-1, 2).T
        values = np.fromiter(counts.values(), np.float64, len(counts))
        counts_UV = scipy.sparse.csr_matrix((values, (users, words)), shape=(n_users, len(vocabulary)))
        return cls(tuple(vocabulary), counts_UV)

    def of_splits(self, dataset: Dataset, splits: Sequence[str]) -> "UserWords":
        """The same words counted in the texts of other splits, by known users."""
        texts = (row for split in splits for row in _texts(dataset, split))
        return self._count(texts, list(self.vocabulary), self.counts_UV.shape[0])

    @property
    def totals_U(self) -> np.ndarray:
        """Words of each user: (U,)."""
        return np.asarray(self.counts_UV.sum(axis=1)).ravel()

    @property
    def rate_V(self) -> np.ndarray:
        """Each word's share of all words, none of them 0: (V,)."""
        counts_V = np.asarray(self.counts_UV.sum(axis=0)).ravel() + 1.0
        return counts_V / counts_V.sum()

    def rates_KV(self, shares_UK: np.ndarray) -> np.ndarray:
        """phi of clusters to which the users belong by `shares_UK`: (K, V), rows sum to 1."""
        counts_KV = np.asarray((self.counts_UV.T @ shares_UK).T)
        return (counts_KV + PRIOR_WORDS * self.rate_V) / (counts_KV.sum(axis=1, keepdims=True) + PRIOR_WORDS)

    def evidence_UK(self, rates_KV: np.ndarray, cap: float) -> np.ndarray:
        """Nats by which each user's words speak for each cluster, against all users together: (U, K)."""
        weight_U = np.minimum(1.0, cap / np.maximum(self.totals_U, 1.0))
        return np.asarray(weight_U[:, None] * (self.counts_UV @ np.log(rates_KV / self.rate_V).T))

    def coordinates(self, seed: int) -> np.ndarray:
        """Leading singular vectors of the users' words (logarithms of counts, rare words weighing more, each user of
        length 1), without the first, which is what all share: (U, R), R = 0 for fewer than three words or users."""
        from sklearn.decomposition import TruncatedSVD

        users_V = np.asarray((self.counts_UV > 0).sum(axis=0)).ravel()
        weighted = self.counts_UV.copy()
        weighted.data = np.log1p(weighted.data)
        weighted = weighted @ scipy.sparse.diags(np.log((1 + len(self.totals_U)) / (1 + users_V)) + 1)
        length_U = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
        weighted = scipy.sparse.diags(1 / np.maximum(length_U, 1e-9)) @ weighted
        kept = min(_COORDINATES + 1, *(size - 1 for size in weighted.shape))
        if kept < 2:  # of one or two words, what is not shared by all is nothing to measure distances by
            return np.zeros((len(self.totals_U), 0))
        return np.asarray(TruncatedSVD(kept, random_state=seed).fit_transform(weighted)[:, 1:])


@dataclass(frozen=True)
class ClusterWords:
    """How often users of K clusters write each of V words, as an artifact keeps it: no text, and nobody's counts."""

    vocabulary: tuple[str, ...]
    """The V words."""
    rate_V: np.ndarray
    """Each word's share of all users' words: float64 (V,)."""
    rates_KV: np.ndarray
    """phi: each word's share of a cluster's words, float64 (K, V)."""

    @classmethod
    def of(cls, words: UserWords, home_U: np.ndarray, clusters: int) -> "ClusterWords":
        """The words of users by the cluster of each, `home_U` (U,)."""
        return cls(words.vocabulary, words.rate_V, words.rates_KV(np.eye(clusters)[home_U]))

    def evidence_K(self, texts: Iterable[str], cap: float) -> np.ndarray:
        """Nats by which a user's texts speak for each cluster, against all users together; see the module: (K,)."""
        counts = Counter(self._place[word] for text in texts for word in words_in(text) if word in self._place)
        if not counts:
            return np.zeros(len(self.rates_KV))
        places, times = np.array(list(counts)), np.array(list(counts.values()), np.float64)
        return np.asarray(min(1.0, cap / times.sum()) * (np.log(self.lift_KV[:, places]) @ times))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.vocabulary)}

    @property
    def lift_KV(self) -> np.ndarray:
        """How much more frequent each word is in a cluster than overall: (K, V)."""
        return np.asarray(self.rates_KV / self.rate_V)

    def save(self, folder: Path) -> None:
        """Write an artifact's file."""
        columns = [pa.array(self.vocabulary), pa.array(self.rate_V)]
        names = ["word", "all", *(str(cluster) for cluster in range(len(self.rates_KV)))]
        with write_file(Path(folder) / WORDS_FILE) as path:
            pq.write_table(pa.table([*columns, *map(pa.array, self.rates_KV)], names=names), path, compression="zstd")

    @classmethod
    def load(cls, folder: Path, clusters: int) -> "ClusterWords | None":
        """Read an artifact's; None for one without texts, or of a version that kept none.

        Raises:
            InputError: the file is damaged, or of another number of clusters.
        """
        path = Path(folder) / WORDS_FILE
        if not path.is_file():
            return None
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: can't be read ({one_line(error)})") from error
        if table.column_names != ["word", "all", *map(str, range(clusters))]:
            raise InputError(
                f"{path}: columns {', '.join(table.column_names)[:80]}; expected those of {clusters} clusters"
            )
        rates_KV = np.stack([table[name].to_numpy() for name in table.column_names[2:]])
        rate_V = table["all"].to_numpy()
        if not ((rates_KV > 0).all() and (rate_V > 0).all()):
            raise InputError(f"{path}: has shares that are not above 0")
        return cls(tuple(table["word"].to_pylist()), rate_V, rates_KV)


class Information(NamedTuple):
    """What users' clusters tell of texts that were not trained on, in nats a word."""

    nats: float
    """By how much a word is likelier under the words of its user's cluster than under those of all users, less the same
    for users dealt to clusters of these sizes at random."""
    interval: tuple[float, float]
    """Where that lies with a probability of 95 %: bootstrap over users."""
    words: int
    """Words that it was measured on."""


def information(
    trained: UserWords, held_out: UserWords, home_U: np.ndarray, clusters: int, seed: int
) -> Information | None:
    """Measure what clusters of users, `home_U` (U,), tell of held-out words; None without any.

    A smoothed unigram probe: an upper bound for texts that are told nothing else, for title and features take a part of
    it away. Random clusters are the control: their words are as few, and they know as little of anybody.
    """
    words = int(held_out.counts_UV.sum())
    if not words or clusters < 2:
        return None
    random = np.random.default_rng([seed, 4])
    own_U = _gain_U(trained, held_out, home_U, clusters)
    by_chance_U = np.mean(
        [_gain_U(trained, held_out, random.permutation(home_U), clusters) for _ in range(_RANDOM_CLUSTERS)], axis=0
    )
    difference_U, words_U = own_U - by_chance_U, held_out.totals_U
    drawn_SU = random.multinomial(len(words_U), np.full(len(words_U), 1 / len(words_U)), size=_RESAMPLES)
    means_S = (drawn_SU @ difference_U) / np.maximum(drawn_SU @ words_U, 1)
    low, high = np.percentile(means_S, [2.5, 97.5]).tolist()
    return Information(float(difference_U.sum() / words), (low, high), words)


def _gain_U(trained: UserWords, held_out: UserWords, home_U: np.ndarray, clusters: int) -> np.ndarray:
    """Nats that each user's held-out words gain by the user's cluster: (U,)."""
    rates_KV = trained.rates_KV(np.eye(clusters)[home_U])
    gain_UK = held_out.counts_UV @ np.log(rates_KV / trained.rate_V).T
    return np.asarray(gain_UK[np.arange(len(home_U)), home_U])


def effective(shares_K: np.ndarray) -> float:
    """The effective number of clusters of these shares, exp(entropy): K where all are as large, 1 where one has all."""
    some_K = shares_K[shares_K > 0]
    return float(np.exp(-(some_K * np.log(some_K)).sum()))


def _texts(dataset: Dataset, split: str) -> Iterable[tuple[int, str]]:
    """Users and texts of a split's rows that have a text."""
    for batch in dataset.batches(split, ["user", "text"]):
        for user, text in zip(batch["user"].to_pylist(), batch["text"].to_pylist(), strict=True):
            if text:
                yield user, text
