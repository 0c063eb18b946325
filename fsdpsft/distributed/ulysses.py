"""Ulysses sequence parallelism: each rank holds a slice of the tokens, and in attention all tokens of some heads.

Two all-to-alls surround any attention function (DeepSpeed-Ulysses, arXiv 2309.14509): one sends q, k and v together
from "my tokens, all heads" to "all tokens, my heads", one carries the output back. Heads are dealt out so
that any number of them works; a key/value head is sent only to the ranks whose query heads use it. Document bounds are
those of the whole batch on every rank, so no lengths are ever communicated.

Cost, a layer and forward pass: two collectives, in which rank r sends

    ``(T / P) * ((H - H_r) + 2 * (S - K_r)) * E``  numbers in the first,
    ``(T / P) * (P - 1) * H_r * E``                numbers in the second,

where H_r and K_r are its query and key/value heads and S is the sum of K_r over the ranks (S = K where no kv head is
shared). The backward pass has the opposite two. Full activation checkpointing repeats the forward's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from fsdpsft.batch import PackedBatch
from fsdpsft.errors import ConfigError


class HeadSlice(Protocol):
    """What is known of a layer's attention: here only that it can be narrowed to some query heads."""

    def for_heads(self, start: int, stop: int) -> Self:
        """The same for query heads ``start:stop`` alone."""


Spec = TypeVar("Spec", bound=HeadSlice)
Context = TypeVar("Context")
Attend = Callable[[Tensor, Tensor, Tensor, Spec, Context], Tensor]


def balanced_bounds(count: int, parts: int) -> tuple[int, ...]:
    """[parts + 1] bounds of consecutive shares of ``range(count)`` whose sizes differ by at most one.

    The larger shares are spread evenly (28 over 8 gives 4 3 4 3 4 3 4 3), so that bounds of groups which could fall
    between two shares do: ``ceil(i * count / parts)``.
    """
    return tuple(-(-i * count // parts) for i in range(parts + 1))


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each rank works on.

    Attributes:
        query: per rank, (start, stop) of its query heads; consecutive, covering all, each once.
        key_value: per rank, (start, stop) of the kv heads its query heads use; neighbours may share one.
    """

    query: tuple[tuple[int, int], ...]
    key_value: tuple[tuple[int, int], ...]


@lru_cache
def head_plan(num_heads: int, num_kv_heads: int, degree: int) -> HeadPlan:
    """Deal query heads out as evenly as whole heads allow, and to each rank the kv heads it needs.

    Raises:
        ConfigError: more ranks than query heads.
    """
    if degree > num_heads:
        raise ConfigError(
            f"ulysses_sequence_parallel_size={degree} exceeds the model's {num_heads} query heads, so some ranks would "
            f"have none. Set it to {num_heads} or less."
        )
    group = num_heads // num_kv_heads
    query = tuple(pairwise(balanced_bounds(num_heads, degree)))
    key_value = tuple((start // group, (stop - 1) // group + 1) for start, stop in query)
    return HeadPlan(query, key_value)


def _deal(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Heads of x [R, H, S/P, E] for each rank as [R, S/P, heads * E]; a head may go to several ranks."""
    x, sizes = x.transpose(1, 2), [stop - start for start, stop in ranges]
    shared = sum(sizes) > x.shape[2]
    # Split where possible: its backward is one concatenation, that of slices a zero-filled whole for each of them.
    parts = [x[:, :, start:stop] for start, stop in ranges] if shared else torch.split(x, sizes, dim=2)
    return [part.flatten(2) for part in parts]


def _exchange(parts: list[Tensor], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send ``parts[d]`` to rank d; the flat concatenation of what comes, ``receive[s]`` numbers from rank s."""
    sent = torch.cat([part.flatten() for part in parts])
    return all_to_all_single_autograd(sent, receive, [part.numel() for part in parts], group)


def _to_heads(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, group: dist.ProcessGroup) -> list[Tensor]:
    """[R, H, S/P, E] and twice [R, K, S/P, E] to this rank's heads of all tokens, [R, h, S, E]."""
    degree, rank = len(plan.query), dist.get_rank(group)
    dealt = [_deal(q, plan.query), _deal(k, plan.key_value), _deal(v, plan.key_value)]
    parts = [torch.cat(columns, dim=-1) for columns in zip(*dealt, strict=True)]
    rows, slice_length, width = parts[rank].shape
    came = _exchange(parts, [rows * slice_length * width] * degree, group).view(degree, rows, slice_length, width)
    whole = came.transpose(0, 1).flatten(1, 2)  # [R, S, width], a view for one row
    widths = [columns[rank].shape[-1] for columns in dealt]
    sizes = [x.shape[-1] for x in (q, k, v)]
    blocks = torch.split(whole, widths, dim=-1)
    return [torch.unflatten(x, -1, (-1, size)).transpose(1, 2) for x, size in zip(blocks, sizes, strict=True)]


def _to_tokens(output: Tensor, plan: HeadPlan, group: dist.ProcessGroup) -> Tensor:
    """This rank's heads of all tokens [R, h, S, E] to all heads of its tokens, [R, H, S/P, E]."""
    degree, (rows, _, length, size) = len(plan.query), output.shape
    parts = list(output.transpose(1, 2).flatten(2).chunk(degree, dim=1))  # each [R, S/P, h * E]
    widths = [(stop - start) * size for start, stop in plan.query]
    tokens = rows * length // degree
    came = torch.split(_exchange(parts, [tokens * width for width in widths], group), [tokens * w for w in widths])
    columns = [x.view(rows, length // degree, width) for x, width in zip(came, widths, strict=True)]
    return torch.unflatten(torch.cat(columns, dim=-1), -1, (-1, size)).transpose(1, 2)


def _match_heads(x: Tensor, query: tuple[int, int], key_value: tuple[int, int], group_size: int) -> Tensor:
    """Repeat kv heads [R, k, S, E] where this rank's query heads do not fall on them in equal numbers.

    Kernels for grouped heads assume that query head i uses kv head ``i // (h / k)``. Where the deal has cut a group,
    each query head gets a copy of its own kv head instead.
    """
    wanted = [head // group_size - key_value[0] for head in range(*query)]
    count = len(wanted)
    if count % x.shape[1] == 0 and wanted == [i // (count // x.shape[1]) for i in range(count)]:
        return x
    heads = torch.split(x, 1, dim=1)  # no index tensor, which would have to be sent to the device
    return torch.cat([heads[head] for head in wanted], dim=1)


def sequence_parallel(attend: Attend[Spec, Context], group: dist.ProcessGroup) -> Attend[Spec, Context]:
    """Wrap an attention function so that it takes and returns this rank's slice of the tokens.

    Args:
        attend: ``attend(q, k, v, spec, context)`` on whole sequences; ``context`` must describe the whole batch.
        group: the Ulysses group, of P ranks that hold consecutive slices in rank order.

    Returns:
        The same signature on q [R, H, S/P, E], k and v [R, K, S/P, E], giving [R, H, S/P, E]. It breaks the graph when
        compiled, so that collectives keep one order on all ranks.
    """
    degree, rank = dist.get_world_size(group), dist.get_rank(group)

    def attend_in_parallel(q: Tensor, k: Tensor, v: Tensor, spec: Spec, context: Context) -> Tensor:
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        plan = head_plan(num_heads, num_kv_heads, degree)
        mine = plan.query[rank]
        q, k, v = _to_heads(q, k, v, plan, group)
        k, v = (_match_heads(x, mine, plan.key_value[rank], num_heads // num_kv_heads) for x in (k, v))
        return _to_tokens(attend(q, k, v, spec.for_heads(*mine), context), plan, group)

    outside_graph: Callable[[Attend[Spec, Context]], Attend[Spec, Context]] = torch.compiler.disable
    return outside_graph(attend_in_parallel)


@dataclass(frozen=True)
class SpreadPlan:
    """How trained positions move so that every rank's head works on equally many, known without communication.

    Attributes:
        send: per destination rank, how many of this rank's trained positions go there.
        receive: per source rank, how many come from there.
        total: trained positions of the whole micro-batch.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a micro-batch; P = 1 gives the whole of it.

    Attributes:
        input_ids: [R, S/P] int64, this rank's slice of each row.
        position_ids: [R, S/P] int64, position in the document, not in the slice.
        trained_index: [m] int64, flat positions in the slice whose label counts, ascending.
        targets: [m'] int64, the ids to predict for what ``spread`` hands this rank.
        loss_weights: [m'] float32, of the same.
        sources: [m'] int64, of the same: the source of each one's sample.
        plan: moves hidden states [m, D] to [m', D].
    """

    input_ids: Tensor
    position_ids: Tensor
    trained_index: Tensor
    targets: Tensor
    loss_weights: Tensor
    sources: Tensor
    plan: SpreadPlan

    def _map(self, function: Callable[[Tensor], Tensor]) -> LocalBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def pin_memory(self) -> LocalBatch:
        """Copy to page-locked host memory, from which a copy to the device does not block."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> LocalBatch:
        """Move all tensors to ``device`` without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


def shard(batch: PackedBatch, rank: int, size: int) -> LocalBatch:
    """Cut rank ``rank`` of ``size`` its part out of a batch on the host.

    The trained positions of all ranks, in rank order and ascending in each, form one list; its balanced consecutive
    shares say whose head works on which, so each rank knows every rank's counts from the batch alone.
    """
    assert batch.input_ids.device.type == "cpu", "a batch is cut on the host, where its counts are known"
    row_length = batch.input_ids.shape[1]
    assert row_length % size == 0, f"rows of {row_length} tokens are not padded to a multiple of {size}"
    length = row_length // size
    rows, columns = np.divmod(batch.trained_index.numpy(), row_length)
    owners = columns // length
    order = np.argsort(owners, kind="stable")
    owned = np.searchsorted(owners[order], np.arange(size + 1))  # bounds of each rank's own in the list
    shares = balanced_bounds(len(order), size)
    own = order[owned[rank] : owned[rank + 1]]
    share = order[shares[rank] : shares[rank + 1]]
    head = batch.trained_index.numpy()[share]
    here = slice(rank * length, (rank + 1) * length)
    send, receive = _overlaps(owned[rank : rank + 2], shares), _overlaps(shares[rank : rank + 2], owned)
    return LocalBatch(
        input_ids=batch.input_ids[:, here].contiguous(),
        position_ids=batch.position_ids[:, here].contiguous(),
        trained_index=torch.from_numpy(rows[own] * length + columns[own] - rank * length),
        targets=batch.labels.flatten()[head],
        loss_weights=batch.loss_weights.flatten()[head],
        sources=batch.trained_sources[share],
        plan=SpreadPlan(send, receive, len(order)),
    )


def _overlaps(interval: np.ndarray | tuple[int, ...], bounds: np.ndarray | tuple[int, ...]) -> tuple[int, ...]:
    """How many of the integers in ``interval`` fall into each of the ranges between ``bounds``."""
    start, stop = interval
    return tuple(int(max(0, min(stop, b) - max(start, a))) for a, b in pairwise(bounds))


def spread(hidden: Tensor, plan: SpreadPlan, group: dist.ProcessGroup | None) -> Tensor:
    """Even the head's work out over the group: this rank's trained positions [m, D] to its share [m', D].

    Differentiable; one all-to-all, none where the batch has no trained position or there is no group. Shares differ
    by at most one, and follow ``LocalBatch.targets``.
    """
    if group is None or plan.total == 0:
        return hidden
    return all_to_all_single_autograd(hidden.contiguous(), list(plan.receive), list(plan.send), group)
