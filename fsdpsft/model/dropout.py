"""Where a model drops numbers at random in training, told to the user: there alone the layout is in the maths.

Draws come from each process's own generator in the order of its work, so processes, Ulysses degree and micro-batches
change them. With the same layout a run repeats itself, and one that is resumed goes on as if it had not stopped.
"""

from __future__ import annotations

from torch import nn


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


def remark(model: nn.Module) -> str | None:
    """A sentence for a model that drops anything; None for one that does not."""
    shares = ", ".join(f"{name}={share:g}" for name, share in active_dropout(model).items())
    if not shares:
        return None
    return (
        f"dropout is on ({shares}): losses depend on the random draws, which differ with the number of processes, the "
        "Ulysses degree and the micro-batch size. Without dropout they do not."
    )
