"""URIs that are refused before anything is asked of a storage: what they would lead to, keys in them."""

from pathlib import Path

import pytest
from helpers.cli import Runner

from gavamoe.artifacts import copying, object_store, remote
from gavamoe.artifacts.object_store import ObjectStore
from gavamoe.errors import InputError

SECRET = "S3CRET"


def make_folder(path: Path) -> Path:
    path.mkdir()
    (path / "meta.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:///x/a#b", "file:///x/a#b: # is no part of a name in a URI; write %23 for it"),
        ("s3://bucket/a#b", "s3://bucket/a#b: # is no part of a name in a URI; write %23 for it"),
        ("s3://bucket/a?b", "s3://bucket/a?b: ? is no part of a name in a URI; write %3F for it"),
        ("file:///x/100%", "file:///x/100%: % is no character; write %25 for a percent sign"),
        ("s3://bucket/a%2", "s3://bucket/a%2: %2 is no character; write %25 for a percent sign"),
        ("s3://", "s3://: names no folder"),
        ("s3:/bucket/a", "s3:/bucket/a: not a URI; did you mean s3://bucket/a?"),
        ("file:/x/a", "file:/x/a: not a URI; did you mean file:///x/a?"),
        ("file:///", "file:///: names no folder"),
        ("file:///x/%00", "has a control character"),
        ("file:///x/%ff", "is not UTF-8"),
        ("file:///x/\udcff", "is not UTF-8"),
        ("file:///x/../y", "file:///x/../y: has . or .. for a folder"),
        ("s3://bucket/x/%2e%2E/y", "has . or .. for a folder"),
    ],
)
def test_uris_that_would_lead_elsewhere_are_refused(uri: str, message: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    for call in (lambda: remote.located(uri), lambda: copying.copy(str(folder), uri), lambda: ObjectStore(uri)):
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://user:{SECRET}@bucket/x",
        f"s3://user%3A{SECRET}@bucket/x",
        f"s3://{SECRET}@bucket/x",
        f"s3:/user:{SECRET}@bucket/x",
        f"abfs://account:{SECRET}@container/x",
        f"abfs://account:{SECRET}/+rest==@container/x#y",
        f"abfss://container:{SECRET}@account.dfs.core.windows.net/x",
        f"gs://b/x?scheme=http&endpoint_override=127.0.0.1:1&access_token={SECRET}",
        f"hdfs://user:{SECRET}@host:9000/x",
        f"s3://bucket?access_key=a&secret_key={SECRET}",
    ],
)
def test_keys_in_uris_are_refused_unseen(
    gavamoe: Runner, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "a")
    for command in (("copy", folder, uri), ("copy", uri, tmp_path / "b"), ("data", "describe", uri)):
        refused = gavamoe(*command)
        assert refused.code == 2, refused.err
        assert SECRET not in refused.out + refused.err
    written = [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in written)


@pytest.mark.parametrize(
    "uri", ["abfs://container@account.dfs.core.windows.net/x", "hdfs://me@host:9000/x", "gs://anonymous@bucket/x"]
)
def test_names_before_a_place_that_are_no_keys_stay(uri: str) -> None:
    assert object_store.canonical(uri) == uri
