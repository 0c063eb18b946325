"""What mixtures of experts do in training beyond predicting tokens, told to the user.

The loss here is that of the trained tokens and nothing else. transformers' mixtures can add a term that evens the load
of the experts out (``router_aux_loss_coef``); they do so only where ``output_router_logits`` is set, which no family
sets by default. The term is not linear in tokens: it depends on how a step is cut into micro-batches, and would make
the loss depend on the hardware.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

_NOISE = ("router_jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def remarks(config: PreTrainedConfig) -> list[str]:
    """Sentences about what a configuration asks for and does not get, or gets and should not count on."""
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
