"""What the benchmarks share: the data, the model, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.rows.sources import read_rows, resolve_sources
from fsdpsft.testing import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPE_25M: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SHAPE_25M,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

Row = tuple[list[int], list[int]]  # token ids and the mask of those that are trained


def gsm8k_file(name: str = "train.jsonl") -> Path | None:
    """GSM8K where it lies (FSDPSFT_TEST_DATA, or ``shared/data`` beside the repository); None where it does not."""
    folder = (
        Path(os.environ["FSDPSFT_TEST_DATA"]) if "FSDPSFT_TEST_DATA" in os.environ else ROOT.parent / "shared" / "data"
    )
    file = folder / "gsm8k" / name
    return file if file.is_file() else None


def texts(file: Path) -> list[str]:
    """All questions and answers."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [text for row in rows for text in (row["question"], row["answer"])]


def tokenized_rows(count: int, vocab_size: int) -> tuple[list[Row], PreTrainedTokenizerFast, str]:
    """``count`` conversations as tokens and masks, the tokenizer, and their origin: GSM8K, or drawn like it."""
    file = gsm8k_file()
    if file is None:
        tokenizer, dice, rows = tiny_tokenizer(), np.random.default_rng(0), []
        for _ in range(count):
            prompt, reply = (int(n) for n in np.clip(dice.lognormal((4.1, 4.6), 0.4), 16, 400))
            rows.append((dice.integers(3, len(tokenizer), prompt + reply).tolist(), [0] * prompt + [1] * reply))
        return rows, tokenizer, "made up, lengths like GSM8K's"
    tokenizer = tiny_tokenizer(corpus=texts(file), vocab_size=min(vocab_size, 32768))
    (source,) = resolve_sources(str(file))
    encoded = RowEncoder([source], tokenizer).encode(source, list(islice(read_rows(source), count)))
    rows = [(e.input_ids.tolist(), (e.loss_weights > 0).astype(int).tolist()) for (e,) in encoded]
    return rows, tokenizer, "GSM8K, ChatML"


def save_model(folder: Path, vocab_size: int, shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> int:
    """Write a random Qwen2 and its tokenizer; returns its number of parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocab_size, bos_token_id=None, eos_token_id=2, pad_token_id=0, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def environment() -> dict[str, Any]:
    """Versions, commit, machine and how busy it is."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    git = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    names = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "flash-attn", "liger-kernel", "triton")
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"), "commit": git.stdout.strip(), "python": platform.python_version(),
        "versions": {name: found for name in names if (found := version(name))},
        "cpu": cpu[0] if cpu else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "bf16_units": sorted({"amx_bf16", "avx512_bf16"} & set(flags)), "load": [round(x, 1) for x in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def hardware_name() -> str:
    """A short name of the hardware, for file names."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")
    return f"cpu-{os.cpu_count()}-cores"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
