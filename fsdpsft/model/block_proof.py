"""What is done to a model's blocks leaves their gradients as they were: proven on the model at hand, at every start.

One block of each kind is run on a short batch of several documents before and after each change: kernels, compile,
checkpointing with offload and tiles. Weights are still on meta then, so the block is lent made-up ones and gives them
back: of all the model, one block at a time takes memory, with its gradients, and no weights are read. Attention, with
its exchange between processes, is compared with the reference by itself, on what the block has handed to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from fsdpsft.batch import PackedBatch, Sample, pack
from fsdpsft.errors import ModelError
from fsdpsft.model.attention import Attend, AttentionContext, AttentionSpec
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.sft_model import decoder_blocks

LENGTHS = (11, 5, 14)
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative difference of a gradient that rounding explains where the same kernels run."""
OTHER_KERNELS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""The same where others do, which round elsewhere."""
LARGE = 4.0
"""Times the usual size of weights: what is clamped or capped in a block is to reach its bounds."""
SAMPLED = 1 << 14  # entries of a gradient that are compared, at equal distances


Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """What was done to a model, in the words of an error, and what to set to do without."""

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
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    off = {n: float((found[n] - e).norm()) / max(float(e.norm()), floor, 1e-30) for n, e in expected.items()}
    return max(off.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])


@dataclass
class _Kind:
    """The first block of its kind, and what the model's forward calls it with; for all tokens and this process's."""

    block: nn.Module
    name: str
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class BlockProof:
    """Gradients of one block of each kind, compared before and after each change to the model.

    Attributes:
        draws: whether a block draws random numbers in training; it is then proven in evaluation mode.
    """

    def __init__(self, causal_lm: PreTrainedModel, device: torch.device, *, packed: bool, place: tuple[int, int]) -> None:
        """Run the plain blocks.

        Args:
            causal_lm: on meta, before anything but adapters changed it.
            device: where training computes.
            packed: whether documents share a row.
            place: this process's rank in its Ulysses group, and the group's size.

        Raises:
            ModelError: a block cannot be run by itself.
        """
        self.device, self.place, self.draws = device, place, False
        self.model = causal_lm
        self.batch = _batch(packed, place[1])
        self.attended: dict[str, list[tuple[Tensor, Tensor, Tensor, AttentionSpec]]] = {}
        self.problems: list[str] = []
        blocks = decoder_blocks(causal_lm)
        self.kinds = _kinds(causal_lm, blocks)
        try:
            for size in sorted({1, place[1]}):
                _capture(causal_lm, blocks, self.kinds, self.batch, (place[0] % size, size))
            before = _random_states(device)
            self.expected = self._gradients(torch.float32, attend=None)
            self.draws = any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True))
            if self.draws:
                self.expected = self._gradients(torch.float32, attend=None)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ModelError(
                f"a block of {type(causal_lm).__name__} cannot be run by itself to prove its gradients: "
                f"{type(error).__name__}: {error}. Please report the model's name."
            ) from error

    def kernels(self, change: Change) -> None:
        """Compare the blocks, whose kernels have just been changed, with what they were; in float32."""
        self._check(lambda: self._gradients(torch.float32, attend=None), self.expected, OTHER_KERNELS[torch.float32], change)

    def attention(self, attend: Attend, dtype: torch.dtype, change: Change) -> None:
        """Compare an attention function with the reference on what the blocks hand to it; each process its slice."""
        for name, calls in self.attended.items():
            for *whole, spec in calls:
                expected = {name: self._attended(attend_sdpa, whole, spec, dtype)}
                slices = [x.chunk(self.place[1], dim=2)[self.place[0]] for x in whole]
                self._check(
                    lambda own=slices, spec=spec, name=name: {name: self._attended(attend, own, spec, dtype)},  # type: ignore[misc]
                    expected, OTHER_KERNELS[dtype], change,
                )  # fmt: skip

    def _attended(self, attend: Attend, given: list[Tensor], spec: AttentionSpec, dtype: torch.dtype) -> Gradients:
        """Attention's output and gradients for this process's slice, from all tokens or from that slice."""
        rank, size = self.place
        length = self.batch.input_ids.shape[1]
        given = [x.detach().to(self.device, dtype).clone().requires_grad_() for x in given]
        sinks = None if spec.sinks is None else spec.sinks.to(self.device, dtype)
        context = AttentionContext.of(self.batch, attend, self.device)
        output = attend(given[0], given[1], given[2], replace(spec, dropout=0.0, sinks=sinks), context)
        weights = _made_up((*output.shape[:2], length, output.shape[3]), self.device, dtype)
        if output.shape[2] < length:
            weights = weights.chunk(size, dim=2)[rank]
        found = (output.detach(), *torch.autograd.grad((output * weights).sum(), given))
        own = [x.chunk(size, dim=2)[rank] if x.shape[2] == length else x for x in found]
        return {n: sampled(x, SAMPLED) for n, x in zip(("attention", "query", "key", "value"), own, strict=True)}

    def before(self, attend: Attend, dtype: torch.dtype) -> dict[str, Gradients]:
        """Gradients in the run's own precision, with weights so large that clamps reach their bounds."""
        return self._gradients(dtype, attend, LARGE)

    def same(self, expected: dict[str, Gradients], attend: Attend, dtype: torch.dtype, change: Change) -> None:
        """Compare the blocks with ``expected``, of ``before``, where the same kernels run."""
        self._check(lambda: self._gradients(dtype, attend, LARGE), expected, TOLERANCE[dtype], change)

    def _check(
        self, run: Callable[[], dict[str, Gradients]], expected: dict[str, Gradients], tolerance: float, change: Change
    ) -> None:
        """Note the gradient that differs most where rounding does not explain it."""
        try:
            found = run()
        except RuntimeError as error:
            self.problems.append(f"{change.what} ends in an error: {error}. {change.instead}")
            return
        for kind, gradients in expected.items():
            name, off = worst(found[kind], gradients)
            if not off <= tolerance:
                self.problems.append(
                    f"{change.what} changes gradients of {type(self.model).__name__}: in {kind}, that of {name} is off "
                    f"by {off:.1e} of its norm, where rounding explains {tolerance:.0e}. {change.instead}"
                )

    def finish(self, total: Callable[[Tensor], Tensor]) -> None:
        """Raise on every process what any of them has found.

        Args:
            total: adds a tensor up over all processes.

        Raises:
            ModelError: the first difference: which change, which gradient, how far off, and what to set.
        """
        if int(total(torch.tensor([len(self.problems)], device=self.device))):
            found = self.problems or ["another process found that gradients are wrong; its message says which"]
            raise ModelError(found[0])

    def _gradients(self, dtype: torch.dtype, attend: Attend | None, size: float = 1.0) -> dict[str, Gradients]:
        """Gradients by kind of block and name; ``attend`` None: the reference attention on all tokens."""
        self.model.train(not self.draws)
        found = {}
        for kind in self.kinds:
            args, kwargs = kind.calls[0 if attend is None else -1]
            found[kind.name] = self._run(kind, args, kwargs, dtype, attend, size)
        self.model.train()
        return found

    def _run(
        self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype, attend: Attend | None,
        size: float,
    ) -> Gradients:
        watched = attend or self._recording(kind.name)
        context = AttentionContext.of(self.batch, watched, self.device)
        args, kwargs = tree_map_only(Tensor, partial(_moved, device=self.device, dtype=dtype), (args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = _made_up(hidden.shape, self.device, dtype).contiguous().requires_grad_()
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        if "attention_context" in kwargs:
            kwargs["attention_context"] = context
        with _lent_weights(kind.block.modules(), self.device, dtype, size):
            output = kind.block(*args, **kwargs)
            output = next(x for x in tree_leaves(output) if isinstance(x, Tensor))
            trained = {name: p for name, p in kind.block.named_parameters() if p.requires_grad}
            loss = (output * _made_up(output.shape, self.device, dtype)).sum()
            inputs = {"the block's input": hidden, **trained}
            gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {n: sampled(g, SAMPLED) for n, g in zip(inputs, gradients, strict=True) if g is not None}

    def _recording(self, name: str) -> Attend:
        calls = self.attended[name] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
            kept = replace(spec, sinks=None if spec.sinks is None else spec.sinks.detach())
            calls.append((q.detach(), k.detach(), v.detach(), kept))
            return attend_sdpa(q, k, v, spec, context)

        return attend


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

    Blocks hand on what they are given. Weights outside of them, embeddings above all, take no memory.
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
                input_ids=batch.input_ids[:, here], position_ids=batch.position_ids[:, here], use_cache=False,
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

    Args:
        modules: whose parameters are lent.
        device: where they compute.
        dtype: in what precision.
        size: of the weights, 1 where a product keeps the size of what it is given.
        real: with memory of their own; otherwise rows overlap, which is enough to be read.
    """
    own: list[tuple[dict[str, Any], str, Tensor]] = []
    lent: dict[int, Tensor] = {}
    for module in modules:
        for table in (module._parameters, module._buffers):
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


def _made_up(
    shape: Iterable[int], device: torch.device, dtype: torch.dtype = torch.float32, number: int = 0
) -> Tensor:
    """Random numbers of unit size, the same each time, as overlapping windows of a short row: no memory, no time."""
    shape = tuple(shape)
    strides = (11, 7, 3, 1)[-len(shape) :] if shape else ()
    length = 1 + sum(stride * (n - 1) for stride, n in zip(strides, shape, strict=True))
    row = torch.randn(max(length, 1), generator=torch.Generator().manual_seed(number), device="cpu")
    return row.to(device, dtype).as_strided(shape, strides)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
