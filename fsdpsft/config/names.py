"""Names that are no keys but that people type: older spellings, keys of other trainers, typing errors."""

from __future__ import annotations

import difflib

from fsdpsft.config.schema import KEYS
from fsdpsft.errors import ConfigError

ALIASES = {
    "data.micro_batch_size": "data.micro_batch_size_per_gpu",
    "data.max_token_len": "data.max_token_len_per_gpu",
    "data.multiturn.tools_key": "data.tools_key",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
    "model.path": "model.partial_pretrain",
    "model.fsdp_config.cpu_offload": "model.fsdp_config.offload_params",
    "optim.lr_warmup_steps_ratio": "optim.warmup_steps_ratio",
    "optim.lr_warmup_steps": "optim.warmup_steps",
    "trainer.checkpoint.save_contents": "trainer.save_contents",
}
RETIRED = {
    "trainer.nnodes": "the number of nodes is torchrun's --nnodes; leave the key out",
    "trainer.n_gpus_per_node": "the number of processes is torchrun's --nproc_per_node; leave the key out",
    "data.use_shm": "tokenised data is memory-mapped and shared already; leave the key out",
    "model.use_shm": "weights are read straight into their shards; leave the key out",
    "model.external_lib": "import your library before calling fsdpsft.train(), or use data.custom_cls",
    "model.trim_last_block": "the last block computes all tokens now, which took no longer; leave the key out",
    "trainer.checkpoint.load_contents": "resuming loads the whole trainer_state/; leave the key out",
}
_SAME_WORD = 0.75  # how alike two names must be for one to be a typing error of the other


def unknown_key(name: str) -> ConfigError:
    """The error for a name that is no key, with the key it is a typing error of, if there is one."""
    leaf = name.rpartition(".")[2]
    same_leaf = [known for known in KEYS if known.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(name, [*KEYS, *ALIASES], n=1, cutoff=_SAME_WORD)
    nearest = (same_leaf or close or [""])[0]
    hint = f"; did you mean {nearest}?" if nearest else ""
    return ConfigError(f"unknown key {name}{hint} (all keys: python -m fsdpsft.train --help)")
