"""Settings: the typed schema, how overrides become it, and every rule that needs no data and no model.

``conf/train.yaml`` holds each key's default and meaning, this module its type and rules. ``load_config`` ends in plain
dataclasses; nothing further in sees a Hydra or OmegaConf object. Imports no torch, so that a typing mistake is
reported in a second.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdpsft.errors import ConfigError

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the YAML as fsdpsft/conf (see pyproject.toml); a checkout has it beside the package.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


@dataclass
class MultiturnConfig:
    """Where a conversation's messages stand in a row."""

    enable: bool
    messages_key: str
    enable_thinking_key: str


@dataclass
class CustomClassConfig:
    """The user's own row adapter."""

    path: str | None
    name: str | None


@dataclass
class DataConfig:
    """What is trained on, and how it is cut into batches."""

    train_files: Any
    val_files: Any
    format: str
    dataset_info: str | None
    prompt_key: str | None
    response_key: str | None
    prompt_dict_keys: list[str] | None
    response_dict_keys: list[str] | None
    system_key: str | None
    tools_key: str
    multiturn: MultiturnConfig
    train_on_turns: str
    history: str
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    special_tokens_in_content: str
    max_length: int
    truncation: str
    on_bad_row: str
    max_bad_share: float
    train_batch_size: int
    micro_batch_size_per_gpu: int
    max_token_len_per_gpu: int | None
    balance_dp_token: bool
    drop_last: bool
    train_max_samples: int | None
    val_max_samples: int | None
    custom_cls: CustomClassConfig
    cache_dir: str | None
    num_workers: int | None

    @property
    def token_budget(self) -> int:
        """Tokens one process may have in one forward pass."""
        return self.max_token_len_per_gpu or self.micro_batch_size_per_gpu * self.max_length


@dataclass
class WrapPolicyConfig:
    """Which blocks become FSDP units."""

    min_num_params: int


@dataclass
class FSDPConfig:
    """How weights are stored and shared out."""

    model_dtype: str
    reduce_dtype: str
    reshard_after_forward: bool
    replicate_size: int
    gradient_sync: str
    offload_params: bool
    wrap_policy: WrapPolicyConfig


@dataclass
class ModelConfig:
    """The model, its memory, and its adapters."""

    partial_pretrain: str
    trust_remote_code: bool
    strategy: str
    fsdp_config: FSDPConfig
    enable_gradient_checkpointing: str
    activation_offload: bool
    mlp_tiles: int
    use_liger: bool
    attn_implementation: str
    compile: bool
    dtype: str
    head_chunk_tokens: int
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    target_modules: Any
    exclude_modules: Any
    modules_to_save: list[str] | None
    use_rslora: bool
    use_dora: bool
    lora_adapter_path: str | None

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained instead of the model's own weights."""
        return self.lora_rank > 0 or self.lora_adapter_path is not None


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    clip_grad: float | None
    state_dtype: str
    lr_scheduler: str
    warmup_steps_ratio: float
    warmup_steps: int | None
    min_lr_ratio: float
    decay_ratio: float
    decay_shape: str


@dataclass
class TrainerConfig:
    """The run: its length, its place, what it saves and says."""

    default_local_dir: str
    default_hdfs_dir: str | None
    project_name: str
    experiment_name: str
    seed: int
    device: str
    total_epochs: int
    total_training_steps: int | None
    save_freq: int | str
    test_freq: int | str
    save_contents: list[str]
    async_save: bool
    max_shard_size: str
    max_ckpt_to_keep: int | None
    keep_every: int | None
    best_metric: str | None
    on_disk_full: str
    save_on_file: str | None
    resume_mode: str
    resume_from_path: str | None
    allow_config_change: bool
    logger: list[str]
    log_freq: int
    timeout: int


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    ulysses_sequence_parallel_size: int
    use_remove_padding: bool
    trainer: TrainerConfig

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to ``config.yaml``."""
        return asdict(self)


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
CHOICES = {
    "data.format": ("auto", "prompt_response", "messages", "sharegpt", "alpaca", "tokenized"),
    "data.truncation": ("error", "left", "right", "drop"),
    "data.train_on_turns": ("all", "last"),
    "data.history": ("as_rendered", "per_turn"),
    "data.special_tokens_in_content": ("escape", "refuse"),
    "data.on_bad_row": ("error", "skip"),
    "model.strategy": ("fsdp2",),
    "model.dtype": ("auto", "bfloat16", "float32"),
    "model.fsdp_config.model_dtype": ("float32", "bfloat16"),
    "model.fsdp_config.reduce_dtype": ("float32", "bfloat16"),
    "model.fsdp_config.gradient_sync": ("every", "last"),
    "model.enable_gradient_checkpointing": ("none", "selective", "full"),
    "model.attn_implementation": ("auto", "sdpa", "varlen", "flex", "flash_attention_2", "flash_attention_3"),
    "optim.state_dtype": ("float32", "bfloat16"),
    "optim.lr_scheduler": ("cosine", "wsd", "linear", "constant"),
    "optim.decay_shape": ("cosine", "linear", "sqrt"),
    "trainer.device": ("auto", "cuda", "cpu"),
    "trainer.on_disk_full": ("error", "continue"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    "trainer.best_metric": (None, "val/loss"),
}
RANGES: dict[str, tuple[float, float]] = {  # inclusive bounds
    "data.max_length": (2, 1 << 31), "data.train_batch_size": (1, 1 << 40), "data.max_bad_share": (0, 1),
    "data.micro_batch_size_per_gpu": (1, 1 << 31), "data.max_token_len_per_gpu": (2, 1 << 31),
    "data.num_workers": (1, 4096), "data.train_max_samples": (1, 1 << 62), "data.val_max_samples": (1, 1 << 62),
    "model.fsdp_config.replicate_size": (1, 1 << 20), "model.mlp_tiles": (1, 1 << 20),
    "model.head_chunk_tokens": (1, 1 << 31), "model.lora_rank": (0, 1 << 20), "model.lora_dropout": (0, 0.999),
    "optim.lr": (0, 1e3), "optim.eps": (1e-30, 1), "optim.weight_decay": (0, 1e3), "optim.clip_grad": (1e-30, 1e30),
    "optim.warmup_steps_ratio": (0, 1), "optim.warmup_steps": (0, 1 << 40), "optim.min_lr_ratio": (0, 1),
    "optim.decay_ratio": (0, 1), "ulysses_sequence_parallel_size": (1, 1 << 20), "trainer.total_epochs": (1, 1 << 31),
    "trainer.total_training_steps": (1, 1 << 40), "trainer.max_ckpt_to_keep": (1, 1 << 31),
    "trainer.keep_every": (1, 1 << 40), "trainer.log_freq": (1, 1 << 31), "trainer.timeout": (1, 1 << 31),
    "trainer.seed": (0, (1 << 63) - 1),
}  # fmt: skip
LOGGERS = ("console", "tensorboard", "wandb")
SAVE_CONTENTS = ("model", "state")


def schema_keys(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name of every key with its annotated type."""
    keys: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        if is_dataclass(hint):
            keys |= schema_keys(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            keys[prefix + field.name] = hint
    return keys


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
            return compose(config_name, overrides=[*overrides, *search])
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
    check(config, default_values())
    return config


def default_values() -> dict[str, Any]:
    """Dotted keys of ``conf/train.yaml`` with their defaults, spelled as the schema spells them."""
    raw = _compose([], None, "train")
    OmegaConf.update(raw, "data.train_files", "")
    OmegaConf.update(raw, "model.partial_pretrain", "")
    _normalise_values(raw)
    return _flatten(OmegaConf.to_container(raw, resolve=True))  # type: ignore[arg-type]


def check(config: Config, defaults: Mapping[str, Any]) -> None:
    """Raise one ``ConfigError`` that lists every value, combination and dead key that cannot work."""
    values = _flatten(asdict(config))
    faults = [
        f"{key}={values[key]} is not one of {', '.join(map(str, allowed))}"
        for key, allowed in CHOICES.items()
        if values[key] not in allowed
    ]
    faults += [
        f"{key}={values[key]} must lie between {low:g} and {high:g}"
        for key, (low, high) in RANGES.items()
        if values[key] is not None and not low <= values[key] <= high
    ]
    faults += [message for broken, message in _impossible(config) if broken]
    changed = [key for key, value in values.items() if key in defaults and value != defaults[key]]
    faults += [
        f"{key}={values[key]} has no effect: it needs {needs}"
        for key, (works, needs) in _EFFECTIVE.items()
        if key in changed and not works(config)
    ]
    if faults:
        raise ConfigError("\n".join(faults) if len(faults) == 1 else "\n".join(["", *(f"- {f}" for f in faults)]))


def _impossible(c: Config) -> list[tuple[bool, str]]:
    """Combinations that cannot work: (is it so, what to tell)."""
    d, m, o, t = c.data, c.model, c.optim, c.trainer
    frequencies = {"trainer.save_freq": t.save_freq, "trainer.test_freq": t.test_freq}
    bad_frequency = [k for k, v in frequencies.items() if v != "epoch" and not (isinstance(v, int) and (v == -1 or v > 0))]
    return [
        (d.token_budget < d.max_length and c.ulysses_sequence_parallel_size * d.token_budget < d.max_length,
         f"data.max_token_len_per_gpu={d.max_token_len_per_gpu} times ulysses_sequence_parallel_size="
         f"{c.ulysses_sequence_parallel_size} is below data.max_length={d.max_length}: the longest sample would not fit"),
        (d.multiturn.enable and d.format not in ("auto", "messages", "sharegpt"),
         f"data.multiturn.enable=true contradicts data.format={d.format}"),
        (d.dataset_info is not None and d.format != "auto", "data.dataset_info states each set's format: leave data.format=auto"),
        ((d.custom_cls.path is None) != (d.custom_cls.name is None), "data.custom_cls.path and data.custom_cls.name go together"),
        (c.ulysses_sequence_parallel_size > 1 and not c.use_remove_padding,
         f"ulysses_sequence_parallel_size={c.ulysses_sequence_parallel_size} needs use_remove_padding=true"),
        (len(o.betas) != 2 or not all(0 <= b < 1 for b in o.betas), f"optim.betas={o.betas} must be two numbers in [0, 1)"),
        (o.state_dtype == "bfloat16" and o.betas[-1] > 0.99,
         f"optim.state_dtype=bfloat16 cannot resolve optim.betas={o.betas}: its updates round away above 0.99"),
        (o.lr_scheduler == "wsd" and o.warmup_steps is None and o.warmup_steps_ratio + o.decay_ratio > 1,
         f"optim.warmup_steps_ratio={o.warmup_steps_ratio} and optim.decay_ratio={o.decay_ratio} add up to more than 1"),
        (m.activation_offload and m.enable_gradient_checkpointing == "none",
         "model.activation_offload=true needs model.enable_gradient_checkpointing=selective or full"),
        (m.fsdp_config.model_dtype == "bfloat16" and m.dtype == "float32",
         "model.fsdp_config.model_dtype=bfloat16 contradicts model.dtype=float32"),
        (m.uses_lora and m.fsdp_config.model_dtype == "bfloat16",
         "model.fsdp_config.model_dtype=bfloat16 contradicts model.lora_rank: adapters are kept in float32"),
        (t.default_hdfs_dir is not None,
         f"trainer.default_hdfs_dir={t.default_hdfs_dir} is not supported; copy trainer.default_local_dir yourself"),
        ((t.resume_mode == "resume_path") != (t.resume_from_path is not None),
         "trainer.resume_mode=resume_path and trainer.resume_from_path go together"),
        (t.best_metric is not None and d.val_files is None, f"trainer.best_metric={t.best_metric} needs data.val_files"),
        (bool(bad_frequency), f"{' and '.join(bad_frequency)} must be a number of steps, \"epoch\" or -1"),
        (bool(set(t.logger) - set(LOGGERS)), f"trainer.logger={t.logger}: known are {', '.join(LOGGERS)}"),
        (not t.save_contents or bool(set(t.save_contents) - set(SAVE_CONTENTS)),
         f"trainer.save_contents={t.save_contents}: one or both of {', '.join(SAVE_CONTENTS)}"),
    ]  # fmt: skip


def _lora(c: Config) -> bool:
    return c.model.uses_lora


def _new_lora(c: Config) -> bool:
    return c.model.lora_rank > 0


def _wsd(c: Config) -> bool:
    return c.optim.lr_scheduler == "wsd"


def _validates(c: Config) -> bool:
    return c.data.val_files is not None


# Keys that only some combinations read: (does this one, what it takes). Looked at where the value is not the default.
_EFFECTIVE: dict[str, tuple[Callable[[Config], bool], str]] = {
    "optim.decay_ratio": (_wsd, "optim.lr_scheduler=wsd"),
    "optim.decay_shape": (_wsd, "optim.lr_scheduler=wsd"),
    "optim.min_lr_ratio": (lambda c: c.optim.lr_scheduler != "constant", "a schedule other than optim.lr_scheduler=constant"),
    "optim.warmup_steps_ratio": (lambda c: c.optim.warmup_steps is None, "optim.warmup_steps=null"),
    "model.lora_alpha": (_lora, "model.lora_rank above 0"),
    "model.lora_dropout": (_lora, "model.lora_rank above 0"),
    "model.target_modules": (_lora, "model.lora_rank above 0"),
    "model.exclude_modules": (_lora, "model.lora_rank above 0"),
    "model.modules_to_save": (_lora, "model.lora_rank above 0"),
    "model.use_rslora": (_lora, "model.lora_rank above 0"),
    "model.use_dora": (_lora, "model.lora_rank above 0"),
    "data.val_max_samples": (_validates, "data.val_files"),
    "trainer.test_freq": (_validates, "data.val_files"),
    "data.max_bad_share": (
        lambda c: c.data.on_bad_row == "skip" or c.data.truncation in ("left", "right"),
        "data.on_bad_row=skip, or data.truncation=left or right, which can leave a row without a trained token",
    ),
    "trainer.keep_every": (lambda c: c.trainer.max_ckpt_to_keep is not None, "trainer.max_ckpt_to_keep"),
    "trainer.max_shard_size": (lambda c: "model" in c.trainer.save_contents, "trainer.save_contents with model"),
    "data.max_token_len_per_gpu": (lambda c: c.use_remove_padding, "use_remove_padding=true"),
}


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
