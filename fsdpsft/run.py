"""Everything a run holds, put together from its settings: processes, model, optimiser, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from fsdpsft.checkpoint.export import Handoff, Probe
from fsdpsft.checkpoint.folder import only_run_in
from fsdpsft.checkpoint.manager import Adapter, CheckpointManager, patience
from fsdpsft.checkpoint.state import TrainState, read_state
from fsdpsft.config.load import parse_size, to_yaml
from fsdpsft.config.resume import check_config
from fsdpsft.config.schema import Config
from fsdpsft.data.batches.loader import Loader, SampleStore, Step
from fsdpsft.distributed.failure import explain
from fsdpsft.distributed.mesh import (
    Mesh,
    check_world,
    choose_device,
    close_mesh,
    env_rank,
    env_world_size,
    init_mesh,
    keep_freed_memory,
)
from fsdpsft.errors import UserError
from fsdpsft.evaluate import token_losses
from fsdpsft.lr_schedule import LRSchedule, build_schedule
from fsdpsft.metrics import Console, JsonLines, TensorBoard, Throughput, Tracker, Trackers, WandB
from fsdpsft.model import lora, streamed
from fsdpsft.model.flops import flop_count
from fsdpsft.model.sft_model import count_parameters, resolve_dtype
from fsdpsft.optim import build_optimizer
from fsdpsft.parallelize import ParallelModel, build_model
from fsdpsft.prepare import TrainingData, prepare_data
from fsdpsft.recorder import Recorder
from fsdpsft.signals import Stopped, StopSignal

log = logging.getLogger(__name__)

_PROBE_TOKENS = 64
_CONTENT = "content of data.train_files as tokenised"


@dataclass
class Run:
    """A run ready to go; ``train.py`` says what is done with it.

    Attributes:
        config: the settings.
        data: what the data side prepared.
        validation: None without ``data.val_files``.
        total_steps: optimiser steps of the whole run; ``start_step`` of them were done before.
        under_way: the step at work, counted from 1; 0 before the first.
    """

    config: Config
    data: TrainingData
    mesh: Mesh
    model: ParallelModel
    optimizer: torch.optim.Optimizer
    loader: Loader
    validation: Loader | None
    checkpoints: CheckpointManager
    schedule: LRSchedule
    recorder: Recorder
    requests: StopSignal
    start_step: int
    total_steps: int
    under_way: int = 0

    def steps(self) -> Iterator[Step]:
        """The steps still to do, built ahead; ``under_way`` is the one at work, counted from 1."""
        for step in self.loader.iterate(self.start_step, self.total_steps):
            self.under_way = step.index + 1
            yield step

    def lr(self, step: Step) -> float:
        """Learning rate of a step."""
        return self.config.optim.lr * self.schedule(step.index)

    @property
    def sync_every_micro_batch(self) -> bool:
        """Whether gradients are summed over processes after each micro-batch, or once a step."""
        return self.config.model.fsdp_config.gradient_sync == "every"

    def is_due(self, frequency: int | str, step: Step) -> bool:
        """Whether something done every ``frequency`` (steps, "epoch", -1: only at the end) is due after ``step``."""
        done = step.index + 1
        every = len(self.loader) if frequency == "epoch" else int(frequency)
        return done == self.total_steps or (every > 0 and done % every == 0)

    def save(self, step: Step) -> None:
        """Write ``global_step_N``, in the background where asked, and let old ones go."""
        t, done = self.config.trainer, step.index + 1
        state = TrainState(
            done, done / len(self.loader), tokens=self.recorder.tokens, trained_tokens=self.recorder.trained_tokens,
            config=self.config.as_dict(), data_fingerprint=self.data.train.fingerprint,
        )  # fmt: skip
        metric = self.recorder.last.get(t.best_metric) if t.best_metric else None
        self.checkpoints.save(
            self.model.module.causal_lm, self.optimizer, state, contents=t.save_contents, metric=metric,
            adapter=_adapter(self.model, self.config, self.data), probe=self._probe(), background=t.async_save,
        )  # fmt: skip

    def _probe(self) -> Probe | None:
        """A short text, and the model's loss on each of its tokens, which the exported model must show too."""
        t = self.config.trainer
        if not t.verify_export or "model" not in t.save_contents:
            return None
        input_ids = self.data.train.sample(0).input_ids[:_PROBE_TOKENS].astype(np.int64)
        losses = token_losses(self.model, input_ids, padded=not self.config.use_remove_padding)
        return Probe(torch.from_numpy(input_ids), losses, streamed.token_losses, self.model.compute_dtype)

    def close(self) -> None:
        """Wait for the save under way and close every file."""
        try:
            self.checkpoints.close()
        finally:
            self.recorder.close()


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Prepare the data, join the processes, build everything; close it all afterwards.

    Raises:
        UserError: settings or data that cannot work; another run that writes to the same folder.
        RunFailed: an error that is no user's mistake, or another process's; names rank and step.
    """
    data = prepare_data(config)  # before any process group: nobody times out while tokens are made
    # Before the lock, which makes the output folder: a mistake leaves none.
    check_world(env_world_size(), config.ulysses_sequence_parallel_size, config.model.fsdp_config.replicate_size)
    alone = only_run_in(Path(config.trainer.default_local_dir)) if env_rank() == 0 else contextlib.nullcontext()
    with alone, _join(config, data) as run:
        yield run


@contextlib.contextmanager
def _join(config: Config, data: TrainingData) -> Iterator[Run]:
    """Join the processes, build the run, and leave in the way that its end calls for."""
    device, t = choose_device(config.trainer.device), config.trainer
    if device.type == "cpu":
        keep_freed_memory()
    joined_before = torch.distributed.is_initialized()
    mesh = init_mesh(
        device, sp_size=config.ulysses_sequence_parallel_size,
        replicate_size=config.model.fsdp_config.replicate_size, timeout_s=t.timeout,
        shard_alone=config.model.fsdp_config.offload_params,
    )  # fmt: skip
    run: Run | None = None
    try:
        torch.manual_seed(t.seed + mesh.rank)  # of dropout alone: processes must not drop the same places
        save_on_file = Path(t.save_on_file) if t.save_on_file else None
        with StopSignal(save_on_file, timedelta(seconds=t.timeout)) as requests:
            run = _build(config, data, mesh, requests)
            yield run
    except (UserError, Stopped):  # all processes come here together
        _leave(run, joined_before)
        raise
    except Exception as error:
        # The others may be waiting for this process: to leave in good order could take until their time-out.
        if mesh.world_size == 1:
            _leave(run, joined_before)
        step = run.under_way if run is not None else 0
        raise explain(error, rank=mesh.rank, step=step, processes=mesh.world_size, timeout_s=t.timeout) from error
    else:
        _leave(run, joined_before)


def _leave(run: Run | None, joined_before: bool) -> None:
    """Finish what is being written and leave the process group, unless it is the caller's own."""
    try:
        if run is not None:
            run.close()
    finally:
        if not joined_before:
            close_mesh()


def _build(config: Config, data: TrainingData, mesh: Mesh, requests: StopSignal) -> Run:
    o, t = config.optim, config.trainer
    loader = make_loader(config, data.train, data, mesh)
    model = build_model(
        data.model_path, config.model, mesh, packed=config.use_remove_padding, seed=t.seed,
        max_length=config.data.max_length,
    )  # fmt: skip
    optimizer = build_optimizer(
        model.module, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, weight_decay=o.weight_decay,
        state_dtype=resolve_dtype(o.state_dtype, mesh.device),
    )  # fmt: skip
    checkpoints = CheckpointManager(
        Path(t.default_local_dir), _handoff(config, data), keep=t.max_ckpt_to_keep, keep_every=t.keep_every,
        publish="best" if t.best_metric else "newest", on_error=t.on_disk_full,  # type: ignore[arg-type]
        timeout=patience(t.timeout, count_parameters(model.module)[0]),
    )  # fmt: skip
    state = _resume(config, data, model, optimizer, checkpoints)
    total_steps = t.total_training_steps or t.total_epochs * len(loader)
    schedule = build_schedule(
        o.lr_scheduler, total_steps, warmup_steps=o.warmup_steps, warmup_ratio=o.warmup_steps_ratio,
        decay_ratio=o.decay_ratio, decay_shape=o.decay_shape, min_ratio=o.min_lr_ratio,
    )  # fmt: skip
    _announce(config, data, model, loader, state, total_steps)
    recorder = Recorder(
        _trackers(config, mesh, state.step, total_steps),
        Throughput(mesh.device, mesh.world_size, flop_count(model.module)),
        data.train.describe, steps_per_epoch=len(loader), source_names=data.train.source_names, log_freq=t.log_freq,
        tokens_seen=state.tokens, trained_tokens_seen=state.trained_tokens,
    )  # fmt: skip
    validation = None
    if data.validation is not None:
        validation = make_loader(config, data.validation, data, mesh, evaluation=True)
    return Run(
        config, data, mesh, model, optimizer, loader, validation, checkpoints, schedule, recorder, requests,
        state.step, total_steps,
    )  # fmt: skip


def make_loader(
    config: Config, store: SampleStore, data: TrainingData, mesh: Mesh, *, evaluation: bool = False
) -> Loader:
    """The loader of a store under the run's settings, for this process's place in the mesh."""
    d, packed = config.data, config.use_remove_padding
    return Loader(
        store, train_batch_size=d.train_batch_size, token_budget=d.token_budget, pad_token_id=data.pad_token_id,
        seed=config.trainer.seed, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, sp_size=mesh.sp_size,
        max_rows=None if packed else d.micro_batch_size_per_gpu, padded=not packed, drop_last=d.drop_last,
        balance=d.balance_dp_token, source_weights=None if evaluation else data.source_weights,
        max_samples=d.val_max_samples if evaluation else d.train_max_samples, evaluation=evaluation,
        pin_memory=mesh.device.type == "cuda",
    )  # fmt: skip


def _handoff(config: Config, data: TrainingData) -> Handoff:
    return Handoff(
        data.model_path, max_shard_bytes=parse_size(config.trainer.max_shard_size), chat_template=data.chat_template,
        eos_token_ids=data.eos_token_ids,
        fingerprints={"data": data.train.fingerprint, "encoder": data.encoder.fingerprint},
    )  # fmt: skip


def _adapter(model: ParallelModel, config: Config, data: TrainingData) -> Adapter | None:
    causal_lm = model.module.causal_lm
    if not config.model.uses_lora:
        return None
    return Adapter(
        lora.merged_state(causal_lm),
        lora.adapter_state(causal_lm),
        lora.adapter_config(causal_lm, str(data.model_path)),
    )


def _resume(
    config: Config, data: TrainingData, model: ParallelModel, optimizer: torch.optim.Optimizer,
    checkpoints: CheckpointManager,
) -> TrainState:  # fmt: skip
    """Load the checkpoint that ``trainer.resume_mode`` asks for; a fresh state where there is none."""
    t = config.trainer
    if t.resume_mode == "disable":
        return TrainState(step=0)
    path = Path(t.resume_from_path) if t.resume_from_path else checkpoints.latest_good()
    if path is None:
        return TrainState(step=0)
    saved = TrainState.of(read_state(path))
    # The same file names may hold other rows now, and the same tokenizer folder another template.
    was, now = ({_CONTENT: fingerprint} for fingerprint in (saved.data_fingerprint, data.train.fingerprint))
    check_config(was | saved.config, now | config.as_dict(), allow=t.allow_config_change)
    state = checkpoints.load(path, model.module.causal_lm, optimizer, verified=t.resume_from_path is None)
    model.weights_changed()
    return state


def _trackers(config: Config, mesh: Mesh, step: int, total_steps: int) -> Trackers:
    """Open the places metrics go to, and write ``config.yaml``; rank 0 alone has any."""
    if mesh.rank:
        return Trackers([])
    t, folder = config.trainer, Path(config.trainer.default_local_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config) + _versions())
    trackers: list[Tracker] = [JsonLines(folder / "metrics.jsonl", step)]
    trackers.append(Console(total_steps, step, lines="console" in t.logger))
    if "tensorboard" in t.logger:
        trackers.append(TensorBoard(folder, to_yaml(config)))
    if "wandb" in t.logger:
        trackers.append(WandB(folder, config.as_dict(), t.project_name, t.experiment_name))
    return Trackers(trackers)


def _versions() -> str:
    """Versions of what the run stands on, and the commit of the folder it was started in, as YAML comments."""
    names = ("fsdpsft", "torch", "transformers", "peft", "pyarrow", "flash-attn", "liger-kernel")
    lines = [f"# python {sys.version.split()[0]}"]
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines.append(f"# {name} {metadata.version(name)}")
    git = shutil.which("git")
    if git:
        found = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        lines += [f"# git {found.stdout.strip()}"] if found.returncode == 0 else []
    return "\n".join(lines) + "\n"


def _announce(
    config: Config, data: TrainingData, model: ParallelModel, loader: Loader, state: TrainState, total_steps: int
) -> None:
    if model.mesh.rank:
        return
    store, (total, trained) = data.train, count_parameters(model.module)
    log.info(
        "%s samples, %s tokens, %s of them trained (%.1f %%)", f"{len(store):,}",
        f"{int(store.lengths.sum(dtype=np.int64)):,}", f"{int(store.trained.sum(dtype=np.int64)):,}",
        100 * store.trained.sum(dtype=np.int64) / store.lengths.sum(dtype=np.int64),
    )  # fmt: skip
    log.info(
        "%s with %s parameters, %s trained, on %d x %s (data parallel %d, Ulysses %d), %s compute",
        type(model.module.causal_lm).__name__, f"{total:,}", f"{trained:,}", model.mesh.world_size,
        model.mesh.device.type, model.mesh.dp_size, model.mesh.sp_size, str(model.compute_dtype).removeprefix("torch."),
    )  # fmt: skip
    if state.step >= total_steps:
        log.info(
            "already finished: step %d of %d is done; raise trainer.total_epochs to go on", state.step, total_steps
        )
    elif state.step:
        log.info("resuming at step %d of %d", state.step, total_steps)
    else:
        log.info("%d steps of %d samples, %d an epoch", total_steps, config.data.train_batch_size, len(loader))
