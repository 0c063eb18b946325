"""Data sets on the Hugging Face Hub, brought to local files that are then read like any others."""

from __future__ import annotations

import re
from pathlib import Path

from fsdpsft.errors import DataError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]*){0,2}")
_PREFIX = "hf://datasets/"
_OFFLINE = "Check the name and the connection (and HF_HUB_OFFLINE), or download the files and name their path"


def is_hub_name(path: str) -> bool:
    """Whether ``path`` has the form ``owner/name[:config[:split]]`` and is not the name of a data file."""
    files = r"\.(parquet|pq|jsonl?|ndjson|arrow|feather|csv)(\.gz|\.zst)?$"
    return _NAME.fullmatch(path) is not None and re.search(files, path) is None


def fetch_hub_rows(name: str, split: str) -> list[str]:
    """Fetch a Hub data set through ``datasets``.

    Args:
        name: ``owner/name[:config[:split]]``.
        split: used where the name has none.

    Returns:
        The Arrow files it is cached in.

    Raises:
        DataError: ``datasets`` is not installed, or the data set cannot be fetched.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        hint = "install it, or download the files and name their path"
        raise DataError(f"{name}: no such path, and Hub data sets need the package datasets; {hint}") from None
    owner_name, config, named_split = (name.split(":") + ["", ""])[:3]
    try:
        data = load_dataset(owner_name, config or None, split=named_split or split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as exc:
        message = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise DataError(f"{name}: no such path, nor on the Hub ({message}). {_OFFLINE}") from exc
    cached = [str(entry["filename"]) for entry in data.cache_files]
    if not cached:
        raise DataError(f"{name}: the data set is empty or not kept in files; save it as Parquet and name the file")
    return cached


def fetch_hub_path(url: str) -> str:
    """Fetch ``hf://datasets/owner/name[@revision]/path`` (a file, folder or glob) into the Hub's cache.

    Returns:
        The local path or glob.

    Raises:
        DataError: the address is malformed, or the files cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    parts = url.removeprefix(_PREFIX).strip("/").split("/", 2)
    if not url.startswith(_PREFIX) or len(parts) < 3:
        example = f"{_PREFIX}owner/name/path/to/file.parquet"
        raise DataError(f"{url}: an address on the Hub looks like {example}; for a whole data set write owner/name")
    name, _, revision = parts[1].partition("@")
    try:
        folder = snapshot_download(
            f"{parts[0]}/{name}",
            repo_type="dataset",
            revision=revision or None,
            allow_patterns=[parts[2], f"{parts[2]}/*"],
        )
    except (OSError, ValueError, HfHubHTTPError) as exc:
        message = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise DataError(f"{url}: could not be fetched from the Hub ({message}). {_OFFLINE}") from exc
    return str(Path(folder) / parts[2])
