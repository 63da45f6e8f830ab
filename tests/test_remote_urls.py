"""Addresses with secrets: they are used, and stand in no message, log or file but the one that is for their owner."""

import base64
import json
import os
import re
import stat
from functools import partial
from pathlib import Path

import pytest
from http_server import File, serving
from tiny_runs import LABELS, RECIPE, run, small_splits

from mpp.errors import UserError, without_secrets
from mpp.remote.cache import Cache
from mpp.remote.fetch import Retry
from mpp.remote.urls import below, kept_url, shown_url

QUICKLY = RECIPE.replace("steps: 6", "steps: 2")
QUICK = Retry(attempts=2, wait=0.01, longest=0.02, timeout=5)


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("https://me:s3cret@host/a.tar?X-Amz-Signature=s3cret&b=2", "https://host/a.tar?..."),
        ("http://me:p@s3cret@host/x: gone", "http://host/x: gone"),
        ("http://me:p%40s3cret@host:80/x", "http://host:80/x"),
        ("http://s3cret@host/x", "http://host/x"),
        ("http://me:a/s3cret@host/x", "http://host/x"),
        ("http://me:a?s3#cret@host/x", "http://host/x"),
        ("HTTPS://me:s3cret@host/x", "HTTPS://host/x"),
        ("http:/me:s3cret@host/x", "http:/host/x"),
        ("s3://KEY:s3cret@bucket/x.tar", "s3://bucket/x.tar"),
        ("http://host/x#token=s3cret", "http://host/x#..."),
        ("[http://a:s3cret@h/x, http://b:s3cret@h/y?z=s3cret]", "[http://h/x, http://h/y?..."),
        ("http://a:s3cret@h/x,http://b:s3cret@h/y", "http://h/x,http://h/y"),
        ("http://a:s3cret@h/{a,b}-{0..9}.tar", "http://h/{a,b}-{0..9}.tar"),
        ('found "http://me:s3 s3cret@h/x?y s3cret" here', 'found "http://h/x?..." here'),
        ("pipe:curl 'https://me:s3cret@host/a?sig=s3cret' | cat", "pipe:curl 'https://host/a?...' | cat"),
        ("pipe:curl -u me:s3cret https://host/a", "pipe:curl -u ... https://host/a"),
        ("GET /a?X-Amz-Credential=s3cret&X-Amz-Signature=s3cret", "GET /a?X-Amz-Credential=...&X-Amz-Signature=..."),
        ("sent Authorization: Bearer s3cret", "sent Authorization: Bearer ..."),
        ("HF_TOKEN=s3cret wget", "HF_TOKEN=... wget"),
    ],
)
def test_no_secret_is_shown_and_all_else_is(text, shows):
    assert without_secrets(text) == shows
    assert without_secrets(shows) == shows
    assert str(UserError(text)) == shows


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/me/set@main/a.tar",
        "http://host:8080/a@b/c",
        "model.class_token=false: not a number?",
        "data/a@b: no such folder",
        "name:(a+)?(b) matches",
        "a/b?c=d",
        "C:/data/x@y",
        "x" * 200_000,
        "ab=" * 50_000,
        "a://" * 20_000,
    ],
    ids=lambda text: text[:20],
)
def test_what_holds_no_secret_stays_and_takes_no_time(text):
    assert without_secrets(text) == text


def test_an_address_is_kept_without_what_is_secret_and_a_folder_signs_its_files():
    assert kept_url("https://me:s3cret@host/a?sig=s3cret#x") == "https://host/a"
    assert kept_url("data/a?b@c") == "data/a?b@c"
    assert kept_url("pipe:curl -u a:b http://c:d@h/x") == "pipe:curl -u ... http://h/x"
    assert shown_url("http://me:s3 cret@host/x") == "http://host/x"
    assert below("https://host/dig/?sig=1", "a.tar") == "https://host/dig/a.tar?sig=1"
    assert below("s3://bucket/what?", "a.tar") == "s3://bucket/what?/a.tar"


# Every command


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture
def guarded(splits, monkeypatch, tmp_path):
    """A server that gives the shards only to me:p@s3cret; its address, with and without these."""
    monkeypatch.setattr("mpp.data.read.Cache", partial(Cache, retry=QUICK))
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", os.devnull)
    with serving() as server:
        for path in splits.iterdir():
            url = server.put(f"shards/{path.name}", File(path.read_bytes(), login="me:p@s3cret"))
        plain = url.rpartition("/")[0]
        yield plain.replace("://", "://me:p%40s3cret@"), plain


def leaks(folder: Path) -> list[str]:
    """The files below a folder that hold the secret, as it is or in base64."""
    words = (b"s3cret", base64.b64encode(b"me:p@s3cret"), b"p%40s")
    found = [path for path in folder.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in words)]
    return [str(path.relative_to(folder)) for path in found]


def test_no_command_shows_or_keeps_the_secrets_of_addresses(guarded, splits, tmp_path, caplog, monkeypatch):
    url, plain = guarded
    signed = f"{url}?X-Amz-Signature=s3cret"
    (given := tmp_path / "given").mkdir()
    for name, text in {
        "pre": QUICKLY,
        "tune": LABELS.replace("depth: 2", "depth: 1").replace("steps: 6", "steps: 2"),
    }.items():
        text = text.replace("path: PATH,", f"path: '{url}', cache: {tmp_path}/cache,")
        (given / f"{name}.yaml").write_text(text)
    arms = "compare:\n  arms: {scratch: {finetune: tune}, mpp: {pretrain: pre, finetune: tune}}\n"
    (given / "both.yaml").write_text(f"base: pre.yaml\n{arms}  seeds: [0]\n  protocols: [finetune, knn]\n")
    out = tmp_path / "run"
    right = [
        ("pretrain", given / "pre.yaml", f"out={out}", "log.tensorboard=true"),
        ("pretrain", given / "pre.yaml", f"out={out}"),
        ("pretrain", given / "pre.yaml", f"out={tmp_path / 'mixed'}", f"data.path={signed}", f"data.mix.a.path={url}"),
        ("finetune", given / "tune.yaml", f"out={tmp_path / 'tuned'}", "--from", out),
        ("plan", given / "pre.yaml"),
        ("probe", out, "--data", url, "--protocol", "knn", "--json", tmp_path / "probe.json"),
        ("embed", out, url, tmp_path / "x.npz", "--split", "test"),
        ("predict", tmp_path / "tuned", url, "--split", "test", "--out", tmp_path / "p.csv"),
        ("predict", tmp_path / "tuned", url, "--split", "test", "--json", tmp_path / "p.json"),
        ("convert", tmp_path / "tuned", tmp_path / "timm", "--to", "timm"),
        ("compare", given / "both.yaml", f"out={tmp_path / 'compared'}", f"data.path={url}"),
        ("shards", "index", f"{url}/{{train,test}}-000000.tar", tmp_path / "index", "--labels", "none"),
    ]
    wrong = [
        ("shards", "check", url),
        ("shards", "stats", signed),
        ("shards", "index", url),
        ("shards", "index", f"{url.replace('%40', '@')}/no.tar", tmp_path / "none"),
        ("shards", "index", f"{url}/train-000000.tar", f"{url}/x"),
        ("shards", "make", url, tmp_path / "made"),
        ("pretrain", given / "pre.yaml", f"out={out}", f"data.path={url}/"[:-1], "train.lr=1"),
        ("pretrain", given / "pre.yaml", "--from", f"{url}/x", f"out={tmp_path / 'y'}"),
        ("pretrain", given / "pre.yaml", f"weights={signed}", f"out={tmp_path / 'y'}"),
        ("pretrain", signed),
        ("pretrain", given / "pre.yaml", f"data.path=[{url}, {signed}]"),
        ("pretrain", given / "pre.yaml", f"data.path={url.upper()}", f"out={tmp_path / 'y'}"),
        ("pretrain", given / "pre.yaml", f"data.path={url}/no", f"out={tmp_path / 'y'}"),
        ("pretrain", given / "pre.yaml", f"data.path={url.replace('me:', 'you:')}", f"out={tmp_path / 'y'}"),
        ("pretrain", given / "pre.yaml", f"data.allow=[{signed}]"),
        ("pretrain", given / "pre.yaml", f"objective.name={signed}"),
        ("pretrain", given / "pre.yaml", f"{signed}"),
        ("pretrain", given / "pre.yaml", "--unknown", signed),
        ("probe", out, "--data", url, "--protocol", signed),
        ("probe", out, "--data", url, "--train", "none"),
        ("predict", out, url, "--split", "test"),
        ("recipes", "--import", signed),
    ]
    for expected, commands in ((0, right), (2, wrong)):
        for command in commands:
            result = run(*command)
            assert result.code == expected, (command, result)
            assert not re.search("s3cret|p%40|p@", result.out + result.err), (command, result)
    assert "s3cret" not in caplog.text
    for path in given.iterdir():
        path.unlink()
    assert sorted(leaks(tmp_path)) == ["index/test-index.private.json", "index/train-index.private.json"]
    assert stat.S_IMODE((tmp_path / "index/test-index.private.json").stat().st_mode) == 0o600
    assert f"path: {plain}\n" in (out / "recipe.yaml").read_text()
    assert plain in (tmp_path / "compared/results.json").read_text()
    assert json.loads((tmp_path / "probe.json").read_text())["data"] == plain


def test_going_on_takes_the_secrets_from_the_recipe_given_or_from_netrc_and_says_if_they_are_missing(
    guarded, tmp_path, monkeypatch
):
    (url, _), recipe, out = guarded, tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(QUICKLY.replace("path: PATH,", f"path: '{url}',"))
    assert run("pretrain", recipe, f"out={out}").code == 0
    weights = (out / "encoder.safetensors").read_bytes()
    for given, login in (((recipe, f"out={out}"), ""), ((out / "recipe.yaml", f"data.path={url}"), "")):
        (out / "encoder.safetensors").unlink()
        assert run("pretrain", *given).code == 0, login
        assert (out / "encoder.safetensors").read_bytes() == weights
    result = run("pretrain", out / "recipe.yaml")
    assert result.code == 2
    assert "refused: status 401 Unauthorized; give its address with user and password" in result.line
    assert "a saved recipe keeps neither (or ~/.netrc)" in result.line
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password p@s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert run("pretrain", out / "recipe.yaml").code == 0


def test_an_index_of_guarded_urls_is_read_with_what_its_owner_alone_may_see(guarded, tmp_path):
    url, plain = guarded
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(QUICKLY.replace("PATH", str(tmp_path / "index")))
    signed = f"{url}/train-00000{{0..1}}.tar?X-Amz-Signature=s3cret"
    assert run("shards", "index", signed, tmp_path / "index").code == 0
    assert [path.name for path in (tmp_path / "index").glob("*.safetensors")] == ["train-index.safetensors"]
    assert run("pretrain", recipe, f"out={tmp_path / 'run'}").code == 0
    (tmp_path / "index/train-index.private.json").unlink()
    (tmp_path / "cache").rename(tmp_path / "old cache")
    result = run("pretrain", recipe, f"out={tmp_path / 'again'}")
    assert result.code == 2
    assert f"mpp: {plain}/train-00000" in result.err
    assert "refused: status 401" in result.err
