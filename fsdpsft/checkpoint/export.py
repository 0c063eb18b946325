"""From the tensors in training to the files of a Hugging Face model.

What is written is what ``save_pretrained`` would write (names, ties, layout), but cut up beforehand, so that each rank
writes whole files of its own and no process holds the model. Config and tokenizer are the source model's files, byte
for byte, except for what training changed: a consumer pinned to an older transformers keeps working.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from fsdpsft.checkpoint.files import FileRecord, copy_file, record_of, write_bytes, write_json
from fsdpsft.checkpoint.folder import INDEX_FILE
from fsdpsft.checkpoint.parameters import hf_name, without_wrappers
from fsdpsft.checkpoint.pieces import Piece
from fsdpsft.checkpoint.safetensors_read import open_model_files
from fsdpsft.checkpoint.safetensors_write import TensorSpec, dtype_name, dtype_named
from fsdpsft.checkpoint.tensor_plan import PlannedFile, Unit, build_index, split_into_files
from fsdpsft.errors import CheckpointError, ModelError

logger = logging.getLogger(__name__)

_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_CARRIED_NAMES = re.compile(r"(LICENSE|NOTICE).*", re.IGNORECASE)
_NOT_CARRIED = re.compile(r"manifest\.json|.*\.index\.json|adapter_config\.json|trainer_state\.json|requirements\.txt")


@dataclass(frozen=True)
class StoredDtypes:
    """Dtypes of a model's files: the usual floating-point one, and those of the tensors that have another."""

    usual: torch.dtype
    others: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, folder: Path) -> StoredDtypes:
        """Read them from the headers of a model folder's files."""
        with_dtypes = {name: entry.dtype for name, entry in open_model_files(folder).items()}
        floating = Counter(dtype for dtype in with_dtypes.values() if dtype.is_floating_point)
        usual = floating.most_common(1)[0][0] if floating else torch.float32
        return cls(usual, {name: dtype for name, dtype in with_dtypes.items() if dtype != usual})

    def as_json(self) -> dict[str, Any]:
        """As kept in ``state.json``."""
        return {"usual": dtype_name(self.usual), "others": {n: dtype_name(d) for n, d in self.others.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StoredDtypes:
        """What ``as_json`` made."""
        others = {name: dtype_named(dtype) for name, dtype in content["others"].items()}
        return cls(dtype_named(content["usual"]), others)


@dataclass(frozen=True)
class Handoff:
    """What is handed on, beside the weights.

    Attributes:
        source: folder of the model training began from.
        dtype: of the floating-point weights on disk; None keeps each tensor's dtype in the source's files.
        max_shard_bytes: largest weights file.
        chat_template: the template trained with; None keeps the source's.
        eos_token_ids: tokens that end a turn; generation_config.json will name them all.
        tokenizer: given only if training changed it (new tokens); saved in place of the source's files.
        fingerprints: put into the manifest (template, data, ...).
        stored: dtypes of the source's files, where the files are no longer at hand.
    """

    source: Path
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5_000_000_000
    chat_template: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: PreTrainedTokenizerFast | None = None
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    stored: StoredDtypes | None = None

    def stored_dtypes(self) -> StoredDtypes:
        """Dtypes in the source's files; read there unless they were given."""
        return self.stored or StoredDtypes.of(self.source)


@dataclass(frozen=True)
class Probe:
    """A text and what the model in training makes of it.

    Attributes:
        input_ids: [T] int64, on the CPU.
        losses: [T - 1] loss of each token but the first, on the CPU.
        compute_dtype: that the losses were computed in.
    """

    input_ids: Tensor
    losses: Tensor
    compute_dtype: torch.dtype = torch.float32


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name they have in the plain model, tied ones once.

    Taken from ``state_dict``, whose hooks bring FSDP2 parameters back to their sharded form and hide checkpoint
    wrappers. Of tied names the one ``save_pretrained`` drops is
    dropped.

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


def plan_export(model: nn.Module, pieces: Mapping[str, Piece], handoff: Handoff) -> list[PlannedFile]:
    """Plan the weight files: names and shapes as on the Hub, dtypes as in the source (or ``handoff.dtype``).

    Args:
        model: the transformers model, for its layout conversions.
        pieces: name in the model -> piece (only shape and dtype are looked at).
        handoff: source folder, dtype, file size.
    """
    on_disk = _dtype_chooser(handoff)
    whole = {name: torch.empty(piece.shape, dtype=piece.dtype, device="meta") for name, piece in pieces.items()}
    final = revert_weight_conversion(model, dict(whole))
    plain = [n for n, t in whole.items() if n in final and final[n].shape == t.shape]
    units = {n: Unit((n,), (TensorSpec(n, on_disk(n, whole[n].dtype), tuple(whole[n].shape)),)) for n in plain}
    rest = {n: t for n, t in whole.items() if n not in units}
    if rest:
        logger.info("%d tensors are stored in another layout than they have in memory; converting them", len(rest))
        wanted = {n: t for n, t in final.items() if n not in units}
        units.update({unit.sources[0]: unit for unit in _conversion_units(model, rest, wanted, on_disk)})
    return split_into_files([units[n] for n in whole if n in units], handoff.max_shard_bytes)


def _conversion_units(model: nn.Module, rest: dict[str, Tensor], wanted: dict[str, Tensor], on_disk: Any) -> list[Unit]:
    """Group tensors so that each group converts on its own to the very tensors the whole converts to.

    One tensor at a time where that works (experts split apart), else a layer at a time, else all at once.
    """
    groupings = (
        [[name] for name in rest],
        list(_by_layer(rest).values()),
        [list(rest)],
    )
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    for groups in groupings:
        made = [_try_convert(model, {name: rest[name] for name in group}) for group in groups]
        if all(m is not None for m in made) and {n: t.shape for m in made if m for n, t in m.items()} == shapes:
            return [_unit(model, group, m, on_disk) for group, m in zip(groups, made, strict=True) if m]
    raise CheckpointError(f"{type(model).__name__}: cannot bring {sorted(rest)[:4]}... into the layout of its files.")


def _unit(model: nn.Module, group: list[str], made: dict[str, Tensor], on_disk: Any) -> Unit:
    dtypes = {on_disk(name, tensor.dtype) for name, tensor in made.items()}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    outputs = tuple(TensorSpec(name, widest, tuple(tensor.shape)) for name, tensor in made.items())
    return Unit(tuple(group), outputs, partial(revert_weight_conversion, model))


def _try_convert(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    try:
        return dict(revert_weight_conversion(model, tensors))
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError):  # a conversion that lacks its other sources
        return None


def _by_layer(names: Mapping[str, Tensor]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r".*?\.\d+\.", name)
        layers.setdefault(match[0] if match else "", []).append(name)
    return layers


def _dtype_chooser(handoff: Handoff) -> Any:
    """Return ``f(name on disk, dtype in memory) -> dtype on disk``."""
    if handoff.dtype is not None:
        chosen = handoff.dtype
        return lambda name, held: chosen if held.is_floating_point else held
    stored = handoff.stored_dtypes()
    return lambda name, held: stored.others.get(name, stored.usual) if held.is_floating_point else held


def write_hub_files(
    folder: Path, files: Sequence[PlannedFile], handoff: Handoff, vocab_size: int | None
) -> dict[str, FileRecord]:
    """Write all but the weights: config, generation config, tokenizer, chat template, index.

    Args:
        folder: the model's folder.
        files: the weight files, for the index and the dtype; none where the folder is to hold no weights.
        handoff: see ``Handoff``.
        vocab_size: rows of the embedding now; None leaves the config's number.

    Returns:
        Each file written.
    """
    records = {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in carried_files(handoff.source):
        name = path.relative_to(handoff.source).as_posix()
        records[name] = copy_file(path, folder / name)
    records.update(_patch_config(folder, files, vocab_size))
    if handoff.tokenizer is not None:
        handoff.tokenizer.save_pretrained(folder)
        present = [p.relative_to(folder).as_posix() for p in carried_files(folder)]
        records.update({name: record_of(folder / name) for name in present})
    if handoff.chat_template is not None:
        records.update(_put_template(folder, handoff.chat_template))
    if handoff.eos_token_ids:
        records.update(_name_stop_tokens(folder, handoff.eos_token_ids))
    if len(files) > 1:
        records[INDEX_FILE] = write_json(folder / INDEX_FILE, build_index(files))
    return records


def carried_files(source: Path) -> list[Path]:
    """The files of a model folder that are not weights: configs, tokenizer, templates, remote code, licence."""
    found = [path for path in source.iterdir() if path.is_file()]
    if (source / "chat_templates").is_dir():
        found += [path for path in (source / "chat_templates").iterdir() if path.is_file()]
    kept = (p for p in found if p.suffix in _CARRIED_SUFFIXES or _CARRIED_NAMES.fullmatch(p.name))
    return sorted(p for p in kept if not _NOT_CARRIED.fullmatch(p.name) and not p.name.startswith("."))


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, not a JSON object.")
    return content


def _patch_config(folder: Path, files: Sequence[PlannedFile], vocab_size: int | None) -> dict[str, FileRecord]:
    """Bring config.json in line with the weights (dtype, vocabulary); untouched bytes where it already is."""
    path = folder / "config.json"
    config = _read_json(path)
    counted: Counter[torch.dtype] = Counter()
    for file in files:
        for spec in file.specs:
            counted[spec.dtype] += spec.nbytes
    changes: dict[str, Any] = {}
    if counted:
        dtype = dtype_name(counted.most_common(1)[0][0])
        changes = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    if vocab_size is not None and "vocab_size" in config:
        changes["vocab_size"] = vocab_size
    if all(config[key] == value for key, value in changes.items()):
        return {}
    return {"config.json": write_json(path, {**config, **changes})}


def source_template(folder: Path) -> str | None:
    """The default chat template of a model folder, wherever it is kept; None where there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if path.is_file() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name: the form before chat_templates/
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _put_template(folder: Path, template: str) -> dict[str, FileRecord]:
    """Make ``template`` the folder's default template, where both transformers 5 and 4 look for it."""
    if source_template(folder) == template:
        return {}
    records = {"chat_template.jinja": write_bytes(folder / "chat_template.jinja", template.encode())}
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if path.is_file() else {}
    held: Any = config.get("chat_template")
    if isinstance(held, list):  # several by name: only the default one is replaced
        held = [{"name": "default", "template": template}, *(item for item in held if item["name"] != "default")]
        records[path.name] = write_json(path, {**config, "chat_template": held})
    elif held is not None:
        records[path.name] = write_json(path, {**config, "chat_template": template})
    return records


def _name_stop_tokens(folder: Path, eos_token_ids: Sequence[int]) -> dict[str, FileRecord]:
    """Have generation_config.json stop at every token that training taught the model to end a turn with."""
    path = folder / "generation_config.json"
    config = _read_json(path) if path.is_file() else {}
    named = _as_list(config.get("eos_token_id"))
    missing = [token for token in eos_token_ids if token not in named]
    if not missing:
        return {}
    logger.info("generation_config.json: eos_token_id %s gains %s, which training ends turns with", named, missing)
    merged = named + missing
    return {path.name: write_json(path, {**config, "eos_token_id": merged[0] if len(merged) == 1 else merged})}


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def prove_model(folder: Path, files: Sequence[PlannedFile], handoff: Handoff, *, tied: bool | None) -> dict[str, Any]:
    """Open an exported model as its consumers will, and compare it with what was meant.

    The bytes of the weights have been compared when they were written; here it is the parts together: index and key
    set, dtype in the config, ties, tokenizer, chat template, stop tokens. No remote code is run.

    Args:
        folder: the model's folder.
        files: the weight files as planned.
        handoff: see ``Handoff``.
        tied: whether the weights hold one tensor for embedding and head; None where nobody knows.

    Returns:
        The verdict for the manifest.

    Raises:
        CheckpointError: names what differs.
    """
    expected = {spec.name: spec for file in files for spec in file.specs}
    found = open_model_files(folder)
    if set(found) != set(expected):
        raise CheckpointError(f"{folder}: tensors {sorted(set(found) ^ set(expected))[:6]} differ from those exported.")
    for name, spec in expected.items():
        if (found[name].dtype, found[name].shape) != (spec.dtype, spec.shape):
            raise CheckpointError(f"{folder}: {name} is {found[name].dtype} {found[name].shape}, expected {spec}.")
    remote = "auto_map" in _read_json(folder / "config.json")
    if not remote and tied is not None:
        _prove_config(folder, tied)
    template = _prove_tokenizer(folder, handoff, remote)
    named = _read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    stops = _as_list(named.get("eos_token_id"))
    if missing := [token for token in handoff.eos_token_ids if token not in stops]:
        raise CheckpointError(
            f"{folder}: generation_config.json stops at {stops} but training ends turns with {missing}."
        )
    return {
        "tensors": len(expected),
        "dtypes": dict(Counter(dtype_name(spec.dtype) for spec in expected.values())),
        "tied_embeddings": tied,
        "eos_token_id": stops,
        "chat_template": template,
        "weights_reread": "every byte compared",
        "config_loaded": "not loaded: it asks for remote code" if remote else True,
    }


def _prove_config(folder: Path, tied: bool) -> None:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if bool(config.get_text_config().tie_word_embeddings) != tied:
        raise CheckpointError(
            f"{folder}: config.json says tie_word_embeddings={not tied}, but the trained embeddings are "
            f"{'tied' if tied else 'not tied'}; the model would load with other weights."
        )


def _prove_tokenizer(folder: Path, handoff: Handoff, remote: bool) -> str:
    """Load the tokenizer and compare its template; say which it is."""
    wanted = handoff.chat_template if handoff.chat_template is not None else source_template(handoff.source)
    if remote or not (folder / "tokenizer_config.json").is_file():
        return "tokenizer not loaded"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    held = tokenizer.chat_template
    if isinstance(held, dict):
        held = held.get("default")
    if held != wanted:
        raise CheckpointError(f"{folder}: the tokenizer's chat template is not the one trained with.")
    return "as trained" if handoff.chat_template is not None else "as in the source"


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers' bars out of the training's own lines."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def prove_answers(folder: Path, probe: Probe) -> dict[str, Any]:
    """Load an exported model as its consumers do and compare its token losses with the trainer's.

    The model is loaded and computes in float32: transformers makes a model's dtype the process's default while it
    builds it, which training, on another thread, must not see. Memory: four bytes a parameter, in this process.

    Returns:
        The figures, for the manifest.

    Raises:
        CheckpointError: tensors are missing, or the median difference is more than rounding can explain.
    """
    if "auto_map" in _read_json(folder / "config.json"):
        return {"compared": "no: the model asks for remote code"}
    with _no_progress_bar():
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    if wrong := {key: sorted(map(str, names))[:4] for key, names in told.items() if names}:
        raise CheckpointError(f"{folder}: transformers loads the exported model with {wrong}.")
    with torch.inference_mode():
        logits = model.eval()(input_ids=probe.input_ids[None]).logits[0, :-1].float()
    found = torch.nn.functional.cross_entropy(logits, probe.input_ids[1:], reduction="none")
    error = (found - probe.losses).abs()
    median, largest = float(error.median()), float(error.max())
    stored = {entry.dtype for entry in open_model_files(folder).values()}
    exact = stored | {probe.compute_dtype} <= {torch.float32, torch.float64}
    allowed = _NATS_EXACT if exact else _NATS_ROUNDED
    if not median <= allowed:
        raise CheckpointError(
            f"{folder}: the exported model's token losses on a probe text are {median:.3g} nats (median) away from the "
            f"trainer's; rounding explains {allowed:g}. Set trainer.verify_export=false to save it nevertheless."
        )
    return {"compared": True, "tokens": len(found), "median_nats": median, "largest_nats": largest, "allowed": allowed}


# Of the median over the probe's tokens, which a mixture's router that tips over on a few tokens does not move.
_NATS_EXACT, _NATS_ROUNDED = 1e-3, 0.1
