"""Plausible bugs, put into a copy of the code one at a time: the nearest tests must notice each of them.

    python -m tests.mutants                # all of them (10 minutes on two cores)
    python -m tests.mutants clip label     # those whose names hold one of these words
    python -m tests.mutants --list

A fault that is found and mended gets an entry here, with the test that would have caught it. An entry whose text is no
longer found in its file is an error: the code has moved on, and the entry must follow it (``test_mutants.py`` says so).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600.0  # of one test selection
FAILED = 1  # pytest's exit code when tests ran and some failed


class Mutant(NamedTuple):
    """One bug.

    Attributes:
        name: what is wrong, in words.
        file: where.
        old: the text there, found once.
        new: what takes its place.
        tests: arguments of pytest that must fail: a file, and perhaps ``-k`` with an expression.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "gradients are clipped by a process's own shard",
        "fsdpsft/optim.py",
        "get_total_norm([p.grad for p",
        "get_total_norm([_local(p.grad) for p",
        ("tests/test_optim.py",),
    ),
    Mutant(
        "bfloat16 weights are rounded twice a step",
        "fsdpsft/optim.py",
        'parameter.float().mul_(1 - group["lr"] * group["weight_decay"])',
        'parameter.mul_(1 - group["lr"] * group["weight_decay"]).float()',
        ("tests/test_optim.py",),
    ),
    Mutant(
        "AdamW corrects the second moment by the first one's decay",
        "fsdpsft/optim.py",
        "square / (1 - beta2**step)",
        "square / (1 - beta1**step)",
        ("tests/test_optim.py",),
    ),
    Mutant(
        "biases of linear layers decay",
        "fsdpsft/optim.py",
        'return leaf == "weight"',
        "return True",
        ("tests/test_optim.py",),
    ),
    Mutant("experts' biases decay", "fsdpsft/optim.py", ' and "bias" not in leaf', "", ("tests/test_optim.py",)),
    Mutant(
        "truncation cuts ids and mask unlike",
        "fsdpsft/data/batches/store_parts.py",
        "loss_weights=sample.loss_weights[kept]",
        "loss_weights=sample.loss_weights[:limit]",
        ("tests/data/batches/test_store.py",),
    ),
    Mutant(
        "gradient_sync=last drops a micro-batch",
        "fsdpsft/train.py",
        "            (loss_sum / step.loss_denominator).backward()",
        "            _ = (sync_every or i) and (loss_sum / step.loss_denominator).backward()",
        ("tests/distributed/test_fsdp.py",),
    ),
    Mutant(
        "gradients are averaged over processes",
        "fsdpsft/distributed/fsdp.py",
        "set_gradient_divide_factor(1.0)",
        "set_gradient_divide_factor(2.0)",
        ("tests/distributed/test_fsdp.py",),
    ),
    Mutant(
        "in bfloat16 only the last micro-batch's gradient counts",
        "fsdpsft/distributed/fsdp.py",
        "master.grad += gradient",
        "master.grad = gradient.to(master.dtype)",
        ("tests/parity/test_precision.py",),
    ),
    Mutant(
        "the loss is divided by the number of labels, not by their weights",
        "fsdpsft/data/batches/loader.py",
        "loss_denominator=float(self.store.weights[rows].sum())",
        "loss_denominator=float(self.store.trained[rows].sum())",
        ("tests/data/batches/test_loader.py",),
    ),
    Mutant(
        "every rank trains on the first one's samples",
        "fsdpsft/data/batches/loader.py",
        "in assignment[settings.dp_rank]",
        "in assignment[0]",
        ("tests/data/batches/test_loader.py",),
    ),
    Mutant(
        "every epoch has the same order",
        "fsdpsft/data/batches/packing.py",
        "self.seed, 0, epoch)",
        "self.seed, 0, 0)",
        ("tests/data/batches/test_packing.py",),
    ),
    Mutant(
        "labels are not shifted",
        "fsdpsft/batch.py",
        "targets = sample.input_ids[1:]",
        "targets = sample.input_ids[:-1]",
        ("tests/test_batch.py",),
    ),
    Mutant(
        "weights of tokens are not shifted with the labels",
        "fsdpsft/batch.py",
        "] = sample.loss_weights[1:]",
        "] = sample.loss_weights[:-1]",
        ("tests/test_batch.py",),
    ),
    Mutant(
        "bounds of documents are off by one",
        "fsdpsft/batch.py",
        "np.concatenate([[0], np.cumsum(seqlens)])",
        "np.concatenate([[0], np.cumsum(seqlens)[:-1] - 1, [total]])",
        ("tests/test_batch.py",),
    ),
    Mutant(
        "the head's gradient ignores the weights of tokens",
        "fsdpsft/loss.py",
        "out=self.hidden[part]).mul_(factor)",
        "out=self.hidden[part])",
        ("tests/test_loss.py",),
    ),
    Mutant(
        "the soft cap's slope is left out of the gradient",
        "fsdpsft/loss.py",
        "torch.mul(change, slope, out=product[rows])",
        "product[rows] = change.to(product.dtype)",
        ("tests/test_loss.py",),
    ),
    Mutant(
        "a sliding window is one token too wide",
        "fsdpsft/model/attention_backends.py",
        "seen.triu(1 - window)",
        "seen.triu(-window)",
        ("tests/model/test_attention.py",),
    ),
    Mutant(
        "selective checkpointing keeps results that are written to in place",
        "fsdpsft/distributed/activation_checkpoint.py",
        "kept.result = tree_map_only(Tensor, Tensor.clone, kept.result)",
        "pass",
        ("tests/distributed/test_activation_checkpoint.py",),
    ),
    Mutant(
        "merged weights lack the adapters' scale",
        "fsdpsft/model/lora.py",
        "update = layer.scaling[_ADAPTER] * (up @ down)",
        "update = up @ down",
        ("tests/model/test_lora.py",),
    ),
    Mutant(
        "a resumed run keeps the metrics of a step that it takes again",
        "fsdpsft/metrics.py",
        "_step_of(line) <= self._resumed_step",
        "_step_of(line) <= self._resumed_step + 1",
        ("tests/test_run.py",),
    ),
    Mutant(
        "Ulysses: every rank has the first one's positions",
        "fsdpsft/distributed/ulysses.py",
        "batch.position_ids[:, here]",
        "batch.position_ids[:, :length]",
        ("tests/distributed/test_ulysses.py",),
    ),
    Mutant(
        "warm-up begins at zero",
        "fsdpsft/lr_schedule.py",
        "(step + 1) / self.warmup_steps",
        "step / self.warmup_steps",
        ("tests/test_lr_schedule.py",),
    ),
    Mutant(
        "a gradient norm that is not a number goes unnoticed",
        "fsdpsft/recorder.py",
        "math.isfinite(loss) and math.isfinite(grad_norm)",
        "math.isfinite(loss)",
        ("tests/test_recorder.py",),
    ),
    Mutant(
        "a step's numbers are read after the next step has overwritten them",
        "fsdpsft/recorder.py",
        "self._values = torch.cat([norm.reshape(1), losses])",
        "self._values = losses",
        ("tests/test_recorder.py",),
    ),
    Mutant(
        "validation divides by labels instead of their weights",
        "fsdpsft/evaluate.py",
        "total / denominator",
        "total / float(trained.sum())",
        ("tests/test_evaluate.py",),
    ),
    Mutant(
        "a resumed run leaves a step out",
        "fsdpsft/run.py",
        "self.loader.iterate(self.start_step,",
        "self.loader.iterate(self.start_step + bool(self.start_step),",
        ("tests/e2e/test_resume.py",),
    ),
)


def place(mutant: Mutant, root: Path) -> str:
    """The mutated text of the mutant's file.

    Raises:
        LookupError: its old text does not stand there exactly once.
    """
    text = (root / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise LookupError(f"{mutant.name}: its text stands {count} times in {mutant.file}; bring the entry up to date")
    return text.replace(mutant.old, mutant.new)


def copy_tree(target: Path) -> None:
    """All that git tracks, or would, as it stands in the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def tested(root: Path, tests: tuple[str, ...]) -> int | None:
    """pytest's exit code for a selection of tests in a copy; None where it took too long."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if (data := ROOT.parent / "shared" / "data").is_dir():
        environment.setdefault("FSDPSFT_TEST_DATA", str(data))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def main(arguments: list[str] | None = None) -> int:
    """Try the mutants; 0 where each was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="try only mutants whose names hold one of these")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.words or any(word in m.name for word in options.words)]
    if options.list:
        print("\n".join(f"{m.name}: {m.file}, {' '.join(m.tests)}" for m in chosen))
        return 0
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        root = Path(scratch)
        copy_tree(root)
        texts = {m: place(m, root) for m in chosen}  # all entries are looked up before the first test runs
        for tests in dict.fromkeys(m.tests for m in chosen):
            if tested(root, tests) != 0:
                faults.append(f"{' '.join(tests)} does not pass on the code as it is")
        for mutant in chosen if not faults else []:
            began, file = time.monotonic(), root / mutant.file
            whole = file.read_text()
            file.write_text(texts[mutant])
            code = tested(root, mutant.tests)
            file.write_text(whole)
            verdict = "caught" if code in (FAILED, None) else f"NOT CAUGHT (pytest ended with {code})"
            print(f"{verdict}: {mutant.name} ({time.monotonic() - began:.0f} s)", flush=True)
            if verdict != "caught":
                faults.append(f"{mutant.name}: {' '.join(mutant.tests)} did not fail")
    print("\n".join(faults) or f"all {len(chosen)} were caught")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
