"""``conf/train.yaml`` as written from the schema: every key, its default and one line of help.

python -m fsdpsft.config
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsdpsft.config.schema import KEYS

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the YAML as fsdpsft/conf (see pyproject.toml); a checkout has it beside the package.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
HEADER = """\
# Every key of fsdpsft, its default, and what it does. Written from fsdpsft/config/schema.py; edit it there.
# Override any of them on the command line:  torchrun -m fsdpsft.train data.train_files=chats.parquet optim.lr=1e-5
defaults:
  - _self_
  - preset: null                    # a file of conf/preset/, e.g. preset=lora
"""
_COMMENT_COLUMN = 36


def render() -> str:
    """The text of ``conf/train.yaml``."""
    lines = nested(
        (name, _value(key.default), key.help.replace("{choices}", " | ".join(key.choices)))
        for name, key in KEYS.items()
    )
    return HEADER + "\n".join(lines) + "\n"


def nested(settings: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines of YAML, sections indented, of settings in the schema's order: dotted key, value as text, comment."""
    lines: list[str] = []
    sections: list[str] = []
    for name, value, comment in settings:
        *path, leaf = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(path, sections, strict=False)) if a != b), len(path))
        if path[:1] != sections[:1]:
            lines.append("")
        lines += ["  " * depth + f"{path[depth]}:" for depth in range(min(shared, len(sections)), len(path))]
        sections = path
        # At least one blank before the comment, or YAML reads it as part of the value.
        lines.append(f"{'  ' * len(path)}{leaf}: {value}".ljust(_COMMENT_COLUMN - 1) + f" # {comment}")
    return lines


def _value(value: Any) -> str:
    """A default in YAML, on one line."""
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # YAML 1.1 reads 1e-05 as text, OmegaConf as a number; written as people write it.
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) and 0 < abs(value) < 1e-3 else str(value)
