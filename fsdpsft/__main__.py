"""The command ``fsdpsft``, also ``python -m fsdpsft``: each sub-command is the module of that name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from fsdpsft.errors import nearest

COMMANDS = {
    "train": "train a model, as a YAML file and key=value say",
    "check": "prove what would be trained, token by token",
    "plan": "show steps, memory and time before anything is started",
    "selftest": "show on your model and machine that layout changes no number",
    "export": "turn a checkpoint into a Hugging Face model",
    "convert": "rewrite a YAML of LLaMA-Factory, axolotl, TRL or verl",
}
USAGE = "usage: fsdpsft COMMAND …     (fsdpsft COMMAND --help says more)\n\n" + "".join(
    f"  {name:10}{what}\n" for name, what in COMMANDS.items()
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command on the arguments after it; returns its exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "help"):
        sys.stdout.write(USAGE)
        return 0
    if name not in COMMANDS:
        is_setting = "=" in name or name.endswith((".yaml", ".yml"))
        near = [f"train {name}"] if is_setting else nearest(name, COMMANDS)
        hint = f"did you mean fsdpsft {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        sys.stderr.write(f"error: fsdpsft has no command {name}; {hint}\n")
        return 1
    code: int = import_module(f"fsdpsft.{name}").main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
