"""The Hugging Face hub: whether it can be reached, which its client would try for half a minute, and what a clone of
one of its repositories may lack."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from registry.errors import UsageError

TIMEOUT_SECONDS = 5.0


@lru_cache(maxsize=1)
def hub_unreachable() -> bool:
    """True if there is no connection to the hub, or to the proxy that leads there; asked once a process. Then only
    what is cached can be had, so callers pass it on as ``local_files_only``. Raises UsageError for an address that is
    none."""
    from urllib.request import getproxies, proxy_bypass  # an HTTP client, of which importing envs has no need

    endpoint, proxy = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", None
    try:
        url = urlsplit(endpoint)
        proxy = getproxies().get(url.scheme)
        if proxy and not proxy_bypass(url.hostname or ""):
            url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), TIMEOUT_SECONDS).close()
    except OSError:
        return True
    except ValueError as error:  # no port, no name of a host
        raise UsageError(
            f"the hub's address {endpoint!r} (HF_ENDPOINT){f', or the proxy {proxy!r},' if proxy else ''} is malformed "
            f"({error}): correct or unset the environment variable"
        ) from error
    return False


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git leaves in place of a large one where git-lfs was not at work."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")
