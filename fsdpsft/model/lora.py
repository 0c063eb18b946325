"""Low-rank adapters: peft puts them into the model, this module fills, merges and writes them.

``apply_lora`` changes the module tree of a meta model; ``load.load_weights`` fills the base; ``fill_adapters`` gives
the adapters their first values, the same on any number of processes. ``merged_state`` and ``adapter_state`` yield full
tensors one at a time, so no process gathers more than one layer.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. rsLoRA: https://arxiv.org/abs/2312.03732.
DoRA: https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fsdpsft.checkpoint.parameters import (
    copy_own_part,
    full,
    hf_name,
    is_adapter,
    local_block,
    retie,
    tied_groups,
    without_wrappers,
)
from fsdpsft.checkpoint.safetensors import TensorFiles
from fsdpsft.errors import ConfigError, ModelError, and_more

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
_ADAPTER = "default"  # peft's name for the only adapter
_PREFIX = "base_model.model."  # of every name in peft's files
_UNSUPPORTED = (
    "bias",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "layers_to_transform",
)


@dataclass(frozen=True)
class LoraSettings:
    """What the user chose; the fields are the keys ``model.lora_rank`` and so on.

    Attributes:
        rank: columns of A' and B. alpha: the update is B A alpha / rank (alpha / sqrt(rank) with ``use_rslora``).
        dropout: on the adapters' input while training.
        target_modules: "all-linear" (all but the head), names of linear modules, or one regular expression.
        exclude_modules: names, or one regular expression, of what is left out.
        modules_to_save: modules trained whole beside the adapters, such as ``embed_tokens`` and ``lm_head``.
        use_dora: learn each row's length apart from its direction.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    use_rslora: bool = False
    use_dora: bool = False


def apply_lora(causal_lm: PreTrainedModel, settings: LoraSettings, adapter_path: Path | None = None) -> None:
    """Put adapters into ``causal_lm`` in place and freeze everything else; its class stays what it is.

    Meant for a meta model, before sharding and loading. Adapters and ``modules_to_save`` are float32, whatever the
    base's dtype. Where input and output embeddings are tied, training either trains both, still tied.

    Args:
        causal_lm: the model, quantised ones excepted.
        settings: the user's choices.
        adapter_path: folder of an adapter to start from; its own configuration then decides (``dropout`` excepted).

    Raises:
        ConfigError: a rank that is not positive, or a name that matches no module (the message lists those there are).
        ModelError: a quantised base, an adapter folder that cannot be used, or modules LoRA cannot be put on.
    """
    if getattr(causal_lm.config, "quantization_config", None) is not None:
        raise ModelError(f"{type(causal_lm).__name__} is quantised; LoRA here needs the original weights.")
    config = _read_config(adapter_path, settings) if adapter_path is not None else _new_config(causal_lm, settings)
    ties = tied_groups(causal_lm)
    try:
        inject_adapter_in_model(config, causal_lm, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise ModelError(f"LoRA cannot be applied to {type(causal_lm).__name__}: {error}") from error
    _check_injected(causal_lm, tied=bool(ties))
    _retype_trainable(causal_lm)


def _new_config(causal_lm: PreTrainedModel, settings: LoraSettings) -> LoraConfig:
    """Check the settings against the model and put them into peft's terms."""
    if settings.rank <= 0:
        raise ConfigError(f"model.lora_rank={settings.rank} must be positive to use LoRA.")
    modules = [name for name, _ in causal_lm.named_modules()]
    targets = _all_linear(causal_lm) if settings.target_modules == ALL_LINEAR else settings.target_modules
    _check_names("model.target_modules", targets, _linear_modules(causal_lm))
    _check_names("model.exclude_modules", settings.exclude_modules or (), modules)
    _check_names("model.modules_to_save", settings.modules_to_save, modules)
    # Full names: peft takes any module whose name merely ends in the given letters ("norm": "layernorm" too).
    saved = [name for name in modules if any(_is_named(name, wanted) for wanted in settings.modules_to_save)]
    embeddings = {name.rpartition(".")[0] for group in tied_groups(causal_lm) for name in group}
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=settings.exclude_modules or None,
        modules_to_save=saved or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        ensure_weight_tying=bool(embeddings & set(saved)),
    )


def _linear_modules(causal_lm: PreTrainedModel) -> list[str]:
    return [name for name, module in causal_lm.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _all_linear(causal_lm: PreTrainedModel) -> list[str]:
    """Names of all linear modules but the head, short where that is unambiguous.

    peft's own "all-linear" goes beyond them in mixtures of experts (routers, stacked experts), depending on the family.
    """
    head = causal_lm.get_output_embeddings()
    wanted = {name for name in _linear_modules(causal_lm) if causal_lm.get_submodule(name) is not head}
    clashing = {_leaf(name) for name, _ in causal_lm.named_modules() if name not in wanted}
    if any(parameter.ndim > 2 for parameter in causal_lm.parameters()):
        logger.warning("LoRA adapts linear modules; stacked experts stay frozen.")
    return sorted({name if _leaf(name) in clashing else _leaf(name) for name in wanted})


def _is_named(name: str, wanted: str) -> bool:
    """Whether a module's dotted name is ``wanted`` or ends in it."""
    return name == wanted or name.endswith(f".{wanted}")


def _leaf(name: str) -> str:
    """Last part of a dotted name."""
    return name.rpartition(".")[2]


def _check_names(key: str, wanted: str | Sequence[str], names: list[str]) -> None:
    """Raise a ConfigError where a name, or the regular expression, matches none of ``names``."""
    if isinstance(wanted, str):
        try:
            found = any(re.fullmatch(wanted, name) for name in names)
        except re.error as error:
            raise ConfigError(f"{key}={wanted!r} is not a regular expression: {error}.") from error
        unmatched = [] if found else [wanted]
    else:
        unmatched = [w for w in wanted if not any(_is_named(name, w) for name in names)]
    if unmatched:
        there = ", ".join(sorted({_leaf(name) for name in names if name and not _leaf(name).isdigit()}))
        raise ConfigError(
            f"{key}: {', '.join(map(repr, unmatched))} matches no module of the model. There are: {there}."
        )


def _read_config(folder: Path, settings: LoraSettings) -> LoraConfig:
    """Read the configuration of an existing adapter; refuse what this module cannot fill, merge or write."""
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_FILE).is_file():
        found = ", ".join(sorted(f.name for f in folder.iterdir())[:20]) if folder.is_dir() else "no such folder"
        raise ModelError(f"{folder} is not an adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_FILE}. Found: {found}.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder} is a {config.peft_type} adapter; only LoRA adapters can be trained on.")
    odd = [f"{name}={value}" for name in _UNSUPPORTED if (value := getattr(config, name)) and value != "none"]
    if odd:
        raise ModelError(f"{folder}: adapters with {', '.join(odd)} are not supported.")
    if settings.rank not in (0, config.r):
        raise ConfigError(f"model.lora_rank={settings.rank}, but the adapter in {folder} has rank {config.r}.")
    config.inference_mode = False
    config.lora_dropout = settings.dropout
    return config


def _check_injected(causal_lm: PreTrainedModel, tied: bool) -> None:
    """Refuse what peft did that could not be trained, merged or exported correctly."""
    for name, module in causal_lm.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) or _ADAPTER not in module.lora_A:
            kind = type(base).__name__
            raise ModelError(f"LoRA on {name} ({kind}) is not supported; put it into model.modules_to_save instead.")
    head = causal_lm.get_output_embeddings()
    if isinstance(head, LoraLayer):
        raise ModelError("LoRA cannot be put on the head; put it into model.modules_to_save to train it whole.")
    if tied and causal_lm.get_input_embeddings().weight is not head.weight:
        raise ModelError(
            f"{type(causal_lm).__name__} ties its head to its embeddings, and peft cannot train one of them without "
            "breaking the tie. Leave both out of model.modules_to_save."
        )


def _retype_trainable(causal_lm: PreTrainedModel) -> None:
    """Make what is trained float32, on the device of the base (peft made the adapters on meta)."""
    groups = tied_groups(causal_lm)
    device = next(p.device for name, p in causal_lm.named_parameters() if not is_adapter(name))
    for name, parameter in list(causal_lm.named_parameters()):
        if not parameter.requires_grad:
            continue
        data = parameter.detach().float()
        data = torch.empty_like(data, device=device) if data.is_meta else data
        parent, _, leaf = name.rpartition(".")
        setattr(causal_lm.get_submodule(parent), leaf, nn.Parameter(data))
    retie(causal_lm, groups)


def plain_adapters(causal_lm: nn.Module) -> list[nn.Module]:
    """The layers with adapters whose update is ``s B A x`` and nothing else; DoRA's are not among them."""
    return [module for module in causal_lm.modules() if isinstance(module, LoraLinear) and not module.lora_variant]


def add_updates_by_product(causal_lm: nn.Module) -> None:
    """Let plain adapters compute ``W x + B (s A x)``, where peft computes ``W x + s (B (A x))``.

    Scaled where it is ``rank`` wide, and added by the product itself, an update takes no pass over the layer's output
    of its own, and leaves no second wide result for the backward pass; peft's takes two forward and one backward.
    """
    for layer in plain_adapters(causal_lm):
        layer.forward = _added_by_product(layer)


def _added_by_product(layer: Any) -> Callable[[Tensor], Tensor]:
    plain = layer.forward

    def forward(x: Tensor) -> Tensor:
        down, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER].weight
        if x.dtype != down.weight.dtype:
            return plain(x)  # type: ignore[no-any-return]  # which casts
        base: Tensor = layer.base_layer(x)
        narrow = down(layer.lora_dropout[_ADAPTER](x)) * layer.scaling[_ADAPTER]
        return torch.addmm(base.flatten(0, -2), narrow.flatten(0, -2), up.t()).view_as(base)

    return forward


@torch.no_grad()
def fill_adapters(causal_lm: PreTrainedModel, *, seed: int, adapter_path: Path | None = None) -> None:
    """Give the adapters their first values, after the base's weights are there: new ones, or those of an adapter.

    New: A is uniform in +-1/sqrt(in), drawn for the whole matrix from the seed and the parameter's name and then cut to
    this process's part; B is zero; DoRA's magnitudes are the lengths of the base's rows. Collective with DoRA.

    Raises:
        ModelError: the adapter's file lacks parameters, has others, or other shapes.
    """
    if adapter_path is not None:
        _read_adapter(causal_lm, adapter_path)
        return
    for name, parameter in causal_lm.named_parameters():
        if not is_adapter(name):
            continue
        if ".lora_B." in name:
            local_block(parameter)[0].zero_()
        elif ".lora_A." in name:
            copy_own_part(parameter, _initial_a(parameter.shape, f"{seed}:{peft_name(name)}"))
        else:
            layer = causal_lm.get_submodule(name.partition(".lora_magnitude_vector.")[0])
            copy_own_part(parameter, full(layer.get_base_layer().weight).float().norm(dim=_row_dim(layer)))


def _initial_a(shape: torch.Size, key: str) -> Tensor:
    """Draw [rank, in] as ``nn.Linear`` does, from a generator of its own."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def _read_adapter(causal_lm: PreTrainedModel, folder: Path) -> None:
    """Fill adapters and modules trained whole from PEFT's file, each process its own rows."""
    files = TensorFiles([folder / ADAPTER_FILE])
    wanted = {peft_name(name): p for name, p in _trainable(causal_lm)}
    problems = [f"{name} is missing" for name in wanted if name not in files]
    problems += [f"{name} is not in the model" for name in files if name not in wanted]
    problems += [
        f"{name} is {list(files[name].shape)}, not {list(p.shape)}"
        for name, p in wanted.items()
        if name in files and files[name].shape != tuple(p.shape)
    ]
    if problems:
        raise ModelError(f"{folder / ADAPTER_FILE} does not fit the model: {and_more(problems)}.")
    for name, parameter in wanted.items():
        local, offsets = local_block(parameter)
        files.read_into(name, local, offsets)
    files.close()


def peft_name(name: str) -> str:
    """Name that PEFT's files give to a parameter of ours."""
    name = without_wrappers(name).replace(f".modules_to_save.{_ADAPTER}.", ".")
    name = name.replace(f".lora_magnitude_vector.{_ADAPTER}.weight", ".lora_magnitude_vector")
    return _PREFIX + name.replace(f".{_ADAPTER}.weight", ".weight")


@torch.no_grad()
def adapter_state(causal_lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (PEFT name, full tensor) of what was trained, one at a time; collective. No two share memory."""
    for name, parameter in _trainable(causal_lm):
        yield peft_name(name), full(parameter).clone()


def _trainable(causal_lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that belong in an adapter's file; tied ones under each of their names, as peft wants them."""
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        if is_adapter(name) or f".modules_to_save.{_ADAPTER}." in name:
            yield name, parameter


def adapter_config(causal_lm: PreTrainedModel, base_model: str) -> dict[str, Any]:
    """Content of ``adapter_config.json``; ``base_model`` is the path or Hub id of the model that was fine-tuned."""
    content = dict(causal_lm.peft_config[_ADAPTER].to_dict())
    content.update(base_model_name_or_path=base_model, inference_mode=True)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


@torch.no_grad()
def merged_state(causal_lm: PreTrainedModel, within: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) of the model with its adapters merged in, one at a time; collective.

    ``within`` is a module's name: only what lies in it.

    Works as well without adapters. The model does not change. Merged weights are float32, others in their own dtype;
    a tied tensor comes once, persistent buffers come last.
    """
    for name, parameter in causal_lm.named_parameters():
        if is_adapter(name) or ".original_module." in name or not name.startswith(within):
            continue
        layer_name, is_base, leaf = name.rpartition(".base_layer.")
        if is_base and leaf == "weight":
            yield hf_name(name), _merged_weight(causal_lm.get_submodule(layer_name))
        else:
            yield hf_name(name), full(parameter)
    for prefix, module in causal_lm.named_modules():
        for name, buffer in module.named_buffers(recurse=False) if prefix.startswith(within) else ():
            if name not in module._non_persistent_buffers_set:
                yield hf_name(f"{prefix}.{name}" if prefix else name), full(buffer)


def _merged_weight(layer: Any) -> Tensor:
    """W + s B A, and with DoRA each row brought to its learned length; float32."""
    weight: Tensor = full(layer.get_base_layer().weight).float()
    down, up = full(layer.lora_A[_ADAPTER].weight).float(), full(layer.lora_B[_ADAPTER].weight).float()
    update = layer.scaling[_ADAPTER] * (up @ down)
    merged: Tensor = weight + (update.T if _row_dim(layer) == 0 else update)
    if layer.use_dora[_ADAPTER]:
        lengths = merged.norm(dim=_row_dim(layer), keepdim=True)
        magnitudes = full(layer.lora_magnitude_vector[_ADAPTER].weight).float()
        merged = merged * (magnitudes.view_as(lengths) / lengths)
    return merged


def _row_dim(layer: Any) -> int:
    """Dimension along which one output's weights lie: 1, or 0 where the layer keeps its weight transposed (GPT-2)."""
    return 0 if layer.fan_in_fan_out else 1
