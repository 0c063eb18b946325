"""Trade time for memory: recompute activations in the backward pass, offload them to the host, tile the MLP.

It replaces ``forward`` of existing modules: parameter names do not change, and FSDP's hooks, which sit on the module's
call, do not run again when a block is recomputed. Gradients are bit-identical on CPU in every mode; tiles alone change
the shape, and so the rounding, of the MLP's products.

What one block of T tokens keeps until its backward pass (D: hidden size, I: the MLP's width, Q and K: width of all
query heads and of all key or value heads):

    none         everything: inputs of each product, norm and activation, in float32 where a norm works in it
    selective    the block's input, T D; results of its products but the last, Q + 2 K + D + 2 I a token; attention's
                 output, Q a token; results of an all-to-all. Norms, rotary embedding, the MLP's activation and what
                 adapters add are recomputed, no other product, attention or exchange is
    full         the block's input, T D; the whole block is recomputed, but for its last product
    mlp_tiles    inputs of the block's children instead of the block's; with ``selective`` also what it keeps of
                 attention. Never more than one tile of the MLP's intermediates

Inside a compiled unit, selective sees no operator: it keeps only results from outside it, of attention and all-to-alls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
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
AROUND_OPERATORS = frozenset({"torch._library.autograd", "torch.distributed._functional_collectives"})
"""Modules whose autograd functions stand around operators with a schema, which says what is written to."""

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Recomputation:
    """How activations are kept for the backward pass.

    Attributes:
        mode: ``none``, ``selective`` or ``full``.
        offload: keep the inputs of checkpointed units in host memory until their backward pass.
        mlp_tiles: above 1, each block's MLP runs over this many slices of the tokens, each recomputed on its own. The
            block's other children then are units of their own: with the whole block as one, the MLP would run three
            times instead of twice.
        draws: the blocks draw random numbers, which a recomputation must draw again.
    """

    mode: str
    offload: bool = False
    mlp_tiles: int = 1
    draws: bool = True


def units(blocks: Sequence[nn.Module], mlp_tiles: int = 1) -> list[nn.Module]:
    """The modules that are recomputed each alone, in forward order: blocks, or their children where MLPs are tiled."""
    return list(blocks) if mlp_tiles == 1 else [child for block in blocks for child in block.children()]


def apply(blocks: Sequence[nn.Module], how: Recomputation) -> None:
    """Set up checkpointing of a model's decoder blocks, in place; after compile and before FSDP.

    Args:
        blocks: the decoder blocks in forward order.
        how: what to recompute.

    Raises:
        ConfigError: ``offload`` without checkpointing, which alone knows what may leave the device.
        ModelError: ``mlp_tiles`` for a block in which no plain MLP is found.
    """
    assert how.mode in ("none", "selective", "full"), how.mode
    if how.offload and how.mode == "none":
        raise ConfigError(
            "model.activation_offload=true moves what checkpointing keeps; set "
            "model.enable_gradient_checkpointing=selective or full."
        )
    tiled = [_plain_mlp(block, how.mlp_tiles) for block in blocks] if how.mlp_tiles > 1 else []
    for mlp in tiled:
        mlp.forward = _tiled(mlp.forward, how)
    if how.mode == "none":
        return
    whole = [unit for unit in units(blocks, how.mlp_tiles) if unit not in tiled]
    offload = HostOffload(len(whole)) if how.offload else None
    for index, unit in enumerate(whole):
        inputs_kept = partial(offload.of_unit, index) if offload else nullcontext
        unit.forward = _checkpointed(unit.forward, how, inputs_kept)


def _checkpointed(
    forward: Forward, how: Recomputation, inputs_kept: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Forward:
    """``forward`` under non-reentrant checkpointing, which allows keyword arguments and inputs without gradient.

    Args:
        forward: of a unit.
        how: in mode ``selective``, results that are costly to make are kept.
        inputs_kept: context in which the inputs are saved.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        work, inputs = _closed_over_constants(forward, args, kwargs)
        recomputed = partial(checkpoint, work, *inputs, use_reentrant=False, preserve_rng_state=how.draws)
        with inputs_kept():
            if how.mode != "selective":
                return recomputed()
            results: _Results = deque()
            keep = _Keep(results)
            output = recomputed(context_fn=lambda: (keep, _Reuse(results)))
        keep.release(output)
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


@dataclass(eq=False)
class _Kept:
    """A costly operator and its result, detached; None: to be made again."""

    op: Any
    result: Any
    versions: list[int]


_Results = deque[_Kept]
"""Costly operators of a unit in the order they ran."""


class _Unit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator of a unit; compiled regions stay compiled, and are recomputed as a whole."""

    supports_higher_order_operators = True

    def __init__(self, results: _Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let the compiler work inside."""
        return True


class _Keep(_Unit):  # type: ignore[no-untyped-call]
    """The forward pass: keeps results of matrix products, attention kernels and exchanges between ranks.

    A kept result shares its memory with the block's computation. Before anything may write there, what is kept moves
    to a copy. What may write: an operator whose schema says so, one without a schema, and code that torch does not see,
    such as a Triton kernel. A gradient comes back through such code only by an ``autograd.Function``, whose arguments
    this context sees. What the unit returns may be written to later, so it is not kept.
    """

    def __init__(self, results: _Results) -> None:
        super().__init__(results)
        self.exposed: dict[int, _Kept] = {}  # by the storages that the block can still reach

    def __enter__(self) -> _Keep:
        """Watch operators and autograd functions."""
        global _watching
        _watching = self
        setattr(_SingleLevelFunction, "apply", classmethod(_apply_watched))  # noqa: B010  # what mypy cannot follow
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Watch no longer."""
        global _watching
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        delattr(_SingleLevelFunction, "apply")
        _watching = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.exposed and (written := _written(func)) is not None:
            self.protect([args[i] for i in written if isinstance(i, int) and i < len(args)])
            self.protect([kwargs[name] for name in written if name in kwargs])
        elif self.exposed and not isinstance(func, torch._ops.OpOverload):
            self.protect((args, kwargs))
        result = func(*args, **kwargs)
        if _is_costly(func, args):
            own = tree_map_only(Tensor, _detached, result)
            self.results.append(_Kept(func, own, [tensor._version for tensor in _tensors(own)]))
            self.exposed.update(dict.fromkeys(_storages(own), self.results[-1]))
        return result

    def protect(self, given: Any) -> None:
        """Before something may write to the tensors in ``given``: what is kept there moves to a copy of its own."""
        for kept in {self.exposed[s] for s in _storages(given) if s in self.exposed}:
            for storage in _storages(kept.result):
                del self.exposed[storage]
            with torch.no_grad():
                if str(kept.op).startswith("_c10d_functional"):
                    torch.ops._c10d_functional.wait_tensor(kept.result)
                kept.result = tree_map_only(Tensor, Tensor.clone, kept.result)
            kept.versions = [0] * len(kept.versions)

    def release(self, output: Any) -> None:
        """At the unit's end: let go of what it returns, and of the last product where no backward reads its result."""
        for storage in _storages(output):
            if storage in self.exposed:
                self.exposed[storage].result = None
        last = self.results[-1] if self.results else None
        if last and isinstance(last.result, Tensor) and _ends_in_product(output, last.result.shape[-1]):
            last.result = None
        self.exposed.clear()


_watching: _Keep | None = None  # the unit at work


def _apply_watched(cls: type[_SingleLevelFunction], *args: Any, **kwargs: Any) -> Any:
    """In the place where ``Function.apply`` calls torch's own, so that no alias of an ``apply`` goes past it."""
    if _watching is not None and cls.__module__ not in AROUND_OPERATORS:
        _watching.protect((args, kwargs))
    return super(_SingleLevelFunction, cls).apply(*args, **kwargs)  # type: ignore[misc]


class _Reuse(_Unit):  # type: ignore[no-untyped-call]
    """The recomputation: the same operators in the same order find their results made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_costly(func, args):
            return func(*args, **(kwargs or {}))
        assert self.results, f"{func} is recomputed, but the forward pass ended before: it must do the same each time"
        kept = self.results.popleft()
        assert kept.op is func, f"{func} is recomputed where {kept.op} ran: the forward pass must do the same each time"
        if kept.result is None:
            return func(*args, **(kwargs or {}))
        if kept.versions != [tensor._version for tensor in _tensors(kept.result)]:
            raise ModelError(
                f"a result of {func} was written to after its block had ended, so it cannot be used again. Set "
                "model.enable_gradient_checkpointing=full or none."
            )
        return kept.result


def _ends_in_product(output: Any, width: int) -> bool:
    """Whether a unit returns a product of this width, perhaps added to something, which reads neither in backward."""
    nodes: list[Any] = [tensor.grad_fn for tensor in _tensors(output) if tensor.shape[-1] == width]
    while nodes:
        node = nodes.pop()
        if node is not None and node.name() in ("MmBackward0", "AddmmBackward0"):
            return True
        if node is not None and node.name() in ("AddBackward0", "ViewBackward0", "UnsafeViewBackward0"):
            nodes += [earlier for earlier, _ in node.next_functions]
    return False


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storages(tree: Any) -> Iterable[int]:
    return [tensor.untyped_storage()._cdata for tensor in _tensors(tree)]


def _detached(tensor: Tensor) -> Tensor:
    """Detached, or it would keep the graph alive that keeps it; below autograd, where this key is off by default.

    With it, the version counter is the original's, so that a write to the original shows.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


@cache
def _written(op: Any) -> tuple[int | str, ...] | None:
    """Places and names of the arguments an operator writes to; None where its schema names none, or it has none."""
    if not isinstance(op, torch._ops.OpOverload) or op._schema.name == "_c10d_functional::wait_tensor":
        return None  # to wait for an exchange is to let it write what it returned
    arguments = enumerate(op._schema.arguments)
    written = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return tuple(key for pair in written for key in pair) or None


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


def _tiled(forward: Forward, how: Recomputation) -> Forward:
    """A function of [R, S, D] that treats each token alone, run tile by tile, each recomputed in the backward pass."""
    tile_forward = _checkpointed(forward, Recomputation("full", draws=how.draws))

    def run(hidden: Tensor) -> Tensor:
        return torch.cat([tile_forward(part) for part in hidden.chunk(how.mlp_tiles, dim=1)], dim=1)

    return run


@dataclass(eq=False)
class _Offloaded:
    """A tensor in host memory, or being copied there or back.

    Attributes:
        device: where it belongs.
        host: its copy.
        copied: on CUDA, the end of the last copy.
        present: the tensor on the device while it is there, else None.
    """

    device: torch.device
    host: Tensor
    copied: torch.cuda.Event | None
    present: Tensor | None


class HostOffload:
    """Offloads the inputs of checkpointed units to page-locked host memory between forward and backward.

    Copies run on a stream of their own. In the forward pass at most two inputs are on the device; in the backward pass
    the next one is fetched while one is in use. The last unit's input stays. On CPU it makes plain copies.
    Hooks on saved tensors reach only the inputs, as inside a checkpoint its own hooks apply.
    """

    def __init__(self, units: int) -> None:
        """For a model of so many checkpointed units, of which the last keeps its input."""
        self.units = units
        self.waiting: list[_Offloaded] = []
        self._stream: torch.cuda.Stream | None = None

    def of_unit(self, index: int) -> AbstractContextManager[None]:
        """Context in which the input of unit ``index`` is saved."""
        if index == 0:
            self.waiting.clear()  # of a forward pass that had no backward
        if index == self.units - 1:
            return nullcontext()
        hooks: AbstractContextManager[None] = saved_tensors_hooks(self._pack, self._unpack)  # type: ignore[assignment]
        return hooks

    def _pack(self, tensor: Tensor) -> _Offloaded | Tensor:
        # Some versions of torch's checkpoint save an empty tensor beside the inputs.
        if not tensor.is_floating_point() or not tensor.numel() or isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.is_cuda:
            offloaded = self._send_out(tensor)
        else:
            offloaded = _Offloaded(tensor.device, tensor.detach().to("cpu", copy=True), None, None)
        self.waiting.append(offloaded)
        return offloaded

    def _unpack(self, kept: _Offloaded | Tensor) -> Tensor:
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

    def _send_out(self, tensor: Tensor) -> _Offloaded:
        compute, side = torch.cuda.current_stream(tensor.device), self._side_stream(tensor.device)
        if len(self.waiting) >= 2 and (earlier := self.waiting[-2]).copied is not None:
            compute.wait_event(earlier.copied)
            earlier.present = None  # the compute stream has waited, so the allocator may hand its memory out again
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        side.wait_stream(compute)
        with torch.cuda.stream(side):
            host.copy_(tensor.detach(), non_blocking=True)
            copied = side.record_event()
        return _Offloaded(tensor.device, host, copied, tensor.detach())

    def _fetch(self, offloaded: _Offloaded) -> None:
        """Begin to copy a tensor back, unless it is still on the device or being copied."""
        if offloaded.present is not None:
            return
        compute, side = torch.cuda.current_stream(offloaded.device), self._side_stream(offloaded.device)
        # Allocated on the compute stream, where it is freed; the side stream waits for what used the memory before.
        present = torch.empty(offloaded.host.shape, dtype=offloaded.host.dtype, device=offloaded.device)
        side.wait_stream(compute)
        with torch.cuda.stream(side):
            present.copy_(offloaded.host, non_blocking=True)
            offloaded.copied = side.record_event()
        offloaded.present = present
