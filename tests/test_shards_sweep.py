"""mpp/shards/sweep.py: every image once, in order."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_files import labelled, png, quiet, write_tar

from mpp.shards.build import index_folder
from mpp.shards.index import Index
from mpp.shards.sweep import CHUNK, sweep
from mpp.shards.tar import ShardError


@pytest.fixture
def index(tmp_path: Path) -> Index:
    write_tar(tmp_path / "t-0.tar", labelled(CHUNK + 3, ["0"]))
    write_tar(tmp_path / "t-1.tar", labelled(CHUNK, ["0"], start=CHUNK + 3))
    return index_folder(tmp_path, report=quiet)[0]


def test_every_image_is_met_once_in_order(index):
    found = list(sweep(index, np.arange(len(index)), lambda shards, numbers: [shards.read(i) for i in numbers], "read"))
    assert [len(part) for part in found] == [CHUNK, CHUNK, 3]
    assert [data for part in found for data in part] == [png(i) for i in range(2 * CHUNK + 3)]
    assert list(sweep(index, np.arange(0), lambda shards, numbers: numbers, "read")) == []


def test_shards_that_are_urls_are_refused_in_one_line(index):
    remote = replace(index, shards=("https://example.org/t-0.tar", "t-1.tar"))
    with pytest.raises(ShardError, match="its shards are URLs; fetch them to look at every image"):
        list(sweep(remote, np.arange(3), lambda shards, numbers: numbers, "read"))
