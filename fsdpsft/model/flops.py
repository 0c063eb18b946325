"""How much arithmetic the data requires of a model; what achieved speed is measured against."""

from __future__ import annotations

from fsdpsft.model.sft_model import SFTModel


class FlopCount:
    """FLOPs that the data requires, forward and backward, of a decoder-only model.

    Each weight of a matrix costs 2 FLOPs a token forward and 4 backward (2 where it is frozen); a causal attention
    layer costs ``6 * H * E * len^2`` a document. The head is charged only for trained tokens, a frozen weight's
    gradient not at all: what need not be computed does not count as achieved.
    """

    def __init__(self, *, body: int, frozen_body: int, head: int, layers: int, heads: int, head_size: int) -> None:
        self.body, self.frozen_body, self.head = body, frozen_body, head
        self.attention = 6 * layers * heads * head_size

    def __call__(self, tokens: int, trained_tokens: int, squared_lengths: int) -> float:
        """FLOPs of one optimiser step over documents whose lengths' squares sum up to ``squared_lengths``."""
        linear = (6 * self.body + 4 * self.frozen_body) * tokens + 6 * self.head * trained_tokens
        return float(linear + self.attention * squared_lengths)


def flop_count(model: SFTModel) -> FlopCount:
    """What the model's matrices cost a token; embeddings are looked up, not multiplied."""
    lm = model.causal_lm
    config, head = lm.config.get_text_config(), model.head.module
    apart = {id(p) for module in (lm.get_input_embeddings(), head) for p in module.parameters()}
    matrices = [(p.numel(), p.requires_grad) for p in model.parameters() if p.ndim >= 2 and id(p) not in apart]
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return FlopCount(
        body=sum(n for n, trained in matrices if trained),
        frozen_body=sum(n for n, trained in matrices if not trained),
        head=model.head.weight.numel(),
        layers=config.num_hidden_layers,
        heads=heads,
        head_size=head_size,
    )
