"""Rules on settings that need no data and no model: allowed values, combinations that cannot work, dead keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fsdpsft.config.schema import KEYS, Config, Key
from fsdpsft.errors import ConfigError

LOGGERS = ("console", "tensorboard", "wandb")
SAVE_CONTENTS = ("model", "state")
MAY_DROP = ("reasoning", "system", "developer", "tools", "tool_calls", "tool_results", "content")


def check(config: Config, values: Mapping[str, Any]) -> None:
    """Raise one ``ConfigError`` that lists every value, combination and dead key that cannot work.

    Args:
        config: the settings.
        values: the same by dotted key.
    """
    faults = [fault for name, key in KEYS.items() if (fault := _impossible_value(name, key, values[name]))]
    faults += [*_impossible_batches(config), *_impossible_learning(config), *_impossible_run(config)]
    faults += [
        f"{name}={values[name]} has no effect: it needs {key.needs.text}"
        for name, key in KEYS.items()
        if key.needs is not None and values[name] != key.default and not key.needs.holds(config)
    ]
    if faults:
        raise ConfigError("\n".join(faults) if len(faults) == 1 else "\n".join(["", *(f"- {f}" for f in faults)]))


def _impossible_value(name: str, key: Key, value: Any) -> str | None:
    """What is wrong with a value, looked at alone."""
    if value is None and key.nullable:
        return None
    if key.choices and value not in key.choices:
        return f"{name}={value} is not one of {', '.join(key.choices)}"
    low, high = key.low, key.high
    if (low is None or value >= low) and (high is None or value <= high):
        return None
    if high is None:
        return f"{name}={value} must be at least {low:g}"
    return f"{name}={value} must lie between {low:g} and {high:g}"


def _impossible_batches(c: Config) -> Iterator[str]:
    d = c.data
    if d.token_budget < d.max_length and c.ulysses_sequence_parallel_size * d.token_budget < d.max_length:
        yield (
            f"data.max_token_len_per_gpu={d.max_token_len_per_gpu} times ulysses_sequence_parallel_size="
            f"{c.ulysses_sequence_parallel_size} is below data.max_length={d.max_length}: long samples would not fit"
        )
    if d.multiturn.enable and d.format not in ("auto", "messages", "sharegpt"):
        yield f"data.multiturn.enable=true contradicts data.format={d.format}"
    if d.dataset_info is not None and d.format != "auto":
        yield "data.dataset_info states each set's format: leave data.format=auto"
    if (d.custom_cls.path is None) != (d.custom_cls.name is None):
        yield "data.custom_cls.path and data.custom_cls.name go together"
    if c.ulysses_sequence_parallel_size > 1 and not c.use_remove_padding:
        yield f"ulysses_sequence_parallel_size={c.ulysses_sequence_parallel_size} needs use_remove_padding=true"


def _impossible_learning(c: Config) -> Iterator[str]:
    m, o = c.model, c.optim
    if len(o.betas) != 2 or not all(0 <= b < 1 for b in o.betas):
        yield f"optim.betas={o.betas} must be two numbers in [0, 1)"
    if o.state_dtype == "bfloat16" and o.betas[-1] > 0.99:
        yield f"optim.state_dtype=bfloat16 cannot resolve optim.betas={o.betas}: its updates round away above 0.99"
    if o.lr_scheduler == "wsd" and o.warmup_steps is None and o.warmup_steps_ratio + o.decay_ratio > 1:
        yield (
            f"optim.warmup_steps_ratio={o.warmup_steps_ratio} and optim.decay_ratio={o.decay_ratio} exceed 1 together"
        )
    if m.activation_offload and m.enable_gradient_checkpointing == "none":
        yield "model.activation_offload=true needs model.enable_gradient_checkpointing=selective or full"
    if m.fsdp_config.model_dtype == "bfloat16" and m.dtype == "float32":
        yield "model.fsdp_config.model_dtype=bfloat16 contradicts model.dtype=float32"
    if m.uses_lora and m.fsdp_config.model_dtype == "bfloat16":
        yield "model.fsdp_config.model_dtype=bfloat16 contradicts model.lora_rank: adapters are kept in float32"


def _impossible_run(c: Config) -> Iterator[str]:
    t = c.trainer
    frequencies = {"trainer.save_freq": t.save_freq, "trainer.test_freq": t.test_freq}
    bad_frequency = [
        k for k, v in frequencies.items() if v != "epoch" and not (isinstance(v, int) and (v == -1 or v > 0))
    ]
    if t.default_hdfs_dir is not None:
        yield (
            f"trainer.default_hdfs_dir={t.default_hdfs_dir} is not supported; copy trainer.default_local_dir yourself"
        )
    if (t.resume_mode == "resume_path") != (t.resume_from_path is not None):
        yield "trainer.resume_mode=resume_path and trainer.resume_from_path go together"
    if t.best_metric is not None and c.data.val_files is None:
        yield f"trainer.best_metric={t.best_metric} needs data.val_files"
    if set(c.data.may_drop) - set(MAY_DROP):
        yield f"data.may_drop={c.data.may_drop}: any of {', '.join(MAY_DROP)}"
    if bad_frequency:
        yield f'{" and ".join(bad_frequency)} must be a number of steps, "epoch" or -1'
    if set(t.logger) - set(LOGGERS):
        yield f"trainer.logger={t.logger}: known are {', '.join(LOGGERS)}"
    if not t.save_contents or set(t.save_contents) - set(SAVE_CONTENTS):
        yield f"trainer.save_contents={t.save_contents}: one or both of {', '.join(SAVE_CONTENTS)}"
