"""Sources as users have them: compressed, packed, in other encodings, JSON laid out in any way, folders of parts."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.reviews import amazon, peter_folder, refuse, rows_of, write_lines

from gavamoe.data.dataset import open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.errors import InputError

TABLE = "user,item,rating,text\n" + "".join(f"u{n % 7},i{n},{1 + n % 5},The room {n} was clean.\n" for n in range(30))


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def kept(source: Path, format: str = "table", **options: object) -> int:
    """Rows of a dataset made from `source`."""
    return prepare(source, source.parent / f"{source.name}.out", format, **options).kept


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstd),
        (".zip", lambda data: zipped({"reviews.csv": data})),
        (".zip", lambda data: zipped({"__MACOSX/._reviews.csv": b"x", ".DS_Store": b"x", "in/reviews.csv": data})),
        (".tar", lambda data: tarred({"reviews.csv": data}, "w")),
        (".tar.gz", lambda data: tarred({"reviews.csv": data})),
        (".tgz", lambda data: tarred({"._reviews.csv": b"x", "in/reviews.csv": data})),
    ],
)
def test_compressed_tables_are_read(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    name = "reviews.csv" + suffix if "." not in suffix[1:] and suffix not in (".zip", ".tgz") else "reviews" + suffix
    (tmp_path / name).write_bytes(pack(TABLE.encode()))
    assert kept(tmp_path / name) == 30


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, zstd, lambda data: zipped({"r.json": data})])
def test_compressed_reviews_are_read_whatever_they_are_called(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    data = "".join(json.dumps(record) + "\n" for record in amazon(30)).encode()
    (tmp_path / "reviews").write_bytes(pack(data))
    assert kept(tmp_path / "reviews", "amazon") == 30


def test_yelps_archive_is_read_as_it_is_downloaded(tmp_path: Path) -> None:
    record = {"user_id": "u", "stars": 3.0, "text": "Ok.", "date": "2018-07-07 22:09:11"}
    reviews = "".join(json.dumps(record | {"business_id": f"b{n}"}) + "\n" for n in range(10)).encode()
    members = {"Agreement.pdf": b"%PDF", "yelp_academic_dataset_business.json": b"{}\n"}
    members["yelp_academic_dataset_review.json"] = reviews
    (tmp_path / "yelp_dataset.tgz").write_bytes(tarred(members))
    assert kept(tmp_path / "yelp_dataset.tgz", "yelp") == 10


def test_an_archive_of_several_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "two.zip").write_bytes(zipped({"a.csv": b"x", "b.csv": b"y"}))
    refuse(tmp_path / "two.zip", "table", r"holds 2 files \(a\.csv, b\.csv\), one is expected; unpack it")
    (tmp_path / "none.zip").write_bytes(zipped({}) + b"\0")
    refuse(tmp_path / "none.zip", "table", "holds no file")


@pytest.mark.parametrize(
    ("name", "pack"),
    [("t.csv.bz2", bz2.compress), ("t.csv.xz", lzma.compress), ("t.csv.zst", zstd), ("t.csv.gz", gzip.compress),
     ("t.tgz", lambda data: tarred({"t.csv": data})), ("t.zip", lambda data: zipped({"t.csv": data}))],
)  # fmt: skip
def test_cut_and_damaged_files_are_refused(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack("".join(f"u,i,{n * 7919 % 104_729},{hash(str(n))}\n" for n in range(20_000)).encode())
    for content in (packed[: len(packed) // 2], packed[: len(packed) // 2] + b"\xff" * 99 + packed[len(packed) // 2 :]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            prepare(tmp_path / name, tmp_path / "out", "table")
        assert str(tmp_path / name) in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_encodings_are_read(tmp_path: Path, encoding: str, name: str) -> None:
    text = TABLE.replace("room 3 ", "café ")
    if name == "t.jsonl":
        head, *lines = text.splitlines()
        rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / name).write_text(text, encoding=encoding)
    options = {} if encoding in ("utf-16", "utf-8-sig") else {"encoding": encoding}
    prepare(tmp_path / name, tmp_path / "out", "table", **options)
    assert "The café was clean." in {row["text"] for row in rows_of(open_dataset(tmp_path / "out"))}


def test_another_encoding_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE.replace("room", "café"), encoding="latin-1")
    refuse(tmp_path / "t.csv", "table", r"not valid UTF-8: u0, i0, 1, The caf� 0 was clean\.; name the file's encoding"
           r" with --encoding, such as latin-1")  # fmt: skip
    (tmp_path / "t.csv").write_bytes(TABLE.encode("utf-16-le"))
    refuse(tmp_path / "t.csv", "table", "UTF-16 is read with --encoding utf-16-le")


def test_what_an_encoding_cannot_decode_is_one_rejected_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(TABLE.encode() + b"u1,i99,4,a \x81 text\n")
    summary = prepare(tmp_path / "t.csv", tmp_path / "out", "table", encoding="cp1252")
    assert (summary.kept, summary.rejected) == (30, {"not valid UTF-8": 1})


@pytest.mark.parametrize("encoding", ["utf-17", "zlib", "idna", "unicode_escape", "rot13", ""])
def test_what_is_no_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    if encoding:
        refuse(tmp_path / "t.csv", "table", f"encoding: unknown value '{encoding}'; known are", encoding=encoding)
    refuse(peter_folder(tmp_path), "peter", "encoding: format peter is a pickle", encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(amazon(30)),
        json.dumps(amazon(30), indent=1),
        "\n".join(json.dumps(record, indent=2) for record in amazon(30)),
        json.dumps({"reviews": amazon(30)}),
        json.dumps({"count": 30, "of": {"a": [1]}, "reviews": amazon(30), "next": None}, indent=2),
        "\ufeff" + "\r\n".join(map(json.dumps, amazon(30))),
        "\n".join(json.dumps({"images": [{"url": "x"}], **record}) for record in amazon(30)),
        "\n".join(json.dumps({"images": [{"url": "x"}], **record}, indent=1) for record in amazon(30)),
        json.dumps({"reviews": [record | {"reviewText": "clean " * 900} for record in amazon(30)]}),
    ],
    ids=["array", "laid out", "objects", "wrapped", "wrapped with more", "lines", "lists", "lists laid out", "long"],
)
def test_json_is_read_however_it_is_laid_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    assert kept(tmp_path / "r.json", "amazon") == 30


def test_json_that_is_cut_or_holds_columns_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"reviews": amazon(30)}, indent=1)
    (tmp_path / "r.json").write_text(text[: len(text) // 2])
    refuse(tmp_path / "r.json", "amazon", r"element 1\d of the JSON array is not valid JSON or is cut off")
    columns = {"user": {"0": "a", "1": "b"}, "item": {"0": "x", "1": "y"}}
    (tmp_path / "r.json").write_text(json.dumps(columns))
    refuse(tmp_path / "r.json", "table", r"holds columns, not records; .* orient='records', lines=True")
    records = "\n".join(json.dumps(record, indent=2) for record in amazon(30))
    (tmp_path / "r.json").write_text(records[:-5])
    refuse(tmp_path / "r.json", "amazon", "object 30 of the file is not valid JSON or is cut off")


def test_a_broken_first_line_does_not_change_how_the_others_are_read(tmp_path: Path) -> None:
    for first in ('{"reviewerID": "u", "images": [{', '{"a": 1', "{"):
        source = write_lines(tmp_path / "r.json", amazon(30))
        source.write_text(first + "\n" + source.read_text())
        summary = prepare(source, tmp_path / "out" / str(len(first)), "amazon")
        assert (summary.kept, summary.rejected) == (30, {"not valid JSON": 1})


def parquet(path: Path, start: int, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = range(start, start + count)
    columns = {"user": [f"u{n % 7}" for n in rows], "item": list(rows), "text": ["A clean room."] * count}
    pq.write_table(pa.table(columns | {"rating": [3.5] * count}), path)


def test_a_folder_of_parquet_parts_is_one_table(tmp_path: Path) -> None:
    for part in range(3):
        parquet(tmp_path / "spark" / f"part-0000{part}.snappy.parquet", part * 10, 10)
    (tmp_path / "spark" / "_SUCCESS").touch()
    (tmp_path / "spark" / ".part-00000.crc").write_bytes(b"crc")
    summary = prepare(tmp_path / "spark", tmp_path / "out", "table")
    assert (summary.read, summary.kept, summary.items) == (30, 30, 30)
    assert open_dataset(tmp_path / "out").meta.source == "spark"
    for year in (2019, 2020):
        parquet(tmp_path / "hive" / f"year={year}" / "part.parquet", 100 * year, 10)
    assert kept(tmp_path / "hive", columns={"time": "year"}) == 20
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "part-00000.csv").write_text(TABLE)
    refuse(tmp_path / "csv", "table", "a folder without Parquet files; give one file")


@pytest.mark.parametrize(
    ("values", "field", "match"),
    [
        (
            pa.array([[[1]]] * 10),
            "features",
            r"'features' is of type list<.*can't be the features; change it",
        ),
        (pa.array([{"a": 1}] * 10), "features", r"'features' is of type struct<.*--column features=-"),
        (pa.array([1] * 10, pa.time64("us")), "time", r"'time' is of type time64.*can't be the time.*--column time=-"),
        (pa.array([[1.5]] * 10), "rating", r"'rating' is of type list<.*can't be the rating"),
        (pa.array([{"a": 1}] * 10), "user", r"'user' is of type struct<.*can't be the user$"),
    ],
)
def test_a_parquet_column_of_a_wrong_type_is_named(tmp_path: Path, values: pa.Array, field: str, match: str) -> None:
    columns = {"user": ["u"] * 10, "item": [f"i{n}" for n in range(10)], "text": ["A room."] * 10} | {field: values}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    refuse(tmp_path / "t.parquet", "table", match)
    if field not in ("user", "rating"):
        assert kept(tmp_path / "t.parquet", columns={field: "-"}) == 10


def test_repeated_pairs_are_decided_by_times_in_iso_8601(tmp_path: Path) -> None:
    """The older row once stayed, since `Z` was not understood."""
    lines = TABLE.splitlines()
    rows = [lines[0] + ",time", *(line + ",2020-01-02T10:00:00Z" for line in lines[1:])]
    rows[1:1] = ["ux,ix,5,The newest room,2020-01-02T10:00:00Z", "ux,ix,1,The oldest room,2020-01-02T10:00:00+02:00"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    summary = prepare(tmp_path / "t.csv", tmp_path / "out", "table")
    assert (summary.kept, summary.repeated_pairs, summary.unknown_times) == (31, 1, 0)
    assert "The newest room" in {row["text"] for row in rows_of(open_dataset(tmp_path / "out"))}


def test_times_that_are_not_understood_are_counted_and_refused_above_the_share(tmp_path: Path) -> None:
    lines = TABLE.splitlines()
    rows = [lines[0] + ",time", *(line + ",2020-01-02" for line in lines[1:])]
    rows[4] = rows[4].replace("2020-01-02", "01/02/2020")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    summary = prepare(tmp_path / "t.csv", tmp_path / "out", "table")
    assert (summary.kept, summary.unknown_times) == (30, 1)
    assert summary.notes == ["1 times are not understood, such as '01/02/2020' (row 4)"]
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["preparation"]["unknown_times"] == 1
    (tmp_path / "t.csv").write_text("\n".join(rows).replace("2020-01-02", "January 2 2020"))
    refuse(tmp_path / "t.csv", "table", r"30 of 30 times are not understood \(100\.0%, at most 10% are allowed\); "
           r"first: row 1: 'January 2 2020'; write seconds since 1970 or ISO 8601.*--column time=-")  # fmt: skip
    assert kept(tmp_path / "t.csv", columns={"time": "-"}) == 30


def test_features_that_begin_like_a_list_and_are_none_are_rejected(tmp_path: Path) -> None:
    lines = TABLE.splitlines()
    rows = [lines[0] + ",features", *(line + ",\"['room', 'swimming pool']\"" for line in lines[1:])]
    rows[3] = lines[3] + ",[]"
    rows[4] = lines[4] + ",[room"
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    summary = prepare(tmp_path / "t.csv", tmp_path / "out", "table")
    assert summary.rejected == {"features begin like a list and are none": 1}
    found = {str(row["item"]): row["features"] for row in rows_of(open_dataset(tmp_path / "out"))}
    assert found["i0"] == ["room", "swimming pool"]
    assert found["i2"] == []


def test_names_of_columns_are_found_whatever_their_case(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE.replace("user,item,rating,text", "User, Item,RATING,Text"))
    assert kept(tmp_path / "t.csv") == 30


def test_ids_that_were_whole_numbers_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE.replace("u1,", "12.0,"))
    summary = prepare(tmp_path / "t.csv", tmp_path / "out", "table")
    assert summary.notes == ["5 ids end in .0, as whole numbers do that were saved as fractions"]


def test_a_pickle_without_templates_says_so(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "reviews.pickle").write_bytes(pickle.dumps([{"user": "u", "item": "i", "rating": 3, "text": "x"}] * 9))
    refuse(tmp_path / "reviews.pickle", "peter", r"9 of 9 rows rejected.*no template \(feature, adjective, sentence")
