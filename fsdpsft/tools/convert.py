"""Settings of LLaMA-Factory, axolotl, TRL and verl (AlphaApollo's too) as ours: the same batches, steps and schedule.

``fsdpsft/config/other_trainers.yaml`` says what each of their keys is here; this module applies it, with a rule for
what takes more than one key to say. What cannot be carried over is named, never left out in silence.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from fsdpsft.config.load import flatten, load_config, read_yaml
from fsdpsft.config.names import ALIASES, TRAINERS, Peer, find_peer, other_trainers, peers
from fsdpsft.config.schema import KEYS
from fsdpsft.config.yaml_file import nested
from fsdpsft.errors import ConfigError, UserError
from fsdpsft.tools.tool_keys import run_file_tool

USAGE = """usage: fsdpsft convert FILE [world_size=8] [to=run.yaml] [trainer=axolotl]
       fsdpsft convert FOLDER [world_size=8]

Writes the settings of LLaMA-Factory, axolotl, TRL, verl or AlphaApollo as ours, with their keys beside them, and names
what has no equivalent. Of a folder it says how many files convert wholly, in part and not at all.

  world_size=1     processes of that run: its global batch is rows of a process * accumulation * processes
  to=FILE          write here instead of to the terminal
  trainer=NAME     whose file it is, where its keys leave that open: trl, llamafactory, axolotl, verl, verl_engine
"""
REQUIRED = ("data.train_files", "model.partial_pretrain")
_OFF: tuple[Any, ...] = (None, False, "", "none", "no", [], {})


class _NotCarried(Exception):  # noqa: N818 - it ends one key, not the conversion
    """A value that has no equivalent; the message says why."""


@dataclass
class Conversion:
    """A file of another trainer, as ours.

    Attributes:
        given: their keys by dotted name, over their trainer's defaults.
        typed: the names in the file.
        values, origins: our keys, and what each was made from.
        lost: lines on what their run has and ours would not.
        idle: lines on what nothing depends on; ``off``: keys that are null or switched off.
        arithmetic: how the global batch came about.
    """

    trainer: str
    world_size: int
    given: dict[str, Any]
    typed: frozenset[str]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)
    arithmetic: str = ""

    @property
    def outcome(self) -> str:
        """How the file converts: ``wholly`` or ``in part``."""
        return "in part" if self.lost else "wholly"

    def first(self, *names: str) -> Any:
        """The value of the first of ``names`` that is set; None where none is."""
        return next((self.given[name] for name in names if self.given.get(name) is not None), None)


# --- rules ----------------------------------------------------------------------------------------------------------

Rule = Callable[[Any, str, str, Conversion], dict[str, Any]]
"""From their value, their key, our key and all the rest to settings of ours; raises ``_NotCarried``."""


def _batch(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    """The global batch, from rows of one process and accumulation, or from axolotl's ``batch_size``, their product."""
    if name == "gradient_accumulation_steps" and c.first("batch_size") is not None:
        return {}
    rows = [n for n in ("per_device_train_batch_size", "micro_batch_size") if n in c.given and name != "batch_size"]
    sharing = int(c.first("context_parallel_size", "sequence_parallel_degree") or 1)
    factors = [*((n, c.given[n]) for n in rows), (name, value), ("world_size", c.world_size)]
    total = math.prod(int(factor) for _, factor in factors) // sharing
    shared = f" / {sharing} (processes that share a sequence)" if sharing != 1 else ""
    c.arithmetic = f"{ours} = {' * '.join(f'{factor} ({of})' for of, factor in factors)}{shared} = {total}"
    return {ours: total}


def _epochs(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    if float in (KEYS[ours].type, *get_args(KEYS[ours].type)) or value == int(value):
        return {ours: int(value) if value == int(value) else value}
    c.lost.append(f"{name}: {value} - whole epochs only; trainer.total_training_steps ends a run within one")
    return {ours: math.ceil(value)}


def _warmup(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    if value >= 1:
        return {ours: int(value)}
    return {} if "warmup_ratio" in c.typed and not value else {"optim.warmup_steps_ratio": float(value)}


def _steps(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    if value < 1 or value != int(value):
        raise _NotCarried(f"{ours} is a number of steps")
    return {ours: int(value)}


def _frequency(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    strategies = ("save_strategy",) if name == "save_steps" else ("eval_strategy", "evaluation_strategy")
    return _steps(value, name, ours, c) if c.first(*strategies) in (None, "steps") else {}


def _loggers(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    wanted = _split(value)
    unknown = set(wanted) - {"console", "tensorboard", "wandb", "none"}
    if unknown:
        c.lost.append(f"{name}: {', '.join(sorted(unknown))} - console, tensorboard and wandb are known")
    return {ours: ["console", *(logger for logger in wanted if logger in ("tensorboard", "wandb"))]}


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _place(path: str, config: str | None, split: str | None) -> str:
    """A data set on the Hub as ``owner/name:config:split``; a path unchanged."""
    if split and not re.fullmatch(r"[\w.]+", split):
        raise _NotCarried(f"{split} is a part of a split; write those rows to a file")
    return f"{path}:{config or ''}:{split}" if split not in (None, "train") else f"{path}:{config}" if config else path


def _hub(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    path, held_out = c.first("dataset_name"), name == "dataset_test_split"
    if path is None or (held_out and c.first("eval_strategy") in _OFF):
        return {}
    return {ours: _place(path, c.first("dataset_config"), value if held_out else c.first("dataset_train_split"))}


def _sources(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    """A list of data sets, each with its place; what says how its rows are read is looked up as ``datasets.…``."""
    places: list[str] = []
    for item in value:
        facts = dict(item) if isinstance(item, dict) else {"path": item}
        path, files, config, split = (facts.pop(key, None) for key in ("path", "data_files", "name", "split"))
        if not isinstance(path, str) and not files:
            raise _NotCarried(f"{item} has no path")
        places += _split(files) if files else [path if re.search(r"\.\w+$", path) else _place(path, config, split)]
        for key, fact in facts.items():
            _carry(f"datasets.{key}", fact, c)
    return {ours: places}


def _each(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    if len(_split(c.first("dataset") or "")) > 1:
        raise _NotCarried(f"theirs is of each data set, {ours} of all together")
    return {ours: value}


def _rank(value: Any, name: str, ours: str, c: Conversion) -> dict[str, Any]:
    return {ours: value} | ({} if "lora_alpha" in c.typed else {"model.lora_alpha": 2 * int(value)})


RULES: dict[str, Rule] = {
    "rank": _rank,
    "each": _each,
    "same": lambda value, name, ours, c: {ours: value},
    "skip": lambda value, name, ours, c: {},
    "positive": lambda value, name, ours, c: {ours: value if value > 0 else None},
    "betas": lambda value, name, ours, c: {ours: [c.given["adam_beta1"], c.given["adam_beta2"]]},
    "list": lambda value, name, ours, c: {ours: _split(value)},
    "modules": lambda value, name, ours, c: {ours: "all-linear" if "all" in value else _split(value)},
    "batch": _batch,
    "epochs": _epochs,
    "warmup": _warmup,
    "steps": _steps,
    "frequency": _frequency,
    "loggers": _loggers,
    "hub": _hub,
    "sources": _sources,
}


# --- a whole file ---------------------------------------------------------------------------------------------------


def convert(content: Mapping[str, Any], world_size: int = 1, trainer: str | None = None) -> Conversion:
    """Settings of another trainer as ours.

    Args:
        content: the keys of its YAML.
        world_size: processes of their run.
        trainer: whose they are; None: recognised by the keys.

    Raises:
        ConfigError: the keys are of no trainer known here, or a value is not one that the trainer takes.
    """
    flat = flatten(content)
    trainer = trainer or _trainer_of(flat)
    defaults = other_trainers()[trainer]["defaults"]
    unlimited = trainer == "trl" and flat.get("max_length", 1) is None  # of the other keys null is the default
    flat = {name: value for name, value in flat.items() if value is not None or name not in defaults}
    c = Conversion(trainer, world_size, {**defaults, **flat}, frozenset(flat))
    if unlimited:
        c.lost.append("max_length: null - there is always a limit; fsdpsft check shows the lengths")
    for name in sorted(c.given, key=lambda name: name in c.typed):  # what is typed comes after a default, and beats it
        _carry(name, c.given[name], c)
    _finish(c)
    return c


def _carry(name: str, value: Any, c: Conversion) -> None:
    """Bring one of their keys over, into ``c.values`` or into the lines on what is not."""
    line = f"{name}: {str(value)[:60]}"
    peer = find_peer(name, c.trainer)
    if c.trainer.startswith("verl") and name not in peers("verl") and (name in KEYS or name in ALIASES):
        peer = Peer("keys", ours=ALIASES.get(name, name))  # our names are verl's
    try:
        made = {} if peer is None and value in _OFF else _made(value, name, peer, c)
    except _NotCarried as reason:
        if peer is not None and peer.grave:
            raise ConfigError(f"{line} asks for something that is not done here: {reason}") from None
        c.lost.append(f"{line} - {reason}")
        return
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{line} is not a value that {TRAINERS[c.trainer]} takes ({error})") from error
    typed = name in c.typed or name.startswith("datasets.")
    if not made and typed:
        if peer is None or value in _OFF:
            c.off.append(name)
        else:
            c.idle.append(f"{line} - {peer.note}")
    for ours, setting in made.items():
        taken = ours in c.values and not c.origins[ours].startswith("default")
        if not taken or setting != KEYS[ours].default:
            c.values[ours] = setting
        origin = line if typed else f"default of {TRAINERS[c.trainer]}, {line}"
        c.origins[ours] = f"{c.origins[ours]}, {origin}" if taken else origin


def _made(value: Any, name: str, peer: Peer | None, c: Conversion) -> dict[str, Any]:
    """Our settings for one of theirs; empty where there is nothing to set."""
    if peer is None:
        raise _NotCarried("unknown here")
    if value is None or value in peer.fine or peer.kind == "harmless":
        return {}
    if isinstance(peer.how, Mapping):
        if not isinstance(value, (list, dict)) and value in peer.how:
            return {peer.ours: peer.how[value]}
    elif peer.ours and peer.how != "none" and value not in ("", [], {}):
        return RULES[peer.how or "same"](value, name, peer.ours, c) | dict(peer.also)
    if value in _OFF:
        return {}
    raise _NotCarried(peer.note or f"see {peer.ours}")


def _finish(c: Conversion) -> None:
    """What no key says alone: adapters on or off, warmup or none, keys that cannot be or have no effect together."""
    section = other_trainers()[c.trainer]
    if "lora" in section and c.first(section["lora"]["key"]) not in section["lora"]["values"]:
        c.values.pop("model.lora_rank", None)
    if "constant" in (c.first("lr_scheduler_type"), c.first("lr_scheduler")):
        c.values.pop("optim.warmup_steps", None)
        c.values["optim.warmup_steps_ratio"] = 0.0
        c.origins["optim.warmup_steps_ratio"] = "constant there: without warmup"
    while faults := _faults(c):
        words = {fault: [word for word in re.findall(r"[\w.]+", fault) if word in c.values] for fault in faults}
        named = {fault: keys[0] for fault, keys in words.items() if keys}
        if not named:
            raise ConfigError(f"what was made of these settings cannot work: {'; '.join(faults)}")
        for fault, ours in named.items():
            idle = "has no effect" in fault
            if not idle or not c.origins[ours].startswith("default"):
                (c.idle if idle else c.lost).append(f"{c.origins[ours]} - {fault}")
            c.values.pop(ours, None)


def _faults(c: Conversion) -> list[str]:
    """Errors of ``load_config`` on the result, each line beginning with the key to leave out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text(c, ""), encoding="utf-8")
        try:
            load_config([str(path), *(f"{ours}=later" for ours in REQUIRED if ours not in c.values)])
        except ConfigError as error:
            return [line.removeprefix("- ") for line in str(error).splitlines() if line]
    return []


def _trainer_of(flat: Mapping[str, Any]) -> str:
    """Whose keys these are: the trainer with most of its own among them."""
    scores = {t: sum(sign in flat for sign in other_trainers()[t]["signs"]) for t in TRAINERS}
    best = max(scores, key=lambda trainer: scores[trainer])
    if best == "torchtune":
        hint = "the errors of fsdpsft train say what its keys are here"
        raise ConfigError(f"torchtune's recipes name parts of Python code and cannot be converted; {hint}")
    if not scores[best]:
        raise ConfigError(
            "the keys are not LLaMA-Factory's, axolotl's, TRL's or verl's; trainer=NAME says whose they are"
        )
    return best


# --- what is written ------------------------------------------------------------------------------------------------


def text(c: Conversion, source: str) -> str:
    """Our settings as YAML, theirs beside them, and what was not carried over at the top."""
    run = f"for {c.world_size} process{'es' if c.world_size > 1 else ''} (world_size=N says otherwise)"
    head = [f"{source}: settings of {TRAINERS[c.trainer]}, {run}", c.arithmetic]
    head.append(f"It differs: {other_trainers()[c.trainer]['remark']}")
    for title, lines in (("Not carried over:", c.lost), ("Without need here:", c.idle)):
        head += [title, *(f"  {line}" for line in lines)] if lines else []
    head.append(f"Off there and here: {', '.join(c.off)}" if c.off else "")
    unset = [ours for ours in REQUIRED if ours not in c.values]
    head.append(f"To be given beside this file: {', '.join(unset)}" if unset else "")
    settings = [(ours, _dump(c.values[ours]), _line(c.origins[ours])) for ours in KEYS if ours in c.values]
    return "".join(f"# {_line(part)}\n" for part in head if part) + "\n".join(nested(settings)) + "\n"


def _line(part: str) -> str:
    return " ".join(part.splitlines())


def _dump(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # on one line, which YAML reads too
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return dumped.removesuffix("...\n").strip()


def count(folder: Path, world_size: int) -> str:
    """How the YAML files of a folder convert, file by file, and how many do."""
    lines: list[str] = []
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".yaml", ".yml")):
        try:
            c = convert(read_yaml(path), world_size)
            outcome, why = c.outcome, c.lost
        except UserError as error:
            outcome, why = "not", [str(error).replace(str(path), "the file")]
        outcomes[outcome] += 1
        reasons.update({reason.split(":")[0] for reason in why})
        lines.append(f"{outcome:8}{path.relative_to(folder)}" + (f": {_line(why[0])}" if why else ""))
    totals = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("wholly", "in part", "not"))
    often = ", ".join(f"{name} ({times})" for name, times in reasons.most_common(8))
    return "\n".join([*lines, f"{len(lines)} files: {totals}", f"most often in the way: {often or 'nothing'}"]) + "\n"


def _convert_and_write(arguments: Sequence[str]) -> None:
    options = {"world_size": "1", "to": "", "trainer": ""}
    paths = [argument for argument in arguments if argument.partition("=")[0] not in options]
    options |= dict(argument.split("=", 1) for argument in arguments if argument not in paths and "=" in argument)
    if len(paths) != 1:
        raise ConfigError(f"one file or folder is needed, found {', '.join(paths) or 'none'}; see --help")
    if not options["world_size"].isdecimal() or int(options["world_size"]) < 1:
        raise ConfigError(f"world_size={options['world_size']} must be a whole number of at least 1")
    known = [trainer for trainer in TRAINERS if "defaults" in other_trainers()[trainer]]
    if options["trainer"] not in ("", *known):
        raise ConfigError(f"trainer={options['trainer']} is not one of {', '.join(known)}")
    path, to, world_size = Path(paths[0]).expanduser(), Path(options["to"]).expanduser(), int(options["world_size"])
    if path.is_dir():
        sys.stdout.write(count(path, world_size))
        return
    c = convert(read_yaml(path), world_size, options["trainer"] or None)
    if not options["to"]:
        sys.stdout.write(text(c, str(path)))
    elif to.exists():
        raise ConfigError(f"to={to} exists; name a new file")
    else:
        to.write_text(text(c, str(path)), encoding="utf-8")
        sys.stdout.write(f"converted {c.outcome}: {to} (fsdpsft check {to} proves what it trains on)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fsdpsft convert``: 0, or 1 after a mistake or where the file is for something else."""
    return run_file_tool(USAGE, _convert_and_write, arguments)
