"""The last decoder block on trained positions only; exact, as nothing reads its output anywhere else.

Of a prompt's tokens the last block needs keys and values, which replies attend to. Their queries, attention outputs,
MLP and norms are thrown away by the loss, so they are not computed: hidden states are selected inside the last block
instead of after it. What attention itself does is unchanged (queries of other positions are zeros, their results are
dropped), so every kernel, window, soft cap and the Ulysses exchange stay as they are.

The block's own modules are called, whatever they are (adapters, fused kernels, experts), and attention runs the model
class's own code; only how the parts are put together is restated here, and ``trim_last_block`` first compares that with
the class's own forward.

Shapes: hidden states [R, S, D] go in, [1, m, D] come out, m wanted positions (legend in ``batch.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsdpsft.model.attention import AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.block_parts import Elementwise, stand_in

log = logging.getLogger(__name__)

PLAIN = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
SANDWICHED = PLAIN | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}  # Gemma 2 and 3
PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
HEAD_NORMS = frozenset({"q_norm", "k_norm"})

_PROBE_WIDTH = 8
_PROBE_LENGTHS = (7, 4)
_PROBE_WANTED = (1, 2, 5, 9)


def select(hidden: Tensor, positions: Tensor) -> Tensor:
    """[R, S, D] at flat ``positions`` [m] -> [1, m, D]."""
    return hidden.flatten(0, 1).index_select(0, positions)[None]


@dataclass
class _Wanted:
    """The positions of the micro-batch under way; None: all."""

    positions: Tensor | None = None


def trim_last_block(block: nn.Module) -> bool:
    """Let ``block`` compute wanted positions only, where it is built in a way that is known; in place.

    The positions come with each micro-batch, as ``AttentionContext.wanted``; without them the block is as before. To
    be called before checkpointing, compile and FSDP, which wrap the block's forward and call.

    Returns:
        Whether it could be done. It is not for a block of another structure, or one whose class puts its parts
        together in another way, which a comparison on made-up numbers tells; a log line says so.
    """
    reason = _objection(block)
    if reason is not None:
        log.info("the last block computes all positions: %s %s", type(block).__name__, reason)
        return False
    _trim(block)
    return True


def _objection(block: nn.Module) -> str | None:
    parts = {name for name, _ in block.named_children()}
    if parts not in (PLAIN, SANDWICHED):
        return f"has parts {sorted(parts)}"
    attention_parts = {name for name, _ in block.get_submodule("self_attn").named_children()}
    if not PROJECTIONS <= attention_parts <= PROJECTIONS | HEAD_NORMS:
        return f"has attention made of {sorted(attention_parts)}"
    try:
        difference = _difference(block)
    except Exception as error:  # noqa: BLE001  # whatever it is, this class does not do what we think
        return f"could not be compared with its own forward: {type(error).__name__}: {error}"
    return None if difference < 1e-5 else f"differs from its own forward by {difference:.1e}"


def _trim(block: nn.Module) -> None:
    wanted = _Wanted()
    attention: Any = block.self_attn
    whole, attend = block.forward, attention.forward
    attention.q_proj.forward = _laid_back(attention.q_proj.forward, wanted)
    attention.o_proj.forward = _selecting(attention.o_proj.forward, wanted)

    def attend_wanted(*args: Any, attention_context: AttentionContext, **kwargs: Any) -> Any:
        # Here and not in the block: where checkpointing recomputes attention alone, it passes by here again.
        wanted.positions = attention_context.wanted
        return attend(*args, attention_context=attention_context, **kwargs)

    def forward(hidden_states: Tensor, *args: Any, attention_context: AttentionContext, **kwargs: Any) -> Tensor:
        if attention_context.wanted is None:
            return whole(hidden_states, *args, attention_context=attention_context, **kwargs)  # type: ignore[no-any-return]
        return _put_together(block, hidden_states, *args, attention_context=attention_context, **kwargs)

    attention.forward = attend_wanted
    block.forward = forward


def _put_together(block: Any, hidden: Tensor, *args: Any, attention_context: AttentionContext, **kwargs: Any) -> Tensor:
    """Residual, norms, attention and MLP of a pre-norm block, at the wanted positions: [1, m, D]."""
    assert attention_context.wanted is not None
    attended, _ = block.self_attn(block.input_layernorm(hidden), *args, attention_context=attention_context, **kwargs)
    hidden = select(hidden, attention_context.wanted)
    if not hasattr(block, "pre_feedforward_layernorm"):
        hidden = hidden + attended
        return hidden + block.mlp(block.post_attention_layernorm(hidden))  # type: ignore[no-any-return]
    hidden = hidden + block.post_attention_layernorm(attended)
    return hidden + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(hidden)))  # type: ignore[no-any-return]


def _laid_back(project: Callable[[Tensor], Tensor], wanted: _Wanted) -> Callable[[Tensor], Tensor]:
    """A projection of the wanted positions alone; the others' results are zeros, so that the shape is as ever."""

    def run(hidden: Tensor) -> Tensor:
        if wanted.positions is None:
            return project(hidden)
        projected = project(select(hidden, wanted.positions))[0]
        whole = projected.new_zeros(hidden.shape[0] * hidden.shape[1], projected.shape[-1])
        return whole.index_copy(0, wanted.positions, projected).view(*hidden.shape[:2], -1)

    return run


def _selecting(project: Callable[[Tensor], Tensor], wanted: _Wanted) -> Callable[[Tensor], Tensor]:
    """A projection that takes all positions and gives the wanted ones."""
    return lambda hidden: project(hidden if wanted.positions is None else select(hidden, wanted.positions))


def _small_copy(block: nn.Module) -> Any:
    """``block``'s class, and its attention's, around small made-up parts: the hidden size is 8."""
    attention: Any = block.self_attn
    inner: dict[str, nn.Module] = {}
    for name, child in attention.named_children():
        rows, columns = child.weight.shape if name in PROJECTIONS else (0, 0)
        sizes = (columns, _PROBE_WIDTH) if name == "o_proj" else (_PROBE_WIDTH, rows)
        inner[name] = nn.Linear(*sizes) if name in PROJECTIONS else Elementwise(0.2)
    parts = {name for name, _ in block.named_children()} - {"self_attn"}
    outer = {name: Elementwise(0.1 * number) for number, name in enumerate(sorted(parts), 1)}
    return stand_in(block, {**outer, "self_attn": stand_in(attention, inner)})


@torch.no_grad()
def _difference(block: Any) -> float:
    """Largest difference at the wanted positions between a small copy's own forward and the trimmed one."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        copy, total = _small_copy(block), sum(_PROBE_LENGTHS)
        hidden = torch.randn(1, total, _PROBE_WIDTH)
        positions = torch.cat([torch.arange(length) for length in _PROBE_LENGTHS])[None]
        rotation = tuple(torch.randn(1, total, block.self_attn.head_dim) for _ in range(2))
    finally:
        torch.random.set_rng_state(state)
    bounds = torch.tensor([0, *_PROBE_LENGTHS]).cumsum(0).to(torch.int32)

    def run(wanted: Tensor | None) -> Tensor:
        context = AttentionContext(bounds, _PROBE_LENGTHS, max(_PROBE_LENGTHS), attend_sdpa, wanted=wanted)
        result: Tensor = copy.forward(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=rotation, past_key_values=None,
            use_cache=False, attention_context=context,
        )  # fmt: skip
        return result

    wanted = torch.tensor(_PROBE_WANTED)
    expected = select(run(None), wanted)
    _trim(copy)
    return float((run(wanted) - expected).abs().max())
