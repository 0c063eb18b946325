"""Correctness, speed and memory on one CUDA GPU, in one command of eight minutes, without a network.

    python -m benchmarks.gpu_check                       # what matters most, within --minutes
    python -m benchmarks.gpu_check --add                 # what is not yet in the file: 1.5B, 7B, the longest sequence
    python -m benchmarks.gpu_check --only 7B --add       # one section more, into the same file
    python -m benchmarks.gpu_check --tiny --device cpu   # the same code on small shapes, to try it anywhere

Sections: correct (gradients under each setting against none of them, offloading, saving and resuming, on saved tiny
models); gate (every attention backend in bfloat16 against float32); ceiling (of the device itself); profile (one step
of 0.5B and of 7B LoRA, kernel by kernel); attention; head; a training step on ragged chats, ours beside TRL's where it
is installed; the longest sequence of 8B with LoRA.

What is wrong or fails is a row of the results, and the rest goes on. A section has its share of the time that is left
and writes what it has as it gets it, so that a run that is cut short leaves its results. A kernel that leaves the
device unusable costs its section: the rest goes on in a new process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

NEEDED = {
    "torch": "torch", "transformers": "transformers", "peft": "peft", "pyarrow": "pyarrow", "hydra": "hydra-core",
    "omegaconf": "omegaconf", "safetensors": "safetensors", "tqdm": "tqdm", "jinja2": "jinja2", "numpy": "numpy",
}  # fmt: skip
"""Import -> package, of all that the trainer cannot do without."""
OPTIONAL = {
    "trl": "TRL's steps", "datasets": "TRL's steps", "accelerate": "TRL's steps", "liger_kernel": "Liger's kernels",
    "flash_attn": "FlashAttention 2", "triton": "compiled and fused kernels",
}  # fmt: skip
"""Import -> what is not measured without it."""
FIRST = ("correct", "gate", "ceiling", "profile", "attention", "head", "0.5B", "7B-LoRA")
MORE = ("1.5B", "7B", "longest")


def absent(imports: dict[str, str]) -> dict[str, str]:
    """Those that this Python cannot import."""
    return {name: about for name, about in imports.items() if importlib.util.find_spec(name) is None}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the code")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=[*FIRST, *MORE], default=None, metavar="SECTION")
    parser.add_argument("--add", action="store_true", help="add to what is in the file; alone: the sections it lacks")
    parser.add_argument("--out", type=Path, default=None, help="the file of the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; 0 when nothing was found wrong, 1 when something was, 2 when nothing can run here."""
    options, began = parse(arguments), time.monotonic()
    if missing := absent(NEEDED):
        print(
            f"{sys.executable} lacks {', '.join(missing)}. Where there is a network: pip install "
            f"{' '.join(missing.values())}\nWhere there is none: fetch the wheels elsewhere (pip download -d wheels), "
            "bring them along, and pip install --no-index --no-deps --target site wheels/*.whl; PYTHONPATH=site"
        )
        return 2
    for name, what in absent(OPTIONAL).items():
        print(f"{name} is not installed: {what} will not be measured")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # on a machine with several, TRL refuses to be alone
    from benchmarks import gpu_sections

    return gpu_sections.run(options, began)


if __name__ == "__main__":
    sys.exit(main())
