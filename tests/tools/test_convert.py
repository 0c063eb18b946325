"""A YAML of another trainer becomes one of ours that loads, with the same batches, steps and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fsdpsft.config.load import load_config, read_yaml
from fsdpsft.config.schema import KEYS, Config
from fsdpsft.errors import ConfigError
from fsdpsft.tools.convert import Conversion, convert, main, text

LLAMAFACTORY = """
model_name_or_path: some/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: maths,chat
dataset_dir: rows
template: qwen
cutoff_len: 3000
preprocessing_num_workers: 3
output_dir: out/here
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.05
bf16: true
save_steps: 200
logging_steps: 5
report_to: none
mask_history: true
"""
AXOLOTL = """
base_model: some/model
datasets:
  - {path: owner/rows, type: alpaca, split: train}
  - {path: chats.jsonl, ds_type: json, type: chat_template, field_messages: talk, roles_to_train: [assistant]}
test_datasets:
  - {path: owner/rows, name: small, split: test}
sequence_len: 2048
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch_fused
lr_scheduler: linear
learning_rate: 0.0002
warmup_steps: 20
context_parallel_size: 2
gradient_checkpointing: true
flash_attention: true
saves_per_epoch: 1
wandb_project: mine
fsdp_config: {offload_params: true, auto_wrap_policy: TRANSFORMER_BASED_WRAP}
special_tokens: {pad_token: "<pad>"}
"""
TRL = """
model_name_or_path: some/model
dataset_name: owner/chats
dataset_test_split: test
eval_strategy: steps
eval_steps: 50
per_device_train_batch_size: 4
assistant_only_loss: true
max_steps: 300
"""
VERL = """
data:
  train_batch_size: 64
  micro_batch_size: 4
  train_files: ~/data/train.parquet
  prompt_key: extra_info
  response_key: extra_info
  prompt_dict_keys: ['question']
  response_dict_keys: ['answer']
  custom_cls: {path: null, name: null}
model:
  partial_pretrain: some/model
  strategy: fsdp
  fsdp_config: {model_dtype: fp32, cpu_offload: false}
  external_lib: null
optim: {lr: 1e-4, warmup_steps_ratio: 0.2}
trainer:
  default_local_dir: checkpoints/${trainer.project_name}/x
  project_name: maths
  total_epochs: 2
  logger: ['console']
  nnodes: 1
"""
VERL_ENGINE = """
data: {train_batch_size: 32, train_files: [a.parquet], messages_key: talk, pad_mode: no_padding, max_length: 4096,
       apply_chat_template_kwargs: {enable_thinking: false}}
model: {path: some/model, use_remove_padding: true}
engine: {strategy: fsdp2, ulysses_sequence_parallel_size: 2, fsdp_size: -1, model_dtype: fp32}
optim: {lr: 1e-5, lr_warmup_steps_ratio: 0.05, lr_scheduler_type: cosine, min_lr_ratio: 0.1}
trainer: {logger: [console], n_gpus_per_node: 8}
checkpoint: {save_contents: [model, optimizer, extra]}
"""
LR_OF = {"llamafactory": 1e-4, "axolotl": 2e-4, "trl": 2e-5, "verl": 1e-4, "verl_engine": 1e-5}
FILES = {"llamafactory": LLAMAFACTORY, "axolotl": AXOLOTL, "trl": TRL, "verl": VERL, "verl_engine": VERL_ENGINE}


def converted(tmp_path: Path, source: str, world_size: int = 4) -> tuple[Conversion, Config]:
    """The conversion, and what ``load_config`` makes of the text that is written."""
    (tmp_path / "theirs.yaml").write_text(source)
    c = convert(read_yaml(tmp_path / "theirs.yaml"), world_size)
    (tmp_path / "ours.yaml").write_text(text(c, "theirs.yaml"))
    return c, load_config([str(tmp_path / "ours.yaml")])


@pytest.mark.parametrize("trainer", FILES)
def test_each_trainer_is_known_by_its_keys_and_converts_wholly(tmp_path: Path, trainer: str) -> None:
    c, config = converted(tmp_path, FILES[trainer])
    assert (c.trainer, c.outcome, c.lost) == (trainer, "wholly", [])
    assert config.optim.lr == LR_OF[trainer] and config.model.partial_pretrain == "some/model"


@pytest.mark.parametrize("trainer", FILES)
def test_each_line_has_their_key_beside_it_and_no_key_of_theirs_is_left_unsaid(tmp_path: Path, trainer: str) -> None:
    c, _ = converted(tmp_path, FILES[trainer])
    written = text(c, "theirs.yaml")
    assert [name for name in c.typed if f"{name}: " not in written and name not in c.off] == []
    assert set(c.off) <= {"data.custom_cls.path", "data.custom_cls.name", "model.external_lib"}
    settings = [line for line in written.splitlines() if ": " in line and not line.startswith("#")]
    assert len(settings) == len(c.values) and all(" # " in line for line in settings)


def test_llamafactory(tmp_path: Path) -> None:
    c, config = converted(tmp_path, LLAMAFACTORY)
    d, m, o, t = config.data, config.model, config.optim, config.trainer
    assert c.arithmetic.endswith(
        "2 (per_device_train_batch_size) * 8 (gradient_accumulation_steps) * 4 (world_size) = 64"
    )
    assert (d.train_batch_size, d.micro_batch_size_per_gpu, d.max_length, d.truncation) == (64, 2, 3000, "right")
    assert (d.train_files, d.dataset_info, d.num_workers) == (["maths", "chat"], "rows", 3)
    assert d.train_on_turns == "last"
    assert (m.lora_rank, m.lora_alpha, m.target_modules) == (16, 32, "all-linear")  # alpha is twice the rank there
    assert (o.betas, o.weight_decay, o.warmup_steps_ratio, o.lr_scheduler) == ([0.9, 0.999], 0.0, 0.05, "cosine")
    assert (t.total_epochs, t.save_freq, t.log_freq, t.seed, t.logger) == (2, 200, 5, 42, ["console"])


def test_axolotl(tmp_path: Path) -> None:
    _, config = converted(tmp_path, AXOLOTL)
    d, m, o, t = config.data, config.model, config.optim, config.trainer
    assert d.train_batch_size == 2 * 4 * 4 // 2  # two processes share a sequence
    assert config.ulysses_sequence_parallel_size == 2
    assert d.train_files == ["owner/rows", "chats.jsonl"] and d.val_files == ["owner/rows:small:test"]
    assert d.multiturn.messages_key == "talk" and d.format == "auto"
    assert m.lora_rank == 0  # adapter is not set
    assert m.attn_implementation == "flash_attention_2" and m.fsdp_config.offload_params
    assert (o.warmup_steps, o.lr_scheduler) == (20, "linear")
    assert t.logger == ["console", "wandb"] and t.project_name == "mine"


def test_trl_fills_in_its_own_defaults(tmp_path: Path) -> None:
    _, config = converted(tmp_path, TRL, world_size=1)
    d, o, t = config.data, config.optim, config.trainer
    assert (d.train_batch_size, d.max_length, d.truncation) == (4, 1024, "right")
    assert (d.train_files, d.val_files, t.test_freq) == ("owner/chats", "owner/chats::test", 50)
    assert (o.lr, o.lr_scheduler, o.warmup_steps_ratio, o.weight_decay) == (2e-5, "linear", 0.0, 0.0)
    assert (t.total_training_steps, t.total_epochs, t.save_freq, config.model.lora_rank) == (300, 3, 500, 0)


def test_verls_batch_is_that_of_all_processes_already(tmp_path: Path) -> None:
    for source, batch in ((VERL, 64), (VERL_ENGINE, 32)):
        _, config = converted(tmp_path, source, world_size=8)
        assert config.data.train_batch_size == batch
    assert config.optim.betas == [0.9, 0.999] and config.trainer.total_epochs == 4  # the engine's own defaults
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.data.multiturn.messages_key == "talk"


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ("warmup_steps: 30", {"optim.warmup_steps": 30}),
        ("warmup_steps: 0.1", {"optim.warmup_steps_ratio": 0.1}),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", {"optim.warmup_steps_ratio": 0.2}),
        ("lr_scheduler_type: constant\nwarmup_steps: 10", {"optim.warmup_steps_ratio": 0.0}),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}", {"optim.min_lr_ratio": 0.1}),
        ("max_grad_norm: 0", {"optim.clip_grad": None}),
        ("adam_beta2: 0.95", {"optim.betas": [0.9, 0.95]}),
        ("save_strategy: epoch", {"trainer.save_freq": "epoch"}),
        ("save_strategy: no", {"trainer.save_freq": -1}),
        (
            "use_peft: true\nlora_target_modules: all-linear",
            {"model.lora_rank": 16, "model.target_modules": "all-linear"},
        ),
        ('chat_template: "a\\n: {{ b }} # c"', {"data.chat_template": "a\n: {{ b }} # c"}),
        ("report_to: [wandb]", {"trainer.logger": ["console", "wandb"]}),
        ("weight_decay: null", {"optim.weight_decay": 0.0}),
    ],
)
def test_keys_that_take_a_rule(tmp_path: Path, extra: str, wanted: dict[str, Any]) -> None:
    c, config = converted(tmp_path, TRL + extra)
    assert c.lost == []
    for ours, value in wanted.items():
        section, leaf = ours.split(".")
        assert getattr(getattr(config, section), leaf) == value


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("neftune_noise_alpha: 5", "noise on embeddings"),
        ("packing: true", "samples that fill a packed row"),
        ("optim: adafactor", "the optimiser is AdamW"),
        ("lr_scheduler_type: polynomial", "lr_scheduler_type: polynomial"),
        ("save_steps: 0.1", "a number of steps"),
        ("num_train_epochs: 0.3", "whole epochs"),
        ("report_to: [mlflow]", "console, tensorboard and wandb"),
        ("fp16: true", "float16"),
        ("max_length: null", "there is always a limit"),
        ("no_such_key: 3", "unknown here"),
        ("per_device_train_batch_size: 0", "train_batch_size"),
        ("seed: -5", "trainer.seed=-5"),
        ("learning_rate: fast", "Value 'fast'"),
        ("dtype: bfloat16\nuse_peft: true", "model.fsdp_config.model_dtype=bfloat16 contradicts"),
    ],
)
def test_what_has_no_equivalent_is_named_and_the_rest_loads(tmp_path: Path, extra: str, reason: str) -> None:
    c, _ = converted(tmp_path, TRL.replace("per_device_train_batch_size: 4\n", "") + extra)
    if "num_train_epochs" in extra and float in getattr(KEYS["trainer.total_epochs"].type, "__args__", ()):
        pytest.skip("a share of an epoch has become a value")
    assert c.outcome == "in part" and reason in " ".join(c.lost)
    assert reason in text(c, "x").partition("Without need")[0]


@pytest.mark.parametrize(
    "off", ["neftune_noise_alpha: null", "packing: false", "load_in_4bit: false", "push_to_hub: false"]
)
def test_what_is_switched_off_is_no_loss(off: str) -> None:
    assert convert(yaml.safe_load(TRL + off)).outcome == "wholly"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LLAMAFACTORY.replace("stage: sft", "stage: dpo"), "stage: dpo asks for something that is not done here"),
        (LLAMAFACTORY + "quantization_bit: 4", "quantised"),
        (AXOLOTL + "adapter: qlora", "no QLoRA"),
        (AXOLOTL + "rl: dpo", "preference learning"),
        (VERL + "actor_rollout_ref: {actor: {ppo_epochs: 1}}", "reinforcement learning"),
        (TRL + "warmup_steps: [1]", r"warmup_steps: \[1\] is not a value that TRL takes"),
        (TRL + "datasets: 5", "datasets: 5 is not a value that TRL takes"),
        ("colour: blue", "trainer=NAME says whose they are"),
        ("tokenizer: {_component_: a.b}\nmodel: {_component_: c.d}", "torchtune's recipes"),
    ],
)
def test_what_cannot_be_converted_says_why(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(yaml.safe_load(source))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(LLAMAFACTORY)
    assert main([str(theirs), "world_size=8", f"to={ours}"]) == 0
    assert "converted wholly" in capsys.readouterr().out
    assert load_config([str(ours)]).data.train_batch_size == 128
    for arguments, message in (
        ([str(theirs), f"to={ours}"], "exists"),
        ([str(theirs), "world_size=none"], "world_size=none must be"),
        ([str(theirs), "trainer=torchtune"], "is not one of trl, llamafactory"),
        ([str(theirs), "more.yaml"], "one file or folder"),
        ([str(tmp_path / "none.yaml")], "cannot read"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    for content in ("- a\n- b\n", "just text", "a: [1", "\0", ""):
        theirs.write_text(content)
        assert main([str(theirs)]) == 1
        assert "Traceback" not in capsys.readouterr().err


def test_a_folder_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.yaml").write_text(LLAMAFACTORY)
    (tmp_path / "deep" / "b.yml").write_text(AXOLOTL + "sample_packing: true")
    (tmp_path / "c.yaml").write_text("- not\n- keys\n")
    (tmp_path / "d.json").write_text("{}")
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "3 files: 1 wholly, 1 in part, 1 not" in out
    assert "in part deep/b.yml: sample_packing: True" in out
