"""Settings that belong to one tool (``check.rows=…``), parted from those of the run."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from fsdpsft.errors import ConfigError


def take_keys(arguments: Sequence[str], tool: str, known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Part ``tool.key=value`` from the other arguments; a leading ``+`` is accepted.

    Returns:
        The tool's values by key, as text, and the other arguments.

    Raises:
        ConfigError: a key that the tool does not have, or one without a value.
    """
    taken: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        name, given, value = argument.lstrip("+").partition("=")
        if not name.startswith(f"{tool}."):
            rest.append(argument)
            continue
        key = name.removeprefix(f"{tool}.")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {tool}.{close[0]}?" if close else ""
            names = ", ".join(f"{tool}.{name}" for name in known)
            raise ConfigError(f"unknown key {name}{hint} (the keys of this tool: {names})")
        if not given or not value:
            raise ConfigError(f"{name} needs a value: {name}=…")
        taken[key] = value
    return taken, rest


def whole_number(key: str, text: str, least: int) -> int:
    """``text`` as a number of at least ``least``.

    Raises:
        ConfigError: it is none.
    """
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{key}={text} must be a whole number of at least {least}")
    return int(text)
