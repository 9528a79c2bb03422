"""Words as evidence of clusters: counted by user, in closed form, and what clusters tell of texts, against chance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bare_dataset import bare_dataset
from helpers.tiny import tiny_stage1
from sklearn.metrics import adjusted_rand_score

from gavamoe.stage1.mixture_init import UserClusters, cluster_users, principal_points
from gavamoe.stage1.user_words import PRIOR_WORDS, UserWords, effective, information, words_in

STYLES = ("honestly i think it is !", "notes of malt and hops , dry ;", "via phone - for $ 3")


def written(users: int, texts: int, mixed: float, seed: int = 0) -> tuple[UserWords, UserWords, np.ndarray]:
    """Words of users with one of three styles each, a share of which is everybody's: of training and held-out texts."""
    random = np.random.default_rng(seed)
    group_U = random.integers(3, size=users)
    common = "the beer was good and we had it with food".split()
    rows = []
    for _ in range(2 * texts):
        for user, group in enumerate(group_U):
            own = STYLES[group].split()
            rows.append((user, " ".join(random.choice(common if random.random() < mixed else own) for _ in range(8))))
    half = len(rows) // 2
    vocabulary = sorted({word for _, text in rows for word in words_in(text)})
    return (
        UserWords._count(rows[:half], vocabulary, users),
        UserWords._count(rows[half:], vocabulary, users),
        group_U,
    )


def points(embedding_UE: np.ndarray, clusters: int = 3) -> np.ndarray:
    blocks = [torch.from_numpy(part) for part in np.array_split(embedding_UE, 3)]
    return principal_points(lambda: blocks, embedding_UE.shape, clusters)


def test_words_and_marks_are_counted_by_known_user(tmp_path: Path) -> None:
    data = bare_dataset(
        tmp_path / "data", ["Good, GOOD beer!", "so-so", "\u00dcber \U0001f37a good", "", "held", "out"]
    )
    words = UserWords.read(data, 100)
    first, second = (dict(zip(words.vocabulary, row, strict=True)) for row in words.counts_UV.toarray())
    assert words.vocabulary[0] == "good"
    assert (first["good"], first["\U0001f37a"], first["\u00fcber"], first[","]) == (3, 1, 1, 1)
    assert (second["so"], second["-"], second["good"]) == (2, 1, 0)
    assert words.totals_U.tolist() == [8, 3]
    assert "held" not in words.vocabulary
    assert UserWords.read(data, 1).vocabulary == ("good",)
    assert words.of_splits(data, ("valid", "test")).totals_U.tolist() == [0, 0]


def test_rates_are_the_closed_form() -> None:
    words, _, _ = written(30, 3, 0.5)
    shares_UK = np.random.default_rng(1).dirichlet(np.ones(3), size=30)
    rates_KV = words.rates_KV(shares_UK)
    counts = words.counts_UV.toarray()
    for k in range(3):
        by_hand = (shares_UK[:, k] @ counts + PRIOR_WORDS * words.rate_V) / (
            (shares_UK[:, k] @ counts).sum() + PRIOR_WORDS
        )
        np.testing.assert_allclose(rates_KV[k], by_hand)
    np.testing.assert_allclose(rates_KV.sum(axis=1), 1)
    evidence_UK = words.evidence_UK(rates_KV, cap=10)
    by_hand_UK = counts @ np.log(rates_KV / words.rate_V).T * np.minimum(1, 10 / counts.sum(axis=1))[:, None]
    np.testing.assert_allclose(evidence_UK, by_hand_UK)


@pytest.mark.parametrize("seed", [0, 1])
def test_users_are_clustered_by_words_where_embeddings_say_nothing(seed: int) -> None:
    words, held_out, group_U = written(300, 4, 0.6, seed)
    noise_UE = np.random.default_rng(seed).normal(size=(300, 8))
    config = tiny_stage1().stage1
    found = cluster_users(points(noise_UE), config, seed, words).argmax(axis=1)
    assert adjusted_rand_score(group_U, found) > 0.9
    alone = cluster_users(points(noise_UE), config, seed).argmax(axis=1)
    assert adjusted_rand_score(group_U, alone) < 0.1
    told = information(words, held_out, found, 3, seed)
    assert told is not None
    assert told.nats > 0.2
    assert told.interval[0] < told.nats < told.interval[1]


def test_embeddings_decide_where_words_say_nothing() -> None:
    words, _, group_U = written(300, 4, 1.0)
    embedding_UE = np.eye(3)[group_U] * 8 + np.random.default_rng(0).normal(size=(300, 3))
    found = cluster_users(points(embedding_UE), tiny_stage1().stage1, 0, words).argmax(axis=1)
    assert adjusted_rand_score(group_U, found) > 0.95


def test_clusters_without_meaning_tell_nothing() -> None:
    words, held_out, _ = written(300, 4, 0.6)
    chance_U = np.random.default_rng(5).integers(3, size=300)
    told = information(words, held_out, chance_U, 3, 0)
    assert told is not None
    assert told.interval[0] < 0 < told.interval[1]
    assert told.words == int(held_out.counts_UV.sum())


def test_one_cluster_or_no_text_tells_nothing_at_all() -> None:
    words, held_out, _ = written(20, 2, 0.5)
    assert information(words, held_out, np.zeros(20, np.int64), 1, 0) is None
    silent = UserWords._count([], list(words.vocabulary), 20)
    assert information(words, silent, np.zeros(20, np.int64), 3, 0) is None
    np.testing.assert_array_equal(silent.evidence_UK(silent.rates_KV(np.full((20, 3), 1 / 3)), 100), np.zeros((20, 3)))


@pytest.mark.parametrize(
    ("shares", "expected"), [([1.0, 0, 0], 1.0), ([1 / 3] * 3, 3.0), ([0.5, 0.5, 0.0], 2.0), ([0.8, 0.02, 0.18], 1.76)]
)
def test_effective_clusters(shares: list[float], expected: float) -> None:
    assert effective(np.array(shares)) == pytest.approx(expected, abs=0.01)


def test_the_users_clusters_are_where_the_bound_is_largest_and_tight() -> None:
    """With words alone the bound's largest value is log p(w) itself, and q(c|u) is the posterior by Bayes' rule."""
    words, _, _ = written(users=12, texts=2, mixed=0.3)
    start_UK = np.random.default_rng(0).dirichlet(np.ones(3), size=12)
    clusters = UserClusters(start_UK, words, cap=1e9)
    weights_K = np.array([0.2, 0.3, 0.5])
    clusters.update(torch.from_numpy(np.log(weights_K)), 1, "cpu")
    q_UK = clusters.log_q[:-1].exp().double().numpy()
    rates_KV = words.rates_KV(np.exp(np.log(start_UK)))
    joint_UK = np.log(weights_K) + words.counts_UV @ np.log(rates_KV / words.rate_V).T
    evidence_U = np.logaddexp.reduce(joint_UK, axis=1)

    def bound(q_UK: np.ndarray) -> np.ndarray:
        return (q_UK * (joint_UK - np.log(q_UK))).sum(axis=1)

    assert bound(q_UK) == pytest.approx(evidence_U, abs=1e-4)
    random = np.random.default_rng(1)
    for _ in range(50):
        other_UK = 0.9 * q_UK + 0.1 * random.dirichlet(np.ones(3), size=12)
        assert (bound(other_UK) <= evidence_U + 1e-9).all()


def test_words_move_a_user_between_clusters_and_without_weight_nothing_does() -> None:
    words, _, group_U = written(60, 4, 0.3)
    even_UK = np.full((60, 3), 1 / 3)
    start_UK = 0.9 * np.eye(3)[group_U] + 0.1 / 3
    start_UK[0] = even_UK[0]
    for cap, expected in ((100.0, 0.95), (0.0, 0.0)):
        clusters = UserClusters(start_UK, words if cap else None, cap)
        clusters.update(torch.zeros(3).log_softmax(0), 1, "cpu")
        share = clusters.log_q[0].exp()[group_U[0]].item()
        assert share >= expected
        assert cap or share == pytest.approx(1 / 3)


@pytest.mark.parametrize("texts", [["good"], ["good", "good beer"], ["", "x"]])
def test_hardly_a_word_changes_nothing(texts: list[str]) -> None:
    rows = [(user, texts[user % len(texts)]) for user in range(40)]
    vocabulary = sorted({word for _, text in rows for word in words_in(text)})
    words = UserWords._count(rows, vocabulary, 40)
    embedding_UE = np.random.default_rng(0).normal(size=(40, 4))
    embedding_UE[:20] += 5
    found = cluster_users(points(embedding_UE, 2), tiny_stage1(clusters=2).stage1, 0, words).argmax(axis=1)
    assert adjusted_rand_score(found, np.arange(40) < 20) == 1
