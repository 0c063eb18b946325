"""What is done to a model's blocks leaves their gradients as they were: proven on the model itself, at every start.

One block of each kind is run on a short batch of several documents before and after each change: kernels, compile,
checkpointing with offload and tiles. Weights are still on meta then, so a block is lent made-up ones and gets its own
back: of all the model, one block at a time takes memory, with its gradients, and no weights are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from fsdpsft.batch import PackedBatch, Sample, pack
from fsdpsft.errors import ModelError, UserError
from fsdpsft.model.attention import Attend, AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.sft_model import decoder_blocks

LENGTHS = (11, 5, 14)
SAME_KERNELS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference of a gradient that rounding explains where the same kernels run."""
OTHER_KERNELS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The same where others do, which round elsewhere."""
OTHER_EXPERTS = 1.0
"""The same for a mixture in bfloat16: rounding may send a token to another expert."""
LARGE = 4.0
"""Times the usual size of weights: what is clamped or capped in a block is to reach its bounds."""
SAMPLED = 1 << 14  # entries of a gradient that are compared, at equal distances

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """What is done to a model, in the words of an error, and what to set to do without."""

    what: str
    instead: str


def sampled(gradient: Tensor, entries: int) -> Tensor:
    """Up to so many entries of a gradient, at equal distances, in float32 on the host."""
    flat = gradient.detach().flatten()
    return flat[:: -(-flat.numel() // entries)].float().cpu().clone()


def worst(found: Gradients, expected: Gradients) -> tuple[str, float]:
    """The gradient that differs most, and by how much of its norm; NaN where one is.

    A gradient that is zero but for rounding (a key's bias cannot change a softmax) is measured by a thousandth of the
    largest one.
    """
    floor = max(1e-3 * max(float(gradient.norm()) for gradient in expected.values()), 1e-30)
    off = {n: float((found[n] - e).norm()) / max(float(e.norm()), floor) for n, e in expected.items()}
    return max(off.items(), key=lambda item: float("inf") if np.isnan(item[1]) else item[1])


@dataclass
class _Kind:
    """The first block of its kind, and what the model calls it with: for all tokens, and for this process's."""

    block: nn.Module
    name: str
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class BlockProof:
    """Gradients of one block of each kind, compared before and after each change to the model.

    Until ``compute_with``, in float32 with the reference attention on all tokens.

    Attributes:
        draws: whether a block draws random numbers in training; it is then proven in evaluation mode.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, device: torch.device, *, packed: bool, place: tuple[int, int]
    ) -> None:
        """See what the plain blocks are called with, and run them.

        Args:
            causal_lm: on meta, before anything but adapters changed it.
            device: where training computes.
            packed: whether documents share a row.
            place: this process's rank in its Ulysses group, and the group's size.

        Raises:
            ModelError: a block cannot be run by itself.
        """
        self.model, self.device, self.draws = causal_lm, device, False
        self.batch = _batch(packed, place[1])
        self.attend, self.dtype, self.whole = attend_sdpa, torch.float32, True
        self.problems: list[str] = []
        blocks = decoder_blocks(causal_lm)
        self.kinds = _kinds(causal_lm, blocks)
        try:
            for part in ((0, 1), place):
                _capture(causal_lm, blocks, self.kinds, self.batch, part)
            before = _random_states(device)
            self._gradients()
            self.draws = any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True))
        except UserError:
            raise
        except Exception as error:  # whatever it is, this class does not do what we think
            raise ModelError(
                f"a block of {type(causal_lm).__name__} cannot be run by itself, so its gradients cannot be proven: "
                f"{type(error).__name__}: {error}. Please report the model's name."
            ) from error

    def compute_with(self, attend: Attend, dtype: torch.dtype) -> None:
        """From now on, run blocks as the training does: its attention, precision, and this process's tokens."""
        self.attend, self.dtype, self.whole = attend, dtype, False

    @contextmanager
    def unchanged(self, change: Change, *, same_kernels: bool) -> Iterator[None]:
        """Note in ``problems`` where a change, made inside this context, changes a gradient.

        Args:
            change: what is done.
            same_kernels: whether rounding is to stay the same. Weights are then so large that clamps reach their
                bounds; where rounding differs, so large ones would spread the difference.
        """
        size = LARGE if same_kernels else 1.0
        expected = self._gradients(size)
        yield
        try:
            found = self._gradients(size)
        except RuntimeError as error:
            self.problems.append(f"{change.what} ends in an error: {error}. {change.instead}")
            return
        for kind in self.kinds:
            name, off = worst(found[kind.name], expected[kind.name])
            tolerance = (SAME_KERNELS if same_kernels else OTHER_KERNELS)[self.dtype]
            if not same_kernels and self.dtype != torch.float32 and _is_mixture(kind.block):
                tolerance = OTHER_EXPERTS
            if not off <= tolerance:
                self.problems.append(
                    f"{change.what} changes gradients of {type(self.model).__name__}: in {kind.name}, that of {name} "
                    f"is off by {off:.1e} of its norm, where rounding explains {tolerance:.0e}. {change.instead}"
                )

    def finish(self, total: Callable[[Tensor], Tensor]) -> None:
        """Raise on every process where any of them has found a problem.

        Args:
            total: adds a tensor up over all processes.

        Raises:
            ModelError: the first problem: which change, which gradient, how far off, and what to set.
        """
        if int(total(torch.tensor([len(self.problems)], device=self.device))):
            raise ModelError((self.problems or ["another process found wrong gradients; its message says which"])[0])

    def _gradients(self, size: float = 1.0) -> dict[str, Gradients]:
        """Gradients by kind of block and name."""
        self.model.train(not self.draws)
        found = {kind.name: self._run(kind, size) for kind in self.kinds}
        self.model.train()
        return found

    def _run(self, kind: _Kind, size: float) -> Gradients:
        args, kwargs = tree_map_only(Tensor, partial(_moved, like=self), kind.calls[0 if self.whole else 1])
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = _made_up(hidden.shape, self.device, self.dtype).contiguous().requires_grad_()
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        if "attention_context" in kwargs:
            kwargs = {**kwargs, "attention_context": AttentionContext.of(self.batch, self.attend, self.device)}
        with _lent_weights(kind.block.modules(), self.device, self.dtype, size):
            output = kind.block(*args, **kwargs)
            output = next(x for x in tree_leaves(output) if isinstance(x, Tensor))
            loss = (output * _made_up(output.shape, self.device, self.dtype)).sum()
            inputs = {"its input": hidden, **{n: p for n, p in kind.block.named_parameters() if p.requires_grad}}
            gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {n: sampled(g, SAMPLED) for n, g in zip(inputs, gradients, strict=True) if g is not None}


def _batch(packed: bool, size: int) -> PackedBatch:
    lengths = (*LENGTHS[:-1], LENGTHS[-1] + -sum(LENGTHS) % size)
    ids = [np.arange(n, dtype=np.uint32) + 7 * row for row, n in enumerate(lengths)]
    samples = [Sample(x, np.ones(len(x), np.float32), row) for row, x in enumerate(ids)]
    return pack(samples, pad_token_id=0, pad_to_multiple=size, padded=not packed)


def _kinds(causal_lm: PreTrainedModel, blocks: list[nn.Module]) -> list[_Kind]:
    """The first block of each kind: of a class, parts, shapes, and type of layer."""
    layer_types = getattr(causal_lm.config.get_text_config(), "layer_types", None) or ()
    found: dict[Any, _Kind] = {}
    for index, (block, layer_type) in enumerate(itertools.zip_longest(blocks, layer_types[: len(blocks)])):
        parts = tuple((name, type(module)) for name, module in block.named_modules())
        shapes = tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
        kind = _Kind(block, f"block {index} ({type(block).__name__})")
        found.setdefault((layer_type, parts, shapes), kind)
    return list(found.values())


class _Seen(Exception):  # noqa: N818 - not an error
    """Raised when all blocks to be proven have been called."""


def _capture(
    causal_lm: PreTrainedModel, blocks: list[nn.Module], kinds: list[_Kind], batch: PackedBatch, place: tuple[int, int]
) -> None:
    """Note what the model's own forward calls each kind's block with, for this process's slice of the tokens.

    Blocks return their input. Weights outside of them, embeddings above all, take no memory.
    """
    rank, size = place
    length = batch.input_ids.shape[1] // size
    here = slice(rank * length, (rank + 1) * length)
    waiting = {id(kind.block): kind for kind in kinds}

    def recorder(block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if id(block) in waiting:
                waiting.pop(id(block)).calls.append((args, kwargs))
            if not waiting:
                raise _Seen
            return args[0] if args else kwargs["hidden_states"]

        return forward

    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in causal_lm.base_model.modules() if module not in inside]
    plain = [(block, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = recorder(block)
        with torch.no_grad(), _lent_weights(outside, torch.device("cpu"), torch.float32, real=False):
            causal_lm.base_model(
                input_ids=batch.input_ids[:, here],
                position_ids=batch.position_ids[:, here],
                use_cache=False,
                attention_context=AttentionContext.of(batch, attend_sdpa),
            )
    except _Seen:
        pass
    finally:
        for block, forward in plain:
            if forward is None:
                del block.forward
            else:
                block.forward = forward
    assert not waiting, "the model's forward did not call every block"


@contextmanager
def _lent_weights(
    modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype, size: float = 1.0, *, real: bool = True
) -> Iterator[None]:
    """Let modules compute with made-up weights, and give them back their own.

    With ``size`` 1 a product keeps the size of its input. Weights that are not ``real`` have rows that overlap in
    memory, which is enough to read them.
    """
    own: list[tuple[dict[str, Any], str, Tensor]] = []
    lent: dict[int, Tensor] = {}
    for module in modules:
        for table in (cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers)):
            own += [(table, name, tensor) for name, tensor in table.items() if tensor is not None]
    for table, name, tensor in own:
        if id(tensor) not in lent:
            lent[id(tensor)] = _lend(tensor, device, dtype, size, real, len(lent))
        table[name] = lent[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in own:
            table[name] = tensor


def _lend(tensor: Tensor, device: torch.device, dtype: torch.dtype, size: float, real: bool, number: int) -> Tensor:
    if not tensor.is_meta and not isinstance(tensor, nn.Parameter):
        return tensor.to(device)
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    values = _made_up(tensor.shape, device, dtype, number)
    if tensor.ndim < 2:
        values = 1 + 0.3 * values  # scales of norms above all, and biases that show
    elif real:
        values = (values * (size / tensor.shape[-1] ** 0.5)).contiguous()
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _made_up(shape: Iterable[int], device: torch.device, dtype: torch.dtype = torch.float32, number: int = 0) -> Tensor:
    """Random numbers of unit size, the same each time, as overlapping windows of a short row: no memory, no time."""
    shape = tuple(shape)
    strides = (11, 7, 3, 1)[-len(shape) :] if shape else ()
    length = 1 + sum(stride * (n - 1) for stride, n in zip(strides, shape, strict=True))
    row = torch.randn(max(length, 1), generator=torch.Generator().manual_seed(number), device="cpu")
    return row.to(device, dtype).as_strided(shape, strides)


def _moved(tensor: Tensor, like: BlockProof) -> Tensor:
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _is_mixture(block: nn.Module) -> bool:
    return any("expert" in name for name, _ in block.named_modules())


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
