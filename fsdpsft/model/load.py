"""Models, tokenizers and weights from Hugging Face folders; no process ever holds more weights than it keeps.

A model is built with its parameters on the meta device, changed at will (LoRA, ``fully_shard``), and only then given
memory: ``load_weights`` reads, for each parameter, the rows that this process keeps. Buffers are computed while the
model is built and stay real throughout, so that those no checkpoint holds (rotary frequencies) are right by themselves.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from fsdpsft.checkpoint.parameters import copy_own_part, hf_name, is_adapter, local_block, retie, tied_groups
from fsdpsft.checkpoint.safetensors import TensorFiles, open_model_files
from fsdpsft.errors import ModelError, and_more
from fsdpsft.filesystem import read_object
from fsdpsft.model.attention import own_attention_code

logger = logging.getLogger(__name__)

ALLOWED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", "merges*", "vocab*")
"""What is downloaded from the Hub: never pickles, never code."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def resolve_model_path(name_or_path: str) -> Path:
    """Turn ``model.partial_pretrain`` into a local folder: a folder unchanged, a Hub id by downloading it.

    All processes may call this: the Hub's client locks each file of its cache, so one of a node downloads it.

    Raises:
        ModelError: neither such a folder nor such a model on the Hub (or the Hub cannot be reached), or not a model.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_file():
        raise ModelError(f"model.partial_pretrain={name_or_path} is a file; name the folder that holds config.json.")
    if not folder.is_dir():
        folder = _download(name_or_path)
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(f.name for f in folder.iterdir())[:20]) or "nothing"
        raise ModelError(f"{folder} is not a Hugging Face model: it has no config.json. Found: {found}.")
    return folder


def _download(repo: str) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=list(ALLOWED_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.partial_pretrain={repo}: there is no folder of this name (looked in {Path.cwd()}), and as a Hub id "
            f"it could not be downloaded: {reason} Give the path of a local model folder, or a Hub id while online."
        ) from error


def load_model_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model's configuration.

    Raises:
        ModelError: the model brings its own code and ``trust_remote_code`` is off, is of an unknown type, or quantised.
    """
    described = read_object(path / "config.json", ModelError, "Fetch the model again.")
    if described.get("model_type") not in CONFIG_MAPPING and "auto_map" in described and not trust_remote_code:
        raise ModelError(
            f"{path} needs Python code that comes with the model ({described['auto_map']}). Read that code; if you "
            f"trust it, set model.trust_remote_code=true."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from error
    if "quantization_config" in described:
        method = described["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{path} is quantised ({method}); quantised weights cannot be trained. Use the original.")
    if not trust_remote_code:
        _check_architecture(config, path)
    return config


def _check_architecture(config: PreTrainedConfig, path: Path) -> None:
    """Refuse what is not a causal language model, by name."""
    built = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    declared = config.architectures[0] if config.architectures else built
    if built is None or not built.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{path} is a {declared or config.model_type}; only causal language models (…ForCausalLM) can be trained."
        )
    bare = MODEL_MAPPING_NAMES.get(config.model_type)
    if declared and declared != bare and not declared.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(f"{path} holds a {declared}; {built} is needed, and its weights are not all there.")


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load a model's tokenizer.

    Raises:
        ModelError: there is none, or it is a slow one, whose characters cannot be mapped to tokens.
    """
    if not any((path / name).is_file() for name in _VOCABULARIES):  # transformers would make up an empty tokenizer
        raise ModelError(f"{path} has no tokenizer: none of {', '.join(_VOCABULARIES)} is there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path} has no tokenizer that can be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{path}: {type(tokenizer).__name__} is a slow tokenizer; the loss mask needs a fast one (tokenizer.json)."
        )
    return tokenizer


class _EmptyOnMeta(TorchFunctionMode):
    """Send ``torch.empty`` to the meta device and nothing else.

    Modules allocate their weights with it; buffers are computed (from ``arange``, say), and so come out real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, allocating on meta where it is ``torch.empty``."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_meta_model(
    config: PreTrainedConfig,
    *,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the causal language model of ``config`` with every parameter on the meta device and real CPU buffers.

    Args:
        config: what ``load_model_config`` returned; it is copied.
        attn_implementation: a name registered in transformers' AttentionInterface.
        dtype: of the parameters (the master weights).
        trust_remote_code: allow code that comes with the model.

    Raises:
        ModelError: the model's code chooses its attention from a table of its own, which does not have the name.
    """
    config = deepcopy(config)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, **options)
    except KeyError as error:
        if attn_implementation is None or error.args != (attn_implementation,):
            raise
        raise own_attention_code(f"The architecture {config.model_type}") from error
    return _parameters_to_meta(model)


def _parameters_to_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Move the few parameters made by other functions (norms by ``ones``) to meta too; ties survive."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(module, name, moved[id(parameter)])
    return model


@dataclass
class _Conversion:
    """Tensors of the files that transformers turns into one or several others (experts stacked, projections split)."""

    converter: WeightConverter
    target: str
    inputs: list[tuple[str, str]] = field(default_factory=list)  # (source pattern, name in the files)


@dataclass
class _Origins:
    """Where each tensor of the plain model comes from, by its name there."""

    direct: dict[str, str]
    conversions: list[_Conversion]


def _origins(reference: PreTrainedModel, files: TensorFiles, path: Path, strict: bool) -> _Origins:
    """Match the names in ``files`` with those of ``reference`` by transformers' own rules; only headers are read."""
    state = reference.state_dict()
    rules = get_model_conversion_mapping(reference)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = reference.base_model_prefix
    direct: dict[str, str] = {}
    conversions: dict[str, _Conversion] = {}
    unexpected = []
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            unexpected.append(key)
        elif pattern is None:
            direct[name] = key
        else:
            conversion = conversions.setdefault(name, _Conversion(by_pattern[pattern], name))
            conversion.inputs.append((pattern, key))
    _settle_ties(reference, direct, files, path)
    found = _Origins(direct, list(conversions.values()))
    _check(reference, found, files, unexpected, path, strict)
    return found


def _settle_ties(reference: PreTrainedModel, direct: dict[str, str], files: TensorFiles, path: Path) -> None:
    """Give every name of a tied tensor the one tensor that the files have for it."""
    for group in tied_groups(reference):
        present = [name for name in group if name in direct]
        for other in present[1:]:
            if not files.equal(direct[present[0]], direct[other]):
                raise ModelError(
                    f"{path}: the model ties {present[0]} and {other}, but the files hold two different tensors for "
                    f"them. Set tie_word_embeddings to false in its config.json, or drop {other} from the files."
                )
        if present:
            direct.update(dict.fromkeys(group, direct[present[0]]))


def _check(
    reference: PreTrainedModel, origins: _Origins, files: TensorFiles, unexpected: list[str], path: Path, strict: bool
) -> None:
    """Raise a ModelError that lists missing, unexpected and mismatched tensors."""
    state = reference.state_dict()
    converted = {name for conversion in origins.conversions for name in _targets(conversion)}
    missing = [name for name in state if name not in origins.direct and name not in converted]
    ignored = [re.compile(p) for p in reference._keys_to_ignore_on_load_unexpected or ()]
    ignored += [re.compile(r"rotary_emb\.inv_freq"), re.compile(r"(^|\.)position_ids$")]
    unexpected = [key for key in unexpected if not any(p.search(key) for p in ignored)]
    mismatched = [
        f"{name} is {list(files[key].shape)} in the files, {list(state[name].shape)} in the model"
        for name, key in origins.direct.items()
        if files[key].shape != tuple(state[name].shape)
    ]
    if unexpected and not strict:
        logger.info("%s: %d tensors are left out: %s", path, len(unexpected), and_more(unexpected))
        unexpected = []
    problems = [
        f"{title}: {and_more(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", mismatched))
        if names
    ]
    if problems:
        name = type(reference).__name__
        raise ModelError(f"The files in {path} do not fit {name} as config.json describes it. " + ". ".join(problems))


def _targets(conversion: _Conversion) -> list[str]:
    """Names that a conversion yields; the first of its patterns occurs in ``target``, the others take its place."""
    patterns = conversion.converter.target_patterns
    return [conversion.target.replace(patterns[0], pattern) for pattern in patterns]


# --- Filling ------------------------------------------------------------------------------------------------------


class WeightSource:
    """The files of a model, and which of their tensors make up which of the model's; tensors are read when asked for.

    Attributes:
        files: the files.
        converted: number of their tensors that lie there in another layout than in memory.
    """

    def __init__(self, model: PreTrainedModel, path: Path, *, strict: bool = True) -> None:
        """Read the headers and match names and shapes.

        Raises:
            ModelError: files missing, cut short or pickled, or tensors that do not fit the model.
        """
        self.files = open_model_files(path)
        self._path = path
        plain_class = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
        with _EmptyOnMeta():
            reference = cast(Any, plain_class)._from_config(deepcopy(model.config))
        self._reference = _parameters_to_meta(reference)
        self._origins = _origins(self._reference, self.files, path, strict)
        self.converted = sum(len(conversion.inputs) for conversion in self._origins.conversions)

    @torch.no_grad()
    def fill(self, targets: dict[str, list[Tensor]]) -> None:
        """Fill tensors, by their name in the plain model, each with the part of it that this process keeps."""
        targets = dict(targets)
        for name, key in self._origins.direct.items():
            for tensor in targets.pop(name, ()):
                local, offsets = local_block(tensor)
                self.files.read_into(key, local, offsets)
        conversions = [c for c in self._origins.conversions if any(name in targets for name in _targets(c))]
        _fill_converted(conversions, targets, self.files, self._reference, self._path)
        assert not targets, f"not filled: {sorted(targets)}"


@torch.no_grad()
def load_weights(
    model: PreTrainedModel,
    path: Path,
    *,
    device: torch.device | str,
    buffer_device: torch.device | str | None = None,
    strict: bool = True,
) -> int:
    """Give a meta model memory and fill it from ``path``, each process reading only the rows that it keeps.

    Parameters may be plain or sharded in any way (``fully_shard``, hybrid sharding); they are cast to their own dtype
    while they are copied. Tied parameters stay one tensor. The parameters of LoRA adapters are set to NaN here, so
    that forgetting to initialise them cannot go unnoticed. Tensors that transformers converts on load (stacked
    experts) are read whole by every process, one conversion at a time.

    Args:
        model: from ``build_meta_model``, perhaps with adapters and sharded.
        path: the model's folder.
        device: where the parameters go (the CPU when FSDP offloads them).
        buffer_device: where the buffers go; ``device`` if not given.
        strict: refuse tensors in the files that the model lacks (off for a model cut to fewer layers).

    Returns:
        Number of tensor bytes this process read.

    Raises:
        ModelError: files missing, cut short or pickled, or tensors that do not fit the model.
    """
    source = WeightSource(model, path, strict=strict)
    try:
        materialize(model, torch.device(device), torch.device(buffer_device or device))
        if source.converted:
            logger.warning(
                "%s: %d tensors are stored in another layout; every process reads them whole.", path, source.converted
            )
        source.fill(_unfilled(model))
        return source.files.bytes_read
    finally:
        source.files.close()


def materialize(model: nn.Module, device: torch.device, buffer_device: torch.device) -> None:
    """Replace meta tensors by uninitialised ones on ``device``, move buffers, and tie again what was tied."""
    lost = [name for name, buffer in _non_persistent_buffers(model) if buffer.is_meta]
    if lost:
        raise ModelError(f"{type(model).__name__}: buffers {and_more(lost)} are in no file and cannot be recomputed.")
    groups = tied_groups(model)

    def place(tensor: Tensor) -> Tensor:
        where = device if isinstance(tensor, nn.Parameter) else buffer_device
        return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor.to(where)

    model._apply(place)  # type: ignore[no-untyped-call]
    retie(model, groups)


def _non_persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that no checkpoint holds."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _unfilled(model: nn.Module) -> dict[str, list[Tensor]]:
    """Tensors to fill from the files, by Hugging Face name (LoRA keeps trainable copies beside originals)."""
    recomputed = {name for name, _ in _non_persistent_buffers(model)}
    targets: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.fill_(torch.nan)
        else:
            targets.setdefault(hf_name(name), []).append(parameter)
    for name, buffer in model.named_buffers():
        if name not in recomputed:
            targets.setdefault(hf_name(name), []).append(buffer)
    return targets


def _fill_converted(
    conversions: list[_Conversion],
    targets: dict[str, list[Tensor]],
    files: TensorFiles,
    reference: PreTrainedModel,
    path: Path,
) -> None:
    """Run transformers' converters one after another and copy this process's part of what they yield."""
    for conversion in conversions:
        converter = deepcopy(conversion.converter)
        for pattern, key in conversion.inputs:
            converter.add_tensor(conversion.target, key, pattern, files.read(key))
        for name, value in converter.convert(conversion.target, model=reference, config=reference.config).items():
            whole = value[0] if isinstance(value, list) else value
            for tensor in targets.pop(name, ()):
                _require_shape(path, name, whole.shape, tensor)
                copy_own_part(tensor, whole)


def _require_shape(path: Path, name: str, found: torch.Size, target: Tensor) -> None:
    if target.shape != found:
        raise ModelError(f"{path}: {name} is {list(found)}, the model's is {list(target.shape)}.")
