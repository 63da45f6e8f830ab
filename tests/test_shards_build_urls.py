"""Indexing tars by URL: the same index as of local tars, and patterns as webdataset expands them."""

import http.server
import threading
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from http_server import File, Server, serving
from shard_files import labelled, quiet, write_tar

from mpp.errors import UserError
from mpp.remote.fetch import Retry
from mpp.remote.urls import RemoteError
from mpp.shards.build import index_folder
from mpp.shards.build_urls import braces, expand, index_urls
from mpp.shards.index import read_index

pytest.importorskip("aiohttp", reason="fetching over HTTP needs fsspec[http]")

QUICK = Retry(attempts=3, wait=0.002, longest=0.01, timeout=10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as running:
        yield running


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    for i in range(3):
        write_tar(tmp_path / "tars" / f"train-{i:06d}.tar", labelled(5, ["cat", "dog"], start=5 * i))
    return tmp_path / "tars"


def put(server: Server, tars: Path, **fault) -> str:
    urls = [server.put(path.name, File(path.read_bytes(), **fault)) for path in sorted(tars.glob("*.tar"))]
    return urls[0].replace("train-000000", "train-{000000..000002}")


@pytest.mark.parametrize("fault", [{}, {"cut": 1000, "times": 2}, {"lengths": False}, {"ranges": False}], ids=str)
def test_the_index_is_that_of_the_local_tars(server, tars, tmp_path, fault):
    (local,) = index_folder(tars, report=quiet)
    pattern = put(server, tars, **fault)
    index_urls([pattern], tmp_path / "out", "train", retry=QUICK, report=quiet)
    index = read_index(tmp_path / "out", "train")
    for field in fields(index):
        if field.name not in ("folder", "shards", "url"):
            assert np.array_equal(getattr(index, field.name), getattr(local, field.name)), field.name
    assert list(index.shards) == [pattern.replace("{000000..000002}", f"{i:06d}") for i in range(3)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-index.safetensors"]


def test_splits_are_what_the_names_tell_or_as_asked(server, tmp_path):
    for split in ("train", "test"):
        data = write_tar(tmp_path / "one.tar", labelled(4, ["cat", "dog"], start=10 * (split == "test"))).read_bytes()
        url = server.put(f"{split}-000000.tar", File(data))
    both = url.replace("test-", "{train,test}-")
    found = index_urls([both], tmp_path / "out", retry=QUICK, report=quiet)
    assert [(index.split, len(index)) for index in found] == [("train", 4), ("test", 4)]
    assert read_index(tmp_path / "out", "test").classes == ("cat", "dog")
    (whole,) = index_urls([both], tmp_path / "out", "all", retry=QUICK, report=quiet)
    assert (whole.split, len(whole)) == ("all", 8)


def test_a_tar_that_is_cut_or_missing_is_one_line_and_no_index(server, tars, tmp_path):
    pattern = put(server, tars)
    server.put("train-000001.tar", File((tars / "train-000001.tar").read_bytes()[:2000]))
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:\d+/train-000001\.tar: cut"):
        index_urls([pattern], tmp_path / "out", "train", retry=QUICK, report=quiet)
    server.put("train-000001.tar", File(b"", status=404))
    with pytest.raises(UserError, match=r"/train-000001\.tar: not there"):
        index_urls([pattern], tmp_path / "out", "train", retry=QUICK, report=quiet)
    assert not (tmp_path / "out").exists()


def test_a_key_in_two_tars_names_both(server, tars, tmp_path):
    write_tar(tars / "train-000001.tar", labelled(5, ["cat"]))
    with pytest.raises(UserError, match=r"occurs 2 times in train: in train-000000\.tar, train-000001\.tar"):
        index_urls([put(server, tars)], tmp_path / "out", "train", retry=QUICK, report=quiet)


@pytest.mark.parametrize(
    "pattern",
    [
        "http://h/train-{000000..000012}.tar",
        "http://h/train-{8..11}.tar",
        "http://h/train-{08..11}.tar",
        "http://h/train-{0..3}.tar",
        "http://h/train-{3..0}.tar",
        "http://h/{train,val}-{00..02}.tar",
        "http://h/{a,b,}/x.tar",
        "http://h/none.tar",
    ],
)
def test_braces_mean_what_webdataset_takes_them_for(pattern):
    reference = pytest.importorskip("braceexpand").braceexpand
    assert braces(pattern) == list(reference(pattern))


def test_nested_braces_and_endless_ones():
    assert sorted(braces("a{b,{1..2}}")) == ["a1", "a2", "ab"]
    for pattern in ("x{0..99999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(RemoteError, match="more than 1000000 URLs"):
            braces(pattern)


def test_a_folder_over_http_is_the_tars_that_its_page_links_to(tars, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tars / "notes.txt").write_text("")
    (tars / "sub").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as pages:
        thread = threading.Thread(target=pages.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            folder = f"http://127.0.0.1:{pages.server_port}/tars/"
            assert expand(folder, retry=QUICK) == [f"{folder}train-{i:06d}.tar" for i in range(3)]
            with pytest.raises(RemoteError, match="no shards"):
                expand(f"{folder}sub/", retry=QUICK)
            with pytest.raises(RemoteError, match="not there"):
                expand(f"{folder}other/", retry=QUICK)
        finally:
            pages.shutdown()
            thread.join()
