"""Rotary frequencies that depend on length: a run that could reach their switch is refused.

transformers looks at the largest position of a whole batch. With ``longrope`` (Phi 3 and 4) one document beyond
``original_max_position_embeddings`` switches all others of its batch to the long frequencies; with ``dynamic`` scaling
each length beyond ``max_position_embeddings`` has frequencies of its own. Documents would change each other.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from fsdpsft.errors import ModelError


def check_rope(causal_lm: PreTrainedModel, max_length: int | None) -> None:
    """Refuse lengths at which a model's rotary frequencies change.

    Args:
        causal_lm: the model.
        max_length: longest document in tokens; None: not known.

    Raises:
        ModelError: such frequencies, and documents that may be so long.
    """
    for name, module in causal_lm.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in [kinds] if isinstance(kinds, str) else (kinds or {}).values():
            bound = _switch(causal_lm)
            if (kind == "longrope" or "dynamic" in kind) and (max_length is None or max_length > bound):
                raise ModelError(
                    f"{type(causal_lm).__name__}.{name} has rope_type={kind}: beyond {bound} tokens its frequencies "
                    "depend on the longest document of a batch, so documents would change each other. Set "
                    f"data.max_length={bound} or less (it is {max_length}); data.truncation says what to do with "
                    "longer ones."
                )


def _switch(causal_lm: PreTrainedModel) -> int:
    """The longest document that has the frequencies of all shorter ones."""
    config = causal_lm.config.get_text_config()
    groups = [config.rope_parameters, *config.rope_parameters.values()]  # of all layers, or by type of layer
    originals = [g.get("original_max_position_embeddings") for g in groups if isinstance(g, dict)]
    bound: int = min([config.max_position_embeddings, *filter(None, originals)])
    return bound
