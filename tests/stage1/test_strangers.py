"""Strangers: histories are read strictly, and folded in as the textbook does, where it can say what comes out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_stage1
from scipy.stats import multivariate_normal

from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.generation.prompts import RatingScale
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.routes import ROUTES_FILE, training_routes
from gavamoe.stage1.strangers.fold_in import CROWD_FILE, Crowd, FoldIn
from gavamoe.stage1.strangers.history import MAX_HISTORY, Entry, HistoryEntry, indexed, read_history
from gavamoe.stage1.train import train_stage1
from gavamoe.stage1.user_words import ClusterWords, UserWords
from gavamoe.stage1.vae_gmm import VaeGmm

USERS, ITEMS, K = 30, 12, 3
STARS = (1.0, 2.0, 3.0, 4.0, 5.0)


def model_of(likelihood: str, **changes: object) -> VaeGmm:
    torch.manual_seed(0)
    ends = {"categorical": STARS, "gaussian": (1.0, 5.0), "bernoulli": (0.0, 1.0)}[likelihood]
    model = VaeGmm(tiny_stage1(clusters=K, **changes).stage1, USERS, ITEMS, likelihood, ends)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def crowd_of(model: VaeGmm, seed: int = 0) -> Crowd:
    random = np.random.default_rng(seed)
    return Crowd.of(model, random.integers(K, size=USERS), random.integers(1, 20, size=USERS))


def test_a_level_is_the_shrunken_mean_residual_where_taste_has_no_spread() -> None:
    model = model_of("gaussian", rating_biases=True)
    crowd = crowd_of(model)
    flat = Crowd(crowd.weight_K, crowd.mean_KE, 0 * crowd.spread_KEE, crowd.level_K, crowd.level_variance_K)
    fold_in = FoldIn(model, flat, None)
    history = [Entry(item, rating, None) for item, rating in ((0, 4.0), (3, 2.5), (7, 5.0))]
    found = fold_in.stranger(history)
    half, noise = 2.0, float(model.rating_variance(torch.zeros(1, 1))[0].detach())
    expected_KN = fold_in._expected(crowd.mean_KE.float(), crowd.level_K.float(), np.array([0, 3, 7])).detach().numpy()
    residual_K = (np.array([4.0, 2.5, 5.0]) - expected_KN).sum(axis=1) / half
    shrunken_K = residual_K / (3 + noise / half**2 / crowd.level_variance_K.numpy())
    assert found.level_K.numpy() == pytest.approx(crowd.level_K.numpy() + shrunken_K, abs=1e-5)
    assert torch.equal(found.embedding_KE, crowd.mean_KE.float())


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "bernoulli"])
def test_clusters_are_weighed_by_the_probability_of_the_ratings(likelihood: str) -> None:
    model = model_of(likelihood)
    crowd = crowd_of(model)
    fold_in = FoldIn(model, crowd, None)
    history = [Entry(1, 1.0, None), Entry(4, 1.0, None), Entry(1, 1.0, None)]
    log_K = []
    for cluster in range(K):
        state = torch.cat([crowd.mean_KE[cluster].float(), crowd.level_K[cluster : cluster + 1].float()])

        def expected(state: torch.Tensor) -> torch.Tensor:
            items = torch.tensor([1, 4, 1])
            mu, _ = model.encoder(state[:-1].expand(3, -1), model.item_embedding(items))
            bias = None if model.item_bias is None else state[-1] + model.item_bias[items]
            return model.mean_rating(model.decode(mu, bias))

        slopes = torch.autograd.functional.jacobian(expected, state).double().numpy()
        spread = np.zeros((17, 17))
        spread[:16, :16] = crowd.spread_KEE[cluster].numpy()
        spread[16, 16] = float(crowd.level_variance_K[cluster])
        output = model.decode(
            model.encoder(state[:-1].expand(3, -1), model.item_embedding(torch.tensor([1, 4, 1])))[0], None
        )
        noise = np.diag(model.rating_variance(output).detach().double().numpy())
        mean = expected(state).detach().double().numpy()
        log_K.append(multivariate_normal.logpdf(np.ones(3), mean, slopes @ spread @ slopes.T + noise))
    log_K = np.array(log_K) + crowd.weight_K.log().numpy()
    wanted = log_K - np.logaddexp.reduce(log_K)
    assert fold_in.stranger(history).log_q_K.numpy() == pytest.approx(wanted, abs=1e-4)


def test_the_order_of_a_history_does_not_matter_and_ratings_move_towards_it() -> None:
    model = model_of("gaussian", rating_biases=True)
    fold_in = FoldIn(model, crowd_of(model), None)
    history = [Entry(item, 5.0, None) for item in range(8)]
    items = np.arange(ITEMS + 1)
    none, some, turned = (fold_in.routes(fold_in.stranger(entries), items) for entries in ((), history, history[::-1]))
    assert some.rating == pytest.approx(turned.rating, abs=1e-4)
    assert some.rating[:8].mean() > none.rating[:8].mean()
    assert (some.rating <= 5).all()
    assert some.responsibilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def stage1(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("strangers") / "stage1"
    train_stage1(tiny_stage1(clusters=3, epochs=6), tiny_dataset, out, LocalContext())
    return out


def loaded(folder: Path) -> FoldIn:
    model = load_vae_gmm(folder)
    crowd = Crowd.load(folder, model)
    assert crowd is not None
    return FoldIn(model, crowd, ClusterWords.load(folder, 3))


def test_five_rows_put_users_where_training_put_them(stage1: Path, tiny_dataset: Path) -> None:
    data, fold_in = open_dataset(tiny_dataset), loaded(stage1)
    home_U = training_routes(data, stage1 / ROUTES_FILE).user_means_UK.argmax(axis=1)
    histories: dict[int, list[Entry]] = {}
    for row in data.table("train").to_pylist():
        histories.setdefault(row["user"], []).append(Entry(row["item"], row["rating"], row["text"]))
    same = [int(fold_in.stranger(rows[:5]).log_q_K.argmax()) == home_U[user] for user, rows in histories.items()]
    assert np.mean(same) > 0.9
    assert np.bincount(home_U).min() > 5, "there are clusters to tell apart"


def test_words_count_as_they_do_in_training(stage1: Path, tiny_dataset: Path) -> None:
    data = open_dataset(tiny_dataset)
    words = UserWords.read(data, 1000)
    kept = ClusterWords.load(stage1, 3)
    assert kept is not None
    rows = data.table("train").to_pylist()
    texts = [row["text"] for row in rows if row["user"] == 7]
    for cap in (5.0, 1e9):
        assert kept.evidence_K(texts, cap) == pytest.approx(words.evidence_UK(kept.rates_KV, cap)[7], rel=1e-9)
    assert not kept.evidence_K(["\U0001f47e qqqq"], 100.0).any()


def test_items_alone_are_what_is_known_where_there_are_no_ratings() -> None:
    fold_in = FoldIn(model_of("bernoulli"), crowd_of(model_of("bernoulli")), None)
    nothing, unknown, chosen = (
        fold_in.stranger(entries).log_q_K for entries in ((), [Entry(ITEMS, None, None)], [Entry(2, None, None)])
    )
    assert torch.equal(nothing, unknown)
    assert not torch.equal(nothing, chosen)


def test_a_damaged_file_is_refused(stage1: Path, tmp_path: Path) -> None:
    model = load_vae_gmm(stage1)
    assert Crowd.load(tmp_path, model) is None
    (tmp_path / CROWD_FILE).write_bytes(b"no")
    with pytest.raises(InputError, match="can't be read"):
        Crowd.load(tmp_path, model)
    crowd = Crowd.load(stage1, model)
    assert crowd is not None
    Crowd(*(value[:1] for value in vars(crowd).values())).save(tmp_path)
    with pytest.raises(InputError, match="does not belong to this model"):
        Crowd.load(tmp_path, model)
    Crowd(**vars(crowd) | {"weight_K": crowd.weight_K * float("nan")}).save(tmp_path)
    with pytest.raises(InputError, match="not finite"):
        Crowd.load(tmp_path, model)


ENTRIES = [{"item": "I1", "rating": 4, "text": "short"}, {"text": "only words"}, {"rating": 2.5}, {"item": "I9"}]


@pytest.mark.parametrize("form", ["lines", "list", "indented"])
def test_a_history_is_read_from_lines_or_a_list(form: str, tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    lines = "\n".join(map(json.dumps, ENTRIES)) + "\n\n"
    path.write_text(lines if form == "lines" else json.dumps(ENTRIES, indent=2 if form == "indented" else None))
    assert read_history(path) == [HistoryEntry.model_validate(entry) for entry in ENTRIES]
    path.write_text("")
    assert read_history(path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([{"item": "a"}] * 21), "21 entries; a history has at most 20"),
        ('{"item": "a"}\n{"item": }', "line 2: is not JSON"),
        ('[{"item": "a"},', "is not JSON"),
        ('{"item": "a"}\n{"Item": "b"}', "entry 2: Item: Extra inputs are not permitted"),
        ("{}", "entry 1: needs an item, a rating or a text"),
        ('{"item": ""}', "entry 1: item:"),
        ('{"rating": true}', "entry 1: rating:"),
        ('{"rating": NaN}', "entry 1: rating:"),
        ('{"text": "' + "x" * 2001 + '"}', "entry 1: text: String should have at most 2000 characters"),
        ('{"text": "\\ud800"}', "entry 1: text: "),
        ("[[1]]", "entry 1: "),
        ("3", "entry 1: "),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_history_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_history(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_history(tmp_path / "missing")
    path = tmp_path / "h"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="not UTF-8"):
        read_history(path)
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        read_history(path)


def test_entries_by_index_have_ratings_of_the_scale() -> None:
    scale = RatingScale(low=1, high=5, values=STARS)
    items = {"I1": 4}
    entries = [HistoryEntry.model_validate(entry) for entry in ENTRIES[:3]]
    found = indexed(entries, lambda raw: items.get(raw, ITEMS), scale)
    assert found == (Entry(4, 4.0, "short"), Entry(ITEMS, None, "only words"), Entry(ITEMS, 2.5, None))
    with pytest.raises(InputError, match=r"history: entry 2: .*7"):
        indexed([entries[0], HistoryEntry(rating=7.0)], lambda _: 0, scale)
    with pytest.raises(InputError, match=r"history: entry 1: .*no ratings"):
        indexed(entries, lambda _: 0, None)
    assert MAX_HISTORY == 20
