from pathlib import Path

from mpp.files import cache_folder


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))
    assert cache_folder("features") == tmp_path / "features"
    monkeypatch.delenv("MPP_CACHE")
    assert cache_folder("shards") == Path.home() / ".cache" / "mpp" / "shards"
