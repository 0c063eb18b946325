"""The schema: a field of these dataclasses is a key, and says everything there is to know about it.

``conf/train.yaml`` is written from here (``python -m fsdpsft.config``). To add a key, add a field; rules about
several keys at once are in ``rules.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import MISSING as FACTORYLESS
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from omegaconf import MISSING


class Needs(NamedTuple):
    """What a key takes to have an effect.

    Attributes:
        holds: whether these settings have it.
        text: the same in words, for the error.
    """

    holds: Callable[[Config], bool]
    text: str


@dataclass(frozen=True)
class Key:
    """What the schema says of one key.

    Attributes:
        type: its annotation.
        default: its value where the user sets none; ``MISSING`` where the user must.
        help: one line; ``{choices}`` stands for the allowed values.
        choices: allowed values, beside null where the type allows that; empty: any.
        low, high: inclusive bounds of a number; None: unbounded.
        path: whether the value names files, so that ``~`` is the home folder.
        on_resume: whether it may differ between a checkpoint and the run that resumes from it: ``fixed``, ``free``
            (nothing that is learnt changes) or ``grow`` (a larger number is fine).
        needs: None where it always has an effect.
    """

    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    path: bool = False
    on_resume: str = "fixed"
    needs: Needs | None = None

    @property
    def nullable(self) -> bool:
        """Whether null is a value."""
        return self.type is Any or type(None) in getattr(self.type, "__args__", ())


def key(default: Any, help: str, **facts: Any) -> Any:
    """A field of the schema; ``facts`` are further attributes of ``Key``."""
    metadata = {"help": help, **facts}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


LORA = Needs(lambda c: c.model.uses_lora, "model.lora_rank above 0")
WSD = Needs(lambda c: c.optim.lr_scheduler == "wsd", "optim.lr_scheduler=wsd")
VALIDATION = Needs(lambda c: c.data.val_files is not None, "data.val_files")
PACKED = Needs(lambda c: c.use_remove_padding, "use_remove_padding=true")
EXPORT = Needs(lambda c: "model" in c.trainer.save_contents, "trainer.save_contents with model")
DECAYING = Needs(lambda c: c.optim.lr_scheduler != "constant", "a schedule other than optim.lr_scheduler=constant")
WARMUP_RATIO = Needs(lambda c: c.optim.warmup_steps is None, "optim.warmup_steps=null")
KEEP_SOME = Needs(lambda c: c.trainer.max_ckpt_to_keep is not None, "trainer.max_ckpt_to_keep")
BAD_ROWS = Needs(
    lambda c: c.data.on_bad_row == "skip" or c.data.truncation in ("left", "right"),
    "data.on_bad_row=skip, or data.truncation=left or right, which can leave a row without a trained token",
)


@dataclass
class MultiturnConfig:
    """Where a row holds a conversation's messages."""

    enable: bool = key(False, "true: rows must hold a list of messages; false: decided by data.format")
    messages_key: str = key("messages", "column of the messages (`conversations` is recognised too)")
    enable_thinking_key: str = key("enable_thinking", "optional column given to the template as enable_thinking")


@dataclass
class CustomClassConfig:
    """The user's own row adapter."""

    path: str | None = key(None, "Python file with your own row adapter", path=True)
    name: str | None = key(None, "its class")


@dataclass
class DataConfig:
    """What is trained on, and how it is cut into batches."""

    train_files: Any = key(
        MISSING, "path, glob, folder, Hub name, a list of them, or a list of {path, weight}", path=True
    )
    val_files: Any = key(None, "the same, for validation; null: none", on_resume="free", path=True)
    format: str = key(
        "auto", "{choices}", choices=("auto", "prompt_response", "messages", "sharegpt", "alpaca", "tokenized")
    )
    dataset_info: str | None = key(
        None, "a LLaMA-Factory dataset_info.json; train_files then names its entries", path=True
    )
    prompt_key: str | None = key(None, "column of the prompt; null: recognised (prompt, question, instruction, input)")
    response_key: str | None = key(
        None, "column of the response; null: recognised (response, answer, completion, output)"
    )
    prompt_dict_keys: list[str] | None = key(
        None, "keys to follow inside a prompt column that holds dicts, e.g. ['question']"
    )
    response_dict_keys: list[str] | None = key(None, "the same for the response, e.g. ['answer']")
    system_key: str | None = key(None, "column of the system prompt; null: `system` where there is one")
    tools_key: str = key("tools", "column of the tool definitions (objects or a JSON string)")
    multiturn: MultiturnConfig = field(default_factory=MultiturnConfig)
    train_on_turns: str = key("all", "{choices}: which assistant turns are trained", choices=("all", "last"))
    history: str = key(
        "auto",
        "{choices}: if earlier turns get rewritten; auto: as inference does",
        choices=("auto", "as_rendered", "per_turn"),
    )
    may_drop: list[str] = key([], "what rows may give that the template does not print, e.g. [reasoning, tools]")
    chat_template: str | None = key(
        None, "a Jinja file, its text, or `chatml`; null: the model's own. Saved with the model"
    )
    chat_template_kwargs: dict[str, Any] = key({}, "extra variables for the template, e.g. {enable_thinking: false}")
    special_tokens_in_content: str = key(
        "escape",
        "{choices}: special-token text inside a message, which could forge a turn",
        choices=("escape", "refuse"),
    )
    max_length: int = key(4096, "longest sample in tokens", low=2)
    truncation: str = key(
        "drop",
        "{choices}: what to do with a longer one (drops are counted)",
        choices=("error", "left", "right", "drop"),
    )
    on_bad_row: str = key(
        "error", "{choices}: a row that cannot be used; skipped ones are counted by reason", choices=("error", "skip")
    )
    max_bad_share: float = key(
        0.05, "a larger share of skipped or cut-to-nothing rows is an error", low=0, high=1, needs=BAD_ROWS
    )
    train_batch_size: int = key(256, "samples of one optimiser step, all processes together", low=1)
    micro_batch_size_per_gpu: int = key(
        4, "rows of one forward pass when padded; sets the token budget when packed", low=1, on_resume="free"
    )
    max_token_len_per_gpu: int | None = key(
        None,
        "hard token budget of one forward pass; null: micro_batch_size_per_gpu * max_length",
        low=2,
        on_resume="free",
        needs=PACKED,
    )
    balance_dp_token: bool = key(True, "share a step's samples out by cost; false: in order", on_resume="free")
    drop_last: bool = key(False, "true: leave out the epoch's last batch when it is smaller than train_batch_size")
    train_max_samples: int | None = key(None, "use only the first this many rows (null or -1: all)", low=1)
    val_max_samples: int | None = key(None, "the same for validation", low=1, on_resume="free", needs=VALIDATION)
    custom_cls: CustomClassConfig = field(default_factory=CustomClassConfig)
    cache_dir: str | None = key(
        None,
        "where tokenised data is kept; null: ~/.cache/fsdpsft, else a temporary folder",
        on_resume="free",
        path=True,
    )
    num_workers: int | None = key(None, "processes that tokenise; null: one per core", low=1, on_resume="free")

    @property
    def token_budget(self) -> int:
        """Tokens one process may have in one forward pass."""
        return self.max_token_len_per_gpu or self.micro_batch_size_per_gpu * self.max_length


@dataclass
class WrapPolicyConfig:
    """Which blocks become FSDP units."""

    min_num_params: int = key(0, "blocks with fewer parameters are sharded with the root", on_resume="free")


@dataclass
class FSDPConfig:
    """How weights are stored and shared out."""

    model_dtype: str = key(
        "float32", "{choices}: of the weights the optimiser updates", choices=("float32", "bfloat16")
    )
    reduce_dtype: str = key(
        "float32", "{choices}: of the gradient reduction between processes", choices=("float32", "bfloat16")
    )
    reshard_after_forward: bool = key(
        True, "true: ZeRO-3, least memory; false: ZeRO-2, fewer gathers", on_resume="free"
    )
    replicate_size: int = key(
        1, "hybrid sharding: this many replicas, each sharded over the rest", low=1, on_resume="free"
    )
    gradient_sync: str = key(
        "every",
        "{choices}: reduce after each micro-batch, or once a step (more memory)",
        choices=("every", "last"),
        on_resume="free",
    )
    offload_params: bool = key(
        False, "true: weights, gradients and optimiser states rest in host memory", on_resume="free"
    )
    wrap_policy: WrapPolicyConfig = field(default_factory=WrapPolicyConfig)


@dataclass
class ModelConfig:
    """The model, its memory, and its adapters."""

    partial_pretrain: str = key(MISSING, "folder of a Hugging Face model, or a Hub id", path=True)
    trust_remote_code: bool = key(False, "true: run code that comes with the model")
    strategy: str = key("fsdp2", "{choices}", choices=("fsdp2",), on_resume="free")
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    enable_gradient_checkpointing: str = key(
        "auto",
        "none | selective: products and attention kept | full (or true, false) | auto: the least that fits",
        choices=("auto", "none", "selective", "full"),
        on_resume="free",
    )
    activation_offload: bool = key(
        False, "true: what checkpointing keeps rests in host memory until backward", on_resume="free"
    )
    mlp_tiles: int = key(1, "above 1: the MLP runs over this many slices of the sequence", low=1, on_resume="free")
    use_liger: bool = key(False, "true: Liger's RMSNorm, RoPE and SwiGLU kernels (CUDA)", on_resume="free")
    attn_implementation: str = key(
        "auto",
        "{choices}",
        choices=("auto", "sdpa", "varlen", "flex", "flash_attention_2", "flash_attention_3"),
        on_resume="free",
    )
    compile: str = key(
        "auto",
        "torch.compile on each block; auto: on CUDA for 1000 steps or more | true | false",
        choices=("auto", "true", "false"),
        on_resume="free",
    )
    dtype: str = key(
        "auto",
        "{choices}: of the compute (auto: bfloat16 on CUDA, float32 on CPU)",
        choices=("auto", "bfloat16", "float32"),
    )
    head_chunk_tokens: int | None = key(
        None, "trained tokens whose logits exist at one time; null: 4096, on CPU 128 to 512", low=1, on_resume="free"
    )
    lora_rank: int = key(0, "above 0: train LoRA adapters of this rank", low=0)
    lora_alpha: int = key(16, "adapters are scaled by lora_alpha / lora_rank", needs=LORA)
    lora_dropout: float = key(
        0.0, "dropout before the adapters; above 0, losses depend on the layout", low=0, high=0.999, needs=LORA
    )
    target_modules: Any = key("all-linear", "all-linear, a list of names, or a regular expression", needs=LORA)
    exclude_modules: Any = key(None, "names or a regular expression to leave out", needs=LORA)
    modules_to_save: list[str] | None = key(
        None, "modules trained in full beside the adapters, e.g. [embed_tokens, lm_head]", needs=LORA
    )
    use_rslora: bool = key(False, "true: scale by lora_alpha / sqrt(lora_rank)", needs=LORA)
    use_dora: bool = key(False, "true: weight-decomposed adapters (DoRA)", needs=LORA)
    lora_adapter_path: str | None = key(None, "start from this PEFT adapter", path=True)

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained instead of the model's own weights."""
        return self.lora_rank > 0 or self.lora_adapter_path is not None


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = key(1e-5, "peak learning rate", low=0, high=1000.0)
    betas: list[float] = key([0.9, 0.95], "AdamW's")
    eps: float = key(1e-8, "AdamW's", low=1e-30, high=1)
    weight_decay: float = key(
        0.01, "on the matrices of linear layers, embeddings and experts alone", low=0, high=1000.0
    )
    log_decay: bool = key(False, "true: name the parameters that decay, and those that do not", on_resume="free")
    clip_grad: float | None = key(1.0, "largest gradient norm; null: no clipping", low=1e-30)
    state_dtype: str = key("float32", "{choices}: of AdamW's moments", choices=("float32", "bfloat16"))
    lr_scheduler: str = key("cosine", "{choices}", choices=("cosine", "wsd", "linear", "constant"))
    warmup_steps_ratio: float = key(0.1, "share of all steps spent warming up", low=0, high=1, needs=WARMUP_RATIO)
    warmup_steps: int | None = key(None, "the same as a number of steps", low=0)
    min_lr_ratio: float = key(0.0, "where the schedule ends, as a share of lr", low=0, high=1, needs=DECAYING)
    decay_ratio: float = key(0.1, "wsd: share of all steps spent decaying", low=0, high=1, needs=WSD)
    decay_shape: str = key("cosine", "wsd: cosine | linear | sqrt", choices=("cosine", "linear", "sqrt"), needs=WSD)


@dataclass
class TrainerConfig:
    """The run: its length, its place, what it saves and says."""

    default_local_dir: str = key(
        "checkpoints/${trainer.project_name}/${trainer.experiment_name}",
        "where everything is written",
        on_resume="free",
        path=True,
    )
    default_hdfs_dir: str | None = key(None, "not supported; only null is accepted", on_resume="free")
    project_name: str = key("fsdpsft", "names the output folder and the wandb project", on_resume="free")
    experiment_name: str = key("sft", "names the output folder and the wandb run", on_resume="free")
    seed: int = key(1, "of the order of the data and of new weights", low=0)
    device: str = key("auto", "{choices}", choices=("auto", "cuda", "cpu"), on_resume="free")
    total_epochs: int = key(1, "passes over the data", low=1, on_resume="grow")
    total_training_steps: int | None = key(
        None, "overrides total_epochs; the schedule spans it", low=1, on_resume="grow"
    )
    save_freq: int | str = key("epoch", "steps, `epoch`, or -1: only at the end", on_resume="free")
    test_freq: int | str = key("epoch", "the same for validation", on_resume="free", needs=VALIDATION)
    save_contents: list[str] = key(
        ["model", "state"],
        "what a checkpoint holds: a Hugging Face model, the resumable state, or both",
        on_resume="free",
    )
    async_save: bool = key(True, "training goes on while files are written", on_resume="free")
    max_shard_size: str = key("5GB", "of a safetensors file", on_resume="free", needs=EXPORT)
    verify_export: bool = key(
        True, "read each saved model again, one block at a time, and compare its losses", on_resume="free", needs=EXPORT
    )
    max_ckpt_to_keep: int | None = key(
        None, "older checkpoints are deleted (null or -1: none are)", low=1, on_resume="free"
    )
    keep_every: int | None = key(
        None, "checkpoints at multiples of this step are never deleted", low=1, on_resume="free", needs=KEEP_SOME
    )
    best_metric: str | None = key(
        None,
        "{choices}: the folder's root then is the best model instead of the newest",
        choices=("val/loss",),
        on_resume="free",
    )
    on_disk_full: str = key(
        "error", "{choices}: when a checkpoint does not fit", choices=("error", "continue"), on_resume="free"
    )
    save_on_file: str | None = key(None, "save when this file appears (it is removed)", on_resume="free", path=True)
    resume_mode: str = key("auto", "{choices}", choices=("auto", "disable", "resume_path"), on_resume="free")
    resume_from_path: str | None = key(
        None, "the global_step_N folder to resume from, with resume_mode=resume_path", on_resume="free", path=True
    )
    allow_config_change: bool = key(
        False, "true: resume although data, batch size or template changed", on_resume="free"
    )
    logger: list[str] = key(["console"], "console, tensorboard, wandb", on_resume="free")
    log_freq: int = key(1, "steps between log lines", low=1, on_resume="free")
    timeout: int = key(600, "seconds before a stuck collective ends the run", low=1, on_resume="free")


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ulysses_sequence_parallel_size: int = key(1, "processes that share one sequence", low=1, on_resume="free")
    use_remove_padding: bool = key(
        True, "true: samples are packed end to end; false: one padded row a sample", on_resume="free"
    )
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        # Dotted key -> the text that read it from the environment: such a value is used, and never written down.
        self.from_environment: dict[str, str] = {}

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to ``config.yaml``; what the environment gave stays a reference to it."""
        values = asdict(self)
        for name, text in self.from_environment.items():
            *sections, leaf = name.split(".")
            node = values
            for section in sections:
                node = node[section]
            node[leaf] = text
        return values


def _keys_of(schema: type, prefix: str) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    hints = get_type_hints(schema)
    for member in fields(schema):
        hint = hints[member.name]
        if is_dataclass(hint):
            keys |= _keys_of(hint, f"{prefix}{member.name}.")  # type: ignore[arg-type]
        else:
            made = member.default if member.default_factory is FACTORYLESS else member.default_factory()
            keys[prefix + member.name] = Key(hint, made, **member.metadata)
    return keys


KEYS: Mapping[str, Key] = _keys_of(Config, "")
"""Every key by its dotted name, in the order of the YAML."""
