"""Remarks for the log on models whose training draws random numbers or asks for another loss.

Draws come from each process's own generator in the order of its work, so processes, Ulysses degree and micro-batches
change them. With the same layout a run repeats itself, and one that is resumed continues as if it had not stopped.

The loss is that of the trained tokens alone. transformers' mixtures of experts can add a term that evens the load of
the experts out, where ``output_router_logits`` is set. It is not linear in tokens: it would make the loss depend on how
a step is cut into micro-batches.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_NOISE = ("router_jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def remarks(model: PreTrainedModel) -> list[str]:
    """What a model's configuration asks for and does not get, or gets and should not count on; a sentence each."""
    shares = ", ".join(f"{name}={share:g}" for name, share in active_dropout(model).items())
    dropout = (
        f"dropout is on ({shares}): losses depend on the random draws, which differ with the number of processes, the "
        "Ulysses degree and the micro-batch size. Without dropout they do not."
    )
    return _of_experts(model.config) + ([dropout] if shares else [])


def active_dropout(model: nn.Module) -> dict[str, float]:
    """Shares dropped in training, by the name a module has for it (``attention_dropout``, ``lora_dropout``); sorted."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            parts = [part for part in name.split(".") if "drop" in part]
            named = {parts[-1] if parts else "dropout": module.p}
        else:
            named = {k: v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)}
        found.update({key: share for key, share in named.items() if share > 0})
    return dict(sorted(found.items()))


def _of_experts(config: PreTrainedConfig) -> list[str]:
    values = vars(config.get_text_config())
    found = []
    if values.get("output_router_logits"):
        found.append(
            "config.json sets output_router_logits, by which transformers would add a load-balancing term to the loss; "
            "it is not added here: the loss is that of the trained tokens alone."
        )
    noise = {name: values[name] for name in _NOISE if values.get(name)}
    if noise:
        found.append(
            f"config.json sets {noise}: the router draws random numbers in training, so losses differ slightly with "
            "the number of processes."
        )
    return found
