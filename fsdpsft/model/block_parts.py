"""A decoder block taken apart into attention and MLP, each with the norm before it, to be recomputed each alone.

The block's own forward stays in charge of residuals and order. What changes is where a norm runs: in its own place it
hands its input on, and the part behind it (attention or MLP) applies it first. So the residual stream, which exists
anyway, is all that a part is given, and what the norm makes lives no longer than the part's own intermediates.

That is right where the norm's output goes to that part and nowhere else. A small stand-in of the block's class, with
made-up parts, is run as it is and rearranged; a block whose stand-in shows any difference is not taken apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

ATTENTION = ("attn", "attention")
"""How the name of a block's attention ends."""

_WIDTH, _LENGTH = 8, 11


class Elementwise(nn.Module):
    """Stands for a norm or an MLP: any function of each token alone will do."""

    def __init__(self, shift: float) -> None:
        """``shift`` tells one from another."""
        super().__init__()
        self.shift = shift

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``tanh(1.3 x + shift)``."""
        return torch.tanh(1.3 * hidden_states + self.shift)


class _Pair(Elementwise):
    """Stands for attention, which returns its weights too: transformers' blocks use the first."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states), None


def stand_in(original: nn.Module, children: dict[str, nn.Module]) -> Any:
    """A module of the same class and settings with other children; nothing of the original's size is made."""
    copy = type(original).__new__(type(original))
    nn.Module.__init__(copy)
    for name, value in vars(original).items():
        if name not in copy.__dict__ and name != "forward":
            copy.__dict__[name] = value
    for name, child in children.items():
        setattr(copy, name, child)
    return copy.eval()


def split(block: nn.Module) -> list[nn.Module] | None:
    """Take ``block`` apart in place.

    To be called after what changes its modules (LoRA, fused kernels, trimming) and before compile and checkpointing.

    Returns:
        Its attention and its MLP, each with the norm before it, and the norms that are left (behind a part), in the
        order of the forward pass; None where its structure does not allow it, which a log line tells.
    """
    works = {name for name, child in block.named_children() if any(True for _ in child.children())}
    attention = {name for name in works if name.endswith(ATTENTION)}
    for pairs in (attention, works):  # some mixtures return their router's scores beside the result
        order, fed = _trace(block, works, pairs)
        if fed and _proven(block, fed, pairs):
            break
    else:
        _say_once(type(block).__name__)
        return None
    _fold_norms(block, fed)
    return [block.get_submodule(name) for name in order if name not in fed.values()]


@cache
def _say_once(name: str) -> None:
    log.info("%s is recomputed as a whole: its parts cannot be told apart", name)


def _small_copy(block: nn.Module, pairs: set[str]) -> Any:
    children: dict[str, nn.Module] = {}
    for number, (name, child) in enumerate(block.named_children(), 1):
        kind = _Pair if name in pairs else Elementwise
        children[name] = child if isinstance(child, nn.Dropout) else kind(0.1 * number)
    return stand_in(block, children)


@torch.no_grad()
def _run(block: nn.Module) -> Tensor:
    hidden = torch.linspace(-2, 2, _LENGTH * _WIDTH).view(1, _LENGTH, _WIDTH)
    result = block(
        hidden, attention_mask=None, position_ids=None, position_embeddings=None, past_key_values=None, use_cache=False
    )
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _trace(block: nn.Module, works: set[str], pairs: set[str]) -> tuple[list[str], dict[str, str]]:
    """The block's children in the order they run, and for each part in ``works`` the norm whose output it is given.

    Empty where the block cannot be run around stand-ins, or has other parts than one attention, one MLP and norms.
    """
    order: list[str] = []
    made: dict[int, str] = {}  # id of an output: which child made it
    kept: list[Any] = []  # alive, so that no id is given twice
    fed: dict[str, str] = {}
    copy = _small_copy(block, pairs)

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            order.append(name)
            kept.append((given, output))
            made[id(output)] = name
            maker = made.get(id(given))
            if name in works and maker is not None and maker not in works:
                fed[name] = maker

        return note

    for name, child in copy.named_children():
        if not isinstance(child, nn.Dropout):
            child.register_forward_hook(watch(name), with_kwargs=True)
    try:
        _run(copy)
    except Exception as error:  # noqa: BLE001  # whatever it is, this class does not do what we think
        log.debug("%s could not be run around stand-ins: %s: %s", type(block).__name__, type(error).__name__, error)
        return [], {}
    alone = len(order) == len(set(order)) and len(set(fed.values())) == len(fed)
    return (order, fed) if alone and len(works) == 2 and fed.keys() == works else ([], {})


def _proven(block: nn.Module, fed: dict[str, str], pairs: set[str]) -> bool:
    plain, rearranged = _small_copy(block, pairs), _small_copy(block, pairs)
    _fold_norms(rearranged, fed)
    return torch.equal(_run(plain), _run(rearranged))


def _fold_norms(block: nn.Module, fed: dict[str, str]) -> None:
    for part, norm in fed.items():
        _fold(block.get_submodule(norm), block.get_submodule(part))


def _fold(norm: Any, part: Any) -> None:
    """Let ``part`` apply ``norm`` to what it is given, and ``norm`` hand its input on."""
    normalise, work = norm.forward, part.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return work(normalise(hidden_states), *args, **kwargs)

    def hand_on(hidden_states: Tensor) -> Tensor:
        return hidden_states

    part.forward, norm.forward = forward, hand_on
