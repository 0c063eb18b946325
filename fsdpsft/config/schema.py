"""The settings as typed dataclasses, one a section of ``conf/train.yaml``, which holds defaults and meanings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, get_type_hints


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
    head_chunk_tokens: int | None
    trim_last_block: bool
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
    verify_export: bool
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
