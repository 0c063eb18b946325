"""The folders that a run leaves behind are what their consumers ask for: transformers, PEFT, TRL, lm-eval."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdpsft import load_config
from fsdpsft import train as run_training
from fsdpsft.prepare import prepare_data
from fsdpsft.testing import CHATML, save_tiny_model, tiny_tokenizer
from fsdpsft.tools.export import main as export

PREFIXED = "{# as trained #}" + CHATML
NUMBERS = ("one", "two", "three", "four")


def train(folder: Path, name: str, *more: str) -> Path:
    """Two epochs on chats whose reply repeats the last word."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {a} {b}"}, {"role": "assistant", "content": b}]}
        for a in NUMBERS
        for b in NUMBERS
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "template.jinja").write_text(PREFIXED)
    settings = [
        f"data.train_files={folder / 'rows.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        f"data.chat_template={folder / 'template.jinja'}",
        "data.train_batch_size=8",
        "data.max_length=64",
        f"model.partial_pretrain={folder / 'source'}",
        "optim.lr=1e-2",
        "trainer.total_epochs=2",
        "trainer.save_freq=epoch",
        f"trainer.default_local_dir={folder / name}",
        *more,
    ]
    config = load_config(settings)
    before = threading.enumerate()
    run_training(config)
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert set(left) <= {"tqdm_monitor"}  # which tqdm ends itself at the interpreter's exit
    (folder / f"{name}.fingerprint").write_text(prepare_data(config).train.fingerprint)
    return folder / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source model in bfloat16, as most are."""
    folder = tmp_path_factory.mktemp("handoff")
    save_tiny_model(folder / "source", tiny_tokenizer(corpus=[*NUMBERS, "say", "user", "assistant", ""]))
    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    return folder


@pytest.fixture(scope="module")
def full(home: Path) -> Path:
    return train(home, "full")


@pytest.fixture(scope="module")
def lora(home: Path) -> Path:
    return train(home, "lora", "model.lora_rank=4", "model.target_modules=all-linear")


def prompt(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == PREFIXED
    messages = [{"role": "user", "content": "say one two"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert isinstance(ids, torch.Tensor)
    return ids


@pytest.mark.parametrize("run", ["full", "lora"])
@pytest.mark.parametrize("place", [".", "global_step_2", "global_step_4"])
def test_generate(run: str, place: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(run) / place
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    ids = prompt(folder)
    reply = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert reply.shape[1] > ids.shape[1]
    assert (
        AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
        == model.generation_config.eos_token_id
    )


def test_the_root_is_the_last_step(full: Path) -> None:
    assert (full / "model.safetensors").samefile(full / "global_step_4/model.safetensors")


def test_peft_takes_the_adapter_and_answers_as_the_merged_model(home: Path, lora: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(home / "source", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, lora / "global_step_4/lora_adapter")
    merged = AutoModelForCausalLM.from_pretrained(lora, dtype=torch.float32)
    ids = prompt(lora)
    with torch.no_grad():
        expected, found = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            before = adapted(ids).logits
    assert (found - expected).norm() < 0.02 * expected.norm()  # the merged weights are rounded to bfloat16
    assert (before - expected).norm() > 0.1 * expected.norm()  # and something was learnt


@pytest.mark.parametrize("run", ["full", "lora"])
def test_the_manifest_says_what_was_trained_on(home: Path, run: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(run)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 4
    fingerprints, verdict = manifest["fingerprints"], manifest["verdict"]
    assert fingerprints["data"] == (home / f"{run}.fingerprint").read_text()
    assert fingerprints["source"] == str(home / "source")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert fingerprints["tokens"] == last["train/tokens"]
    assert fingerprints["trained_tokens"] == last["train/trained_tokens"]
    assert verdict["chat_template"] == "as trained" and verdict["eos_token_id"] == [2]
    assert verdict["probe"]["compared"] is True and verdict["probe"]["median_nats"] <= verdict["probe"]["allowed"]


@pytest.mark.parametrize("run", ["full", "lora"])
def test_the_state_of_a_run_is_a_model_too(home: Path, run: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(run)
    target = home / f"{run}-exported"
    assert export([f"from={folder / 'global_step_4/trainer_state'}", f"to={target}"]) == 0
    ours, theirs = load_file(target / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert AutoTokenizer.from_pretrained(target).chat_template == PREFIXED


def test_trl_takes_the_folder_as_its_model(full: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    chats = [{"prompt": [{"role": "user", "content": f"say {a} {b}"}]} for a in NUMBERS for b in NUMBERS]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]  # differs within each group

    trainer = trl.GRPOTrainer(
        model=str(full),
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_list(chats),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, use_cpu=True,
            max_completion_length=8, report_to=[], save_strategy="no", learning_rate=1e-3, bf16=False,
        ),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


LM_EVAL_TASK = """
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["one", "two", "three", "four"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_scores_the_folder(full: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = [{"question": f"say {a} {b}", "answer": i} for a in NUMBERS for i, b in enumerate(NUMBERS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "say.yaml").write_text(LM_EVAL_TASK.format(rows=tmp_path / "rows.jsonl"))
    scored = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(full), "dtype": "float32"}, tasks=["say"], device="cpu",
        apply_chat_template=True, task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert scored["n-samples"]["say"]["effective"] == 16
    assert 0 <= scored["results"]["say"]["acc,none"] <= 1
