"""Tools that take the keys of a training and a few of their own (``check.rows=…``)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol, Self, TypeVar

from fsdpsft.config.cli import run_command
from fsdpsft.config.schema import Config
from fsdpsft.errors import ConfigError, UserError, did_you_mean


class ToolOptions(Protocol):
    """A tool's own settings: a dataclass whose fields are its keys."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def parse(cls, values: dict[str, str]) -> Self:
        """Read the values that were given; raises ConfigError where one is not usable."""
        ...


Own = TypeVar("Own", bound=ToolOptions)


def run_tool(
    tool: str, usage: str, options: type[Own], command: Callable[[Config, Own], object], arguments: Sequence[str] | None
) -> int:
    """Separate the tool's own keys from the training's, and run ``command`` on both.

    Args:
        tool: its name, as in ``fsdpsft.{tool}`` and ``{tool}.key=value``.
        usage: printed before the training's keys when help is asked for.
        options: what the tool's keys are read into.
        command: what the tool does; it returns False where something does not hold.
        arguments: the command line; None for this process's own.

    Returns:
        The exit code: 0, or 1 where something does not hold and after a user's mistake.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(usage)
    try:
        taken, rest = take_keys(arguments, tool, [field.name for field in fields(options)])
        own = options.parse(taken)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    results: list[object] = []
    failed = run_command(lambda config: results.append(command(config, own)), rest, f"fsdpsft.{tool}")
    return failed or int(any(result is False for result in results))


def run_file_tool(usage: str, act: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a tool that takes no keys of a training: 0, or 1 after a user's mistake, whose message is written."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(usage)
        return 0
    try:
        act(arguments)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def take_keys(arguments: Sequence[str], tool: str, known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The values of ``tool.key=value`` arguments (a leading ``+`` is accepted) by key, and the other arguments.

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
            hint = did_you_mean(key, known, prefix=f"{tool}.")
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
