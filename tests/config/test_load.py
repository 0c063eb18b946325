"""What users type becomes typed settings, or one clear error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fsdpsft.config.load import CONF_DIR, default_values, load_config
from fsdpsft.config.rules import _EFFECTIVE, CHOICES, RANGES
from fsdpsft.config.schema import schema_keys
from fsdpsft.errors import ConfigError

NEEDED = ["data.train_files=a.parquet", "model.partial_pretrain=some/model"]


def test_yaml_and_schema_hold_the_same_keys() -> None:
    assert set(default_values()) == set(schema_keys())


def test_every_key_of_the_yaml_has_a_comment() -> None:
    text = (CONF_DIR / "train.yaml").read_text()
    bare = [line for line in text.splitlines() if re.match(r"^\s+\w+: [^\s]", line) and "#" not in line]
    assert bare == []


def test_rules_name_existing_keys() -> None:
    assert set(CHOICES) | set(RANGES) | set(_EFFECTIVE) <= set(schema_keys())


def test_defaults_are_typed() -> None:
    config = load_config(NEEDED)
    assert config.optim.lr == 1e-5 and isinstance(config.optim.lr, float)
    assert config.trainer.save_freq == "epoch" and config.data.token_budget == 4 * 4096


def test_commands_of_other_trainers_are_understood() -> None:
    config = load_config([
        *NEEDED, "data.prompt_key=extra_info", "data.response_key=extra_info", "data.prompt_dict_keys=['question']",
        "+data.response_dict_keys=['answer']", "data.micro_batch_size=4", "optim.lr=1e-4",
        "trainer.default_local_dir=/tmp/out", "trainer.project_name=gsm8k-sft", "trainer.experiment_name=sp2",
        "trainer.logger=['console']", "trainer.total_epochs=4", "trainer.default_hdfs_dir=null",
        "ulysses_sequence_parallel_size=2", "use_remove_padding=true", "model.enable_gradient_checkpointing=true",
    ])  # fmt: skip
    assert config.data.response_dict_keys == ["answer"] and config.data.micro_batch_size_per_gpu == 4
    assert config.model.enable_gradient_checkpointing == "full" and config.trainer.total_epochs == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rate=1"], "unknown key optim.learning_rate"),
        (["optim.weight_decy=1"], "did you mean optim.weight_decay?"),
        (["data.max_len=5"], "did you mean data.max_len"),
        (["optim.lr=fast"], "optim.lr"),
        (["data.train_files=a.parquet,b.parquet"], "needs brackets|need brackets"),
        (["data.train_files=a b=c"], "needs quotes"),
        (["optim.lr"], "expected key=value"),
        (["~optim.lr=3"], "expected key=value"),
        (["trainer.nnodes=2"], "torchrun's --nnodes"),
        (["data.truncation=middle"], "data.truncation=middle is not one of error, left, right, drop"),
        (["optim.lr=-1"], "optim.lr=-1.0 must lie between"),
        (["optim.decay_ratio=0.5"], "optim.decay_ratio=0.5 has no effect: it needs optim.lr_scheduler=wsd"),
        (["model.lora_alpha=64"], "model.lora_alpha=64 has no effect: it needs model.lora_rank above 0"),
        (["ulysses_sequence_parallel_size=2", "use_remove_padding=false"], "needs use_remove_padding=true"),
        (["data.max_token_len_per_gpu=100"], "below data.max_length=4096"),
        (["trainer.best_metric=val/loss"], "needs data.val_files"),
        (["trainer.resume_mode=resume_path"], "go together"),
        (["trainer.logger=[consol]"], "known are console, tensorboard, wandb"),
        (["trainer.save_freq=often"], "trainer.save_freq must be"),
        (["trainer.default_hdfs_dir=hdfs://x"], "not supported"),
        (["preset=nothing"], "nothing"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([*NEEDED, *overrides])


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data.train_files is not set.*model.partial_pretrain is not set"):
        load_config([])


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config([*NEEDED, "optim.lr=-1", "data.truncation=x", "optim.decay_ratio=0.3"])
    assert str(error.value).count("\n- ") == 3


def test_presets_and_own_yaml(tmp_path: Path) -> None:
    assert load_config([*NEEDED, "preset=lora", "model.lora_rank=8"]).model.lora_rank == 8
    (tmp_path / "mine.yaml").write_text("defaults:\n  - train\n  - _self_\noptim:\n  lr: 0.5\n")
    assert load_config(NEEDED, config_dir=tmp_path, config_name="mine").optim.lr == 0.5
    (tmp_path / "typo.yaml").write_text("defaults:\n  - train\n  - _self_\noptim:\n  lrr: 0.5\n")
    with pytest.raises(ConfigError, match=r"optim\.lrr"):
        load_config(NEEDED, config_dir=tmp_path, config_name="typo")


def test_template_variables_are_free_keys() -> None:
    config = load_config([*NEEDED, "+data.chat_template_kwargs.enable_thinking=false"])
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
