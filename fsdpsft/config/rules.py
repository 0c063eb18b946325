"""Every rule on settings that needs no data and no model: allowed values, impossible combinations, dead keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fsdpsft.config.schema import Config
from fsdpsft.errors import ConfigError

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
    "data.max_length": (2, 1 << 31),
    "data.train_batch_size": (1, 1 << 40),
    "data.max_bad_share": (0, 1),
    "data.micro_batch_size_per_gpu": (1, 1 << 31),
    "data.max_token_len_per_gpu": (2, 1 << 31),
    "data.num_workers": (1, 4096),
    "data.train_max_samples": (1, 1 << 62),
    "data.val_max_samples": (1, 1 << 62),
    "model.fsdp_config.replicate_size": (1, 1 << 20),
    "model.mlp_tiles": (1, 1 << 20),
    "model.head_chunk_tokens": (1, 1 << 31),
    "model.lora_rank": (0, 1 << 20),
    "model.lora_dropout": (0, 0.999),
    "optim.lr": (0, 1e3),
    "optim.eps": (1e-30, 1),
    "optim.weight_decay": (0, 1e3),
    "optim.clip_grad": (1e-30, 1e30),
    "optim.warmup_steps_ratio": (0, 1),
    "optim.warmup_steps": (0, 1 << 40),
    "optim.min_lr_ratio": (0, 1),
    "optim.decay_ratio": (0, 1),
    "ulysses_sequence_parallel_size": (1, 1 << 20),
    "trainer.total_epochs": (1, 1 << 31),
    "trainer.total_training_steps": (1, 1 << 40),
    "trainer.max_ckpt_to_keep": (1, 1 << 31),
    "trainer.keep_every": (1, 1 << 40),
    "trainer.log_freq": (1, 1 << 31),
    "trainer.timeout": (1, 1 << 31),
    "trainer.seed": (0, (1 << 63) - 1),
}
LOGGERS = ("console", "tensorboard", "wandb")
SAVE_CONTENTS = ("model", "state")

Faults = list[tuple[bool, str]]
"""Combinations that cannot work: (is it so, what to tell)."""


def check(config: Config, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise one ``ConfigError`` that lists every value, combination and dead key that cannot work.

    Args:
        config: the settings.
        values: the same by dotted key.
        defaults: the defaults by dotted key, to tell what the user has set.
    """
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
    impossible = (*_impossible_batches(config), *_impossible_learning(config), *_impossible_run(config))
    faults += [message for broken, message in impossible if broken]
    changed = [key for key, value in values.items() if key in defaults and value != defaults[key]]
    faults += [
        f"{key}={values[key]} has no effect: it needs {needs}"
        for key, (works, needs) in _EFFECTIVE.items()
        if key in changed and not works(config)
    ]
    if faults:
        raise ConfigError("\n".join(faults) if len(faults) == 1 else "\n".join(["", *(f"- {f}" for f in faults)]))


def _impossible_batches(c: Config) -> Faults:
    d = c.data
    return [
        (
            d.token_budget < d.max_length and c.ulysses_sequence_parallel_size * d.token_budget < d.max_length,
            f"data.max_token_len_per_gpu={d.max_token_len_per_gpu} times ulysses_sequence_parallel_size="
            f"{c.ulysses_sequence_parallel_size} is below data.max_length={d.max_length}: long samples would not fit",
        ),
        (
            d.multiturn.enable and d.format not in ("auto", "messages", "sharegpt"),
            f"data.multiturn.enable=true contradicts data.format={d.format}",
        ),
        (
            d.dataset_info is not None and d.format != "auto",
            "data.dataset_info states each set's format: leave data.format=auto",
        ),
        (
            (d.custom_cls.path is None) != (d.custom_cls.name is None),
            "data.custom_cls.path and data.custom_cls.name go together",
        ),
        (
            c.ulysses_sequence_parallel_size > 1 and not c.use_remove_padding,
            f"ulysses_sequence_parallel_size={c.ulysses_sequence_parallel_size} needs use_remove_padding=true",
        ),
    ]


def _impossible_learning(c: Config) -> Faults:
    m, o = c.model, c.optim
    return [
        (
            len(o.betas) != 2 or not all(0 <= b < 1 for b in o.betas),
            f"optim.betas={o.betas} must be two numbers in [0, 1)",
        ),
        (
            o.state_dtype == "bfloat16" and o.betas[-1] > 0.99,
            f"optim.state_dtype=bfloat16 cannot resolve optim.betas={o.betas}: its updates round away above 0.99",
        ),
        (
            o.lr_scheduler == "wsd" and o.warmup_steps is None and o.warmup_steps_ratio + o.decay_ratio > 1,
            f"optim.warmup_steps_ratio={o.warmup_steps_ratio} and optim.decay_ratio={o.decay_ratio} exceed 1 together",
        ),
        (
            m.activation_offload and m.enable_gradient_checkpointing == "none",
            "model.activation_offload=true needs model.enable_gradient_checkpointing=selective or full",
        ),
        (
            m.fsdp_config.model_dtype == "bfloat16" and m.dtype == "float32",
            "model.fsdp_config.model_dtype=bfloat16 contradicts model.dtype=float32",
        ),
        (
            m.uses_lora and m.fsdp_config.model_dtype == "bfloat16",
            "model.fsdp_config.model_dtype=bfloat16 contradicts model.lora_rank: adapters are kept in float32",
        ),
    ]


def _impossible_run(c: Config) -> Faults:
    t = c.trainer
    frequencies = {"trainer.save_freq": t.save_freq, "trainer.test_freq": t.test_freq}
    bad_frequency = [
        k for k, v in frequencies.items() if v != "epoch" and not (isinstance(v, int) and (v == -1 or v > 0))
    ]
    return [
        (
            t.default_hdfs_dir is not None,
            f"trainer.default_hdfs_dir={t.default_hdfs_dir} is not supported; copy trainer.default_local_dir yourself",
        ),
        (
            (t.resume_mode == "resume_path") != (t.resume_from_path is not None),
            "trainer.resume_mode=resume_path and trainer.resume_from_path go together",
        ),
        (
            t.best_metric is not None and c.data.val_files is None,
            f"trainer.best_metric={t.best_metric} needs data.val_files",
        ),
        (bool(bad_frequency), f'{" and ".join(bad_frequency)} must be a number of steps, "epoch" or -1'),
        (bool(set(t.logger) - set(LOGGERS)), f"trainer.logger={t.logger}: known are {', '.join(LOGGERS)}"),
        (
            not t.save_contents or bool(set(t.save_contents) - set(SAVE_CONTENTS)),
            f"trainer.save_contents={t.save_contents}: one or both of {', '.join(SAVE_CONTENTS)}",
        ),
    ]


def _lora(c: Config) -> bool:
    return c.model.uses_lora


def _wsd(c: Config) -> bool:
    return c.optim.lr_scheduler == "wsd"


def _validates(c: Config) -> bool:
    return c.data.val_files is not None


# Keys that only some combinations read: (does this one, what it takes). Looked at where the value is not the default.
_EFFECTIVE: dict[str, tuple[Callable[[Config], bool], str]] = {
    "optim.decay_ratio": (_wsd, "optim.lr_scheduler=wsd"),
    "optim.decay_shape": (_wsd, "optim.lr_scheduler=wsd"),
    "optim.min_lr_ratio": (
        lambda c: c.optim.lr_scheduler != "constant",
        "a schedule other than optim.lr_scheduler=constant",
    ),
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
    "trainer.verify_export": (lambda c: "model" in c.trainer.save_contents, "trainer.save_contents with model"),
    "trainer.max_shard_size": (lambda c: "model" in c.trainer.save_contents, "trainer.save_contents with model"),
    "data.max_token_len_per_gpu": (lambda c: c.use_remove_padding, "use_remove_padding=true"),
}
