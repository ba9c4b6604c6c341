"""Files from the network: checked by SHA-256, kept in a cache, never half there."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import file_sha256
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

SECONDS_TO_CONNECT = 10.0


def cached_file(url: str, sha256: str, folder: Path) -> Path | None:
    """The cached copy of `url` if it is there and its SHA-256 is right, else None."""
    path = folder / url.rpartition("/")[2]
    if not path.is_file():
        return None
    if file_sha256(path) != sha256:
        log.warning("%s does not have the checksum of %s; it is not used", path, url)
        return None
    return path


def download(url: str, sha256: str, folder: Path) -> Path:
    """The path of `url` in the cache `folder`, fetched if it is not there yet.

    Raises:
        ConfigError: no network, or what came does not have the SHA-256; nothing is kept then.
    """
    cached = cached_file(url, sha256, folder)
    if cached is not None:
        return cached
    path = folder / url.rpartition("/")[2]
    log.info("downloading %s to %s", url, path)
    with replacing(path) as temporary:
        try:
            with (
                urllib.request.urlopen(url, timeout=SECONDS_TO_CONNECT) as source,
                temporary.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(
                f"cannot download {url} ({reason}); put the file at {path}, "
                "or give the path of a local one"
            ) from error
        if file_sha256(temporary) != sha256:
            raise ConfigError(
                f"what came from {url} does not have the SHA-256 {sha256}; nothing was kept"
            )
    return path


def reach_hub(key: str, name: str) -> None:
    """Make sure that the Hugging Face hub can be asked for `name`, the value of a setting.

    Its libraries would try again and again for a minute. With HF_HUB_OFFLINE=1 they look in
    their cache only, and behind a proxy nobody but them can tell, so neither is checked.

    Raises:
        ConfigError: the hub does not answer.
    """
    if os.environ.get("HF_HUB_OFFLINE") or urllib.request.getproxies():
        return
    parts = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise ConfigError(
            f"{key}={name} is not a local path, and {parts.hostname} does not answer; "
            "check the network, give a local path, or set HF_HUB_OFFLINE=1 to use what was "
            "downloaded before"
        ) from error
