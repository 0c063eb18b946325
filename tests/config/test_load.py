"""What users type becomes typed settings, or one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fsdpsft.config.load import load_config, to_yaml
from fsdpsft.config.schema import KEYS
from fsdpsft.config.yaml_file import CONF_DIR, render
from fsdpsft.errors import ConfigError

NEEDED = ["data.train_files=a.parquet", "model.partial_pretrain=some/model"]


def test_the_yaml_is_written_from_the_schema() -> None:
    assert (CONF_DIR / "train.yaml").read_text() == render(), "run: python -m fsdpsft.config"


def test_the_yaml_reads_back_as_the_schemas_defaults() -> None:
    read = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "train.yaml"), resolve=False)
    for name, key in KEYS.items():
        value = read
        for part in name.split("."):
            value = value[part]
        assert (float(value) if isinstance(key.default, float) else value) == key.default, name


def test_every_key_says_what_it_is() -> None:
    assert [name for name, key in KEYS.items() if not key.help.strip()] == []
    assert [name for name, key in KEYS.items() if key.on_resume not in ("fixed", "free", "grow")] == []


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
        (["model.fsdp_config.replicate_size=a b=c"], "cannot read the value of model.fsdp_config.replicate_size"),
        (["model.target_modules=${nope}"], "model.target_modules: Interpolation key 'nope' not found$"),
        (["trainer.seed=${hydra:runtime.cwd}"], "trainer.seed: "),
        (["optim.lr=${oc.env:NO_SUCH_VARIABLE}"], "optim.lr: .*NO_SUCH_VARIABLE"),
        (["data.multiturn=1"], "data.multiturn"),
        (["data.multiturn.enable=yes please"], "data.multiturn.enable"),
        (["optim={lr: 1}"], "unknown key optim"),
        (["no_such_file.yaml"], "cannot read no_such_file.yaml"),
        (["optim.lr"], "expected key=value"),
        (["~optim.lr=3"], "expected key=value"),
        (["trainer.nnodes=2"], "torchrun's --nnodes"),
        (["data.truncation=middle"], "data.truncation=middle is not one of error, left, right, drop"),
        (["optim.lr=-1"], "optim.lr=-1.0 must lie between"),
        (["data.train_batch_size=0"], "data.train_batch_size=0 must be at least 1"),
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


@pytest.mark.parametrize("name", ["with blank.jsonl", "a=b.jsonl", "part (1).jsonl", "ünï.jsonl", "a,b.jsonl"])
def test_paths_are_taken_as_a_shell_hands_them_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    config = load_config(["model.partial_pretrain=some/model", f"data.train_files={tmp_path / name}"])
    assert config.data.train_files == str(tmp_path / name)


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config([
        "model.partial_pretrain=~/model", "data.train_files=[~/a.parquet,{path: ~/b.parquet, weight: 2}]",
    ])  # fmt: skip
    assert config.model.partial_pretrain == "/home/someone/model"
    assert config.data.train_files == ["/home/someone/a.parquet", {"path": "/home/someone/b.parquet", "weight": 2}]


def test_a_yaml_file_holds_only_the_keys_one_sets(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data:\n  train_files: a.parquet\noptim:\n  lr: 0.5\nmodel.path: some/model\n")
    config = load_config([str(tmp_path / "run.yaml"), "optim.eps=1e-7"])
    assert (config.optim.lr, config.optim.eps, config.model.partial_pretrain) == (0.5, 1e-7, "some/model")
    assert load_config(["optim.lr=0.25", str(tmp_path / "run.yaml")]).optim.lr == 0.25


def test_the_written_settings_repeat_a_run(tmp_path: Path) -> None:
    config = load_config([*NEEDED, "optim.betas=[0.8,0.9]", "data.chat_template_kwargs.enable_thinking=false"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("optim:\n  lrr: 1\n", r"run.yaml: unknown key optim.lrr; did you mean optim.lr\?"),
        ("optim: [\n", "cannot read"),
        ("\x00", "cannot read"),
        ("data:\n  train_batch_size: many\n", "data.train_batch_size"),
    ],
)
def test_mistakes_in_a_yaml_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config([*NEEDED, str(tmp_path / "run.yaml")])


def test_what_comes_from_the_environment_is_used_but_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    config = load_config([*NEEDED, "trainer.project_name=${oc.env:SECRET}"])
    assert config.trainer.project_name == "hunter2" and config.trainer.default_local_dir == "checkpoints/hunter2/sft"
    assert "hunter2" not in to_yaml(config) and "hunter2" not in str(config.as_dict())
    assert "${oc.env:SECRET}" in to_yaml(config)
