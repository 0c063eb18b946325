"""From the command line to typed settings: defaults, presets, YAML files, overrides, in that order.

``load_config`` ends in plain dataclasses; nothing further in sees a Hydra or OmegaConf object. Imports no torch, so
that a typing mistake is reported in a second.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fsdpsft.config.names import ALIASES, peer_hint, unknown_key
from fsdpsft.config.rules import check
from fsdpsft.config.schema import KEYS, Config, Key
from fsdpsft.config.yaml_file import CONF_DIR
from fsdpsft.errors import ConfigError

log = logging.getLogger(__name__)

TEMPLATE_VARIABLE = "data.chat_template_kwargs."
_OVERRIDE = re.compile(r"^(?:\+\+|\+)?(?P<key>[A-Za-z_][\w.\-]*)=(?P<value>.*)$", re.DOTALL)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_OF_RESOLVERS = re.compile(r"^\w+ raised while resolving interpolation: ")
_REFERENCE = re.compile(r"\$\{\s*([\w.]+)\s*\}")


def load_config(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "train"
) -> Config:
    """Compose the YAML and the overrides, type them, and check all that can be checked without data or model.

    Args:
        overrides: ``key=value`` as on the command line, a leading ``+`` allowed; or the path of a YAML file that holds
            only the keys it sets, such as the ``config.yaml`` of a run. An override beats a file, a later file an
            earlier one.
        config_dir: folder of the user's own Hydra configuration, which may name ``train`` in its defaults list.
        config_name: name of the YAML file in that folder, without its suffix.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a combination that cannot work; all faults at once.
    """
    files = [text for text in overrides if _is_file(text)]
    given = dict(_parse(text) for text in overrides if not _is_file(text))
    raw = _compose(given.pop("preset", None), config_dir, config_name)
    for name, value in [item for file in files for item in _read_file(Path(file).expanduser()).items()]:
        _set(raw, name, value)
    for name, value in given.items():
        _set(raw, name, value)
    for name in flatten(OmegaConf.to_container(raw, resolve=False)):  # type: ignore[arg-type]
        if name not in KEYS:
            raise unknown_key(name)
    _spell(raw)
    config = _typed(raw)
    check(config, flatten(config.as_dict()))
    config.from_environment = _from_environment(raw)
    return config


def to_yaml(config: Config) -> str:
    """The settings as YAML text that ``load_config`` reads back."""
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


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted leaves of a nested mapping; keys whose type is itself a mapping are leaves."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        key = prefix + str(name)
        if isinstance(value, Mapping) and key not in KEYS and not key.endswith("chat_template_kwargs"):
            flat |= flatten(value, key + ".")
        else:
            flat[key] = value
    return flat


# --- what the user typed --------------------------------------------------------------------------------------------


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) and _OVERRIDE.match(text) is None


def _known(name: str) -> str:
    """The key that ``name`` means.

    Raises:
        ConfigError: there is none.
    """
    if name in ALIASES:
        log.warning("%s is an older name of %s", name, ALIASES[name])
        return ALIASES[name]
    if name in KEYS or name == "preset" or name.startswith(TEMPLATE_VARIABLE):
        return name
    raise unknown_key(name)


def _parse(text: str) -> tuple[str, Any]:
    """Key and value of one ``key=value``."""
    match = _OVERRIDE.match(text.strip())
    if match is None:
        raise ConfigError(f"cannot read the argument {text!r}: expected key=value, for example optim.lr=1e-5")
    name, value = _known(match["key"]), match["value"]
    if _is_text(name) and value[:1] not in ("'", '"', "[", "{") and value not in ("null", "???"):
        if "," in value and not Path(value).expanduser().exists():
            raise ConfigError(f"{text}: several values need brackets, {name}=[{value}]")
        return name, value  # a path may hold blanks, commas, = and parentheses: they mean nothing here
    try:
        if name in KEYS and KEYS[name].path:  # Hydra's grammar has no ~, YAML's has
            return name, OmegaConf.to_container(OmegaConf.create(f"k: {value}"))["k"]  # type: ignore[index, call-overload]
        return name, OverridesParser.create().parse_override(f"k={value}").value()
    except (HydraException, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the value of {name}: {value!r}. A list is written {name}=[a,b]") from error


def _is_text(name: str) -> bool:
    """Whether values of the key are text, or names of files, that need no grammar."""
    return name in KEYS and (KEYS[name].path or KEYS[name].type in (str, str | None))


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys of a YAML file, references unresolved.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = OmegaConf.load(path)
        if not isinstance(content, ListConfig):
            return OmegaConf.to_container(content, resolve=False)  # type: ignore[return-value]
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {path}: {(str(error).splitlines() or ['?'])[0]}") from error
    raise ConfigError(f"{path} holds a list; expected keys, for example data: {{train_files: chats.parquet}}")


def _read_file(path: Path) -> dict[str, Any]:
    """Known keys of a YAML file, dotted."""
    flat = flatten(read_yaml(path))
    try:
        return {_known(name): value for name, value in flat.items()}
    except ConfigError as error:
        theirs = [name for name in flat if name not in KEYS and peer_hint(name)]
        hint = f"; fsdpsft convert {path} rewrites another trainer's whole file" if len(theirs) > 1 else ""
        raise ConfigError(f"{path}: {error}{hint}") from error


def _compose(preset: str | None, config_dir: str | Path | None, config_name: str) -> DictConfig:
    directory = Path(config_dir).expanduser().resolve() if config_dir else CONF_DIR
    overrides = [f"hydra.searchpath=[file://{CONF_DIR}]"] if config_dir else []
    overrides += [f"preset={preset}"] if preset else []
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            composed: DictConfig = compose(config_name, overrides=overrides)
            return composed
    except HydraException as error:
        raise ConfigError(f"cannot compose {config_name} from {directory}: {str(error).strip()}") from error


# --- from values to types -------------------------------------------------------------------------------------------


def _set(raw: DictConfig, name: str, value: Any) -> None:
    _named(lambda: OmegaConf.update(raw, name, value, merge=False, force_add=True), name)


def _spell(raw: DictConfig) -> None:
    """Bring the spellings that people type to the one the schema knows, in place."""
    for name, key in KEYS.items():
        value = _named(lambda name=name: OmegaConf.select(raw, name), name)  # type: ignore[misc]
        spelt = _spelt(name, key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
        if spelt is not None:
            OmegaConf.update(raw, name, spelt[0])


def _spelt(name: str, key: Key, value: Any) -> tuple[Any] | None:
    """The value as the schema spells it, in a tuple; None where it is already."""
    spelt = value
    if name == "model.enable_gradient_checkpointing" and str(value).lower() in ("true", "false"):
        spelt = "full" if str(value).lower() == "true" else "none"
    elif "true" in key.choices and isinstance(value, bool):
        spelt = str(value).lower()
    elif "float32" in key.choices and value in _DTYPES:
        spelt = _DTYPES[value]
    elif key.nullable and key.low is not None and value == -1:
        spelt = None
    elif isinstance(value, str) and key.type in (list[str], list[str] | None):
        spelt = [value]
    elif key.path:
        spelt = _at_home(value)
    return None if spelt == value and type(spelt) is type(value) else (spelt,)


def _at_home(value: Any) -> Any:
    """Paths, alone or in lists of ``path`` or ``{path, weight}``, with ``~`` written out."""
    if isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _at_home(value["path"])}
    return value


def _typed(raw: DictConfig) -> Config:
    missing = [name for name in KEYS if _named(lambda name=name: OmegaConf.is_missing(*_parent(raw, name)), name)]  # type: ignore[misc]
    if missing:
        raise ConfigError("; ".join(f"{name} is not set: {name}=…" for name in missing))
    config = _named(lambda: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), raw)), "a key")
    assert isinstance(config, Config)
    return config


def _parent(raw: DictConfig, name: str) -> tuple[Any, str]:
    section, _, leaf = name.rpartition(".")
    return (OmegaConf.select(raw, section) if section else raw), leaf


def _named(work: Callable[[], Any], name: str) -> Any:
    """Run ``work`` on the settings; what OmegaConf and its resolvers raise becomes one line that names the key."""
    try:
        return work()
    except (OmegaConfBaseException, HydraException, ValueError, KeyError, TypeError) as error:
        key = getattr(error, "full_key", None) or name
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{key}: {_OF_RESOLVERS.sub('', reason[0])}") from error


def _from_environment(raw: DictConfig) -> dict[str, str]:
    """Keys whose text reads an environment variable, itself or by way of another key, with that text."""
    texts = flatten(OmegaConf.to_container(raw, resolve=False))  # type: ignore[arg-type]
    found: dict[str, str] = {}
    for _ in KEYS:  # as many rounds as a chain of references can be long
        before = len(found)
        for name, value in texts.items():
            text = str(value)
            if _ENVIRONMENT.search(text) or any(other in found for other in _REFERENCE.findall(text)):
                found[name] = value
        if len(found) == before:
            break
    return found
