"""Names that are no keys but that people type: older spellings, keys of other trainers, typing errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fsdpsft.config.schema import KEYS
from fsdpsft.errors import ConfigError, nearest

ALIASES = {
    "data.micro_batch_size": "data.micro_batch_size_per_gpu",
    "data.max_token_len": "data.max_token_len_per_gpu",
    "data.multiturn.tools_key": "data.tools_key",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
    "model.path": "model.partial_pretrain",
    "model.fsdp_config.cpu_offload": "model.fsdp_config.offload_params",
    "optim.lr_warmup_steps_ratio": "optim.warmup_steps_ratio",
    "optim.lr_warmup_steps": "optim.warmup_steps",
    "trainer.checkpoint.save_contents": "trainer.save_contents",
}
TRAINERS = {
    "trl": "TRL",
    "llamafactory": "LLaMA-Factory",
    "axolotl": "axolotl",
    "verl": "verl's fsdp_sft_trainer",
    "verl_engine": "verl's sft_trainer",
    "torchtune": "torchtune",
}
_SAME_WORD = 0.75  # how alike two names must be for one to be a typing error of the other


@dataclass(frozen=True)
class Peer:
    """What a key of another trainer is here, from ``other_trainers.yaml``, which explains the attributes.

    Attributes:
        kind: ``keys``, ``harmless``, ``missing`` or ``refused``.
        ours: the key to look at; "" where there is none.
        grave: a value other than the ``fine`` ones makes the whole configuration something else.
    """

    kind: str
    ours: str = ""
    note: str = ""
    how: str | Mapping[Any, Any] | None = None
    fine: tuple[Any, ...] = ()
    also: Mapping[str, Any] = field(default_factory=dict)
    grave: bool = False

    def __str__(self) -> str:
        """As the error says it: our key, what it means, and where the two differ."""
        if not self.ours:
            return self.note
        unit = KEYS[self.ours].help.replace("{choices}", " | ".join(KEYS[self.ours].choices))
        same = "see" if self.how in ("skip", "none") else "here it is"
        return f"{same} {self.ours} ({unit})" + (f"; {self.note}" if self.note else "")


@cache
def other_trainers() -> dict[str, dict[str, Any]]:
    """The sections of ``other_trainers.yaml``."""
    sections: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("other_trainers.yaml").read_text())
    return sections


@cache
def peers(section: str) -> dict[str, Peer]:
    """The names of one section."""
    content = other_trainers()[section]
    found = {}
    for name, facts in content.get("keys", {}).items():
        found[name] = Peer("keys", **{**facts, "fine": tuple(facts.get("fine", ()))})
    for kind in ("harmless", "missing", "refused"):
        for reason, names in content.get(kind, {}).items():
            found |= {name: Peer(kind, note=reason, grave=kind == "refused") for name in names.split()}
    return found


def find_peer(name: str, trainer: str) -> Peer | None:
    """What a dotted name of ``trainer`` is here; of a nested name that is not known, what its sections are."""
    parts = name.split(".")
    sections = (trainer, trainer.split("_")[0], "any")
    marks = [part for part in parts[-1:] if part.startswith("_")]  # such as _target_, wherever it stands
    for candidate in (name, *marks, *(".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))):
        found = [peers(section)[candidate] for section in sections if candidate in peers(section)]
        if found:
            return found[0]
    return None


def peer_hint(name: str) -> str:
    """What a name of any other trainer is here, trainer by trainer where they differ; "" where none has it."""
    for candidate in (name, name.rpartition(".")[2], name.split(".")[0]):
        found = {section: str(peers(section)[candidate]) for section in other_trainers() if candidate in peers(section)}
        if len(set(found.values())) > 1:
            return "".join(f"\n  of {TRAINERS.get(s, 'others')}: {text}" for s, text in found.items())
        if found:
            return next(iter(found.values()))
    return ""


def unknown_key(name: str) -> ConfigError:
    """The error for a name that is no key: what it misspells, or what another trainer's key of that name is here."""
    leaf = name.rpartition(".")[2]
    same_leaf = [known for known in KEYS if known.rpartition(".")[2] == leaf]
    close = nearest(name, [*KEYS, *ALIASES], alike=_SAME_WORD)
    typed_by_others = any(name in peers(section) for section in other_trainers())
    meant = "" if typed_by_others else (same_leaf or close or [""])[0]
    hint = f"; did you mean {meant}?" if meant else f": {theirs}" if (theirs := peer_hint(name)) else ""
    return ConfigError(f"unknown key {name}{hint} (all keys: fsdpsft train --help)")
