"""Processes and their places: the device, the backend, and the mesh ``(dp_replicate, dp_shard, sp)``.

Rank ``r`` is ``r = (replica * dp_shard + shard) * sp + sp_rank``: the processes of one Ulysses group are
neighbours, so they share a node. Data parallel rank and size count replicas and shards together.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fsdpsft.errors import ConfigError

_NCCL_GRACE_S = 60
_ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def env_rank() -> int:
    """Rank as torchrun states it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def env_local_rank() -> int:
    """Rank on this node as torchrun states it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def env_world_size() -> int:
    """Number of processes as torchrun states it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Mesh:
    """This process's place among the others.

    Attributes:
        device: the device of this process.
        world_size: all processes; ``dp_size * sp_size``.
        dp_rank: which share of a step's samples this process trains; equal within a Ulysses group.
        sp_rank: which slice of a sequence this process holds.
        fsdp: 1-D ``(shard,)`` or 2-D ``(replicate, shard)`` mesh over which weights are sharded; None for one process.
        sp_group: the Ulysses group; None at degree 1.
    """

    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    sp_rank: int
    sp_size: int
    fsdp: DeviceMesh | None
    sp_group: dist.ProcessGroup | None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add ``values`` up over all processes, in place: [n] -> [n]. Does not wait on the host."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


def check_world(world_size: int, sp_size: int, replicate_size: int) -> None:
    """Raise ``ConfigError`` where the processes cannot be arranged as asked."""
    if world_size % sp_size:
        raise ConfigError(
            f"ulysses_sequence_parallel_size={sp_size} does not divide the {world_size} processes: start a multiple "
            f"of {sp_size} (torchrun --nproc_per_node)"
        )
    if (world_size // sp_size) % replicate_size:
        raise ConfigError(
            f"model.fsdp_config.replicate_size={replicate_size} does not divide the {world_size // sp_size} "
            f"data-parallel processes ({world_size} processes / ulysses_sequence_parallel_size={sp_size})"
        )


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step instead of handing each back to the system.

    For training on CPU, where the allocator is the C library's: by default every large tensor is mapped anew, and its
    pages are zeroed at first touch. Measured: a tenth of a step in float32, a sixth in bfloat16. Elsewhere than on
    glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def choose_device(name: str) -> torch.device:
    """Map ``auto | cuda | cpu`` to this process's device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda, but torch sees no CUDA device; use trainer.device=cpu")
    if not _ALLOCATOR_SETTINGS & os.environ.keys():  # the allocator reads them when it is first asked for memory
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # ragged batches would fragment fixed ones
    device = torch.device("cuda", env_local_rank())
    torch.cuda.set_device(device)
    return device


def init_mesh(
    device: torch.device, *, sp_size: int = 1, replicate_size: int = 1, timeout_s: int = 600, shard_alone: bool = False
) -> Mesh:
    """Join the process group that torchrun describes and arrange it; one process needs no group at all.

    Args:
        device: of this process.
        sp_size: Ulysses degree.
        replicate_size: replicas of the sharded weights.
        timeout_s: a collective that waits longer for a process ends the run.
        shard_alone: give one process a group and a mesh too, because FSDP does more for it than sharding (offload).

    Raises:
        ConfigError: the number of processes cannot be arranged as asked.
    """
    world_size = env_world_size()
    check_world(world_size, sp_size, replicate_size)
    if world_size == 1 and not shard_alone:
        return Mesh(device, 0, 1, 0, 1, 0, 1, None, None)
    if not dist.is_initialized():
        _join(device, world_size, timeout_s)
    rank, dp_size = dist.get_rank(), world_size // sp_size
    ranks, timeout = np.arange(world_size), timedelta(seconds=timeout_s)
    if replicate_size > 1:
        grid = ranks.reshape(replicate_size, -1)
        # Groups are made by hand, as those of init_device_mesh would have torch's own time-out.
        groups = [_group_among(grid.T, timeout), _group_among(grid, timeout)]
        names = ("dp_replicate", "dp_shard_sp")
        fsdp = DeviceMesh.from_group(groups, device.type, torch.from_numpy(grid), mesh_dim_names=names)
    else:
        fsdp = init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp_shard_sp",))
    sp_group = _group_among(ranks.reshape(dp_size, sp_size), timeout) if sp_size > 1 else None
    return Mesh(device, rank, world_size, rank // sp_size, dp_size, rank % sp_size, sp_size, fsdp, sp_group)


def _join(device: torch.device, world_size: int, timeout_s: int) -> None:
    if device.type != "cuda":
        backend, timeout = "gloo", timedelta(seconds=timeout_s)
    else:
        # CPU tensors always have gloo: checkpoints are staged and stop signals agreed on there. NCCL gets more time, as
        # it ends the process without saying at which step; the agreement on stop signals, over gloo, can say so.
        backend, timeout = "cpu:gloo,cuda:nccl", timedelta(seconds=timeout_s + _NCCL_GRACE_S)
    store = _fresh_store(world_size, timeout) if world_size > 1 else HashStore()
    dist.init_process_group(backend, store=store, rank=env_rank(), world_size=world_size, timeout=timeout)


def _fresh_store(world_size: int, timeout: timedelta) -> Store:
    """Where the processes find each other's addresses: torchrun's, without those of its earlier starts.

    torchrun lends one store to all its restarts, where a process can still find the address of one that died. Its
    agents count restarts each for itself, so the count can tell starts apart on one node only.
    """
    store: Store
    store, _, _ = next(rendezvous("env://", timeout=timeout))  # type: ignore[no-untyped-call]
    if os.environ.get("LOCAL_WORLD_SIZE") != str(world_size):
        return store
    return PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _group_among(rows: np.ndarray, timeout: timedelta) -> dist.ProcessGroup:
    """The group of this process, of groups that are the rows of ``rows``. Collective."""
    group: dist.ProcessGroup | None
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)  # type: ignore[no-untyped-call]
    assert group is not None
    return group


def close_mesh() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
