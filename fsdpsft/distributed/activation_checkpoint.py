"""Trade time for memory: recompute activations in the backward pass, rest them in host memory, tile the MLP.

All of it wraps ``forward`` of existing modules: no module is added, so parameter names do not change, and FSDP's hooks,
which sit on the module's call, do not run a second time when a block is recomputed. Every mode computes the same
numbers by the same kernels; gradients are bit-identical on CPU, except that tiles change the shape, and so the
rounding, of the MLP's products.

What one block of T tokens keeps until its backward pass (D: hidden size, I: the MLP's width, Q and K: width of all
query heads and of all key or value heads), and what is made again then:

    none         everything: inputs of each product, norm and activation, in float32 where a norm works in it
    selective    the inputs of attention and of the MLP, 2 T D; results of their products but the last, Q + 2 K and 2 I
                 a token; attention's output, Q a token; what came by an exchange. Norms, rotary embedding, the MLP's
                 activation and what adapters add are made again, no other product, attention or exchange is. Attention
                 and MLP are units of their own: while one is made again and passed back, nothing of the other is alive
    full         the block's input, T D; the whole block is made again, but for its last product. Two units would keep
                 T D more for each block to save the smaller one's intermediates once, which is worse in all but the
                 shallowest models (measured). Not so where kept inputs rest in host memory: then there are two
    mlp_tiles    the inputs of attention and of the MLP, 2 T D; with ``selective`` also what it keeps of attention.
                 Never more than one tile of the MLP's intermediates

Inside a compiled unit no single operator can be seen. There, selective keeps what stands outside: attention's output
and what came by an exchange. What the compiler has fused is made again as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from fsdpsft.errors import ConfigError, ModelError

MLP_NAMES = ("mlp", "feed_forward", "ffn")
FEW_TERMS = 256
"""A product that sums no more of them is made as fast as its result is read back from memory: GPUs do some 250
operations in the time of one byte."""
PRODUCTS = frozenset({"mm", "addmm", "linear", "_grouped_mm", "_scaled_mm", "all_to_all_single"})

Forward = Callable[..., Any]
Split = Callable[[nn.Module], Sequence[nn.Module] | None]
"""Takes a block apart into modules that can be recomputed each alone, in forward order; None where it cannot."""


def apply(
    blocks: Sequence[nn.Module],
    mode: str,
    *,
    offload: bool = False,
    mlp_tiles: int = 1,
    split: Split = lambda block: None,
    prepare: Callable[[nn.Module], None] = lambda unit: None,
) -> None:
    """Set up checkpointing of a model's decoder blocks, in place; before FSDP.

    Args:
        blocks: the decoder blocks in forward order.
        mode: ``none``, ``selective`` or ``full``.
        offload: keep the inputs of checkpointed units in host memory until their backward pass.
        mlp_tiles: above 1, each block's MLP runs over this many slices of the tokens, each recomputed on its own. The
            block's other parts then are units of their own: with the whole block as one, the MLP would run three times
            instead of twice.
        split: how to take a block apart, where that saves memory.
        prepare: called with each unit before its forward is wrapped (to compile it).

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
    units: list[nn.Module] = []
    for block in blocks:
        mlp = _plain_mlp(block, mlp_tiles) if mlp_tiles > 1 else None
        parts = list(split(block) or ()) if mode == "selective" or offload or mlp is not None else []
        parts = parts or ([block] if mlp is None else list(block.children()))
        for part in parts:
            prepare(part)
        if mlp is not None:
            mlp.forward = _tiled(mlp.forward, mlp_tiles)
        units += [part for part in parts if part is not mlp]
    if mode == "none":
        return
    rest = HostRest(len(units)) if offload else None
    for index, unit in enumerate(units):
        resting = partial(rest.of_unit, index) if rest else None
        unit.forward = _checkpointed(unit.forward, keep=mode == "selective", resting=resting)


def _checkpointed(
    forward: Forward, *, keep: bool = False, resting: Callable[[], AbstractContextManager[None]] | None = None
) -> Forward:
    """``forward`` under non-reentrant checkpointing, which allows keyword arguments and inputs without gradient.

    Args:
        keep: results that are costly to make.
        resting: context in which the inputs are saved.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        work, inputs = _closed_over_constants(forward, args, kwargs)
        with resting() if resting else nullcontext():
            if not keep:
                return checkpoint(work, *inputs, use_reentrant=False)
            results: _Results = deque()
            output = checkpoint(
                work, *inputs, use_reentrant=False, context_fn=lambda: (_Keep(results), _Reuse(results))
            )
        _forget_last(results, output)
        return output

    return run


def _closed_over_constants(
    forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Forward, list[Any]]:
    """A function of what gradients go back to, and that: what a closure holds, no hook can send to the host."""
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.requires_grad]
    others = {name: value for name, value in kwargs.items() if name not in names}
    count = len(args)

    def work(*given: Any) -> Any:
        return forward(*given[:count], **dict(zip(names, given[count:], strict=True)), **others)

    return work, [*args, *(kwargs[name] for name in names)]


_Results = deque[tuple[Any, Any]]
"""Costly operators of a unit and their results, in the order they ran."""


class _Unit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator of a unit; compiled regions stay compiled, and are made again as a whole."""

    supports_higher_order_operators = True

    def __init__(self, results: _Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let the compiler work inside."""
        return True


class _Keep(_Unit):  # type: ignore[no-untyped-call]
    """The forward pass: keeps results of matrix products, attention kernels and exchanges between ranks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_costly(func, args):  # detached, or they would keep the graph alive that keeps them
            self.results.append((func, tree_map_only(Tensor, Tensor.detach, result)))
        return result


class _Reuse(_Unit):  # type: ignore[no-untyped-call]
    """The recomputation: the same operators in the same order find their results made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.results or not _is_costly(func, args):
            return func(*args, **(kwargs or {}))
        kept, result = self.results.popleft()
        assert kept is func, f"{func} is recomputed where {kept} ran: the forward pass must do the same each time"
        assert all(tensor._version == 0 for tensor in tree_leaves(result) if isinstance(tensor, Tensor)), (
            f"a result of {func} was written over, so it cannot be used again"
        )
        return result


def _is_costly(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator's result is kept: a product, unless it sums few terms for its width, as an adapter's does."""
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        terms, columns = args[-1].shape
        return terms > min(FEW_TERMS, columns // 16)  # type: ignore[no-any-return]
    return _may_be_costly(op)


@cache
def _may_be_costly(op: Any) -> bool:
    if isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable:
        return False  # the result is where its caller wants it, not what it returns
    name = getattr(op, "__name__", str(op)).split(".")[0]
    return name in PRODUCTS or "attention" in name or "attn" in name


def _forget_last(results: _Results, output: Any) -> None:
    """Drop the last result where it is what the unit returns: the recomputation ends before it."""
    made = {tensor.untyped_storage()._cdata for tensor in tree_leaves(output) if isinstance(tensor, Tensor)}
    if results and {t.untyped_storage()._cdata for t in tree_leaves(results[-1][1]) if isinstance(t, Tensor)} & made:
        results.pop()


def _plain_mlp(block: nn.Module, tiles: int) -> nn.Module:
    """The block's MLP, which must treat each token alone."""
    children = dict(block.named_children())
    name = next((name for name in MLP_NAMES if name in children), None)
    if name is None or any("expert" in inner for inner, _ in children[name].named_modules()):
        found = "a mixture of experts" if name else f"only {sorted(children)}"
        raise ModelError(
            f"model.mlp_tiles={tiles} needs a plain MLP in each block; {type(block).__name__} has {found}. "
            "Set model.mlp_tiles=1."
        )
    return children[name]


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
        # Some versions of torch's checkpoint save an empty tensor beside the inputs.
        if not tensor.is_floating_point() or not tensor.numel() or isinstance(tensor, nn.Parameter):
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
