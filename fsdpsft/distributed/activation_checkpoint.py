"""Trade time for memory: recompute activations in the backward pass, rest them in host memory, tile the MLP.

All of it wraps ``forward`` of existing modules: no module is added, so parameter names do not change, and FSDP's hooks,
which sit on the module's call, do not run a second time when a block is recomputed. Every mode computes the same
numbers by the same kernels; gradients are bit-identical on CPU, except that tiles change the shape, and so the
rounding, of the MLP's products.

What one block of T tokens keeps until its backward pass, in numbers of size D (I: the MLP's width over D):

    none         everything: inputs of each product, norm and activation, in float32 where a norm works in it
    selective    the block's input, and what is costly to make: results of matrix products, attention and exchanges
    full         the block's input
    mlp_tiles    the inputs of the block's parts; never more than one tile of the MLP's width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fsdpsft.errors import ConfigError, ModelError

MLP_NAMES = ("mlp", "feed_forward", "ffn")
PRODUCTS = frozenset({"mm", "addmm", "linear", "_grouped_mm", "_scaled_mm", "all_to_all_single"})

Forward = Callable[..., Any]


def apply(blocks: Sequence[nn.Module], mode: str, *, offload: bool = False, mlp_tiles: int = 1) -> None:
    """Set up checkpointing of a model's decoder blocks, in place; after compile, before FSDP.

    Args:
        blocks: the decoder blocks in forward order.
        mode: ``none``, ``selective`` or ``full``.
        offload: keep the inputs of checkpointed units in host memory until their backward pass.
        mlp_tiles: above 1, each block's MLP runs over this many slices of the tokens, each recomputed on its own. The
            block's other parts then become units of their own: with the whole block as one, the MLP would run three
            times instead of twice.

    Raises:
        ConfigError: ``offload`` without checkpointing, which alone knows what may leave the device.
        ModelError: ``mlp_tiles`` for a block in which no plain MLP is found.
    """
    assert mode in ("none", "selective", "full"), mode
    if offload and mode == "none":
        raise ConfigError(
            "model.activation_offload=true moves what checkpointing keeps; set "
            "model.enable_gradient_checkpointing=selective or full."
        )
    units = list(blocks)
    if mlp_tiles > 1:
        units = [part for block in blocks for part in _parts_beside_tiled_mlp(block, mlp_tiles)]
    if mode == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, _keep_what_is_costly) if mode == "selective" else None
    rest = HostRest(len(units)) if offload else None
    for index, unit in enumerate(units):
        unit.forward = _checkpointed(unit.forward, contexts, partial(rest.of_unit, index) if rest else None)


def _keep_what_is_costly(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep results of matrix products, attention kernels and exchanges between ranks; recompute what is elementwise."""
    name = getattr(op, "__name__", str(op)).split(".")[0]
    costly = name in PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(
    forward: Forward,
    contexts: Callable[[], Any] | None = None,
    resting: Callable[[], AbstractContextManager[None]] | None = None,
) -> Forward:
    """``forward`` under non-reentrant checkpointing, which allows keyword arguments and inputs without gradient."""
    options: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with resting() if resting else nullcontext():
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, **options)

    return run


def _parts_beside_tiled_mlp(block: nn.Module, tiles: int) -> list[nn.Module]:
    """Tile the block's MLP and return its other parts."""
    children = dict(block.named_children())
    name = next((name for name in MLP_NAMES if name in children), None)
    if name is None or any("expert" in inner for inner, _ in children[name].named_modules()):
        found = "a mixture of experts" if name else f"only {sorted(children)}"
        raise ModelError(
            f"model.mlp_tiles={tiles} needs a plain MLP in each block; {type(block).__name__} has {found}. "
            "Set model.mlp_tiles=1."
        )
    mlp = children.pop(name)
    mlp.forward = _tiled(mlp.forward, tiles)
    return list(children.values())


def _tiled(forward: Forward, tiles: int) -> Forward:
    """A function of [R, S, D] that treats each token alone, run tile by tile, each recomputed in the backward pass."""
    tile_forward = _checkpointed(forward)

    def run(hidden: Tensor) -> Tensor:
        parts = hidden.chunk(tiles, dim=1)
        return torch.cat([tile_forward(part) for part in parts], dim=1)

    return run


@dataclass(eq=False)
class _Resting:
    """A tensor in host memory, on its way there or back.

    Attributes:
        device: where it belongs.
        host: its copy.
        copied: on CUDA, the end of the last copy.
        present: its storage on the device while there, else None.
    """

    device: torch.device
    host: Tensor
    copied: torch.cuda.Event | None
    present: Tensor | None


class HostRest:
    """Rests the inputs of checkpointed units in page-locked host memory between forward and backward.

    Copies run on a stream of their own. Going out, at most two inputs are on the device: before the third is sent,
    the compute stream waits for the first to have left. Coming back, the one needed next is fetched while the present
    one is in use. The last unit's input stays, as it is needed at once. On CPU it makes plain copies.

    Hooks on saved tensors reach exactly the inputs, for inside a checkpoint its own hooks take over.
    """

    def __init__(self, units: int) -> None:
        """For a model of so many checkpointed units, of which the last keeps its input."""
        self.units = units
        self.waiting: list[_Resting] = []
        self._stream: torch.cuda.Stream | None = None

    def of_unit(self, index: int) -> AbstractContextManager[None]:
        """Context in which the input of unit ``index`` is saved."""
        if index == 0:
            self.waiting.clear()  # of a forward pass that had no backward
        if index == self.units - 1:
            return nullcontext()
        hooks: AbstractContextManager[None] = saved_tensors_hooks(self._pack, self._unpack)  # type: ignore[assignment]
        return hooks

    def _pack(self, tensor: Tensor) -> _Resting | Tensor:
        if not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.is_cuda:
            resting = self._send_out(tensor)
        else:
            resting = _Resting(tensor.device, tensor.detach().to("cpu", copy=True), None, None)
        self.waiting.append(resting)
        return resting

    def _unpack(self, kept: _Resting | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept in self.waiting:  # all that was saved after it has been used
            del self.waiting[self.waiting.index(kept) :]
        if kept.copied is None:
            return kept.host.to(kept.device)
        self._fetch(kept)
        torch.cuda.current_stream(kept.device).wait_event(kept.copied)
        tensor, kept.present = kept.present, None
        if self.waiting:
            self._fetch(self.waiting[-1])
        assert tensor is not None
        return tensor

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream

    def _send_out(self, tensor: Tensor) -> _Resting:
        compute, side = torch.cuda.current_stream(tensor.device), self._side_stream(tensor.device)
        if len(self.waiting) >= 2 and (earlier := self.waiting[-2]).copied is not None:
            compute.wait_event(earlier.copied)
            earlier.present = None  # the compute stream has waited, so the allocator may hand its memory out again
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        side.wait_stream(compute)
        with torch.cuda.stream(side):
            host.copy_(tensor.detach(), non_blocking=True)
            copied = side.record_event()
        return _Resting(tensor.device, host, copied, tensor.detach())

    def _fetch(self, resting: _Resting) -> None:
        """Begin to bring a tensor back, unless it is on the device still or on its way."""
        if resting.present is not None:
            return
        compute, side = torch.cuda.current_stream(resting.device), self._side_stream(resting.device)
        # Allocated on the compute stream, where it is freed; the side stream waits for what used the memory before.
        present = torch.empty(resting.host.shape, dtype=resting.host.dtype, device=resting.device)
        side.wait_stream(compute)
        with torch.cuda.stream(side):
            present.copy_(resting.host, non_blocking=True)
            resting.copied = side.record_event()
        resting.present = present
