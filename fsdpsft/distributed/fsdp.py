"""FSDP2: which modules are sharded, in which precision, how often weights are gathered and how gradients are summed.

Gradients are summed, never averaged: the loss of each micro-batch is already divided by the trained tokens of the
whole step, so FSDP's own division by the number of processes is switched off.

Gathers of a step of m micro-batches through L blocks, where weights are freed after the forward pass (ZeRO-3):

    root (embeddings, last norm, head)   1; where nothing in it is trained, 1 in the whole run
    first block                          m + 1, as a backward pass ends where the next forward pass begins
    last block                           m, as its backward pass begins where its forward pass ends
    each other block                     2 m

and without that (ZeRO-2) one a step for each; a unit in which nothing is trained, one in the whole run. Frozen weights
of a block with adapters are gathered with them; only gradients that exist are reduced.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


@dataclass(frozen=True)
class Sharding:
    """How weights are sharded.

    Attributes:
        compute_dtype: of gathered weights and activations; the stored shards keep their own.
        reduce_dtype: of the gradient reduction.
        reshard_after_forward: free a block after its forward and gather it again for the backward (ZeRO-3).
        offload: shards, gradients and optimiser states rest in host memory.
        min_num_params: smaller blocks are left to the root.
    """

    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard_after_forward: bool
    offload: bool
    min_num_params: int = 0


def shard_model(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, how: Sharding) -> list[FSDPModule]:
    """Shard ``model`` in place: every block is a unit, all else (embeddings, last norm, head) belongs to the root.

    Args:
        model: the root module, whose forward ends in the loss, so that the head is gathered inside it.
        blocks: decoder blocks in forward order.
        mesh: ``(shard,)`` for plain sharding, ``(replicate, shard)`` for hybrid sharding.
        how: precision, when weights are freed, what is offloaded.

    Returns:
        The units to keep whole between a step's micro-batches (see ``prepare_micro_batch``): the root and the first
        block, and all blocks without ``reshard_after_forward``.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=how.compute_dtype, reduce_dtype=how.reduce_dtype, cast_forward_inputs=False
    )
    offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if how.offload else OffloadPolicy()
    for block in blocks:
        if sum(p.numel() for p in block.parameters()) >= how.min_num_params:
            # The last block's backward follows its forward at once: do not free its weights in between.
            reshard = how.reshard_after_forward and block is not blocks[-1]
            fully_shard(
                block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload_policy
            )
    # Nor the root's, which the backward of the head needs.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload_policy)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        # A divide factor alone turns the sum into PREMUL_SUM, which gloo lacks.
        unit.set_force_sum_reduction_for_comms(True)
    frozen = {unit for unit in units if not any(p.requires_grad for p in _own_parameters(unit))}
    for unit in frozen:
        # What is gathered up to the backward pass may stay gathered from then on if no step changes it.
        unit.set_reshard_after_backward(how.reshard_after_forward and unit is not model, recurse=False)
    for block in itertools.takewhile(lambda block: {block, model} <= frozen, blocks):
        assert isinstance(block, FSDPModule)
        block.set_unshard_in_backward(False)  # no gradient comes down to it, but it would be gathered ahead
    first = blocks[0] if blocks[0] in units else model
    return [u for u in units if u not in frozen and (u in (model, first) or not how.reshard_after_forward)]


def _own_parameters(unit: nn.Module) -> list[nn.Parameter]:
    """Parameters that are gathered with ``unit``: all but those of units inside it."""
    inner = {id(p) for m in unit.modules() if m is not unit and isinstance(m, FSDPModule) for p in m.parameters()}
    return [p for p in unit.parameters() if id(p) not in inner]


def prepare_micro_batch(model: nn.Module, whole: Sequence[FSDPModule], *, last: bool, sync: bool) -> None:
    """Say what the next backward does; a step's weights change only after its last micro-batch.

    Args:
        model: the root module.
        whole: what ``shard_model`` returned. These units are whole when a backward pass ends and when the next forward
            pass begins; kept so in between, they need no second gather and no more peak memory.
        last: the step's last micro-batch.
        sync: reduce gradients between processes; without it they add up unsharded.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
    for unit in whole:
        unit.set_reshard_after_backward(last, recurse=False)


class MasterWeights:
    """Mixed precision for one process: what FSDP2's policy does, without its wrappers.

    The module keeps its master weights; inside ``computing()`` their copies in the compute dtype are used instead.
    Each gradient of a copy is added to its master's, in the master's dtype, as soon as it exists. What has one in that
    dtype itself (the loss, of the head) hands it to the copy's ``take_gradient``, past autograd, which would round it.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype) -> None:
        self._compute_dtype = compute_dtype
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._slots: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in model.modules():
            for name, master in module.named_parameters(recurse=False):
                if master.dtype == compute_dtype or not master.is_floating_point():
                    continue
                if master not in self._copies:
                    self._copies[master] = self._copy_of(master)
                self._slots.append((module, name, master))

    def _copy_of(self, master: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(torch.empty_like(master, dtype=self._compute_dtype), requires_grad=master.requires_grad)

        def take(gradient: Tensor) -> None:
            if master.grad is None:
                master.grad = gradient.to(master.dtype)
            else:
                master.grad += gradient

        def take_from(working: Tensor) -> None:
            if working.grad is not None:  # else it was taken already
                take(working.grad)
                working.grad = None

        if master.requires_grad:
            copy.register_post_accumulate_grad_hook(take_from)  # type: ignore[no-untyped-call]
            copy.take_gradient = take  # type: ignore[attr-defined]
        return copy

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Let forward and backward run on the copies, made here each time: once a step, and never stale."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(list(self._copies.values()), list(self._copies))
        for module, name, master in self._slots:
            module._parameters[name] = self._copies[master]
        try:
            yield
        finally:
            for module, name, master in self._slots:
                module._parameters[name] = master
