"""Synthetic data with a known truth: planted user groups, ratings of known noise, explanations by a grammar.

    rating = clip(round(3 + taste[group, genre] + user offset + item offset + noise), 1, 5)

A group's taste averages to zero over genres, and a genre's over groups, so a user + item bias model sees
none of it. The explanation names one or two of the item's features (the group has favorites among them)
in the group's style with words of the rating's sentiment (`grammar`). A few newcomers, users and items of
little activity, occur in the validation and test splits only.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import write_folder, write_json
from gavamoe.data.dataset import ROW_GROUP_ROWS, TRUTH_SCHEMA
from gavamoe.data.ratings import PLANTED_SCALE
from gavamoe.data.synthetic import grammar
from gavamoe.data.writer import DatasetWriter, Rows
from gavamoe.errors import InputError

MIDDLE, LOWEST, HIGHEST = 3.0, 1, 5
TASTE = 1.5
"""Taste at gap 1 of the group that likes a genre best, in rating units; the one that likes it least has -TASTE."""
OFFSET_STD = 0.25
"""Standard deviation of user offsets, and of item offsets."""
DEFAULT_NOISE = 0.7
NEWCOMER_USERS, NEWCOMER_ITEMS = 0.02, 0.01
MAX_DENSITY = 0.7
"""Largest share of all pairs that may have a rating: distinct pairs are drawn by rejection."""
MAX_RATINGS = 100_000_000
_ITEM_FEATURES = 4
_TAKES_FAVORITE = 0.75


class _World(NamedTuple):
    """The planted truth: groups, genres, tastes, offsets and newcomers."""

    group_U: np.ndarray
    """Group of each user."""
    genre_I: np.ndarray
    """Genre of each item."""
    features_IF: np.ndarray
    """Features of each item, as positions in its genre's list."""
    taste_GC: np.ndarray
    """What each group adds to the ratings of each genre."""
    offset_U: np.ndarray
    """What each user adds to his or her ratings."""
    offset_I: np.ndarray
    """What is added to each item's ratings."""
    new_user_U: np.ndarray
    """Whether each user is a newcomer, who occurs in the validation and test splits only."""
    new_item_I: np.ndarray
    """Whether each item is a newcomer, which occurs in the validation and test splits only."""


def synthesize(
    out: Path,
    *,
    users: int = 2000,
    items: int = 1000,
    ratings: int = 60_000,
    groups: int = 3,
    gap: float = 1.0,
    noise: float = DEFAULT_NOISE,
    seed: int = 0,
) -> Path:
    """Write a synthetic dataset to the new folder `out` and return its path. Equal arguments give equal bytes.

    Args:
        ratings: distinct (user, item) pairs over all splits.
        groups: planted user groups, 1 to 6.
        gap: how far the groups' tastes lie apart; 1 is easy, .5 hard, 0 leaves nothing to find.
        noise: standard deviation of the rating noise.

    Raises:
        InputError: `out` exists or an argument is outside its bounds.
    """
    _check(users, items, ratings, groups, gap, noise)
    with write_folder(Path(out)) as folder:
        rng = np.random.default_rng(seed)
        world = _make_world(rng, users, items, groups, gap)
        user_N, item_N = _draw_pairs(rng, world, ratings)
        mean_N = _mean_ratings(world, user_N, item_N)
        rating_N = np.clip(np.round(mean_N + rng.normal(0.0, noise, ratings)), LOWEST, HIGHEST).astype(np.float32)
        split_N = _draw_splits(rng, world, user_N, item_N)
        rows = Rows(
            users=[f"U{number:06d}" for number in range(users)],
            items=[f"I{number:06d}" for number in range(items)],
            titles=[grammar.title(number) for number in range(items)],
            user=user_N,
            item=item_N,
            rating=rating_N,
            split=split_N,
        )
        with DatasetWriter(folder, rows) as writer:
            for text, features in _explanations(rng, world, user_N, item_N, rating_N):
                writer.write(text, features)
            writer.finish(
                source="synthetic",
                format="synthetic",
                text_mode="explanation",
                seed=seed,
                split="8:1:1",
                preparation={"rows read": ratings, "rows kept": ratings},
                bounds=(LOWEST, HIGHEST),
            )
            index_U = writer.user_index
        expected_N = expected_rating(mean_N, noise)
        _write_truth(folder, world, rows, expected_N, index_U, {"seed": seed, "gap": gap, "noise": noise})
    return Path(out)


def _check(users: int, items: int, ratings: int, groups: int, gap: float, noise: float) -> None:
    most = min(MAX_RATINGS, int(users * items * MAX_DENSITY))
    for name, value, low, high in (
        ("users", users, 10, 10_000_000),
        ("items", items, 10, 10_000_000),
        ("groups", groups, 1, len(grammar.STYLES)),
        ("ratings", ratings, 100, most),
        ("gap", gap, 0.0, 3.0),
        ("noise", noise, 0.0, 10.0),
    ):
        if not low <= value <= high:
            raise InputError(f"{name}: {value} is outside {low}..{high}")


def _make_world(rng: np.random.Generator, users: int, items: int, groups: int, gap: float) -> _World:
    genres = min(max(2 * groups, 4), len(grammar.GENRES))
    n_features = len(next(iter(grammar.GENRES.values())))
    levels = np.linspace(TASTE, -TASTE, groups) if groups > 1 else np.zeros(1)
    # even genres rotate the ranking of the groups, odd ones mirror the rotation: rows and columns sum to zero
    order_GC = (np.arange(groups)[:, None] + np.arange(genres) // 2) % groups
    order_GC[:, 1::2] = groups - 1 - order_GC[:, 1::2]
    return _World(
        group_U=rng.permutation(np.arange(users) % groups).astype(np.int32),
        genre_I=rng.permutation(np.arange(items) % genres).astype(np.int32),
        features_IF=rng.permuted(np.tile(np.arange(n_features), (items, 1)), axis=1)[:, :_ITEM_FEATURES],
        taste_GC=gap * levels[order_GC],
        offset_U=rng.normal(0.0, OFFSET_STD, users),
        offset_I=rng.normal(0.0, OFFSET_STD, items),
        new_user_U=_newcomers(rng, users, NEWCOMER_USERS),
        new_item_I=_newcomers(rng, items, NEWCOMER_ITEMS),
    )


def _newcomers(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    chosen = np.zeros(count, dtype=bool)
    chosen[rng.permutation(count)[: max(1, round(share * count))]] = True
    return chosen


def _draw_pairs(rng: np.random.Generator, world: _World, ratings: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (user, item) pairs in random order, int32 (N,) each; activity and popularity have long tails."""
    activity_U = np.where(world.new_user_U, 0.1, rng.lognormal(0.0, 0.5, len(world.group_U)))
    popularity_I = np.where(world.new_item_I, 0.1, rng.lognormal(0.0, 0.7, len(world.genre_I)))
    user_ends, item_ends = (np.cumsum(weight) / np.sum(weight) for weight in (activity_U, popularity_I))
    users, items = len(user_ends), len(item_ends)
    pairs = np.empty(0, dtype=np.int64)
    for attempt in range(1000):
        missing = ratings - len(pairs)
        if missing == 0:
            break
        if attempt < 10:
            user, item = (np.searchsorted(ends, rng.random(missing), side="right") for ends in (user_ends, item_ends))
        else:  # nearly full rows and columns: what is left is drawn evenly
            user, item = rng.integers(users, size=missing), rng.integers(items, size=missing)
        pairs = np.unique(np.concatenate([pairs, user * items + item]))
    pairs = rng.permutation(pairs)
    return (pairs // items).astype(np.int32), (pairs % items).astype(np.int32)


def _mean_ratings(world: _World, user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
    taste_N = world.taste_GC[world.group_U[user_N], world.genre_I[item_N]]
    return MIDDLE + taste_N + world.offset_U[user_N] + world.offset_I[item_N]


def _draw_splits(rng: np.random.Generator, world: _World, user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
    """int8 (N,): 8:1:1, with every newcomer's row in the validation or test split."""
    count = len(user_N)
    new_N = world.new_user_U[user_N] | world.new_item_I[item_N]
    order = np.argsort(rng.random(count) - new_N, kind="stable")  # newcomers come first
    split_N = np.zeros(count, dtype=np.int8)
    held_out = order[: max(round(0.2 * count), int(new_N.sum()))]
    split_N[held_out] = 1 + np.arange(len(held_out)) % 2
    return split_N


def _explanations(
    rng: np.random.Generator, world: _World, user_N: np.ndarray, item_N: np.ndarray, rating_N: np.ndarray
) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Text string (R,) and features list<string> (R,) for each batch of rows."""
    bank = list(grammar.GENRES.values())
    for start in range(0, len(user_N), ROW_GROUP_ROWS):
        span = slice(start, start + ROW_GROUP_ROWS)
        group, item = world.group_U[user_N[span]], item_N[span]
        chosen = _choose_features(rng, world, group, item)
        draws = rng.integers(0, 60, (len(group), 4))  # 60 is a multiple of every number of choices
        texts, features = [], []
        for g, genre, places, rating, draw in zip(
            group.tolist(), world.genre_I[item].tolist(), chosen, rating_N[span].tolist(), draws.tolist(), strict=True
        ):
            words = tuple(bank[genre][place] for place in places)
            texts.append(grammar.sentence(grammar.STYLES[g], PLANTED_SCALE.sentiment(rating), words, tuple(draw)))
            features.append(words)
        yield pa.array(texts, pa.string()), pa.array(features, pa.list_(pa.string()))


def _choose_features(
    rng: np.random.Generator, world: _World, group: np.ndarray, item: np.ndarray
) -> list[tuple[int, ...]]:
    """One or two positions in the genre's features for each row: mostly the group's favorites among the item's."""
    has = world.features_IF[item]
    groups = len(world.taste_GC)
    favorite = has % groups == group[:, None]
    takes = rng.random((len(item), 1)) < _TAKES_FAVORITE
    score = rng.random(has.shape) + (favorite & takes)
    best = np.take_along_axis(has, np.argsort(-score, axis=1), axis=1)
    both = rng.random(len(item)) < 0.5
    return [(a, b) if two else (a,) for a, b, two in zip(*best[:, :2].T.tolist(), both.tolist(), strict=True)]


def expected_rating(mean: np.ndarray, noise: float) -> np.ndarray:
    """E[clip(round(mean + noise), 1, 5)] (N,) for Gaussian noise: 1 plus the chance of passing each half step."""
    if noise == 0:
        return np.clip(np.round(mean), LOWEST, HIGHEST)
    erf = np.vectorize(math.erf, otypes=[float])
    expected = np.full(len(mean), float(LOWEST))
    for step in range(LOWEST, HIGHEST):
        expected += 0.5 * (1.0 + erf((mean - (step + 0.5)) / (noise * math.sqrt(2.0))))
    return expected


def bias_model_rmse(user: np.ndarray, item: np.ndarray, rating: np.ndarray, split: np.ndarray) -> float:
    """RMSE on the test rows of mean + user bias + item bias, fitted to the training rows.

    A ridge of strength 5 (each bias is shrunk as if five more ratings sat at the mean).
    """
    training, test = split == 0, split == 2
    mean = float(rating[training].mean(dtype=np.float64))
    biases = {"user": np.zeros(user.max() + 1), "item": np.zeros(item.max() + 1)}
    codes = {"user": user, "item": item}
    for _ in range(20):  # alternating exact solutions; converges in a few rounds
        for one, other in (("user", "item"), ("item", "user")):
            residual = rating[training] - mean - biases[other][codes[other][training]]
            size = len(biases[one])
            sums = np.bincount(codes[one][training], residual, size)
            biases[one] = sums / (np.bincount(codes[one][training], minlength=size) + 5.0)
    predicted = mean + biases["user"][user[test]] + biases["item"][item[test]]
    return _rmse(predicted, rating[test])


def _rmse(predicted: np.ndarray, observed: np.ndarray) -> float:
    return float(np.sqrt(np.mean((predicted - observed.astype(np.float64)) ** 2)))


def _write_truth(
    folder: Path,
    world: _World,
    rows: Rows,
    expected_N: np.ndarray,
    index_U: np.ndarray,
    settings: dict[str, float],
) -> None:
    test = rows.split == 2
    write_json(
        folder / "truth.json",
        {
            "groups": len(world.taste_GC),
            **settings,
            "noise_floor_rmse": _rmse(expected_N, rows.rating),
            "oracle_rmse": _rmse(expected_N[test], rows.rating[test]),
            "bias_rmse": bias_model_rmse(rows.user, rows.item, rows.rating, rows.split),
            "sentiment_words": grammar.sentiment_words(),
        },
    )
    present = np.flatnonzero(index_U >= 0)
    order = present[np.argsort(index_U[present])]
    columns = [pa.array(np.arange(len(order), dtype=np.int32)), pa.array(world.group_U[order])]
    pq.write_table(pa.table(columns, schema=TRUTH_SCHEMA), folder / "truth_users.parquet")
