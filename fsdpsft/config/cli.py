"""What all command-line tools share: reading settings, help, and errors, printed once."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from fsdpsft.config.load import load_config, to_yaml
from fsdpsft.config.names import peer_hint
from fsdpsft.config.schema import Config
from fsdpsft.config.yaml_file import CONF_DIR
from fsdpsft.errors import RunFailed, UserError

USAGE = """usage: [torchrun --nproc_per_node=N] -m {module} [run.yaml] key=value …

  run.yaml                    a file of the keys it sets, such as the config.yaml of a run; key=value beats it
  --help                      this text and every key
  --cfg job                   print the resulting settings, and exit
  --config-dir DIR            folder of your own YAML
  --config-name NAME          its name; put `train` in its defaults list to extend the keys below

Keys, with their defaults (conf/train.yaml):

"""


def run_command(command: Callable[[Config], object], arguments: Sequence[str], module: str = "fsdpsft.train") -> int:
    """Read the settings from ``arguments`` and run ``command`` on them.

    Returns:
        0, or 1 after a user's mistake, whose message is written once for all processes.
    """
    quiet = int(os.environ["RANK"]) > 0 if "RANK" in os.environ else False
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "transformers", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE.format(module=module) + (CONF_DIR / "train.yaml").read_text())
        return 0
    try:
        options, overrides = _split(arguments)
        config = load_config(
            overrides, config_dir=options.pop("--config-dir", None), config_name=options.pop("--config-name", "train")
        )
        if "--cfg" in options:
            sys.stdout.write(to_yaml(config))
            return 0
        command(config)
    except UserError as error:
        if quiet:
            time.sleep(10)  # rank 0 prints it; torchrun then ends this process
        else:
            sys.stderr.write(f"error: {error}\n")
        return 1
    except RunFailed as failure:
        return _report(failure)
    return 0


def _report(failure: RunFailed) -> int:
    """Write what ended the run, whole lines at once; the process at fault gives its traceback, the others one line."""
    sys.stderr.write(f"{failure}\n")
    if not failure.collateral:
        sys.stderr.write("".join(traceback.format_exception(failure.__cause__)))
    sys.stderr.flush()
    if failure.processes > 1:
        if failure.collateral:
            time.sleep(5)  # torchrun ends the run at the first death it sees: let that be the one at fault
        os._exit(1)  # the interpreter's own end would join threads that wait for other processes
    return 1


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate ``--option value`` and ``--option=value`` from ``key=value``."""
    options: dict[str, str] = {}
    overrides: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--"):
            overrides.append(argument)
            continue
        name, given, value = argument.partition("=")
        if name not in ("--cfg", "--config-dir", "--config-name"):
            hint = f" ({theirs})" if (theirs := peer_hint(name.lstrip("-"))) else ""
            raise UserError(f"unknown option {name}{hint}; settings are given as key=value (see --help)")
        options[name] = value if given else next(waiting, "")
        if not options[name]:
            raise UserError(f"{name} needs a value")
    return options, overrides
