"""The dataset folder: what is written is what is read, known ids come first, damage and newer versions are told."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gavamoe.data.catalog import Catalog
from gavamoe.data.dataset import DATA_FILES, SPLITS, open_dataset
from gavamoe.data.describe import describe
from gavamoe.data.writer import LEFT_OUT, DatasetWriter, Rows, rating_scale
from gavamoe.errors import InputError

SETTINGS = {"source": "s", "format": "f", "text_mode": "explanation", "seed": 0, "split": "8:1:1", "preparation": {}}


def write_small(folder: Path, ratings: tuple[float, ...] = (5, 4, 3, 1, 2, 5)) -> Path:
    """Six rows; user "new" and item "late" occur only in valid and test; user "gone" in no split."""
    folder.mkdir()
    rows = Rows(
        users=["new", "ann", "bob", "gone"],
        items=["late", "cup", "pot"],
        titles=[None, "A Cup", "A Pot"],
        user=np.array([0, 1, 2, 1, 2, 3], dtype=np.int32),
        item=np.array([1, 1, 2, 2, 0, 1], dtype=np.int32),
        rating=np.array(ratings, dtype=np.float32),
        split=np.array([1, 0, 0, 0, 2, LEFT_OUT], dtype=np.int8),
    )
    features = [["lid"], ["lid", "rim"], ["rim"], ["lid"], [], ["never"]]
    with DatasetWriter(folder, rows) as writer:
        for span in (slice(0, 4), slice(4, 6)):
            texts = [f"text {number}" for number in range(6)][span]
            writer.write(pa.array(texts), pa.array(features[span], pa.list_(pa.string())))
        writer.finish(**SETTINGS)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small")


def test_rows_come_back_with_their_own_users_items_and_texts(small: Path) -> None:
    dataset = open_dataset(small)
    catalog = dataset.catalog
    found = {
        (catalog.user_id(row["user"]), catalog.item_id(row["item"]), row["rating"], row["text"], tuple(row["features"]))
        for split in SPLITS
        for row in dataset.table(split).to_pylist()
    }
    assert found == {
        ("new", "cup", 5.0, "text 0", ("lid",)),
        ("ann", "cup", 4.0, "text 1", ("lid", "rim")),
        ("bob", "pot", 3.0, "text 2", ("rim",)),
        ("ann", "pot", 1.0, "text 3", ("lid",)),
        ("bob", "late", 2.0, "text 4", ()),
    }
    assert [dataset.size(split) for split in SPLITS] == [3, 1, 1]


def test_known_users_and_items_hold_the_lowest_indices(small: Path) -> None:
    catalog = open_dataset(small).catalog
    assert (catalog.known_users, catalog.n_users, catalog.known_items, catalog.n_items) == (2, 3, 2, 3)
    assert catalog.user_index("new") == 2
    assert catalog.item_index("late") == 2
    assert {catalog.user_index("ann"), catalog.user_index("bob")} == {0, 1}
    assert catalog.user_index("gone") is None
    assert catalog.user_index("never seen") is None
    assert catalog.item_title(catalog.item_index("cup")) == "A Cup"
    assert catalog.item_title(2) is None
    assert catalog.item_title(99) is None


def test_usual_features_count_training_rows_only(small: Path) -> None:
    catalog = open_dataset(small).catalog
    ann, bob, cup, pot = (
        catalog.user_index("ann"),
        catalog.user_index("bob"),
        *map(catalog.item_index, ("cup", "pot")),
    )
    assert catalog.usual_features(ann, cup, 5) == ("lid", "rim")
    assert catalog.usual_features(bob, cup, 5) == ("rim", "lid"), "what the user uses too comes first"
    assert catalog.usual_features(bob, cup, 1) == ("rim",)
    assert catalog.usual_features(None, pot, 5) == ("lid", "rim")
    assert catalog.usual_features(bob, 2, 5) == ("rim",), "an item without training rows: the user's own"
    assert catalog.usual_features(2, 2, 5) == ()
    assert catalog.usual_features(None, None, 5) == ()
    assert catalog.usual_features(-1, 10**6, 5) == ()


def test_a_saved_catalog_is_the_same(small: Path, tmp_path: Path) -> None:
    first = open_dataset(small).catalog
    first.save(tmp_path / "kept")
    again = Catalog.load(tmp_path / "kept")
    assert (again.known_users, again.known_items) == (2, 2)
    assert [again.user_id(index) for index in range(3)] == [first.user_id(index) for index in range(3)]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "catalog.json",
        "items.parquet",
        "users.parquet",
    ]


def test_arrays_hold_nan_where_there_is_no_rating(tmp_path: Path) -> None:
    dataset = open_dataset(write_small(tmp_path / "implicit", ratings=(np.nan,) * 6))
    assert dataset.implicit
    assert dataset.rating_values is None
    assert dataset.rating_range is None
    arrays = dataset.arrays("train")
    assert arrays.user.dtype == np.int32
    assert arrays.rating.dtype == np.float32
    assert np.isnan(arrays.rating).all()
    assert dataset.table("train")["rating"].null_count == 3


def test_batches_stream_the_rows_in_order(small: Path) -> None:
    dataset = open_dataset(small)
    batches = list(dataset.batches("train", ["text"], size=2))
    assert [batch.num_rows for batch in batches] == [2, 1]
    assert pa.Table.from_batches(batches)["text"].to_pylist() == dataset.table("train")["text"].to_pylist()


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, same = (open_dataset(write_small(tmp_path / name)) for name in ("one", "same"))
    other = open_dataset(write_small(tmp_path / "other", ratings=(5, 4, 3, 1, 2, 4)))
    changed = open_dataset(write_small(tmp_path / "changed", ratings=(5, 4, 2, 1, 2, 5)))
    assert one.fingerprint == same.fingerprint == other.fingerprint, "the last row is in no split"
    assert changed.fingerprint != one.fingerprint
    assert set(one.meta.files) == set(DATA_FILES)


@pytest.mark.parametrize(
    ("observed", "bounds", "values", "extent"),
    [
        ([1, 3, 4, 5], (1, 5), (1, 2, 3, 4, 5), (1, 5)),
        ([3, 5], (1, 5), (1, 2, 3, 4, 5), (1, 5)),
        ([1, 1.5, 5], (1, 5), (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5), (1, 5)),
        ([1, 2, 5], None, (1, 2, 3, 4, 5), (1, 5)),
        ([0, 1], None, (0, 1), (0, 1)),
        ([7], None, (7,), (7, 7)),
        ([0.13, 0.5, 0.77], None, None, (0.13, 0.77)),
        (list(range(101)), None, None, (0, 100)),
        ([], None, None, None),
        ([], (1, 5), None, None),
    ],
)
def test_rating_scale(observed: list[float], bounds: tuple, values: tuple | None, extent: tuple | None) -> None:
    found_values, found_extent = rating_scale(np.array(observed, dtype=np.float32), bounds)
    assert found_values == (pytest.approx(values) if values else None)
    assert found_extent == (pytest.approx(extent) if extent else None)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    ones = np.ones(4, dtype=np.int32)
    rows = Rows(["a", "b"], ["x", "y"], [None, None], ones, ones, ones.astype(np.float32), np.zeros(4, dtype=np.int8))
    with pytest.raises(InputError, match="4 usable rows leave the valid split empty"):
        DatasetWriter(tmp_path, rows)


def rewrite_meta(folder: Path, **changes: object) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_schema_is_refused(small: Path) -> None:
    rewrite_meta(small, schema_version=2)
    with pytest.raises(InputError, match="schema version 2 is newer than 1"):
        open_dataset(small)


def test_what_is_no_dataset_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such dataset folder"):
        open_dataset(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"not a dataset \(no meta.json\)"):
        open_dataset(tmp_path / "empty")
    (small / "meta.json").write_text("[1]")
    with pytest.raises(InputError, match="no schema_version"):
        open_dataset(small)
    (small / "meta.json").write_text('{"schema_version": 1}')
    with pytest.raises(
        InputError, match=r"meta\.json: not a usable dataset \(prepare it again\): source: field required"
    ):
        open_dataset(small)


def test_damage_is_told(small: Path) -> None:
    rewrite_meta(small, rows={"train": 4, "valid": 1, "test": 1})
    with pytest.raises(InputError, match=r"train.parquet has 3 rows, meta.json says 4"):
        open_dataset(small)
    rewrite_meta(small, rows={"train": 3, "valid": 1, "test": 1}, known_users=9)
    with pytest.raises(InputError, match=r"says 9 known users, but users\.parquet has 3 rows"):
        open_dataset(small)
    rewrite_meta(small, known_users=2)
    open_dataset(small)
    content = (small / "test.parquet").read_bytes()
    (small / "test.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"test.parquet: damaged"):
        open_dataset(small)
    (small / "test.parquet").unlink()
    with pytest.raises(InputError, match=r"test.parquet: missing"):
        open_dataset(small)
    pq.write_table(pa.table({"user": [1]}), small / "test.parquet")
    with pytest.raises(InputError, match=r"test.parquet: has the columns"):
        open_dataset(small)


def test_an_index_outside_the_catalog_is_damage(small: Path) -> None:
    table = pq.read_table(small / "train.parquet")
    pq.write_table(table.set_column(0, "user", pa.array([0, 1, 7], pa.int32())), small / "train.parquet")
    with pytest.raises(InputError, match=r"a user index outside 0\.\.2"):
        open_dataset(small).arrays("train")


def test_an_unknown_split_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match="split: unknown value 'dev'; known are train, valid, test"):
        open_dataset(small).table("dev")


def test_describe_counts(small: Path) -> None:
    found = describe(open_dataset(small))
    assert (found.users, found.items, found.records, found.features) == (3, 3, 5, 2)
    assert found.density == pytest.approx(5 / 9)
    assert found.ratings == {"1": 1, "2": 1, "3": 1, "4": 1, "5": 1}
    assert found.mean_rating == pytest.approx(3.0)
    assert (found.unknown_users, found.unknown_items) == (1, 1)
    assert found.unknown_records == {"valid": 1, "test": 1}
    assert found.words_per_text == pytest.approx(2.0)
    assert found.features_per_record == pytest.approx(1.0)
    assert found.records_without_feature == 1
    assert found.titles == 2
    shown = dict(found.rows())
    assert list(shown)[:4] == ["users", "items", "records", "features"]
    assert shown["mean rating"] == "3.000"


def test_describe_implicit_and_continuous(tmp_path: Path) -> None:
    implicit = describe(open_dataset(write_small(tmp_path / "implicit", ratings=(np.nan,) * 6)))
    assert implicit.mean_rating is None
    assert dict(implicit.rows())["ratings"] == "none: implicit feedback"
    continuous = describe(open_dataset(write_small(tmp_path / "c", ratings=(0.13, 0.5, 0.77, 0.9, 0.31, 0))))
    assert len(continuous.ratings) == 10
    assert sum(continuous.ratings.values()) == 5
