"""Parameters by name: what wrappers put into their names, which are tied, and which part of one this process keeps."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fsdpsft.errors import ModelError

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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name they have in the plain model, tied ones once.

    Taken from ``state_dict``, whose hooks bring FSDP2 parameters back to their sharded form and hide checkpoint
    wrappers. Of tied names the one that ``save_pretrained`` drops is left out.

    Raises:
        ModelError: the model declares two names tied that no longer share their tensor, or the reverse.
    """
    tensors = {
        without_wrappers(name): value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    for dropped, kept in declared_ties(model).items():
        if dropped in tensors and kept in tensors:
            if tensors[dropped] is not tensors[kept]:
                raise ModelError(f"{dropped} is declared tied to {kept}, but they are two tensors; the tie was lost.")
            del tensors[dropped]
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and (other := seen.setdefault(id(tensor), name)) != name:
            raise ModelError(f"{name} and {other} are one tensor, which the model's class does not declare.")
    return tensors


def declared_ties(model: nn.Module) -> dict[str, str]:
    """Dropped name -> kept name, as transformers expands ``_tied_weights_keys`` (empty where the config unties)."""
    ties: Any = model.all_tied_weights_keys if hasattr(model, "all_tied_weights_keys") else {}
    return dict(ties)


def is_tied(model: nn.Module) -> bool:
    """Whether two names of the model, with or without adapters in it, are one tensor in fact."""
    state = model.state_dict(keep_vars=True)
    tensors = {hf_name(name): value for name, value in state.items() if ".original_module." not in name}
    ties = declared_ties(model).items()
    return any(dropped in tensors and kept in tensors and tensors[dropped] is tensors[kept] for dropped, kept in ties)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that training changes, by name, tied ones once; frozen ones are as they are in the source model."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and value.requires_grad:
            named.setdefault(id(value), (without_wrappers(name), value))
    return dict(named.values())


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
