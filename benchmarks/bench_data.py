"""Measure the data layer: order and plan at ten million samples, balance over ranks, building and opening stores.

    python benchmarks/bench_data.py order balance build --processes 2 --out benchmarks/results/data.json

Each part runs in a process of its own, so that its peak memory is its own. The conversations are made up, short, and
of random lengths; the tokenizer is trained on the spot.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fsdpsft.batch import Sample
from fsdpsft.data.batches.loader import Loader, LoaderSettings
from fsdpsft.data.batches.packing import Order, assign_in_order, assign_step, measure
from fsdpsft.data.batches.store import TokenStore
from fsdpsft.data.batches.store_build import open_or_build
from fsdpsft.data.batches.store_parts import BuildOptions
from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.rows.sources import resolve_sources
from fsdpsft.testing import tiny_tokenizer

MIB = 1 << 20
MEAN, SQUARED_CV, LONGEST = 840, 1.7, 32768


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    """Lognormal lengths with the mean and spread of chat data."""
    variance = np.log(1 + SQUARED_CV)
    drawn = np.random.default_rng(seed).lognormal(np.log(MEAN) - variance / 2, np.sqrt(variance), count)
    return np.clip(drawn, 16, LONGEST).astype(np.int32)


def status(field: str, pid: int | str = "self") -> float:
    """A memory field of /proc/<pid>/status in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return 0.0


def bench_order(arguments: argparse.Namespace) -> dict[str, Any]:
    """Choose and plan 1,000 batches of 256 out of ten million samples."""
    count, batches, batch_size = 10_000_000, 1000, 256
    lengths = lengths_of(count)
    before = status("VmRSS")
    order = Order((count,), batch_size, seed=1)
    start = time.perf_counter()
    chosen = [order.batch(step * 37) for step in range(batches)]
    choosing = time.perf_counter() - start
    start = time.perf_counter()
    for rows in chosen:
        assign_step(lengths[rows], dp_size=64, token_budget=LONGEST)
    planning = time.perf_counter() - start
    mixed = Order((count // 2, count // 4, count // 4), batch_size, seed=1, weights=(0.5, 2.0, 1.0))
    start = time.perf_counter()
    for step in range(batches):
        mixed.batch(step * 37)
    mixing = time.perf_counter() - start
    small = Order((1000,), batch_size, seed=1)
    start = time.perf_counter()
    for step in range(batches):
        small.batch(step)
    return {
        "samples": count,
        "batch_size": batch_size,
        "order_ms_per_batch": choosing / batches * 1e3,
        "order_ms_per_batch_of_1000_samples": (time.perf_counter() - start) / batches * 1e3,
        "mixture_of_3_ms_per_batch": mixing / batches * 1e3,
        "plan_64_ranks_ms_per_batch": planning / batches * 1e3,
        "memory_growth_mib": status("VmRSS") - before,
        "epoch_steps": order.steps_per_epoch,
    }


def bench_balance(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Most over mean, ours and in-order, for 8 and 64 ranks; means over 50 steps."""
    cases = [(8, 256, 32768), (8, 256, 8192), (8, 1024, 16384), (64, 1024, 32768), (64, 4096, 16384), (64, 4096, 65536)]
    results = []
    for ranks, batch_size, budget in cases:
        ours, in_order, seconds = [], [], 0.0
        for step in range(50):
            lengths = np.minimum(lengths_of(batch_size, seed=step), budget)
            start = time.perf_counter()
            plan = assign_step(lengths, dp_size=ranks, token_budget=budget)
            seconds += time.perf_counter() - start
            ours.append(asdict(measure(plan, lengths)))
            in_order.append(asdict(measure(assign_in_order(batch_size, ranks), lengths)))
        mean = [{k: float(np.mean([m[k] for m in many])) for k in many[0]} for many in (ours, in_order)]
        case = {"ranks": ranks, "batch_size": batch_size, "token_budget": budget, "plan_ms": seconds / 50 * 1e3}
        results.append({**case, "planned": mean[0], "in_order": mean[1]})
    return results


def write_conversations(path: Path, rows: int) -> None:
    """Short question-and-answer conversations as JSON lines."""
    dice = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            a, b = dice.randrange(1000), dice.randrange(1000)
            steps = " ".join(f"{a} plus {b} is {a + b}." for _ in range(dice.randrange(1, 4)))
            user = {"role": "user", "content": f"Question {number}: what is {a} + {b}?"}
            file.write(json.dumps({"messages": [user, {"role": "assistant", "content": steps}]}) + "\n")


def write_token_rows(path: Path, rows: int) -> None:
    """Short rows that are tokenised already: next to no work a row, so that memory per row would show."""
    dice = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            length = dice.randrange(4, 24)
            ids = dice.choices(range(256), k=length)
            file.write(
                json.dumps({"input_ids": ids, "loss_mask": [0] * (length // 2) + [1] * (length - length // 2)}) + "\n"
            )


WRITERS = {"conversations": write_conversations, "tokens": write_token_rows}


def tree_memory(root: int) -> tuple[float, float]:
    """Memory of a process and its children in MiB: (all, shared pages counted once; the largest one's resident)."""
    pids, total, largest = [root], 0.0, 0.0
    for pid in pids:
        try:
            pids += [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
            largest = max(largest, status("VmRSS", pid))
        except (OSError, StopIteration):
            continue
    return total, largest


def build_store(folder: Path, rows: int, processes: int, results: Any) -> None:
    """Build in this process, and report how long it took."""
    sources = resolve_sources(str(folder / f"{rows}.jsonl"))
    start = time.perf_counter()
    encoder = RowEncoder(sources, tiny_tokenizer())
    store = open_or_build(sources, encoder, BuildOptions(num_workers=processes), folder / "cache", progress=False)
    results["seconds"] = time.perf_counter() - start
    results["tokens"] = store.stats["tokens"]
    results["stats"] = {k: store.stats[k] for k in ("rows", "samples", "truncated", "duplicates", "dropped", "skipped")}


def open_warm(folder: Path, rows: int, results: Any) -> None:
    """Open the store as a second run does, and make its first step."""
    sources = resolve_sources(str(folder / f"{rows}.jsonl"))
    tokenizer = tiny_tokenizer()
    before = status("VmRSS")
    start = time.perf_counter()
    encoder = RowEncoder(sources, tokenizer)
    store = open_or_build(sources, encoder, BuildOptions(), folder / "cache", may_build=False)
    results["open_seconds"] = time.perf_counter() - start
    loader = Loader(store, LoaderSettings(train_batch_size=256, token_budget=4096, pad_token_id=0))
    loader.step(0)
    results["open_and_first_step_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    steps = list(loader.iterate(1, 51))
    results["loader_tokens_per_second"] = sum(s.num_tokens for s in steps) / (time.perf_counter() - start)
    results["memory_growth_mib"] = status("VmRSS") - before


def open_cheaply(folder: Path, results: Any) -> None:
    """TokenStore.open alone."""
    (path,) = [p for p in (folder / "cache").iterdir() if (p / "manifest.json").is_file()]
    start = time.perf_counter()
    TokenStore.open(path)
    results["store_open_ms"] = (time.perf_counter() - start) * 1e3
    results["store_mib"] = sum(p.stat().st_size for p in path.iterdir()) / MIB


def bench_build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokenise, watch the memory of all processes meanwhile, and open again."""
    fork, found = multiprocessing.get_context("fork"), {}
    for kind, rows in ((size.split(":")[0], int(size.split(":")[1])) for size in arguments.build):
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.scratch))
        WRITERS[kind](folder / f"{rows}.jsonl", rows)
        # Content is only remembered for files that have been left alone for two seconds.
        time.sleep(2.5)
        results = fork.Manager().dict()
        builder = fork.Process(target=build_store, args=(folder, rows, arguments.processes, results))
        builder.start()
        assert builder.pid is not None
        peak_sum = peak_one = 0.0
        while builder.is_alive():
            total, largest = tree_memory(builder.pid)
            peak_sum, peak_one = max(peak_sum, total), max(peak_one, largest)
            time.sleep(0.25)
        builder.join()
        for target, args in ((open_warm, (folder, rows, results)), (open_cheaply, (folder, results))):
            process = fork.Process(target=target, args=args)
            process.start()
            process.join()
        entry = {
            "kind": kind,
            "rows": rows,
            "processes": arguments.processes,
            "file_mib": (folder / f"{rows}.jsonl").stat().st_size / MIB,
            "rows_per_second": rows / results["seconds"],
            "peak_memory_all_processes_mib": peak_sum,
            "peak_memory_largest_process_mib": peak_one,
            **results,
        }
        found[f"{kind}:{rows}"] = entry
        shutil.rmtree(folder)
    return found


class LengthsOnDisk:
    """A store of ``count`` samples whose index is mapped from a file, as a token store's is, with made-up tokens."""

    def __init__(self, count: int, folder: Path) -> None:
        """Write the index in pieces, then map it."""
        piece = lengths_of(min(count, 1_000_000))
        with (folder / f"{count}.bin").open("wb") as file:
            for start in range(0, count, len(piece)):
                file.write(piece[: count - start].tobytes())
        self.lengths = self.trained = np.memmap(folder / f"{count}.bin", np.int32, mode="r")
        self.weights, self.source_counts = self.lengths, (count,)
        self.source_names = ["made up"]

    def sample(self, index: int) -> Sample:
        """All tokens trained."""
        length = int(self.lengths[index])
        return Sample(np.ones(length, np.uint32), np.ones(length, np.float32), index)

    def describe(self, index: int) -> str:
        """Name of a sample."""
        return str(index)


def bench_growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time of the loader's steps, and memory, from ten thousand samples to ten million; sizes alternate."""
    loaders, seconds, grown = {}, {}, {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for count in (10_000, 100_000, 1_000_000, 10_000_000):
            before = status("RssAnon")
            store = LengthsOnDisk(count, Path(scratch))
            loaders[count] = Loader(store, LoaderSettings(train_batch_size=256, token_budget=LONGEST, pad_token_id=0))
            loaders[count].step(0)
            seconds[count], grown[count] = [], status("RssAnon") - before
        for step in range(30):
            for count, loader in loaders.items():
                start = time.process_time()
                loader.step(1 + step)
                seconds[count].append(time.process_time() - start)
        return {
            str(count): {"cpu_ms_per_step": float(np.median(times)) * 1e3, "memory_growth_mib": grown[count]}
            for count, times in seconds.items()
        }


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "order": bench_order,
    "balance": bench_balance,
    "build": bench_build,
    "growth": bench_growth,
}


def run_apart(part: str, arguments: argparse.Namespace, results: Any) -> None:
    """Run one part and leave its result."""
    results[part] = PARTS[part](arguments)


def main() -> None:
    """Run the parts that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    sizes = ["conversations:100000", "conversations:1000000", "tokens:1000000", "tokens:4000000"]
    parser.add_argument("--build", nargs="+", default=sizes, metavar="KIND:ROWS", help=f"kinds: {', '.join(WRITERS)}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scratch", default=None, help="where the made-up files and stores go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.json"))
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    fork = multiprocessing.get_context("fork")
    for part in arguments.parts:
        results = fork.Manager().dict()
        process = fork.Process(target=run_apart, args=(part, arguments, results))
        process.start()
        process.join()
        known[part] = known.get(part, {}) | results[part] if part == "build" else results[part]
        print(json.dumps({part: results[part]}, indent=1))
    known["machine"] = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
