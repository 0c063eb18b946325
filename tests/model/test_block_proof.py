"""The proof at the start: blocks of many families pass it, and what changes their gradients is refused by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from fsdpsft import load_config
from fsdpsft.distributed import activation_checkpoint
from fsdpsft.distributed.mesh import init_mesh
from fsdpsft.errors import ModelError
from fsdpsft.model import patches
from fsdpsft.model.block_proof import BlockProof, Change, worst
from fsdpsft.model.memory import Work
from fsdpsft.parallelize import ParallelModel, adapted_model, build_model
from fsdpsft.testing import run_distributed, save_tiny_model

MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {}, "gemma2": {}, "gemma3_text": {"num_hidden_layers": 6}, "phi3": {}, "gpt2": {"head_dim": None},
    "olmo": {"clip_qkv": 8.0}, "gpt_oss": MIXTURE, "qwen2_moe": {**MIXTURE, "attention_dropout": 0.1}, "cohere": {},
    "granitemoe": MIXTURE, "vaultgemma": {}, "jetmoe": MIXTURE,
}  # fmt: skip
SELECTIVE, FULL = (f"model.enable_gradient_checkpointing={mode}" for mode in ("selective", "full"))
LONG = Work(max_length=64, token_budget=256)


def build(folder: Path, *overrides: str, sp_size: int = 1) -> ParallelModel:
    config = load_config([f"model.partial_pretrain={folder}", "data.train_files=null", *overrides])
    return build_model(folder, config.model, init_mesh(torch.device("cpu"), sp_size=sp_size), LONG, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(tmp_path: Path, family: str) -> None:
    folder = save_tiny_model(tmp_path, model_type=family, **FAMILIES[family])
    build(folder, SELECTIVE, "model.activation_offload=true")
    build(folder, FULL, "model.lora_rank=4")


def break_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As selective checkpointing once was: what it keeps can be written to, and nothing tells."""
    monkeypatch.setattr(activation_checkpoint._Keep, "protect", lambda self, given: None)
    monkeypatch.setattr(activation_checkpoint, "_detached", Tensor.detach)


@pytest.mark.parametrize(("family", "gradient"), [("olmo", r"self_attn\.[qkv]_proj\.weight"), ("gpt_oss", r"\S+")])
def test_a_kept_result_that_is_written_to_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, gradient: str
) -> None:
    folder = save_tiny_model(tmp_path, model_type=family, **FAMILIES[family])
    break_the_copy(monkeypatch)
    message = (
        rf"checkpointing=selective changes gradients of .*block 0 .*that of {gradient} is off by .*Set model\.enable"
    )
    with pytest.raises(ModelError, match=message):
        build(folder, SELECTIVE)
    build(folder, FULL)


class InPlaceRotation(torch.autograd.Function):
    """A stand-in for a Triton kernel: rotates queries and keys in place, which no version counter shows."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        for x in (q, k):
            x.detach().numpy()[...] = PLAIN_ROTATION(x, x, cos, sin)[0].numpy()
        return q.view(q.shape), k.view(k.shape)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *PLAIN_ROTATION(dq, dk, cos, -sin), None, None


PLAIN_ROTATION = modeling_llama.apply_rotary_pos_emb


def test_an_unseen_kernel_that_writes_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path, model_type="llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", InPlaceRotation.apply)
    build(folder, SELECTIVE)
    break_the_copy(monkeypatch)
    with pytest.raises(ModelError, match="checkpointing=selective changes gradients"):
        build(folder, SELECTIVE)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "liger_kernel"))), reason="triton and liger-kernel are needed"
)
def test_ligers_own_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which cannot run the scalars of its other kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 must be set before triton is imported")
    monkeypatch.setattr(patches, "LOSSES", (*patches.LOSSES, "rms_norm", "swiglu"))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", PLAIN_ROTATION)  # put back at the end
    folder = save_tiny_model(tmp_path, model_type="llama", num_hidden_layers=1)
    build(folder, SELECTIVE, "model.use_liger=true")
    break_the_copy(monkeypatch)
    with pytest.raises(ModelError, match="checkpointing=selective changes gradients"):
        build(folder, SELECTIVE, "model.use_liger=true")


def test_a_patch_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any) -> None:
        plain = modeling_llama.LlamaMLP.forward
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 1.01 * plain(self, x))

    liger = next(patch for patch in patches.PATCHES if "Liger" in patch.name)
    wrong_patch = patches.Patch("Liger", lambda *_: True, wrong, liger.prove)
    monkeypatch.setattr(patches, "PATCHES", (wrong_patch,))
    with pytest.raises(
        ModelError, match=r"model.use_liger=true changes gradients of LlamaForCausalLM.*use_liger=false"
    ):
        build(save_tiny_model(tmp_path, model_type="llama"))


def proof_of(folder: Path) -> BlockProof:
    settings = load_config([f"model.partial_pretrain={folder}", "data.train_files=null"]).model
    model = adapted_model(folder, settings, torch.float32)
    return BlockProof(model, torch.device("cpu"), packed=True, place=(0, 1))


def test_one_block_of_each_kind_and_nothing_is_left(tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
    proof = proof_of(save_tiny_model(tmp_path, model_type="gemma3_text", **kinds))
    assert [kind.name[:7] for kind in proof.kinds] == ["block 0", "block 2"]
    assert all(p.is_meta for p in proof.model.parameters())
    assert not proof.draws
    proof.finish(lambda count: count)


def test_blocks_that_draw_are_told_and_proven(tmp_path: Path) -> None:
    proof = proof_of(save_tiny_model(tmp_path, attention_dropout=0.3))
    assert proof.draws
    with proof.unchanged(Change("nothing", ""), same_kernels=True):
        pass
    proof.finish(lambda count: count)


def test_an_error_of_the_changed_block_is_told(tmp_path: Path) -> None:
    proof = proof_of(save_tiny_model(tmp_path))
    with proof.unchanged(Change("model.x=true", "Set model.x=false."), same_kernels=True):
        proof.kinds[0].block.forward = lambda *args, **kwargs: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(ModelError, match=r"model.x=true ends in an error: .*Set model.x=false."):
        proof.finish(lambda count: count)


def test_what_differs_most_is_named() -> None:
    expected = {"a": torch.ones(4), "tiny": torch.full((4,), 1e-9)}
    assert worst({"a": torch.ones(4), "tiny": torch.zeros(4)}, expected)[1] < 1e-5  # nothing but rounding
    assert worst({"a": torch.zeros(4), "tiny": torch.zeros(4)}, expected) == ("a", 1.0)
    assert worst({"a": torch.ones(4), "tiny": torch.full((4,), torch.nan)}, expected)[0] == "tiny"


def prove_on_two(folder: Path, broken_rank: int | None) -> str:
    """The message of the error, under Ulysses with selective checkpointing, broken on one process alone."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if broken_rank == torch.distributed.get_rank():
            break_the_copy(monkeypatch)
        try:
            build(folder, SELECTIVE, sp_size=2)
        except ModelError as error:
            return str(error)
    return ""


def prove_whole_and_broken(folder: Path) -> list[str]:
    return [prove_on_two(folder, None), prove_on_two(folder, 1)]


def test_all_processes_refuse_together(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, model_type="olmo", **FAMILIES["olmo"])
    (whole, told), (whole_too, found) = run_distributed(prove_whole_and_broken, 2, folder)
    assert (whole, whole_too) == ("", "")
    assert told == "another process found wrong gradients; its message says which"
    assert "checkpointing=selective changes gradients" in found
