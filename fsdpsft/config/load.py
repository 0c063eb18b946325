"""Settings: how the YAML and the overrides become the typed schema, checked.

``conf/train.yaml`` holds each key's default and meaning, ``config_schema.py`` its type, ``config_rules.py`` its
rules. ``load_config`` ends in plain dataclasses; nothing further in sees a Hydra or OmegaConf object. Imports no torch,
so that a typing mistake is reported in a second.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdpsft.config.rules import CHOICES, check
from fsdpsft.config.schema import (
    Config,
    DataConfig,
    FSDPConfig,
    ModelConfig,
    OptimConfig,
    TrainerConfig,
    schema_keys,
)
from fsdpsft.errors import ConfigError

__all__ = [
    "CONF_DIR",
    "Config",
    "DataConfig",
    "FSDPConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainerConfig",
    "default_values",
    "load_config",
    "parse_size",
    "to_yaml",
]

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the YAML as fsdpsft/conf (see pyproject.toml); a checkout has it beside the package.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


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
RETIRED = {
    "trainer.nnodes": "the number of nodes is torchrun's --nnodes; leave the key out",
    "trainer.n_gpus_per_node": "the number of processes is torchrun's --nproc_per_node; leave the key out",
    "data.use_shm": "tokenised data is memory-mapped and shared already; leave the key out",
    "model.use_shm": "weights are read straight into their shards; leave the key out",
    "model.external_lib": "import your library before calling fsdpsft.train(), or use data.custom_cls",
    "trainer.checkpoint.load_contents": "resuming loads the whole trainer_state/; leave the key out",
}
_KEYS = schema_keys()
_OVERRIDE = re.compile(r"^(?P<mark>\+\+|\+|~)?(?P<key>[A-Za-z_][\w.\-]*)(?P<rest>=.*)?$", re.DOTALL)


def unknown_key(key: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""
    close = difflib.get_close_matches(key, [*_KEYS, *ALIASES], n=1, cutoff=0.4)
    tail = [known for known in _KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = (tail or close or [""])[0]
    hint = f"; did you mean {nearest}?" if nearest else ""
    return ConfigError(f"unknown key {key}{hint} (all keys: python -m fsdpsft.train --help)")


def _normalise_override(text: str) -> str:
    """Map one override as users type it to the one form Hydra takes: known keys bare, aliases resolved."""
    match = _OVERRIDE.match(text.strip())
    if match is None or match["rest"] is None or match["mark"] == "~":
        raise ConfigError(f"cannot read the argument {text!r}: expected key=value, for example optim.lr=1e-5")
    key, rest = match["key"], match["rest"]
    if key in RETIRED:
        raise ConfigError(f"{key} does not exist here: {RETIRED[key]}")
    if key in ALIASES:
        log.warning("%s is an older name of %s", key, ALIASES[key])
        key = ALIASES[key]
    if key in _KEYS or key == "preset":
        return key + rest
    if key.startswith("data.chat_template_kwargs."):
        return f"++{key}{rest}"
    raise unknown_key(key)


def _parse_overrides(overrides: Sequence[str]) -> list[str]:
    texts = [_normalise_override(text) for text in overrides]
    parser = OverridesParser.create()
    for text in texts:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            key, _, value = text.partition("=")
            raise ConfigError(
                f"cannot read the value of {key}: {value!r}. Text with spaces or special characters needs quotes "
                f"inside the argument: '{key}=\"...\"'"
            ) from error
        if parsed.is_sweep_override():
            raise ConfigError(f"{text}: several values need brackets, {text.partition('=')[0]}=[a,b]")
    return texts


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted leaves of a nested mapping; keys whose type is itself a mapping are leaves."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        key = prefix + str(name)
        if isinstance(value, Mapping) and key not in _KEYS:
            flat |= _flatten(value, key + ".")
        else:
            flat[key] = value
    return flat


def _normalise_values(raw: DictConfig) -> None:
    """Bring the spellings that users of other trainers type to the one this schema knows, in place."""
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    for key in CHOICES:
        value = OmegaConf.select(raw, key)
        if key.endswith("dtype") and value in dtypes:
            OmegaConf.update(raw, key, dtypes[value])
    checkpointing = "model.enable_gradient_checkpointing"
    value = OmegaConf.select(raw, checkpointing)
    if isinstance(value, bool):
        OmegaConf.update(raw, checkpointing, "full" if value else "none")
    for key in ("data.train_max_samples", "data.val_max_samples", "trainer.max_ckpt_to_keep", "optim.clip_grad",
                "trainer.total_training_steps", "optim.warmup_steps"):  # fmt: skip
        if OmegaConf.select(raw, key) == -1:
            OmegaConf.update(raw, key, None)
    for key in ("trainer.logger", "trainer.save_contents", "data.prompt_dict_keys", "data.response_dict_keys",
                "model.modules_to_save"):  # fmt: skip
        value = OmegaConf.select(raw, key)
        if isinstance(value, str):
            OmegaConf.update(raw, key, [value])


def _compose(overrides: Sequence[str], config_dir: str | Path | None, config_name: str) -> DictConfig:
    directory = Path(config_dir).resolve() if config_dir else CONF_DIR
    search = [f"hydra.searchpath=[file://{CONF_DIR}]"] if config_dir else []
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            composed: DictConfig = compose(config_name, overrides=[*overrides, *search])
            return composed
    except HydraException as error:
        raise ConfigError(f"cannot compose {config_name} from {directory}: {str(error).strip()}") from error


def load_config(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "train"
) -> Config:
    """Compose the YAML and the overrides, type them, and check all that can be checked without data or model.

    Args:
        overrides: ``key=value`` as on the command line; a leading ``+`` is accepted on known keys.
        config_dir: folder of the user's own YAML, which may name ``train`` in its defaults list to extend it.
        config_name: name of the YAML file in that folder, without its suffix.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a combination that cannot work; all faults at once.
    """
    texts = _parse_overrides(overrides)
    raw = _compose(texts, config_dir, config_name)
    for key in _flatten(OmegaConf.to_container(raw, resolve=False)):  # type: ignore[arg-type]
        if key not in _KEYS:
            raise unknown_key(key)
    missing = sorted(OmegaConf.missing_keys(raw))
    if missing:
        raise ConfigError("; ".join(f"{key} is not set: {key}=…" for key in missing))
    _normalise_values(raw)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), raw))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check(config, _flatten(config.as_dict()), default_values())
    return config


def default_values() -> dict[str, Any]:
    """Dotted keys of ``conf/train.yaml`` with their defaults, spelled as the schema spells them."""
    raw = _compose([], None, "train")
    OmegaConf.update(raw, "data.train_files", "")
    OmegaConf.update(raw, "model.partial_pretrain", "")
    _normalise_values(raw)
    return _flatten(OmegaConf.to_container(raw, resolve=True))  # type: ignore[arg-type]


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(config.as_dict()))


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``500MB`` (powers of ten).

    Raises:
        ConfigError: not a number followed by KB, MB, GB or TB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"trainer.max_shard_size={text} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
