"""A Hugging Face model's files beside its weights, and the proof that the folder is the model that was trained.

Config and tokenizer are the source model's files, byte for byte, except for what training changed: a consumer pinned to
an older transformers keeps working. The weights are ``tensor_plan``'s.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from fsdpsft.checkpoint.safetensors import INDEX_FILE, dtype_name, open_model_files
from fsdpsft.checkpoint.tensor_plan import Layout, PlannedFile, StoredDtypes, build_index
from fsdpsft.errors import CheckpointError, ModelError
from fsdpsft.filesystem import FileRecord, copy_file, read_object, write_bytes, write_json

logger = logging.getLogger(__name__)

_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_CARRIED_NAMES = re.compile(r"(LICENSE|NOTICE).*", re.IGNORECASE)
_NOT_CARRIED = re.compile(r"manifest\.json|.*\.index\.json|adapter_config\.json|trainer_state\.json|requirements\.txt")


@dataclass(frozen=True)
class Handoff:
    """What is exported beside the weights.

    Attributes:
        source: folder of the model training began from.
        dtype: of the floating-point weights on disk; None keeps each tensor's dtype in the source's files.
        max_shard_bytes: largest weights file.
        chat_template: the template trained with; None keeps the source's.
        eos_token_ids: tokens that end a turn; generation_config.json will name them all.
        fingerprints: put into the manifest (template, data, ...).
        stored: dtypes of the source's files, where the files are gone.
    """

    source: Path
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5_000_000_000
    chat_template: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    stored: StoredDtypes | None = None

    @property
    def layout(self) -> Layout:
        """Of the weight files; the source's dtypes are read there unless they were given."""
        return Layout(self.stored or StoredDtypes.of(self.source), self.dtype, self.max_shard_bytes)


@dataclass(frozen=True)
class Probe:
    """A text and what the model in training makes of it.

    Attributes:
        input_ids: [T] int64, on the CPU.
        losses: [T - 1] loss of each token but the first, on the CPU.
        ask: folder of a model, [T] ids -> [T - 1] losses of that model (``model.streamed.token_losses``).
        compute_dtype: that the losses were computed in.
    """

    input_ids: Tensor
    losses: Tensor
    ask: Callable[[Path, Tensor], Tensor]
    compute_dtype: torch.dtype = torch.float32


def write_hub_files(folder: Path, files: Sequence[PlannedFile], handoff: Handoff) -> dict[str, FileRecord]:
    """Write all but the weights: config, generation config, tokenizer, chat template, index.

    ``files`` are the weight files, for the index and the dtype. Returns each file written.
    """
    records = {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in carried_files(handoff.source):
        name = path.relative_to(handoff.source).as_posix()
        records[name] = copy_file(path, folder / name)
    records.update(_patch_config(folder, files))
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
    return read_object(path, ModelError, "Fetch the model again.")


def _patch_config(folder: Path, files: Sequence[PlannedFile]) -> dict[str, FileRecord]:
    """Make config.json name the dtype of the weights; untouched bytes where it already does."""
    path = folder / "config.json"
    config = _read_json(path)
    counted: Counter[torch.dtype] = Counter()
    for file in files:
        for spec in file.specs:
            counted[spec.dtype] += spec.nbytes
    dtype = dtype_name(counted.most_common(1)[0][0]) if counted else None
    changes = {key: dtype for key in ("dtype", "torch_dtype") if dtype is not None and key in config}
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
        template = next((item["template"] for item in template if item["name"] == "default"), None)
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

    ``tied`` says whether the weights hold one tensor for embedding and head; None where not known.

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


def prove_answers(folder: Path, probe: Probe) -> dict[str, Any]:
    """Compare the token losses of the exported model, opened again, with the trainer's.

    Returns:
        The figures, for the manifest.

    Raises:
        UserError: the model does not load, or the median difference is more than rounding can explain.
    """
    if "auto_map" in _read_json(folder / "config.json"):
        return {"compared": "no: the model asks for remote code"}
    try:
        found = probe.ask(folder, probe.input_ids)
    except NotImplementedError as error:  # no fault of the files, and hours of training wait to be saved
        logger.warning("%s: its losses were not compared with the trainer's: %s", folder.name, error)
        return {"compared": f"no: {error}"}
    difference = (found - probe.losses).abs()
    median, largest = float(difference.median()), float(difference.max())
    stored = {entry.dtype for entry in open_model_files(folder).values()}
    exact = stored | {probe.compute_dtype} <= {torch.float32, torch.float64}
    allowed = _NATS_EXACT if exact else _NATS_ROUNDED
    if not median <= allowed:
        raise CheckpointError(
            f"{folder}: the exported model's token losses on a probe text are {median:.3g} nats (median) away from the "
            f"trainer's; rounding explains {allowed:g}. Set trainer.verify_export=false to save it nevertheless."
        )
    return {
        "compared": True,
        "tokens": len(difference),
        "median_nats": median,
        "largest_nats": largest,
        "allowed": allowed,
    }


# Of the median over the probe's tokens, which a mixture's router that tips over on a few tokens does not move.
_NATS_EXACT, _NATS_ROUNDED = 1e-3, 0.1
