"""Parameters by name: what wrappers put into their names, which are tied, and which part of one this process keeps."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod)\.")
_LORA_BASE = re.compile(r"\b(base_layer|original_module|modules_to_save\.\w+)\.")
_LORA_OWN = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")


def without_wrappers(name: str) -> str:
    """Take out of a parameter's name what activation checkpointing and compile put into it."""
    return _WRAPPERS.sub("", name)


def hf_name(name: str) -> str:
    """Name of a parameter in the plain Hugging Face model: without wrappers, and without what LoRA puts into it."""
    return _LORA_BASE.sub("", without_wrappers(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to LoRA itself, and so has no counterpart in the base model's files."""
    return _LORA_OWN.search(name) is not None


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one and the same tensor, for each such tensor with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def retie(model: nn.Module, groups: list[list[str]]) -> None:
    """Make the parameters of each group one tensor again, after something replaced them one by one."""
    for first, *others in groups:
        parameter = model.get_parameter(first)
        for name in others:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, parameter)
    assert tied_groups(model) == groups, "tied parameters came apart"


def local_block(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the part of a tensor that this process keeps, and where in the whole it begins (one index a dimension).

    Call it without gradients: the part is then the parameter's own memory.
    """
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offsets)


def copy_own_part(tensor: Tensor, whole: Tensor) -> None:
    """Copy into a tensor the part of ``whole``, which has its full shape, that this process keeps."""
    local, offsets = local_block(tensor)
    for dim, offset in enumerate(offsets):
        whole = whole.narrow(dim, offset, local.shape[dim])
    local.copy_(whole)


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, detached; collective where it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole
