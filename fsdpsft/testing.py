"""Helpers for tests and for trials without a GPU: gloo processes, tiny models, a tiny tokenizer."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_WORDS = (
    "system user assistant tool You are a helpful assistant. What is the sum of twelve and thirty-four? The answer is "
    "46. Let me think step by step about it, then write the result after four hashes. #### 0123456789 "
)
CORPUS = _WORDS.split(" ")


def tiny_tokenizer(
    template: str | None = CHATML, corpus: Iterable[str] = CORPUS, vocab_size: int = 384
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that can spell any text; stop token ``<|im_end|>``, pad ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    return fast


def tiny_model(model_type: str = "qwen2", *, vocab_size: int = 384, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a random model of a family (a transformers ``model_type``) small enough for two CPU cores, in float32."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**settings, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_tiny_model(folder: str | Path, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> Path:
    """Write a tiny model and its tokenizer as a Hugging Face folder and return its path."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), **settings)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are alive and were made inside this context; ``peak`` is the most.

    For the CPU, whose allocator keeps no count. Buffers inside a kernel are not seen.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what is new in its results."""
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def free_port() -> int:
    """A TCP port on the loopback address that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(
    rank: int, function: Callable[..., Any], world_size: int, port: int, folder: str, backend: str,
    environment: dict[str, str], args: tuple[Any, ...],
) -> None:  # fmt: skip
    os.environ.update(
        environment,  # the server they are forked from has the environment of its own start
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo") -> list[Any]:
    """Run ``function(*args)`` in ``world_size`` processes and return what each rank returned, in rank order.

    ``function`` must be importable (defined at module level). The processes are forked from a server that has imported
    the trainer once, as that takes seconds. An exception in any rank is raised here with that rank's traceback.
    """
    multiprocessing.set_forkserver_preload(["fsdpsft.train"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, world_size, free_port(), folder, backend, dict(os.environ), args)
        start_processes(_worker, arguments, world_size, start_method="forkserver")  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
