"""URLs of shards: which are taken, and how they are printed and kept without the secrets that they may hold."""

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from mpp.errors import UserError, bare_address, shown, without_secrets

SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs")
PIPE = "pipe:"


class RemoteError(UserError):
    """A URL that is not taken, or an object that cannot be fetched."""


def is_url(text: str) -> bool:
    """Whether a shard's name is no file of a folder but `SCHEME://...` or `pipe:COMMAND`."""
    return text.startswith(PIPE) or re.match("[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_url(url: str, allow: Collection[str] = ()) -> None:
    """Refuses whatever could reach more than one object of a server: an index with URLs may come from anybody.

    allow: "pipe" for the output of shell commands.
    """
    if url.startswith(PIPE):
        if "pipe" not in allow:
            raise RemoteError(
                f"{shown_url(url)}: runs a shell command; if you trust whoever wrote it, set data.allow: [pipe]"
            )
        return
    if not is_url(url) or url.split("://")[0] not in SCHEMES:
        raise RemoteError(f"{shown_url(url)}: expected a URL that begins with {', '.join(SCHEMES)} (://) or pipe:")
    if "::" in url:  # fsspec would open one file system within another, the local one among them
        raise RemoteError(f"{shown_url(url)}: chained URLs (::) are not taken")
    if not url.isprintable() or " " in url:
        raise RemoteError(f"{shown_url(url)}: holds blanks or characters that no URL holds")
    try:
        host = urlsplit(url).netloc
    except ValueError:
        host = ""
    if not host:
        raise RemoteError(f"{shown_url(url)}: names no server or bucket")


def shown_url(url: str) -> str:
    """A URL for messages: without user, password, and what stands behind its `?` or `#`; blanks may be in them."""
    return shown(bare_address(url) if is_url(url) and not url.startswith(PIPE) else url)


def kept_url(url: str) -> str:
    """The address of a URL, as files keep it: what it may hold of secrets is given anew by whoever goes on."""
    if url.startswith(PIPE):
        return without_secrets(url)
    return bare_address(url).removesuffix("...").removesuffix("?").removesuffix("#") if is_url(url) else url


def below(url: str, name: str) -> str:
    """The URL of a file in a folder; what signs the folder's, behind a `?`, signs its files' too."""
    folder, mark, query = url.partition("?") if url.lower().startswith("http") else (url, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"
