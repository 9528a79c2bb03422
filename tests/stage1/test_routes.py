"""Routes: the same for a pair in any batch, process and order; what a cluster is, in words; the latent map."""

import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny import tiny_stage1

from gavamoe.data.dataset import SPLITS, Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.report.latent_map import plot_latents
from gavamoe.stage1.artifact import load_vae_gmm, save_vae_gmm
from gavamoe.stage1.clusters import _rating_gaps, describe_clusters
from gavamoe.stage1.routes import (
    Routes,
    TrainingPairs,
    mean_by_user,
    read_routes,
    route_pairs,
    user_group_ari,
    user_responsibilities,
    write_routes,
)
from gavamoe.stage1.vae_gmm import VaeGmm


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Dataset:
    return open_dataset(tiny_dataset)


@pytest.fixture(scope="module")
def model(dataset: Dataset) -> VaeGmm:
    """Untrained, with a mixture that uses all its clusters; dropout would show a route made in training mode."""
    torch.manual_seed(0)
    config = tiny_stage1(latent_size=6, dropout=0.5).stage1
    catalog = dataset.catalog
    model = VaeGmm(config, catalog.known_users, catalog.known_items, "categorical", (1, 2, 3, 4, 5))
    with torch.no_grad():
        for table in (model.user_embedding, model.item_embedding):
            table.weight.mul_(50)
        pairs = dataset.arrays("train")
        mu, _ = model.encode(torch.tensor(pairs.user), torch.tensor(pairs.item))
        model.prior.means.copy_(mu[[0, 400, 800]])
    return model


@pytest.fixture(scope="module")
def routes_file(dataset: Dataset, model: VaeGmm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routes") / "routes.parquet"
    write_routes(path, dataset, model)
    return path


def assert_same(found: Routes, expected: Routes) -> None:
    np.testing.assert_array_equal(found.cluster, expected.cluster)
    np.testing.assert_allclose(found.responsibilities, expected.responsibilities, atol=1e-5)
    np.testing.assert_allclose(found.rating, expected.rating, atol=1e-5)


def test_routes_have_their_types_and_sum_to_one(dataset: Dataset, model: VaeGmm) -> None:
    pairs = dataset.arrays("train")
    routes = route_pairs(model, pairs.user, pairs.item)
    assert (routes.cluster.dtype, routes.responsibilities.dtype, routes.rating.dtype) == (
        np.int16, np.float32, np.float32,
    )  # fmt: skip
    assert routes.responsibilities.shape == (len(pairs.user), 3)
    np.testing.assert_allclose(routes.responsibilities.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(routes.cluster, routes.responsibilities.argmax(axis=1))
    assert len(np.unique(routes.cluster)) == 3
    assert routes.rating.min() >= 1
    assert routes.rating.max() <= 5


@pytest.mark.parametrize("batch_size", [1, 7, 100_000])
def test_routes_do_not_depend_on_the_batch(dataset: Dataset, model: VaeGmm, batch_size: int) -> None:
    pairs = dataset.arrays("valid")
    assert_same(route_pairs(model, pairs.user, pairs.item, batch_size), route_pairs(model, pairs.user, pairs.item))


def test_routes_follow_a_permutation(dataset: Dataset, model: VaeGmm) -> None:
    pairs = dataset.arrays("train")
    order = np.random.default_rng(0).permutation(len(pairs.user))
    straight, mixed = (
        route_pairs(model, pairs.user, pairs.item),
        route_pairs(model, pairs.user[order], pairs.item[order]),
    )
    assert_same(mixed, Routes(*(column[order] for column in straight)))


def test_routing_leaves_the_model_in_its_mode(dataset: Dataset, model: VaeGmm) -> None:
    pairs = dataset.arrays("test")
    model.train()
    first, second = (route_pairs(model, pairs.user, pairs.item) for _ in range(2))
    assert model.training
    assert_same(first, second)
    model.eval()


def _route_in_process(folder: Path, user: np.ndarray, item: np.ndarray) -> Routes:
    torch.set_num_threads(1)
    return route_pairs(load_vae_gmm(folder), user, item, batch_size=50)


def test_another_process_finds_the_same_routes(dataset: Dataset, model: VaeGmm, tmp_path: Path) -> None:
    save_vae_gmm(tmp_path, model)
    pairs = dataset.arrays("test")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_route_in_process, (tmp_path, pairs.user, pairs.item))
    assert_same(found, route_pairs(model, pairs.user, pairs.item))


def test_no_pairs_have_no_routes(model: VaeGmm) -> None:
    empty = np.zeros(0, np.int32)
    assert route_pairs(model, empty, empty).responsibilities.shape == (0, 3)


def test_file_keeps_every_splits_rows_in_order(dataset: Dataset, model: VaeGmm, routes_file: Path) -> None:
    table = pq.read_table(routes_file)
    names = ["split", "user", "item", "cluster", "responsibilities", "predicted_rating"]
    assert table.schema.names == names
    for split in SPLITS:
        pairs = dataset.arrays(split)
        own = table.filter(np.array(table["split"]) == split)
        np.testing.assert_array_equal(own["user"].to_numpy(), pairs.user)
        np.testing.assert_array_equal(own["item"].to_numpy(), pairs.item)
        assert_same(read_routes(routes_file, split), route_pairs(model, pairs.user, pairs.item))


def test_wrong_route_files_are_refused(dataset: Dataset, routes_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        read_routes(tmp_path / "none.parquet", "train")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_routes(tmp_path / "text.parquet", "train")
    with pytest.raises(InputError, match="don't belong together"):
        read_routes(routes_file, "train", rows=dataset.size("train") + 1)
    with pytest.raises(InputError, match=r"has columns .*, not split, user"):
        read_routes(dataset.path / "users.parquet", "train")


def test_user_responsibilities_are_means_over_training_pairs(dataset: Dataset, routes_file: Path) -> None:
    means = user_responsibilities(dataset, routes_file)
    assert means.shape == (dataset.catalog.known_users, 3)
    np.testing.assert_allclose(means.sum(axis=1), 1, atol=1e-5)
    own = dataset.arrays("train").user == 7
    expected = read_routes(routes_file, "train").responsibilities[own].mean(axis=0)
    np.testing.assert_allclose(means[7], expected, atol=1e-6)


def test_a_user_without_pairs_has_no_share() -> None:
    means = mean_by_user(np.array([0, 0, 2]), np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), 3)
    np.testing.assert_allclose(means, [[0.5, 0.5], [0, 0], [0.5, 0.5]])


def test_ari_of_perfect_random_and_constant_clusters() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(3, size=300)
    assert user_group_ari(np.eye(3)[(groups + 1) % 3], groups, seed=0) == 1
    assert abs(user_group_ari(random.dirichlet(np.ones(3), 300), groups, seed=0)) < 0.05
    assert user_group_ari(np.ones((300, 3)) / 3, groups, seed=0) == 0


def test_clusters_add_up_and_lead_with_what_sets_them_apart(dataset: Dataset, routes_file: Path) -> None:
    pairs = TrainingPairs.read(routes_file, dataset.catalog.known_users)
    clusters = describe_clusters(pairs, dataset.catalog, None, implicit=False)
    routes = read_routes(routes_file, "train")
    assert sum(one.pairs for one in clusters) == dataset.size("train")
    assert sum(one.users for one in clusters) == dataset.catalog.known_users
    assert sum(one.share for one in clusters) == pytest.approx(1)
    for one in clusters:
        expected = routes.rating[routes.cluster == one.cluster].mean()
        assert one.mean_predicted_rating == pytest.approx(float(expected), rel=1e-6)
        lifts = [feature.value for feature in one.features]
        assert lifts == sorted(lifts, reverse=True)
        assert all(value > 1 for value in lifts)
        assert all(feature.value < 0 for feature in one.disliked)
        assert len(one.row()) == 1 + len(one.labels())
        assert len(one.typical_users) == min(5, one.users)
    assert not any(one.liked or one.disliked for one in describe_clusters(pairs, dataset.catalog, None, implicit=True))


def test_a_planted_feature_is_found(dataset: Dataset) -> None:
    """Clusters cut by whether the item has one given feature: that feature leads its cluster's list."""
    features, arrays = dataset.catalog.item_features().to_pylist(), dataset.arrays("train")
    word = features[arrays.item[0]][0]
    has = np.array([word in features[item] for item in arrays.item])
    ratings = np.where(has, 5.0, 2.0).astype(np.float32)
    order = np.argsort(arrays.user, kind="stable")
    means = mean_by_user(arrays.user, np.eye(2)[has.astype(int)], dataset.catalog.known_users)
    made = TrainingPairs(arrays.user[order], arrays.item[order], has[order].astype(np.int16), ratings[order], means)
    without, within = describe_clusters(made, dataset.catalog, None, implicit=False)
    leaders = [one.name for one in within.features if one.value == within.features[0].value]
    assert word in leaders, "or another feature of exactly the same items"
    assert word not in [one.name for one in without.features]
    assert (without.mean_predicted_rating, within.mean_predicted_rating) == (2.0, 5.0)
    # By hand: the smoothed lift of the word in its cluster.
    assert within.features[0].value == pytest.approx((has.sum() + 10) / (has.sum() * has.mean() + 10))


def test_pairs_of_a_user_are_found(dataset: Dataset, routes_file: Path) -> None:
    pairs, arrays = TrainingPairs.read(routes_file, dataset.catalog.known_users), dataset.arrays("train")
    for user in (0, 7, dataset.catalog.known_users - 1):
        assert sorted(pairs.items_of_user(user)) == sorted(arrays.item[arrays.user == user])
    with pytest.raises(InputError, match="don't belong together"):
        TrainingPairs.read(routes_file, 3)


def test_latent_map_is_a_picture_and_repeats(dataset: Dataset, model: VaeGmm, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_latents(model, dataset.arrays("train"), tmp_path / name, seed=3, sample=150)
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    assert content == (tmp_path / "b.png").read_bytes()


def test_what_chance_and_levels_explain_is_neither_liked_nor_disliked() -> None:
    random = np.random.default_rng(0)
    count_KV = random.integers(5, 200, size=(3, 400)).astype(float)
    level_K = np.array([-1.0, 0.0, 1.0])
    rating_KV = count_KV * (3 + level_K[:, None]) + random.normal(size=(3, 400)) * np.sqrt(count_KV) * 0.8
    gap_KV = _rating_gaps(count_KV, rating_KV, 0.8)
    assert np.mean(gap_KV != 0) < 0.05
    count_KV[:, 7] = 150.0
    rating_KV[:, 7] = 150.0 * (3 + level_K + [0.0, 0.6, 0.0])
    assert _rating_gaps(count_KV, rating_KV, 0.8)[:, 7].tolist() == [
        pytest.approx(-0.19, abs=0.05),
        pytest.approx(0.38, abs=0.05),
        pytest.approx(-0.19, abs=0.05),
    ]
