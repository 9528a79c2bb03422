"""Features for a pair that names none: by the formula, from training rows alone, and never of users who are gone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gavamoe.data.catalog import Catalog
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.errors import InputError
from gavamoe.generation.evidence.pair_features import FEATURES_FILE, ITEM, OWN, USER, PairFeatures

ROWS = (
    [("ann", "cup", ["lid"])] * 3 + [("ann", "pot", ["rim", "lid"])] * 2 + [("bob", "cup", ["rim"])]
    + [("bob", "jug", ["deep red"])] * 6 + [("eve", "pot", [])]
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Every row a training row, but one of each other split with features that training never saw."""
    folder = tmp_path_factory.mktemp("features")
    rows = [*ROWS, ("ann", "jug", ["held"]), ("bob", "pot", ["out"])]
    table = pa.Table.from_pylist(
        [
            {"user": user, "item": item, "rating": 4.0, "text": f"text {at}", "features": features}
            for at, (user, item, features) in enumerate(rows)
        ]
    )
    pq.write_table(table, folder / "rows.parquet")
    index = folder / "index"
    index.mkdir()
    for split, places in (("train", range(len(ROWS))), ("valid", [len(ROWS)]), ("test", [len(ROWS) + 1])):
        (index / f"{split}.index").write_text(" ".join(map(str, places)))
    prepare(folder / "rows.parquet", folder / "out", "table", index_dir=index)
    return open_dataset(folder / "out")


@pytest.fixture(scope="module")
def counted(data: Dataset) -> PairFeatures:
    home = [0 if data.catalog.user_id(user) == "ann" else 1 for user in range(data.catalog.known_users)]
    return PairFeatures.read(data, np.array(home), 2)


def ids(data: Dataset, user: str, item: str) -> tuple[int, int]:
    return data.catalog.user_or_unknown(user), data.catalog.item_or_unknown(item)


def test_training_rows_alone_are_counted(counted: PairFeatures, data: Dataset) -> None:
    assert counted.names == ("deep red", "lid", "rim")
    user, item = ids(data, "ann", "cup")
    assert counted.user_UF[user].toarray().tolist() == [[0, 5, 2]]
    assert counted.item_IF[item].toarray().tolist() == [[0, 3, 1]]
    assert counted.cluster_KF.toarray().tolist() == [[0, 5, 2], [6, 0, 1]]


def test_features_are_ranked_by_the_formula(counted: PairFeatures, data: Dataset) -> None:
    user, item = ids(data, "ann", "cup")
    everybody = (np.array([6, 5, 3]) + 0.5) / 15.5
    q = np.array([0.3, 0.7])
    clusters = (np.array([[0, 5, 2], [6, 0, 1]]) + 300 * everybody) / np.array([[307], [307]])
    own, of_item = np.array([0, 5, 2]), np.array([0, 3, 1])
    known = 4 / (4 + ITEM)
    score = (
        known * of_item / 4 + (1 - known) * everybody + OWN * (7 / (7 + USER)) * own / 7 + (q @ clusters - everybody)
    )
    wanted = [counted.names[at] for at in np.argsort(-score)]
    for k in (1, 2, 3, 9):
        assert list(counted.rank(user, item, q.tolist(), k)) == wanted[:k]
    assert wanted[0] == "lid", "the user's and the item's own outweigh what is most frequent"


def test_the_unknown_get_nothing_and_strangers_what_they_wrote(counted: PairFeatures, data: Dataset) -> None:
    user, item = ids(data, "nobody", "nothing")
    assert counted.rank(user, item, [0.5, 0.5], 1) == ()
    assert counted.rank(data.catalog.user_or_unknown("ann"), item, [0.5, 0.5], 1) == ("lid",)
    assert counted.rank(user, item, [0.5, 0.5], 1, ["The RIM, the rim!", "No rim?"] * 10) == ("rim",)
    texts = ["a Deep  red one"] * 3
    assert counted.rank(*ids(data, "nobody", "cup"), [0.5, 0.5], 1, texts) == ("deep red",)


def test_an_artifact_keeps_them(counted: PairFeatures, data: Dataset, tmp_path: Path) -> None:
    catalog = data.catalog
    assert PairFeatures.load(tmp_path, catalog, 2) is None
    counted.save(tmp_path)
    again = PairFeatures.load(tmp_path, catalog, 2)
    assert again is not None
    assert again.names == counted.names
    for name in ("user_UF", "item_IF", "cluster_KF"):
        assert (getattr(again, name) != getattr(counted, name)).nnz == 0
    with pytest.raises(InputError, match="this artifact lacks"):
        PairFeatures.load(tmp_path, catalog, 1)
    (tmp_path / FEATURES_FILE).write_bytes(b"no")
    with pytest.raises(InputError):
        PairFeatures.load(tmp_path, catalog, 2)


def test_data_without_features_has_none_to_name(tmp_path: Path) -> None:
    rows = "user,item,rating,text\n" + "".join(f"u{n % 4},i{n % 5},{1 + n % 5},text {n}\n" for n in range(40))
    (tmp_path / "rows.csv").write_text(rows)
    prepare(tmp_path / "rows.csv", tmp_path / "out", "table")
    data = open_dataset(tmp_path / "out")
    counted = PairFeatures.read(data, np.zeros(data.catalog.known_users, np.int64), 1)
    counted.save(tmp_path)
    again = PairFeatures.load(tmp_path, Catalog(data.path, data.catalog.known_users, data.catalog.known_items), 1)
    assert again is not None
    for each in (counted, again):
        assert each.rank(0, 0, [1.0], 3, ["any text"]) == ()
