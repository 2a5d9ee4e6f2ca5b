"""Downloads into Keras' cache, which are resumed, retried and checked."""

from __future__ import annotations

import hashlib
import os
import time
import urllib.error
import urllib.request

import keras

ATTEMPTS = 4
CHUNK = 1 << 20
TIMEOUT = 30


def cache_folder() -> str:
    """Return the folder for weights: `models/keras_resnet` in Keras' home (`KERAS_HOME`, else `~/.keras`)."""
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    return os.path.join(home, "models", "keras_resnet")


def fetch(url: str, digest: str | None = None, folder: str | os.PathLike[str] | None = None, pause: float = 1.0) -> str:
    """Download a file and return its local path.

    Unlike `keras.utils.get_file`, this function resumes and retries, and a partial file never has the name of the whole one.

    Args:
        url: Address of the file.
        digest: Sha256 (64 hexadecimal digits, or the leading ones) or md5 (32). None skips the check.
        folder: Folder of the cache. Default: `cache_folder()`.
        pause: Seconds before the second attempt; doubled before each further one.

    Returns:
        Path of the file. A file in the cache is used without a connection.

    Raises:
        ConnectionError: There was no connection in any attempt, or the server refuses. The message says where to put the file.
        ValueError: The digest of the file is not the published one. The file is deleted.
    """
    folder = folder or cache_folder()
    # Many sources call their file the same, so the address is part of the name.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rsplit('/', 1)[-1].split('?')[0]}"
    target = os.path.join(folder, name)
    if os.path.isfile(target):
        return target
    os.makedirs(folder, exist_ok=True)
    partial = f"{target}.part"
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _transfer(url, partial)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise ConnectionError(f"{url} answers {error.code} ({error.reason}); the weights may have moved") from error
            last = error
        except (urllib.error.URLError, OSError) as error:
            last = error
    else:
        raise ConnectionError(
            f"{url} could not be downloaded in {ATTEMPTS} attempts ({getattr(last, 'reason', last)}); "
            f"without a network, put the file at {target}"
        ) from last
    _check(partial, digest, url)
    os.replace(partial, target)
    return target


def _transfer(url, partial):
    """Append what is missing to the partial file. A server that cannot resume sends everything again."""
    have = os.path.getsize(partial) if os.path.exists(partial) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing is left to send, or the file has changed: the digest, or a fresh start, tells.
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return
        os.remove(partial)
        raise OSError("the partial file does not belong to what the server has") from error
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        progress = keras.utils.Progbar(total, unit_name="byte")
        with open(partial, "ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress.update(have, finalize=have == total)
    if total is not None and have < total:
        raise OSError(f"the connection broke after {have} of {total} bytes")


def _check(path, digest, url):
    if digest is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5" if len(digest) == 32 else "sha256").hexdigest()
    if not found.startswith(digest):
        os.remove(path)
        raise ValueError(f"{url} has the digest {found[: len(digest)]}, published is {digest}; the file was not kept")
