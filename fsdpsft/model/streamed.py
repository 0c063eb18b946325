"""A model whose weights stay in their files: one block, or the embedding, or the head is in memory at a time.

For what needs the model but must not need its memory: proving an exported model, merging an adapter into its base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fsdpsft.checkpoint.parameters import hf_name, retie, tied_groups
from fsdpsft.errors import ModelError
from fsdpsft.model.load import WeightSource, build_meta_model, load_model_config
from fsdpsft.model.sft_model import decoder_blocks


@dataclass(frozen=True)
class Part:
    """A piece of a model whose weights are in memory together.

    Attributes:
        name: of the module, such as ``model.layers.3``.
        whole: a decoder block, with all below it; else the module's own parameters alone.
    """

    name: str
    module: nn.Module
    whole: bool

    def tensors(self) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """Yield (name in the plain model, the module that owns it, its name there, tensor) of all that files hold."""
        for below, module in self.module.named_modules() if self.whole else [("", self.module)]:
            prefix = ".".join(filter(None, (self.name, below)))
            for leaf, parameter in module.named_parameters(recurse=False):
                yield hf_name(f"{prefix}.{leaf}"), module, leaf, parameter
            for leaf, buffer in module.named_buffers(recurse=False):
                if leaf not in module._non_persistent_buffers_set:
                    yield hf_name(f"{prefix}.{leaf}"), module, leaf, buffer


def parts_of(model: nn.Module) -> list[Part]:
    """The decoder blocks, and each other module that has parameters or persistent buffers of its own."""
    blocks = {id(block) for block in decoder_blocks(model)}
    inside = {id(below) for block in decoder_blocks(model) for below in block.modules()}
    parts = []
    for name, module in model.named_modules():
        if id(module) in blocks:
            parts.append(Part(name, module, whole=True))
        elif id(module) not in inside and any(Part(name, module, whole=False).tensors()):
            parts.append(Part(name, module, whole=False))
    return parts


def allocate_trained(model: nn.Module) -> None:
    """Give the trained parameters of a meta model (an adapter's) memory of their own, uninitialised; ties survive."""
    groups = tied_groups(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad and parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    retie(model, groups)


@contextlib.contextmanager
def present(part: Part, source: WeightSource) -> Iterator[None]:
    """Give the part's meta tensors memory, filled from the files, for as long as the context lasts.

    Tensors that are in memory already (an adapter's) stay as they are.
    """
    # Buffers are never on meta: they were computed with the model, but the files may know better.
    absent = [item for item in part.tensors() if item[3].is_meta or not isinstance(item[3], nn.Parameter)]
    filled: dict[str, list[Tensor]] = {}
    for name, module, leaf, tensor in absent:
        real = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        filled.setdefault(name, []).append(real)
        _put(module, leaf, real)
    source.fill(filled)
    try:
        yield
    finally:
        for _, module, leaf, tensor in absent:
            _put(module, leaf, tensor)


def _put(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = held


@torch.no_grad()
def token_losses(folder: Path, input_ids: Tensor) -> Tensor:
    """Loss of each token of a text but the first, by transformers' own forward through the weights in ``folder``.

    In float32, so that rounding is the trainer's alone. No default dtype changes, as training on another thread would
    see it. Memory: four bytes a parameter of the largest part (``parts_of``), and the text's activations.

    Args:
        folder: a Hugging Face model folder that asks for no remote code.
        input_ids: [T] int64.

    Returns:
        [T - 1] float32.

    Raises:
        ModelError: tensors are missing or surplus.
        NotImplementedError: the model's code reads weights of a part that it does not call.
    """
    model = build_meta_model(load_model_config(folder)).eval()
    source = WeightSource(model, folder)
    _check_buffers(model)
    for part in parts_of(model):
        _read_while_called(part, source)
    try:
        with _NothingAbsent():  # type: ignore[no-untyped-call]
            logits: Tensor = model(input_ids=input_ids[None], use_cache=False).logits[0, :-1].float()
    finally:
        source.files.close()
    return nn.functional.cross_entropy(logits, input_ids[1:], reduction="none")


class _NothingAbsent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators on meta tensors, since a product with one returns rubbish instead of an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments and run ``func``."""
        if any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
            raise NotImplementedError(f"{func} reads weights of a module that is not called")
        return func(*args, **(kwargs or {}))


def _read_while_called(part: Part, source: WeightSource) -> None:
    """Have the part's weights read when it is called and freed when it returns."""
    called: list[contextlib.AbstractContextManager[None]] = []

    def before(module: nn.Module, arguments: object) -> None:
        called.append(present(part, source))
        called[-1].__enter__()

    def after(module: nn.Module, arguments: object, output: object) -> None:
        called.pop().__exit__(None, None, None)

    part.module.register_forward_pre_hook(before)
    part.module.register_forward_hook(after, always_call=True)


def _check_buffers(model: PreTrainedModel) -> None:
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise ModelError(f"{type(model).__name__}: buffers {lost[:4]} are in no file and cannot be recomputed.")
