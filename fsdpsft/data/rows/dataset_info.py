"""LLaMA-Factory's ``dataset_info.json``: names for data sets, with the columns and role tags each one uses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpsft.errors import DataError, did_you_mean

_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
# Entries that are there for other kinds of training, or that would change which rows are read.
_REFUSED = {
    "ranking": "preference data is not for supervised fine-tuning",
    "num_samples": "use data.train_max_samples",
    "script_url": "run the script and name the file it writes",
    "cloud_file_name": "copy the file and name its path",
    "folder": "name the files by a path or glob",
}
_HUBS = {"hf_hub_url", "ms_hub_url", "om_hub_url"}  # the same data set in several places; Hugging Face's is used
_ENTRY_KEYS = {"file_name", "formatting", "split", "subset", "columns", "tags"} | _HUBS
_COLUMNS = {
    "prompt": "prompt_key",
    "query": "query_key",
    "response": "response_key",
    "history": "history_key",
    "messages": "messages_key",
    "system": "system_key",
    "tools": "tools_key",
}
_OTHER_COLUMNS = {
    "chosen": "preference data; to train the chosen answers name that column response",
    "rejected": "preference data; answers to reject are not trained on",
    "kto_tag": "preference data; keep the rows whose answers are wanted, and leave the tag out",
    "images": "only text is trained",
    "videos": "only text is trained",
    "audios": "only text is trained",
}
_TAG_KEYS = {"role_tag": "role_key", "content_tag": "content_key"}
_TAG_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "function_call",
}


@dataclass(frozen=True)
class DatasetInfo:
    """A parsed ``dataset_info.json``.

    Attributes:
        path: the file.
        entries: data set name to its entry.
    """

    path: str
    entries: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: str) -> DatasetInfo:
        """Read the file, or the one in the folder ``path``.

        Raises:
            DataError: it is missing or is not a JSON object of objects.
        """
        file = Path(path).expanduser()
        file = file / "dataset_info.json" if file.is_dir() else file
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
            raise DataError(f"data.dataset_info={path}: cannot be read as JSON ({exc})") from None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise DataError(f"data.dataset_info={path}: must map each data set's name to an object with its file_name")
        return cls(str(file), entries)

    def resolve(self, name: str) -> tuple[str, dict[str, Any]]:
        """The path or Hub name of a data set, and the ``RowFormat`` fields its entry states.

        Raises:
            DataError: the entry needs something that is not supported, or has a key that is not known.
        """
        entry, where = self.entries[name], f"{self.path}, data set {name}"
        for key, advice in _REFUSED.items():
            if entry.get(key):
                raise DataError(f"{where}: {key}={entry[key]!r} is not supported; {advice}")
        _refuse_unknown(entry, _ENTRY_KEYS | set(_REFUSED), where)
        return self._path(entry, where), _row_format(entry, where)

    def _path(self, entry: dict[str, Any], where: str) -> str:
        if entry.get("file_name"):
            return str(Path(self.path).parent / str(entry["file_name"]))
        if not entry.get("hf_hub_url"):
            raise DataError(f"{where}: names neither file_name nor hf_hub_url; add one of them")
        return ":".join([str(entry["hf_hub_url"]), str(entry.get("subset") or ""), str(entry.get("split") or "")])


def _refuse_unknown(found: dict[str, Any], known: set[str], where: str) -> None:
    for key in found:
        if key not in known:
            hint = did_you_mean(key, known)
            raise DataError(f"{where}: unknown key {key}{hint} (known are {', '.join(sorted(known))})")


def _row_format(entry: dict[str, Any], where: str) -> dict[str, Any]:
    formatting = str(entry.get("formatting") or "alpaca")
    if formatting not in _FORMATS:
        raise DataError(f"{where}: formatting={formatting!r} is not one of {', '.join(_FORMATS)}")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if not isinstance(columns, dict) or not isinstance(tags, dict):
        raise DataError(f"{where}: columns and tags must be objects")
    for key, advice in _OTHER_COLUMNS.items():
        if columns.get(key):
            raise DataError(f"{where}, columns: {key}={columns[key]!r} is not supported: {advice}")
    _refuse_unknown(columns, set(_COLUMNS) | set(_OTHER_COLUMNS), f"{where}, columns")
    _refuse_unknown(tags, set(_TAG_KEYS) | set(_TAG_ROLES), f"{where}, tags")
    for key, value in (columns | tags).items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {key} must be text, found {value!r}")
    fields: dict[str, Any] = {"format": _FORMATS[formatting]}
    fields |= {_COLUMNS[key]: value for key, value in columns.items() if value}
    fields |= {_TAG_KEYS[key]: value for key, value in tags.items() if key in _TAG_KEYS and value}
    roles = {value: _TAG_ROLES[key] for key, value in tags.items() if key in _TAG_ROLES and value}
    if roles:
        fields["role_names"] = roles
    return fields
