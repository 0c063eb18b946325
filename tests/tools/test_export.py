"""Any checkpoint becomes a Hugging Face model, its training state alone included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fsdpsft.checkpoint.export import Handoff
from fsdpsft.checkpoint.manager import Adapter, CheckpointManager
from fsdpsft.checkpoint.state import TrainState
from fsdpsft.model import lora
from fsdpsft.model.load import build_meta_model, load_model_config, load_weights
from fsdpsft.testing import PeakMemory, save_tiny_model
from fsdpsft.tools.export import main

TEMPLATE = "{% for message in messages %}{{ message['role'] + message['content'] + '<|im_end|>' }}{% endfor %}"


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def make(folder: Path, **settings: object) -> tuple[Path, dict[str, Tensor]]:
    """Train a step from a bfloat16 source, save, and return checkpoint and the weights expected of it."""
    source = save_tiny_model(folder / "source", **settings)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, optimizer)
    manager = CheckpointManager(folder / "run", Handoff(source, chat_template=TEMPLATE, eos_token_ids=(0, 2)))
    manager.save(model, optimizer, TrainState(1))
    return folder / "run/global_step_1", {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=["qwen2", "mixtral"])
def checkpoint(request, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    more = {"num_local_experts": 3, "tie_word_embeddings": False} if request.param == "mixtral" else {}
    return make(tmp_path_factory.mktemp(request.param), model_type=request.param, **more)


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file of the model in a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "manifest.json"}


def test_state_alone_gives_the_very_files_of_the_checkpoint(checkpoint, tmp_path) -> None:
    path, _ = checkpoint
    shutil.copytree(path / "trainer_state", tmp_path / "moved" / "trainer_state")
    assert main([f"from={tmp_path}/moved/trainer_state", f"to={tmp_path}/model"]) == 0
    assert files(tmp_path / "model") == files(path)


def test_state_alone_in_float32_keeps_the_masters(checkpoint, tmp_path) -> None:
    path, weights = checkpoint
    assert main([f"from={path}/trainer_state", f"to={tmp_path}/model", "dtype=float32", "max_shard_size=100KB"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.dtype == torch.float32 and len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_model_changes_its_dtype(checkpoint, tmp_path) -> None:
    path, weights = checkpoint
    assert main([f"from={path}", f"to={tmp_path}/model", "dtype=float16"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16().half()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TEMPLATE


def test_template_and_stop_tokens_go_along(checkpoint) -> None:
    path, _ = checkpoint
    for folder in (path, path.parent, path / "trainer_state/model_files"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_a_damaged_or_incomplete_state_is_refused(checkpoint, tmp_path, capsys) -> None:
    path, _ = checkpoint
    shutil.copytree(path, tmp_path / "global_step_1")
    victim = tmp_path / "global_step_1/trainer_state/rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert main([f"from={tmp_path}/global_step_1/trainer_state", f"to={tmp_path}/model"]) == 1
    assert "rank-00000.safetensors does not match its checksum" in capsys.readouterr().err
    victim.unlink()
    (tmp_path / "global_step_1/manifest.json").unlink()
    assert main([f"from={tmp_path}/global_step_1/trainer_state", f"to={tmp_path}/model"]) == 1
    assert "are missing" in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["from=x"], "to=FOLDER is missing"),
        (["from=x", "to=y", "dtpye=float32"], "'dtpye=float32' is not understood"),
        (["from=x", "to=y", "dtype=int8"], "dtype=int8 must be one of bfloat16, float16, float32"),
        (["from=/nowhere", "to=y"], "holds neither"),
    ],
)
def test_mistakes_are_named(arguments, complaint, capsys) -> None:
    assert main(arguments) == 1
    assert complaint in capsys.readouterr().err


def test_nothing_is_overwritten(checkpoint, tmp_path, capsys) -> None:
    path, _ = checkpoint
    (tmp_path / "notes.txt").write_text("mine")
    assert main([f"from={path}", f"to={tmp_path}"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# --- LoRA -----------------------------------------------------------------------------------------------------------


def with_adapters(source: Path, **settings: object) -> PreTrainedModel:
    model = build_meta_model(load_model_config(source), dtype=torch.float32)
    lora.apply_lora(model, lora.LoraSettings(rank=4, alpha=8.0, **settings))
    load_weights(model, source, device="cpu")
    lora.fill_adapters(model, seed=1)
    return model


def save_lora(model: PreTrainedModel, optimizer: torch.optim.Optimizer, source: Path, root: Path) -> CheckpointManager:
    manager = CheckpointManager(root, Handoff(source))
    adapter = Adapter(lora.merged_state(model), lora.adapter_state(model), lora.adapter_config(model, str(source)))
    manager.save(model, optimizer, TrainState(1), adapter=adapter)
    return manager


@pytest.fixture(scope="module", params=[{}, {"use_dora": True}], ids=["lora", "dora"])
def lora_run(request, tmp_path_factory) -> tuple[Path, Path, PreTrainedModel, torch.optim.Optimizer, CheckpointManager]:
    folder = tmp_path_factory.mktemp("lora")
    source = save_tiny_model(folder / "source")
    model = with_adapters(source, **request.param)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train_step(model, optimizer)
    train_step(model, optimizer)
    return source, folder / "run", model, optimizer, save_lora(model, optimizer, source, folder / "run")


def test_adapter_and_merged_model_stand_side_by_side(lora_run) -> None:
    source, root, model, _, _ = lora_run
    ids = torch.arange(20)[None]
    expected = model(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(root)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), root / "global_step_1/lora_adapter")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peft(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(source)(ids).logits, expected, atol=1e-3)


def test_only_what_was_trained_is_in_the_state_and_comes_back(lora_run) -> None:
    source, root, model, optimizer, manager = lora_run
    state = json.loads((root / "global_step_1/trainer_state/state.json").read_text())
    assert all(".lora_" in name for name in state["tensors"])
    dora = any("magnitude" in name for name in state["tensors"])
    again = with_adapters(source, use_dora=dora)
    fresh = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    manager.load(root / "global_step_1", again, fresh)
    for (name, left), right in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name
        if left.requires_grad:
            assert all(torch.equal(optimizer.state[left][k], fresh.state[right][k]) for k in optimizer.state[left])


def test_adapter_state_alone_gives_adapter_and_merged_model(lora_run, tmp_path) -> None:
    source, root, _, _, _ = lora_run
    state = tmp_path / "trainer_state"
    shutil.copytree(root / "global_step_1/trainer_state", state)
    assert main([f"from={state}", f"to={tmp_path}/adapter", "adapter=only"]) == 0
    written = root / "global_step_1/lora_adapter"
    left, right = (
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
        load_file(written / "adapter_model.safetensors"),
    )
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert (tmp_path / "adapter/adapter_config.json").read_bytes() == (written / "adapter_config.json").read_bytes()
    assert main([f"from={state}", f"to={tmp_path}/merged", f"base={source}"]) == 0
    assert files(tmp_path / "merged") == files(root / "global_step_1")
    assert main([f"from={root}/global_step_1", f"to={tmp_path}/again", "adapter=only"]) == 0
    assert load_file(tmp_path / "again/adapter_model.safetensors").keys() == left.keys()


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens"]}], ids=["adapters", "embedding-too"])
def test_merging_holds_one_block_of_the_base(tmp_path, settings) -> None:
    source = save_tiny_model(tmp_path / "source", num_hidden_layers=12, hidden_size=128, tie_word_embeddings=False)
    model = with_adapters(source, **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train_step(model, optimizer)
    train_step(model, optimizer)
    save_lora(model, optimizer, source, tmp_path / "run")
    step = tmp_path / "run/global_step_1"
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    with PeakMemory() as memory:
        assert main([f"from={step}/trainer_state", f"to={tmp_path}/merged"]) == 0
    assert files(tmp_path / "merged") == files(step)
    whole = sum(p.nbytes for p in model.parameters())
    assert memory.peak < trained + 3 * max(block, model.lm_head.weight.nbytes) < whole / 2 + trained
