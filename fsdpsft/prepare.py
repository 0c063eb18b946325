"""From settings to tokenised data, its loaders and the learning rate: what training, the check and the plan start from.

Needs no process group.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from fsdpsft.config.schema import Config, DataConfig
from fsdpsft.data.batches.loader import Loader, LoaderSettings, SampleStore
from fsdpsft.data.batches.store import TokenStore
from fsdpsft.data.batches.store_build import open_or_build
from fsdpsft.data.batches.store_parts import BuildOptions
from fsdpsft.data.mask.given import remarks
from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.mask.spans import folder_disagrees
from fsdpsft.data.rows.conversation import RowFormat, unused_columns
from fsdpsft.data.rows.sources import Source, resolve_sources
from fsdpsft.distributed.mesh import Mesh, env_local_rank, env_rank
from fsdpsft.errors import ConfigError, DataError, ModelError, and_more
from fsdpsft.lr_schedule import LRSchedule, build_schedule
from fsdpsft.model.load import load_tokenizer, resolve_model_path

log = logging.getLogger(__name__)

_STOP_SAMPLES = 32


@dataclass(frozen=True)
class TrainingData:
    """What the data side gives to training.

    Attributes:
        model_path: local folder of the model.
        encoder: turned the rows into tokens; holds the chat template.
        train: the training samples; ``validation``: None without ``data.val_files``.
        source_weights: draws per sample and epoch of each training source; None where all are 1.
        eos_token_ids: what ends generation, the stop token that is trained included.
    """

    model_path: Path
    tokenizer: PreTrainedTokenizerFast
    encoder: RowEncoder
    sources: tuple[Source, ...]
    train: TokenStore
    validation: TokenStore | None
    source_weights: tuple[float, ...] | None
    eos_token_ids: tuple[int, ...]

    @property
    def pad_token_id(self) -> int:
        """Id of filler tokens; they are never trained, so any will do where the tokenizer names none."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else 0

    @property
    def chat_template(self) -> str | None:
        """The template's text as trained with; None where the data came as tokens."""
        return self.encoder.template.text if self.encoder.needs_template else None


def row_format(data: DataConfig) -> RowFormat:
    """The columns' meaning, in the data side's own terms."""
    return RowFormat(
        format="messages" if data.multiturn.enable and data.format == "auto" else data.format,
        prompt_key=data.prompt_key,
        response_key=data.response_key,
        prompt_dict_keys=tuple(data.prompt_dict_keys or ()),
        response_dict_keys=tuple(data.response_dict_keys or ()),
        messages_key=data.multiturn.messages_key,
        system_key=data.system_key,
        tools_key=data.tools_key,
        enable_thinking_key=data.multiturn.enable_thinking_key,
        train_on_turns=data.train_on_turns,
    )


def generation_eos(model_path: Path) -> tuple[int, ...]:
    """``eos_token_id`` of ``generation_config.json``, else of ``config.json``, as a tuple.

    Raises:
        ModelError: a file that is not JSON, or ids that are no numbers.
    """
    for file in (model_path / "generation_config.json", model_path / "config.json"):
        try:
            eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
            found = tuple(map(int, eos if isinstance(eos, list) else [] if eos is None else [eos]))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{file}: eos_token_id cannot be read ({error}); fix the file") from error
        if found:
            return found
    return ()


def make_encoder(
    data: DataConfig, sources: list[Source], tokenizer: PreTrainedTokenizerFast, eos_token_ids: tuple[int, ...]
) -> RowEncoder:
    """What turns the rows of ``sources`` into tokens and masks."""
    path, name = data.custom_cls.path, data.custom_cls.name
    return RowEncoder(
        sources,
        tokenizer,
        row_format(data),
        chat_template=data.chat_template,
        template_kwargs=data.chat_template_kwargs,
        special_tokens_in_content=data.special_tokens_in_content,  # type: ignore[arg-type]
        history=data.history,  # type: ignore[arg-type]
        eos_token_ids=eos_token_ids,
        custom_cls=None if path is None or name is None else (path, name),
        may_drop=data.may_drop,
    )


def prepare_data(config: Config, every_byte: bool = False) -> TrainingData:
    """Find the model and the files, and tokenise what is not tokenised yet; the other local processes wait for it.

    Args:
        config: the settings.
        every_byte: compare the hash of every tokenised array with what was written, which reads all of them.

    Raises:
        UserError: a model, file, row or template that cannot be used; nothing large has been loaded by then.
    """
    d = config.data
    leader = env_local_rank() == 0
    sources = resolve_sources(d.train_files, d.dataset_info)
    held_out = resolve_sources(d.val_files, d.dataset_info, split="validation") if d.val_files is not None else []
    model_path = resolve_model_path(config.model.partial_pretrain)
    tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
    if leader and (warning := folder_disagrees(tokenizer, model_path / "tokenizer.json")):
        log.warning(warning)
    eos = generation_eos(model_path)
    options = BuildOptions(d.max_length, d.truncation, d.on_bad_row, d.max_bad_share, d.num_workers)

    def tokenised(sources: list[Source], encoder: RowEncoder) -> TokenStore:
        return open_or_build(
            sources, encoder, options, d.cache_dir, may_build=leader, progress=env_rank() == 0, every_byte=every_byte
        )

    encoder = make_encoder(d, sources, tokenizer, eos)
    train = tokenised(sources, encoder)
    for remark in remarks(train.stats) if env_rank() == 0 else ():
        log.warning(remark)
    check_size(train, config)
    for source in sources:
        if unused := unused_columns(source, encoder.adapters[source.name], encoder.formats[source.name]):
            log.info("%s: columns that nothing reads: %s", source.name, and_more(unused, 20))
    validation = tokenised(held_out, make_encoder(d, held_out, tokenizer, eos)) if held_out else None
    if validation is not None and not validation.trained.any():
        raise DataError("data.val_files has no trained token, so there is no validation loss")
    weights = tuple(source.weight for source in sources)
    return TrainingData(
        model_path=model_path,
        tokenizer=tokenizer,
        encoder=encoder,
        sources=tuple(sources),
        train=train,
        validation=validation,
        source_weights=weights if any(weight != 1.0 for weight in weights) else None,
        eos_token_ids=eos + _trained_stops(train, tokenizer, eos),
    )


def make_loader(
    config: Config, store: SampleStore, data: TrainingData, mesh: Mesh, *, evaluation: bool = False
) -> Loader:
    """The loader of a store under the run's settings, for this process's place in the mesh."""
    d, packed = config.data, config.use_remove_padding
    settings = LoaderSettings(
        train_batch_size=d.train_batch_size,
        token_budget=d.token_budget,
        pad_token_id=data.pad_token_id,
        seed=config.trainer.seed,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        sp_size=mesh.sp_size,
        max_rows=None if packed else d.micro_batch_size_per_gpu,
        padded=not packed,
        drop_last=d.drop_last,
        balance=d.balance_dp_token,
        source_weights=None if evaluation else data.source_weights,
        max_samples=d.val_max_samples if evaluation else d.train_max_samples,
        evaluation=evaluation,
        pin_memory=mesh.device.type == "cuda",
    )
    return Loader(store, settings)


def make_schedule(config: Config, steps_per_epoch: int) -> LRSchedule:
    """The learning rate over all steps of the run."""
    t = config.trainer
    return build_schedule(config.optim, t.total_training_steps or t.total_epochs * steps_per_epoch)


def check_size(store: TokenStore, config: Config) -> None:
    """Refuse data with fewer samples than one batch."""
    limit = config.data.train_max_samples
    samples = min(len(store), limit) if limit else len(store)
    if samples < config.data.train_batch_size:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size} is more than the {samples} samples of "
            f"data.train_files{f' (data.train_max_samples={limit})' if limit else ''}: not one "
            f"batch. Set data.train_batch_size to {samples} or less"
        )


def _trained_stops(store: TokenStore, tokenizer: PreTrainedTokenizerFast, known: tuple[int, ...]) -> tuple[int, ...]:
    """Special tokens that end the trained spans of the first samples and that ``known`` lacks."""
    special = set(tokenizer.all_special_ids)
    found: Counter[int] = Counter()
    for index in range(min(len(store), _STOP_SAMPLES)):
        sample = store.sample(index)
        last = int(sample.input_ids[np.flatnonzero(sample.loss_weights)[-1]]) if sample.loss_weights.any() else -1
        found[last] += 1
    missing = tuple(token for token, _ in found.most_common(1) if token in special and token not in known)
    if missing:
        log.info(
            "%s ends the replies that are trained; it will end generation too", tokenizer.convert_ids_to_tokens(missing)
        )
    return missing
