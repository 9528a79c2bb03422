"""Routes that are not stage 1's: even, repeatable, kept with the model, and never served."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.bare_dataset import bare_dataset
from helpers.tiny import tiny

from gavamoe.artifacts.manifest import read_manifest
from gavamoe.config.schema import GenerationConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest
from gavamoe.runtime.context import LocalContext
from gavamoe.serving.routing import RoutingService
from gavamoe.stage1.route_overrides import CONTROL_FILE, RouteControl
from gavamoe.stage1.routes import Routes
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.setup import prepare
from gavamoe.stage2.train import train_stage2


def control(config: RunConfig, dataset: Dataset) -> RouteControl:
    found = RouteControl.of(config, dataset)
    assert found is not None
    return found


def test_random_routes_are_even_and_depend_on_seed_and_user_alone(planted: Dataset) -> None:
    rule = control(tiny("stage2.routes=random", "stage1.clusters=3"), planted)
    user, item = np.arange(3000), np.arange(3000) % 40
    cluster = rule.cluster(user, item)
    assert np.bincount(cluster, minlength=3) / len(cluster) == pytest.approx([1 / 3] * 3, abs=0.03)
    assert np.array_equal(rule.cluster(user, item[::-1]), cluster)
    other = control(tiny("stage2.routes=random", "seed=1"), planted).cluster(user, item)
    assert (other == cluster).mean() == pytest.approx(1 / 3, abs=0.05)


def test_random_routes_of_earlier_artifacts_go_by_pair(planted: Dataset, tmp_path: Path) -> None:
    saved = {"kind": "random", "clusters": 3, "seed": 0, "groups": []}  # as written before there was `by`
    (tmp_path / CONTROL_FILE).write_text(json.dumps(saved))
    rule = RouteControl.load(tmp_path)
    assert rule is not None
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(60), np.arange(40)))
    cluster = rule.cluster(user, item)
    assert np.bincount(cluster, minlength=3) / len(cluster) == pytest.approx([1 / 3] * 3, abs=0.03)
    order = np.random.default_rng(0).permutation(len(user))
    assert np.array_equal(rule.cluster(user[order], item[order]), cluster[order])
    # Neither a user's nor an item's pairs lean to one cluster.
    for owner in (user, item):
        shares = [np.bincount(cluster[owner == one], minlength=3).max() / (owner == one).sum() for one in range(40)]
        assert max(shares) < 0.7


def test_oracle_routes_are_the_planted_groups(planted: Dataset) -> None:
    rule = control(tiny("stage2.routes=oracle"), planted)
    truth = planted.truth()
    assert truth is not None
    users = np.arange(len(truth.group))
    assert np.array_equal(rule.cluster(users, users), truth.group)
    assert rule.cluster(np.array([10**6]), np.array([0])).tolist() == [0]


def test_what_a_control_leaves_of_the_routes(planted: Dataset) -> None:
    rule = control(tiny("stage2.routes=oracle"), planted)
    user = np.arange(5)
    before = Routes(np.zeros(5, np.int16), np.full((5, 3), 1 / 3, np.float32), np.arange(5, dtype=np.float32))
    after = rule.apply(before, user, user)
    assert np.array_equal(after.rating, before.rating)
    assert np.array_equal(after.responsibilities.argmax(1), after.cluster)
    assert np.array_equal(after.responsibilities.sum(1), np.ones(5))


def test_oracle_needs_a_truth_and_a_cluster_a_group(planted: Dataset, tmp_path: Path) -> None:
    assert RouteControl.of(tiny(), planted) is None
    with pytest.raises(InputError, match="has no planted groups"):
        RouteControl.of(tiny("stage2.routes=oracle"), bare_dataset(tmp_path / "bare", ["a text"] * 10))
    with pytest.raises(InputError, match=r"3 planted groups need as many clusters, stage1\.clusters is 2"):
        RouteControl.of(tiny("stage2.routes=oracle", "stage1.clusters=2"), planted)


def test_a_damaged_control_is_named(tmp_path: Path) -> None:
    assert RouteControl.load(tmp_path) is None
    (tmp_path / CONTROL_FILE).write_text('{"kind": "learned", "clusters": 3, "seed": 0}')
    with pytest.raises(InputError, match=r"route_control\.json: not a description of routes"):
        RouteControl.load(tmp_path)


def test_a_control_trains_writes_and_is_not_served(planted: Dataset, tmp_path: Path) -> None:
    config = tiny("stage2.routes=random", "stage2.max_steps=4", "stage2.evaluate_every=0")
    train_stage1(config, planted.path, tmp_path / "stage1", LocalContext())
    setup = prepare(config, planted.path, tmp_path / "stage1")
    rule = control(config, planted)
    for split, pairs in setup.routed.items():
        assert np.array_equal(setup.clusters[split], rule.cluster(*pairs))
    out = tmp_path / "stage2"
    train_stage2(config, planted.path, tmp_path / "stage1", out, LocalContext())
    assert CONTROL_FILE in read_manifest(out, "stage2").files
    explainer = ExplanationGenerator.load(out)
    pairs = [(user, item) for user in range(6) for item in range(3)]
    written = explainer.explain(
        [ExplanationRequest(user, item) for user, item in pairs], GenerationConfig(max_new_tokens=2)
    )
    user, item = np.array(pairs).T
    assert [explanation.cluster for explanation in written] == rule.cluster(user, item).tolist()
    with pytest.raises(InputError, match="its routes are a control"):
        RoutingService.load(out)
