"""Users left out of a dataset, and ids replaced by hashes: nothing of them is left in any file."""

import json
from pathlib import Path

import pytest
from helpers.reviews import amazon, refuse, rows_of, write_lines

from gavamoe.data.dataset import open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.user_ids import hash_id

SECRET = "correct horse battery staple"


def everything(folder: Path) -> bytes:
    """All bytes of a dataset; its columns are compressed, so that ids are looked for in the rows as well."""
    rows = json.dumps([str(row) for row in rows_of(open_dataset(folder))]).encode()
    return rows + b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def source(tmp_path: Path) -> Path:
    """Reviews of ann and others; one of ann's is broken, one of bob's has no rating."""
    records = amazon(40) + amazon(6, reviewerID="ann", reviewText="My secret words.")
    records.append({"reviewerID": "ann", "asin": "i1", "reviewText": "Secret and without a rating."})
    records.append({"reviewerID": "bob", "asin": "i1", "reviewText": "Also without a rating."})
    path = write_lines(tmp_path / "r.json", records)
    path.write_text(path.read_text() + '{"reviewerID": "ann", "reviewText": "Secret and cut o\n')
    return path


def test_users_to_be_left_out_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "forget.txt").write_text("ann\n  nobody \n\n")
    summary = prepare(source(tmp_path), tmp_path / "out", "amazon", drop_users=tmp_path / "forget.txt")
    assert (summary.read, summary.kept, summary.dropped) == (49, 40, 7)
    assert summary.rejected == {"not valid JSON": 1, "rating missing": 1}
    assert summary.notes == ["1 of the users to leave out have no row"]
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["preparation"]["dropped"] == 7
    content = everything(tmp_path / "out")
    for word in (b"ann", b"ecret", b"Also without"):
        assert word not in content
    same = prepare(write_lines(tmp_path / "o.json", amazon(40)), tmp_path / "others", "amazon")
    assert summary.fingerprint == same.fingerprint


def test_hashed_ids_name_nobody_and_are_found_again_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET + "\n")
    path = source(tmp_path)
    prepare(path, tmp_path / "plain", "amazon")
    prepare(path, tmp_path / "hashed", "amazon", hash_users=tmp_path / "key")
    assert b'"ann"' not in everything(tmp_path / "hashed").replace(b"'", b'"')
    plain, hashed = open_dataset(tmp_path / "plain"), open_dataset(tmp_path / "hashed")
    for index in range(plain.catalog.n_users):
        user = hash_id(plain.catalog.user_id(index), SECRET.encode())
        assert hashed.catalog.user_index(user) == index
        assert len(user) == 32
    assert [row | {"user": 0} for row in rows_of(plain)] == [row | {"user": 0} for row in rows_of(hashed)]
    other = hash_id("ann", b"another key of 16+")
    assert hashed.catalog.user_index(other) is None


@pytest.mark.parametrize(
    ("option", "content", "match"),
    [
        ("drop_users", None, "cannot be read"),
        ("drop_users", b" \n\n", "names no user; expected an id a line"),
        ("drop_users", b"\xff\xfe", "not UTF-8"),
        ("hash_users", None, "cannot be read"),
        ("hash_users", b"short\n", "5 characters of at least 16; try openssl rand -hex 32"),
        ("hash_users", b"x" * 5000, "more than the 4096 bytes"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, option: str, content: bytes | None, match: str) -> None:
    path = source(tmp_path)
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    refuse(path, "amazon", match, **{option: tmp_path / "file"})
