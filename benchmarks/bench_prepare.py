"""Rows a second of turning conversations into tokens and masks: ours and TRL's, side by side.

    python -m benchmarks.bench_prepare --rows 50000 --processes 2

From the same file to token ids and masks on disk, by the same tokenizer in as many processes; rounds alternate, each in
a fresh process with cold caches. The time includes reading the file and starting the processes, for both.
TRL needs a template with generation tags for ``assistant_only_loss``; both render with it. The gate: the same number of
tokens, and of trained tokens, from both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import diverse
from benchmarks.common import (
    RESULTS,
    SHAPE_25M,
    TINY,
    environment,
    gsm8k_file,
    hardware_name,
    save_model,
    texts,
    write_json,
)
from fsdpsft.testing import tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ours(folder: Path, processes: int) -> dict[str, Any]:
    """Build a token store from the rows, the read of the file and the write of the store included."""
    from fsdpsft.data.batches.store_build import open_or_build
    from fsdpsft.data.batches.store_parts import BuildOptions
    from fsdpsft.data.mask.row_encoder import RowEncoder
    from fsdpsft.data.rows.sources import resolve_sources
    from fsdpsft.model.load import load_tokenizer

    tokenizer = load_tokenizer(folder / "model")
    start = time.perf_counter()
    sources = resolve_sources(str(folder / "chats.jsonl"))
    with tempfile.TemporaryDirectory() as cache:
        encoder = RowEncoder(sources, tokenizer)
        store = open_or_build(
            sources, encoder, BuildOptions(max_length=1 << 20, num_workers=processes), Path(cache), progress=False
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": int(store.lengths.sum()), "trained": int(store.trained.sum())}


def trl(folder: Path, processes: int) -> dict[str, Any]:
    """The read of the file as TRL's users do it, and TRL's own preparation as its trainer does it before training."""
    import trl as installed
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    rows = load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train")
    reading = time.perf_counter() - start
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = installed.SFTConfig(
        output_dir=str(folder / "out"), assistant_only_loss=True, dataset_num_proc=processes, max_length=None,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    seconds = 0.0
    prepare = installed.SFTTrainer._prepare_dataset

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        start = time.perf_counter()
        result = prepare(*args, **kwargs)
        seconds += time.perf_counter() - start
        return result

    installed.SFTTrainer._prepare_dataset = timed
    trainer = installed.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    data = trainer.train_dataset
    trained = sum(label != -100 for labels in data["labels"] for label in labels[1:])
    tokens = sum(len(ids) for ids in data["input_ids"])
    return {"seconds": reading + seconds, "reading": reading, "tokens": tokens, "trained": trained}


def run_apart(which: str, folder: Path, processes: int) -> dict[str, Any]:
    """One preparation in a fresh process, with a cache of datasets of its own."""
    environ = {**os.environ, "HF_DATASETS_CACHE": tempfile.mkdtemp(dir=folder), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.bench_prepare", "--worker", which, str(folder), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(found[-1][len("RESULT ") :])
    return result


def write_rows(folder: Path, count: int, text: str) -> None:
    """Conversations of one question and one answer, and a model folder with a tokenizer trained on the first of them.

    Args:
        text: ``diverse`` (no row twice, new words all along) or ``gsm8k`` (its 7,473 rows, again and again).
    """
    file = gsm8k_file()
    assert text == "diverse" or file is not None, "no GSM8K here; set FSDPSFT_TEST_DATA, or use --text diverse"
    parts = texts(file) if text == "gsm8k" and file else diverse.texts(2 * count)
    pairs = [(parts[i % len(parts)], parts[(i + 1) % len(parts)]) for i in range(0, 2 * count, 2)]
    lines = []
    for number, (question, answer) in enumerate(pairs):
        again = f" ({number})" if 2 * number >= len(parts) else ""  # no row twice
        messages = [{"role": "user", "content": question + again}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    tokenizer = tiny_tokenizer(TEMPLATE, corpus=parts[:20_000], vocab_size=32768)
    save_model(folder / "model", 32768, {**SHAPE_25M, **TINY}, tokenizer)


def main() -> None:
    """Alternate the two and write JSON."""
    if sys.argv[1:2] == ["--worker"]:
        which, folder, processes = sys.argv[2:]
        print("RESULT " + json.dumps({"ours": ours, "trl": trl}[which](Path(folder), int(processes))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--text", choices=("diverse", "gsm8k"), default="diverse")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{hardware_name()}-prepare.json")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch), arguments.rows, arguments.text)
        for _ in range(arguments.rounds):
            for which, done in runs.items():
                done.append(run_apart(which, Path(scratch), arguments.processes))
                print(which, done[-1], flush=True)
    counts = {which: {(run["tokens"], run["trained"]) for run in done} for which, done in runs.items()}
    same = counts["ours"] == counts["trl"]
    speeds = {which: arguments.rows / statistics.median(run["seconds"] for run in done) for which, done in runs.items()}
    write_json(arguments.out, {
        "what": "preparation of data", "environment": environment(), "rows": arguments.rows, "text": arguments.text,
        "processes": arguments.processes, "gate": "passed" if same else f"tokens differ: {counts}", "runs": runs,
        **({"rows_per_s": speeds, "ours_over_trl": speeds["ours"] / speeds["trl"]} if same else {}),
    })  # fmt: skip
    print(speeds if same else f"the gate failed: {counts}")


if __name__ == "__main__":
    main()
