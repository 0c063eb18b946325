"""Everything a run holds, put together from its settings: processes, model, optimiser, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from fsdpsft.checkpoint.export import Handoff, Probe
from fsdpsft.checkpoint.folder import LOCK_FILE, only_run_in
from fsdpsft.checkpoint.manager import Adapter, CheckpointManager
from fsdpsft.checkpoint.pieces import patience
from fsdpsft.checkpoint.state import TrainState, read_state
from fsdpsft.config.load import parse_size, to_yaml
from fsdpsft.config.resume import check_config
from fsdpsft.config.schema import Config, OptimConfig
from fsdpsft.data.batches.loader import Loader, Step
from fsdpsft.distributed.failure import explain
from fsdpsft.distributed.launcher import launcher_is_gone
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
from fsdpsft.errors import ConfigError, UserError
from fsdpsft.evaluate import token_losses
from fsdpsft.filesystem import replace_file
from fsdpsft.lr_schedule import LRSchedule
from fsdpsft.metrics import Console, JsonLines, TensorBoard, Throughput, Tracker, Trackers, WandB
from fsdpsft.model import lora, streamed
from fsdpsft.model.flops import flop_count
from fsdpsft.model.memory import Work
from fsdpsft.model.sft_model import count_parameters, resolve_dtype
from fsdpsft.optim import build_optimizer, decay_report
from fsdpsft.parallelize import ParallelModel, build_model
from fsdpsft.prepare import TrainingData, make_loader, make_schedule, prepare_data
from fsdpsft.recorder import Recorder
from fsdpsft.signals import Stopped, StopSignal

log = logging.getLogger(__name__)

LOCK_PATIENCE_S = 60.0
"""Seconds that a start waits for another run in its folder to end: a restarted run meets the one that it replaces."""

_PROBE_TOKENS = 64
_CONTENT = "content of data.train_files as tokenised"


@dataclass
class Run:
    """A run ready to start; ``train.py`` runs it.

    Attributes:
        config: the settings.
        data: what the data side prepared.
        validation: None without ``data.val_files``.
        under_way: the current step, counted from 1; 0 before the first.
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
    under_way: int = 0
    _steps: Generator[Step, None, None] | None = None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; ``start_step`` of them were done before."""
        return self.schedule.total_steps

    def steps(self) -> Iterator[Step]:
        """The steps still to do, built ahead; ``under_way`` is the current one, counted from 1."""
        with contextlib.closing(self.loader.iterate(self.start_step, self.total_steps)) as steps:
            self._steps = steps
            for step in steps:
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
        """Write ``global_step_N``, in the background where asked, and delete old ones."""
        t, done = self.config.trainer, step.index + 1
        state = TrainState(
            done,
            done / len(self.loader),
            tokens=self.recorder.tokens,
            trained_tokens=self.recorder.trained_tokens,
            config=self.config.as_dict(),
            data_fingerprint=self.data.train.fingerprint,
        )
        metric = self.recorder.last.get(t.best_metric) if t.best_metric else None
        self.checkpoints.save(
            self.model.module.causal_lm,
            self.optimizer,
            state,
            contents=t.save_contents,
            metric=metric,
            adapter=_adapter(self.model, self.config, self.data),
            probe=self._probe(),
            background=t.async_save,
        )

    def _probe(self) -> Probe | None:
        """A short text, and the model's loss on each of its tokens, which the exported model must show too."""
        t = self.config.trainer
        if not t.verify_export or "model" not in t.save_contents:
            return None
        input_ids = self.data.train.sample(0).input_ids[:_PROBE_TOKENS].astype(np.int64)
        losses = token_losses(self.model, input_ids, padded=not self.config.use_remove_padding)
        return Probe(torch.from_numpy(input_ids), losses, streamed.token_losses, self.model.compute_dtype)

    def close(self) -> None:
        """End the loader's thread, wait for the save under way, and close every file."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.recorder.close)
            stack.callback(self.checkpoints.close)
            stack.callback(self.requests.settle)
            if self._steps is not None:
                self._steps.close()


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Prepare the data, join the processes, build everything; close it all afterwards.

    Raises:
        UserError: settings or data that cannot work; another run that writes to the same folder.
        Stopped: a signal, before the first step; what was begun is removed.
        RunFailed: an error that is no user's mistake, or another process's; names rank and step.
    """
    t, folder = config.trainer, Path(config.trainer.default_local_dir)
    trigger = Path(t.save_on_file) if t.save_on_file else None
    if trigger is not None and trigger.exists() and not trigger.is_file():
        raise ConfigError(f"trainer.save_on_file={trigger} is a device or a folder; name a file that does not exist")
    with StopSignal(trigger, launcher_is_gone, save_within_s=t.timeout) as requests:
        data = prepare_data(config)  # before any process group: no process times out while tokens are made
        # Before the lock, which makes the output folder: a mistake leaves none.
        check_world(env_world_size(), config.ulysses_sequence_parallel_size, config.model.fsdp_config.replicate_size)
        alone = _own_folder(folder) if env_rank() == 0 else contextlib.nullcontext()
        with alone, _join(config, data, requests) as run:
            yield run


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of the output folder; remove it where this one made it and ends before its first step."""
    new = not folder.exists()
    with only_run_in(folder, LOCK_PATIENCE_S):
        try:
            yield
        except Stopped as stopped:
            if new and not stopped.step:
                _remove_unused(folder)
            raise


def _remove_unused(folder: Path) -> None:
    (folder / LOCK_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds files of somebody else
        folder.rmdir()


@contextlib.contextmanager
def _join(config: Config, data: TrainingData, requests: StopSignal) -> Iterator[Run]:
    """Join the processes, build the run, and leave in the way that its end calls for."""
    device, t = choose_device(config.trainer.device), config.trainer
    if device.type == "cpu":
        keep_freed_memory()
    joined_before = torch.distributed.is_initialized()
    sp_size, fsdp = config.ulysses_sequence_parallel_size, config.model.fsdp_config
    mesh = init_mesh(
        device,
        sp_size=sp_size,
        replicate_size=fsdp.replicate_size,
        timeout_s=t.timeout,
        shard_alone=fsdp.offload_params,
    )
    run: Run | None = None
    try:
        torch.manual_seed(t.seed + mesh.rank)  # of dropout alone: processes must not drop the same places
        run = _build(config, data, mesh, requests)
        requests.begin(timedelta(seconds=t.timeout))
        try:
            yield run
        except Stopped:
            run.checkpoints.wait()
            raise
        run.checkpoints.wait()  # here, so that a process stuck in the last save is reported like any other
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
    t = config.trainer
    loader = make_loader(config, data.train, data, mesh)
    validation = None
    if data.validation is not None:
        validation = make_loader(config, data.validation, data, mesh, evaluation=True)
    moments = resolve_dtype(config.optim.state_dtype, mesh.device)
    schedule = make_schedule(config, len(loader))
    work = Work(
        config.use_remove_padding, config.data.max_length, config.data.token_budget, moments, schedule.total_steps
    )
    model = build_model(data.model_path, config.model, mesh, work, seed=t.seed)
    optimizer = make_optimizer(config.optim, model, moments)
    checkpoints = CheckpointManager(
        Path(t.default_local_dir),
        _handoff(config, data),
        keep=t.max_ckpt_to_keep,
        keep_every=t.keep_every,
        publish="best" if t.best_metric else "newest",
        on_error=t.on_disk_full,  # type: ignore[arg-type]
        timeout=patience(t.timeout, count_parameters(model.module)[0]),
    )
    state = _resume(config, data, model, optimizer, checkpoints)
    if config.optim.log_decay and not mesh.rank:
        log.info(decay_report(model.module.causal_lm))
    _announce(config, data, model, loader, state, schedule.total_steps)
    recorder = Recorder(
        _trackers(config, mesh, state.step, schedule.total_steps),
        Throughput(mesh.device, mesh.world_size, flop_count(model.module)),
        data.train.describe,
        steps_per_epoch=len(loader),
        source_names=data.train.source_names,
        log_freq=t.log_freq,
        tokens_seen=state.tokens,
        trained_tokens_seen=state.trained_tokens,
    )
    first = state.step
    return Run(
        config, data, mesh, model, optimizer, loader, validation, checkpoints, schedule, recorder, requests, first
    )


def make_optimizer(optim: OptimConfig, model: ParallelModel, moments: torch.dtype) -> torch.optim.Optimizer:
    """The optimiser of a model under the run's settings, its moments in dtype ``moments``."""
    betas = optim.betas[0], optim.betas[1]
    return build_optimizer(
        model.module, lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, state_dtype=moments
    )


def _handoff(config: Config, data: TrainingData) -> Handoff:
    return Handoff(
        data.model_path,
        max_shard_bytes=parse_size(config.trainer.max_shard_size),
        chat_template=data.chat_template,
        eos_token_ids=data.eos_token_ids,
        fingerprints={"data": data.train.fingerprint, "encoder": data.encoder.fingerprint},
    )


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
    config: Config,
    data: TrainingData,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    checkpoints: CheckpointManager,
) -> TrainState:
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
    return checkpoints.load(path, model.module.causal_lm, optimizer, verified=t.resume_from_path is None)


def _trackers(config: Config, mesh: Mesh, step: int, total_steps: int) -> Trackers:
    """Open the places metrics go to, and write ``config.yaml``; rank 0 alone has any.

    Raises:
        ConfigError: one is not installed. One that cannot be opened is left out, with a warning.
    """
    if mesh.rank:
        return Trackers([])
    t, folder = config.trainer, Path(config.trainer.default_local_dir)
    try:
        replace_file(folder / "config.yaml", (to_yaml(config) + _versions()).encode())
    except OSError as error:
        log.warning("%s was not written: %s", folder / "config.yaml", error)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder, to_yaml(config)),
        "wandb": lambda: WandB(folder, config.as_dict(), t.project_name, t.experiment_name),
    }
    trackers: list[Tracker] = [JsonLines(folder / "metrics.jsonl", step)]
    trackers.append(Console(total_steps, step, lines="console" in t.logger))
    for name, make in makers.items():
        if name not in t.logger:
            continue
        try:
            trackers.append(make())
        except (ConfigError, Stopped):
            raise
        except Exception as error:  # noqa: BLE001 - code of others must not end the run
            log.warning("trainer.logger: no %s, it cannot be opened: %s: %s", name, type(error).__name__, error)
    return Trackers(trackers)


def _versions() -> str:
    """Versions of the software, and the commit of the folder it was started in, as YAML comments."""
    names = ("fsdpsft", "torch", "transformers", "peft", "pyarrow", "flash-attn", "liger-kernel")
    lines = [f"# python {sys.version.split()[0]}"]
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines.append(f"# {name} {metadata.version(name)}")
    git = shutil.which("git")
    if git:
        with contextlib.suppress(subprocess.TimeoutExpired):
            found = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10)
            lines += [f"# git {found.stdout.strip()}"] if found.returncode == 0 else []
    return "\n".join(lines) + "\n"


def _announce(
    config: Config, data: TrainingData, model: ParallelModel, loader: Loader, state: TrainState, total_steps: int
) -> None:
    if model.mesh.rank:
        return
    store, mesh, (total, trained) = data.train, model.mesh, count_parameters(model.module)
    tokens, trained_tokens = int(store.lengths.sum(dtype=np.int64)), int(store.trained.sum(dtype=np.int64))
    log.info(
        f"{len(store):,} samples, {tokens:,} tokens, {trained_tokens:,} of them trained "
        f"({100 * trained_tokens / tokens:.1f} %)"
    )
    log.info(
        f"{type(model.module.causal_lm).__name__} with {total:,} parameters, {trained:,} trained, on "
        f"{mesh.world_size} x {mesh.device.type} (data parallel {mesh.dp_size}, Ulysses {mesh.sp_size}), "
        f"{str(model.compute_dtype).removeprefix('torch.')} compute"
    )
    if state.step >= total_steps:
        log.info(
            "already finished: step %d of %d is done; raise trainer.total_epochs to continue", state.step, total_steps
        )
    elif state.step:
        log.info("resuming at step %d of %d", state.step, total_steps)
    else:
        log.info("%d steps of %d samples, %d an epoch", total_steps, config.data.train_batch_size, len(loader))
