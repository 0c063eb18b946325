"""Every causal language model of the installed transformers, in small: exact, refused or not built.

    python -m benchmarks.families [--only llama mixtral] [--out FILE]

For each model type a random model of two to four blocks is made from its configuration class. Its loss and gradients on
four documents in one packed row, with our kernels, mask and loss, are compared with transformers' own forward, one
document at a time. Verdicts: ``exact`` (with the largest relative difference), ``WRONG``, ``refused`` (by which
message), ``not built`` (by transformers, from these small settings). Each family runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.common import RESULTS, environment, write_json
from fsdpsft.batch import Sample, pack
from fsdpsft.config.load import load_config
from fsdpsft.distributed.mesh import init_mesh
from fsdpsft.errors import UserError
from fsdpsft.model.memory import Work
from fsdpsft.parallelize import build_model
from fsdpsft.testing import tiny_model, tiny_tokenizer

EXACT = 2e-5
SECONDS = 60
MEMORY = 4 << 30  # of a family's process; a default configuration may be one of billions of parameters
LENGTHS = (17, 5, 26, 11)
# What the generic small settings lack, by model type.
SMALL: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo": {"clip_qkv": 0.5},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4},
    "phi3": {"pad_token_id": 0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "cohere": {"use_qk_norm": True},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gemma2": {"query_pre_attn_scalar": 16},
}


def build(model_type: str) -> Any:
    """A random model of a family that draws nothing, all of whose weights are away from zero."""
    small = SMALL.get(model_type, {})
    drops = {name: 0.0 for name, value in CONFIG_MAPPING[model_type]().to_dict().items() if _draws(name, value)}
    model = tiny_model(model_type, **{**drops, **small})
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) == 0:
                parameter.normal_(std=0.02)
    return model


def _draws(name: str, value: Any) -> bool:
    return isinstance(value, float) and ("drop" in name or "jitter" in name)


def documents() -> list[tuple[list[int], list[float]]]:
    """Token ids and weights of four documents; each one's second half is trained."""
    dice = np.random.default_rng(0)
    return [(dice.integers(3, 300, n).tolist(), [0.0] * (n // 2) + [1.0] * (n - n // 2)) for n in LENGTHS]


def expected(model: Any) -> tuple[float, dict[str, Any]]:
    """Loss sum and gradients of plain transformers, one document at a time."""
    model.train()
    total = torch.zeros(())
    for ids, weights in documents():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total = total + (losses * torch.tensor(weights[1:])).sum()
    total.backward()
    return float(total), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ours(folder: Path, padded: bool) -> tuple[float, dict[str, Any]]:
    """The same by the trainer's model, packed in one row or padded."""
    config = load_config(["data.train_files=x", f"model.partial_pretrain={folder}", "model.dtype=float32"])
    work = Work(not padded, max(LENGTHS), 2 * sum(LENGTHS))
    model = build_model(folder, config.model, init_mesh(torch.device("cpu")), work, seed=0)
    samples = [
        Sample(np.array(ids, np.uint32), np.array(weights, np.float32), row)
        for row, (ids, weights) in enumerate(documents())
    ]
    batch = pack(samples, pad_token_id=0, padded=padded)
    with model.computing():
        loss, _ = model(batch)
        loss.backward()  # type: ignore[no-untyped-call]
    named = model.module.causal_lm.named_parameters()
    return float(loss), {name: p.grad for name, p in named if p.grad is not None}


def judge(model_type: str, padded: bool) -> dict[str, Any]:
    """The verdict on one family."""
    try:
        model = build(model_type)
        loss, gradients = expected(model)
    except Exception as error:  # noqa: BLE001 - whatever a family's own code raises on small settings
        return {"verdict": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tiny_tokenizer().save_pretrained(scratch)
        try:
            found, own = ours(Path(scratch), padded)
        except UserError as error:
            return {"verdict": "refused", "why": str(error)[:300]}
        except Exception as error:  # noqa: BLE001 - a fault of ours is a row, not the end
            return {"verdict": "FAILED", "why": f"{type(error).__name__}: {error}"[:300]}
    largest = max(float(g.norm()) for g in gradients.values())
    off = {"loss": abs(found - loss) / abs(loss)}
    for name, gradient in gradients.items():
        if name in own:
            off[name] = float((own[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * largest)
    missing = sorted(set(gradients) - set(own))
    worst = max(off, key=lambda name: off[name])
    verdict = "exact" if off[worst] <= EXACT and not missing else "WRONG"
    return {"verdict": verdict, "largest": off[worst], "at": worst, **({"missing": missing[:3]} if missing else {})}


def judge_apart(model_type: str, padded: bool) -> dict[str, Any]:
    """The verdict from a forked process, whose memory and time are bounded, and whose death is a row."""
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.SimpleQueue[dict[str, Any]] = context.SimpleQueue()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            answers.put(judge(model_type, padded))

    process = context.Process(target=work)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    return answers.get() if not answers.empty() else {"verdict": "not built", "why": f"ended with {process.exitcode}"}


def main() -> int:
    """Judge each family and write JSON; 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--padded", action="store_true", help="one document a row instead of one packed row")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    rows: dict[str, dict[str, Any]] = {}
    for model_type in arguments.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows[model_type] = judge_apart(model_type, arguments.padded)
        print(f"{model_type:28}{json.dumps(rows[model_type])[:180]}", flush=True)
    totals = Counter(row["verdict"] for row in rows.values())
    layout = "padded" if arguments.padded else "packed"
    out = arguments.out or RESULTS / f"families-{layout}.json"
    write_json(out, {"what": f"families, {layout}", "environment": environment(), "totals": totals, "rows": rows})
    print(dict(totals))
    return int(bool(totals["WRONG"] or totals["FAILED"]))


if __name__ == "__main__":
    sys.exit(main())
