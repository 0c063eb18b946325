"""The first minute of the GPU check: whole runs of tiny models that were saved to disk, each setting against none.

Gradients of one step under each kind of recomputation, offloading, tiles, compilation and Liger's kernels against
those of a run with none of them, in the dtype and with the attention that a run on this device takes. Then five steps
with saves in the background, and the last two of them again from the checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_work import Check
from fsdpsft import load_config
from fsdpsft.run import open_run
from fsdpsft.testing import save_tiny_model
from fsdpsft.train import train

SAME, OTHER_KERNELS = 2e-2, 6e-2  # largest relative difference of a parameter's gradient in bfloat16
SECONDS = 30.0  # of one setting
_KEPT = "model.enable_gradient_checkpointing="
SETTINGS = {
    "selective": [f"{_KEPT}selective"],
    "full": [f"{_KEPT}full"],
    "selective, activations offloaded": [f"{_KEPT}selective", "model.activation_offload=true"],
    "full, MLP in tiles": [f"{_KEPT}full", "model.mlp_tiles=4"],
    "offload_params": ["model.fsdp_config.offload_params=true"],
    "offload_params, selective": ["model.fsdp_config.offload_params=true", f"{_KEPT}selective"],
}
COMPILED = {"compiled": ["model.compile=true"], "compiled, selective": ["model.compile=true", f"{_KEPT}selective"]}
LIGER = {
    "Liger": ["model.use_liger=true"],
    "Liger, selective": ["model.use_liger=true", f"{_KEPT}selective"],
    "Liger, full": ["model.use_liger=true", f"{_KEPT}full"],
}
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
OLMO = {"model_type": "olmo", "clip_qkv": 0.02, "hidden_size": 256, "num_key_value_heads": 4}  # clips in place


def correct(check: Check) -> dict[str, Any]:
    """All of it; a setting that differs or fails is a row."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fsdpsft-gpu-check-") as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(map(_row, range(20))))
        save_tiny_model(folder / "qwen2", **SHAPE)
        save_tiny_model(folder / "olmo", **OLMO)
        settings: dict[str, list[str]] = dict(SETTINGS)
        if check.device.type == "cuda":
            settings |= LIGER if importlib.util.find_spec("liger_kernel") else {}
            settings |= COMPILED
        expected = _gradients(check, folder, "qwen2", [f"{_KEPT}none"])
        found["saved and resumed"] = check.attempt(partial(_resumed, check, folder), SECONDS)
        for label, overrides in settings.items():
            found[label] = check.attempt(partial(_compare, check, folder, "qwen2", overrides, expected), SECONDS)
        expected = _gradients(check, folder, "olmo", [f"{_KEPT}none"])
        for label in ("selective", "full"):
            run = partial(_compare, check, folder, "olmo", SETTINGS[label], expected)
            found[f"OLMo that clips in place, {label}"] = check.attempt(run, SECONDS)
    return found


def _row(number: int) -> str:
    dice = np.random.default_rng(number)
    length = int(dice.integers(8, 200))
    mask = (dice.random(length) < 0.4).astype(int)
    mask[-1] = 1
    return json.dumps({"input_ids": dice.integers(3, 250, length).tolist(), "loss_mask": mask.tolist()}) + "\n"


def _config(check: Check, folder: Path, model: str, overrides: list[str], out: str = "out") -> Any:
    return load_config([
        f"data.train_files={folder / 'rows.jsonl'}", f"model.partial_pretrain={folder / model}",
        f"data.cache_dir={folder / 'cache'}", f"trainer.default_local_dir={folder / out}", "data.train_batch_size=4",
        "data.max_length=256", "data.micro_batch_size_per_gpu=2", "data.num_workers=1", "optim.lr=1e-3",
        "trainer.total_training_steps=5", f"trainer.device={check.device.type}", "trainer.logger=[]", *overrides,
    ])  # fmt: skip


def _gradients(check: Check, folder: Path, model: str, overrides: list[str]) -> list[Tensor]:
    """Gradients of the first step, in the order of the parameters."""
    config = _config(check, folder, model, ["trainer.resume_mode=disable", *overrides])
    with open_run(config) as run:
        step = run.loader.step(0)
        with run.model.computing():
            for place, micro_batch in enumerate(step.micro_batches):
                run.model.prepare_micro_batch(last=place == len(step.micro_batches) - 1, sync=True)
                loss_sum, _ = run.model(micro_batch)
                (loss_sum / step.loss_denominator).backward()
        gradients = [p.grad for p in run.model.module.parameters() if p.grad is not None]
        return [_whole(gradient).detach().float().cpu().clone() for gradient in gradients]


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _compare(
    check: Check, folder: Path, model: str, overrides: list[str], expected: list[Tensor]
) -> dict[str, float | bool]:
    began = time.monotonic()
    found = _gradients(check, folder, model, overrides)
    limit = OTHER_KERNELS if any("liger" in o or "compile" in o for o in overrides) else SAME
    error = gradient_error(found, expected)
    return {"gradient_error": error, "passed": error <= limit, "took_s": round(time.monotonic() - began, 1)}


def gradient_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of a parameter's gradient, relative to its norm; infinite where one is not finite.

    Norms below a hundredth of the largest count as that: the gradient of a key's bias is zero but for rounding.
    """
    least = 1e-2 * max(float(gradient.norm()) for gradient in expected)
    errors = [float((a - b).norm()) / max(float(b.norm()), least) for a, b in zip(found, expected, strict=True)]
    return max(errors) if np.isfinite(errors).all() else float("inf")


def _resumed(check: Check, folder: Path) -> dict[str, Any]:
    """Five steps, saved after the third in the background; then the last two again from there."""
    settings = ["trainer.save_freq=3", "trainer.async_save=true"]
    train(_config(check, folder, "qwen2", settings, "straight"))
    again = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder / 'straight' / 'global_step_3'}"]
    train(_config(check, folder, "qwen2", [*settings, *again], "resumed"))
    losses = [_losses(folder / name / "metrics.jsonl") for name in ("straight", "resumed")]
    pairs = [(losses[0][step], losses[1][step]) for step in (4, 5)]
    error = max(abs(a - b) / a for a, b in pairs)
    return {"losses": losses[0], "loss_error": error, "passed": error <= (1e-3 if torch.cuda.is_available() else 1e-6)}


def _losses(file: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
