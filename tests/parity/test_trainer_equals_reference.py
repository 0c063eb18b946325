"""The whole trainer, over many layouts, against the slow float64 twin in ``reference.py``.

Every case runs ``fsdpsft.train`` itself on pre-tokenised ragged rows with message weights, and compares each step's
loss and gradient norm, and the exported weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fsdpsft import load_config
from fsdpsft import train as run_training
from fsdpsft.data.batches.packing import Order
from fsdpsft.lr_schedule import LRSchedule
from fsdpsft.testing import run_distributed, save_tiny_model
from tests.parity.reference import Row, train_reference

ROWS, BATCH, STEPS, LR, SEED = 44, 8, 12, 2e-3, 3  # the last batch of an epoch has 4 rows
# A gradient that is zero but for rounding (a key's bias cannot change a softmax) is divided by eps, not by itself.
EPS = 1e-5

BASE = [
    f"data.train_batch_size={BATCH}",
    "data.max_length=64",
    "data.micro_batch_size_per_gpu=2",
    f"trainer.seed={SEED}",
    f"trainer.total_training_steps={STEPS}",
    f"optim.lr={LR}",
    f"optim.eps={EPS}",
    "optim.lr_scheduler=linear",
    "optim.warmup_steps=2",
    "optim.clip_grad=0.5",
    "optim.weight_decay=0.1",
    "trainer.save_freq=-1",
    "trainer.resume_mode=disable",
    "trainer.async_save=false",
    "model.enable_gradient_checkpointing=none",
]

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2-tied-gqa": {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2-14-2": {
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 112,
        "tie_word_embeddings": False,
    },
    "qwen3-28-4": {"model_type": "qwen3", "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 8},
    "llama-mha-untied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 16, "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 4, "sliding_window": None, "tie_word_embeddings": False},
    "olmo-clipped": {"model_type": "olmo", "clip_qkv": 0.05, "tie_word_embeddings": False},  # clamps in place
    "gpt-oss": {  # adds biases to its experts' products in place
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    "mixtral-moe": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}

LORA_FAMILIES = ("qwen2-tied-gqa", "qwen2-14-2")


def ragged_rows() -> list[Row]:
    generator = np.random.default_rng(0)
    rows: list[Row] = []
    for _ in range(ROWS):
        length = int(generator.integers(4, 60))
        ids = generator.integers(3, 250, length).tolist()
        mask = (generator.random(length) < 0.4).astype(float)
        mask[-1] = 1.0
        rows.append((ids, mask.tolist()))
    return rows


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    lines = [json.dumps({"input_ids": ids, "loss_mask": [int(w) for w in weights]}) for ids, weights in ragged_rows()]
    (path / "rows.jsonl").write_text("\n".join(lines))
    for name, settings in FAMILIES.items():
        save_tiny_model(path / name, **settings)
    for family in LORA_FAMILIES:
        adapter(path, family)
    return path


def adapter(path: Path, family: str) -> None:
    """An adapter whose B is small but not zero, so that A has a gradient from the first step."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(path / family)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    model.save_pretrained(path / f"adapter-{family}")


def reference_batches() -> list[list[Row]]:
    rows, order = ragged_rows(), Order(counts=(ROWS,), batch_size=BATCH, seed=SEED)
    return [[rows[i] for i in order.batch(step).tolist()] for step in range(STEPS)]


@cache
def reference(model: Path) -> dict[str, Any]:
    schedule = LRSchedule("linear", STEPS, warmup_steps=2)
    return train_reference(
        model, reference_batches(), lambda step: LR * schedule(step), eps=EPS, weight_decay=0.1, clip=0.5
    )


def run_case(folder: Path, family: str, name: str, overrides: Sequence[str]) -> None:
    run_training(
        load_config(
            [
                *BASE,
                f"data.train_files={folder / 'rows.jsonl'}",
                f"model.partial_pretrain={folder / family}",
                f"data.cache_dir={folder / 'cache'}",
                f"trainer.default_local_dir={folder / 'out' / name}",
                *(override.format(folder=folder) for override in overrides),
            ]
        )
    )


def run_cases(folder: Path, cases: Sequence[tuple[str, str, Sequence[str]]]) -> None:
    """Several runs in the same processes, as starting processes costs more than a tiny run."""
    for family, name, overrides in cases:
        run_case(folder, family, name, overrides)


def curves(folder: Path, name: str) -> tuple[list[float], list[float]]:
    lines = [json.loads(line) for line in (folder / "out" / name / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines], [line["train/grad_norm"] for line in lines]


def assert_equals_reference(folder: Path, family: str, name: str) -> None:
    expected = reference(folder / family)
    losses, norms = curves(folder, name)
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, expected["norms"], rtol=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(folder / "out" / name).named_parameters()
    weights = dict(expected["weights"])
    for key, value in exported:
        change = (value.double() - weights[key]).norm() / weights.pop(key).norm().clamp_min(1e-3)
        assert change < 1e-5, f"{key} is off by {change:.1e}"
    assert not weights, "not exported"


def assert_equals_lora_reference(folder: Path, family: str, name: str) -> None:
    schedule = LRSchedule("linear", STEPS, warmup_steps=2)
    expected = train_reference(
        folder / family,
        reference_batches(),
        lambda step: LR * schedule(step),
        eps=EPS,
        weight_decay=0.1,
        clip=0.5,
        wrap=lambda m: PeftModel.from_pretrained(
            m, folder / f"adapter-{family}", is_trainable=True, autocast_adapter_dtype=False
        ).double(),
    )
    losses, norms = curves(folder, name)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, expected["norms"], rtol=1e-5)
    saved = load_file(folder / "out" / name / f"global_step_{STEPS}" / "lora_adapter" / "adapter_model.safetensors")
    trained = {n.replace(".default.weight", ".weight"): p for n, p in expected["weights"].items() if "lora_" in n}
    assert saved.keys() == trained.keys()
    for key, value in saved.items():
        change = (value.double() - trained[key]).norm() / trained[key].norm()
        assert change < 1e-5, f"{key} is off by {change:.1e}"


ONE_PROCESS = {
    "plain": [],
    "large-budget": ["data.micro_batch_size_per_gpu=16"],
    "smallest-budget": ["data.max_token_len_per_gpu=64"],
    "padded": ["use_remove_padding=false"],
    "padded-large": ["use_remove_padding=false", "data.micro_batch_size_per_gpu=5"],
    "unbalanced": ["data.balance_dp_token=false"],
    "small-head-chunks": ["model.head_chunk_tokens=3"],
    "tiles-and-offload": [
        "model.enable_gradient_checkpointing=full",
        "model.mlp_tiles=3",
        "model.activation_offload=true",
    ],
}


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_one_process(folder: Path, name: str) -> None:
    run_case(folder, "qwen2-tied-gqa", name, ONE_PROCESS[name])
    assert_equals_reference(folder, "qwen2-tied-gqa", name)


def test_lora_on_one_process(folder: Path) -> None:
    run_case(folder, "qwen2-tied-gqa", "lora", ["model.lora_adapter_path={folder}/adapter-qwen2-tied-gqa"])
    assert_equals_lora_reference(folder, "qwen2-tied-gqa", "lora")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen2-tied-gqa"])
def test_families(folder: Path, family: str) -> None:
    run_case(folder, family, family, ["model.enable_gradient_checkpointing=selective"])
    assert_equals_reference(folder, family, family)


TWO = {
    "fsdp": ("qwen2-tied-gqa", []),
    "fsdp-zero2-full-ac": (
        "llama-mha-untied",
        ["model.fsdp_config.reshard_after_forward=false", "model.enable_gradient_checkpointing=full"],
    ),
    "fsdp-sync-last": ("qwen2-tied-gqa", ["model.fsdp_config.gradient_sync=last"]),
    "fsdp-padded": ("qwen2-tied-gqa", ["use_remove_padding=false"]),
    "fsdp-gemma2": ("gemma2", ["model.enable_gradient_checkpointing=full"]),
    "fsdp-mixtral": ("mixtral-moe", []),
    "fsdp-phi3": ("phi3", ["model.enable_gradient_checkpointing=selective"]),
    "sp2": ("qwen2-tied-gqa", ["ulysses_sequence_parallel_size=2"]),
    "sp2-window": ("mistral-window", ["ulysses_sequence_parallel_size=2", "model.enable_gradient_checkpointing=full"]),
    "sp2-gemma3": ("gemma3", ["ulysses_sequence_parallel_size=2", "model.enable_gradient_checkpointing=selective"]),
    "hsdp2": ("qwen3-28-4", ["model.fsdp_config.replicate_size=2"]),
    "lora-fsdp": (
        "qwen2-tied-gqa",
        ["model.lora_adapter_path={folder}/adapter-qwen2-tied-gqa", "model.enable_gradient_checkpointing=selective"],
    ),
    "lora-sp2": (
        "qwen2-tied-gqa",
        ["model.lora_adapter_path={folder}/adapter-qwen2-tied-gqa", "ulysses_sequence_parallel_size=2"],
    ),
}

FOUR = {
    "fsdp4": ("qwen2-tied-gqa", ["data.micro_batch_size_per_gpu=4"]),
    "hsdp2x2": (
        "qwen2-tied-gqa",
        ["model.fsdp_config.replicate_size=2", "model.enable_gradient_checkpointing=selective"],
    ),
    "sp4-uneven-14-2": ("qwen2-14-2", ["ulysses_sequence_parallel_size=4"]),
    "sp4-28-4": ("qwen3-28-4", ["ulysses_sequence_parallel_size=4", "model.enable_gradient_checkpointing=full"]),
    "fsdp2-sp2": (
        "llama-mha-untied",
        ["ulysses_sequence_parallel_size=2", "model.enable_gradient_checkpointing=selective"],
    ),
    "hsdp2-sp2": ("gemma2", ["ulysses_sequence_parallel_size=2", "model.fsdp_config.replicate_size=2"]),
    "lora-hsdp2x2": (
        "qwen2-tied-gqa",
        ["model.lora_adapter_path={folder}/adapter-qwen2-tied-gqa", "model.fsdp_config.replicate_size=2"],
    ),
    "lora-sp4-uneven-14-2": (
        "qwen2-14-2",
        [
            "model.lora_adapter_path={folder}/adapter-qwen2-14-2",
            "ulysses_sequence_parallel_size=4",
            "model.enable_gradient_checkpointing=full",
        ],
    ),
    "fsdp2-sp2-moe": ("mixtral-moe", ["ulysses_sequence_parallel_size=2"]),
}


@pytest.fixture(scope="session")
def two_processes(folder: Path) -> Path:
    run_distributed(run_cases, 2, folder, [(family, name, overrides) for name, (family, overrides) in TWO.items()])
    return folder


@pytest.fixture(scope="session")
def four_processes(folder: Path) -> Path:
    run_distributed(run_cases, 4, folder, [(family, name, overrides) for name, (family, overrides) in FOUR.items()])
    return folder


@pytest.mark.parametrize("name", TWO)
def test_two_processes(two_processes: Path, name: str) -> None:
    if name.startswith("lora"):
        assert_equals_lora_reference(two_processes, TWO[name][0], name)
    else:
        assert_equals_reference(two_processes, TWO[name][0], name)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(four_processes: Path, name: str) -> None:
    if name.startswith("lora"):
        assert_equals_lora_reference(four_processes, FOUR[name][0], name)
    else:
        assert_equals_reference(four_processes, FOUR[name][0], name)
