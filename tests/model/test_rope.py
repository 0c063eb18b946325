"""Rotary frequencies that depend on length: no document may be so long that others would change."""

from __future__ import annotations

import pytest

from fsdpsft.errors import ModelError
from fsdpsft.model.rope import check_rope
from fsdpsft.testing import tiny_model

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [3.0 + i for i in range(8)],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, 16),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}, 64),
}


@pytest.mark.parametrize("kind", MODELS)
def test_lengths_beyond_the_switch_are_refused(kind: str) -> None:
    family, changes, bound = MODELS[kind]
    model = tiny_model(family, **changes)
    check_rope(model, bound)
    for length in (bound + 1, None):
        with pytest.raises(ModelError, match=rf"rope_type={kind}: beyond {bound} tokens .* data.max_length={bound} or"):
            check_rope(model, length)


def test_other_models_may_have_any_length() -> None:
    check_rope(tiny_model("qwen2"), None)
