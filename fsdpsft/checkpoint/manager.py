"""Checkpoints: ``global_step_N/`` with a Hugging Face model and the state to resume from, complete or absent.

A save copies this rank's part of weights and optimiser state to host memory, for which training waits. Then, on a
thread or at once, it writes: the state as one safetensors file per rank, the model as Hub files whose owners gather one
tensor at a time over a process group on the CPU. Rank 0 proves the model, writes the manifest, renames the folder into
place, links it at the root and deletes old checkpoints. Every rank learns the outcome.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fsdpsft.checkpoint.export import Handoff, Probe, prove_answers, prove_model, source_template, write_hub_files
from fsdpsft.checkpoint.folder import FORMAT_VERSION, Manifest, RunFolder, holds_model, verify, write_manifest
from fsdpsft.checkpoint.parameters import is_tied, named_tensors, trained_tensors
from fsdpsft.checkpoint.pieces import Exchange, Peers, Piece, Staging, piece_of, rows_of
from fsdpsft.checkpoint.safetensors import TensorSpec, dtype_name
from fsdpsft.checkpoint.state import (
    MODEL,
    OPTIMIZER,
    STATE_FILE,
    STATE_FOLDER,
    TrainState,
    allocate_optimizer_state,
    capture_rng,
    compare_tensors,
    optimizer_tensors,
    read_state,
    read_tensors,
    restore_rng,
    saved_tensors,
    write_local_pieces,
)
from fsdpsft.checkpoint.tensor_plan import PlannedFile, Unit, plan_export, write_tensor_files
from fsdpsft.errors import CheckpointError, UserError
from fsdpsft.filesystem import FileRecord, require_space, write_json

logger = logging.getLogger(__name__)

ADAPTER_FOLDER, HUB_FOLDER = "lora_adapter", "trainer_state/model_files"


@dataclass(frozen=True)
class Adapter:
    """LoRA: what is written instead of the weights in training, and beside them.

    Attributes:
        merged: the plain model's tensors with the adapter added, whole, by plain name. Read once and one at a time, on
            every rank in the same order; each rank keeps its share of the rows. ``model.lora.merged_state``.
        tensors: the adapter alone, whole, under PEFT's names. ``model.lora.adapter_state``.
        config: content of ``adapter_config.json``.
    """

    merged: Iterable[tuple[str, Tensor]]
    tensors: Iterable[tuple[str, Tensor]]
    config: Mapping[str, Any]


@dataclass
class _Job:
    """One save: what is to be written, copied from the tensors in training."""

    state: TrainState
    metric: float | None
    training: dict[str, Piece] = field(default_factory=dict)
    weights: dict[str, Piece] = field(default_factory=dict)
    weight_files: list[PlannedFile] = field(default_factory=list)
    adapter: dict[str, Piece] = field(default_factory=dict)
    adapter_config: Mapping[str, Any] | None = None
    rng: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    probe: Probe | None = None

    @property
    def adapter_files(self) -> list[PlannedFile]:
        """The adapter as one file, named as PEFT looks for it."""
        units = [Unit((p.name,), (TensorSpec(p.name, p.dtype, p.shape),)) for p in self.adapter.values()]
        units.sort(key=lambda unit: -unit.dtype.itemsize)
        return [PlannedFile(f"{ADAPTER_FOLDER}/adapter_model.safetensors", tuple(units))] if units else []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written, by all ranks together."""
        written = sum(piece.nbytes for piece in (*self.training.values(), *self.adapter.values()))
        return written + sum(file.nbytes for file in self.weight_files)


class CheckpointManager:
    """Saves, keeps, verifies and loads the checkpoints of one run. Every rank makes one and calls it alike."""

    def __init__(
        self,
        root: Path,
        handoff: Handoff,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        publish: Literal["newest", "best"] = "newest",
        on_error: Literal["error", "continue"] = "error",
        timeout: timedelta = timedelta(hours=1),
    ) -> None:
        """Collective where ``torch.distributed`` is initialised: makes a gloo group of its own.

        Args:
            root: ``trainer.default_local_dir``, on a file system all ranks see.
            handoff: what goes with the exported weights.
            keep: number of newest checkpoints kept (None: all); the best one stays besides.
            keep_every: checkpoints of steps divisible by it stay too.
            publish: which checkpoint the root directory shows; the best one has the lowest metric.
            on_error: whether a failed save ends the run ("error") or is logged ("continue").
            timeout: for one rank waiting for another while files are written; see ``patience``.
        """
        self.folder = RunFolder(root)
        self._handoff = handoff
        self._keep, self._keep_every = keep, keep_every
        self._publish, self._on_error = publish, on_error
        self._peers = Peers.of_this_run(timeout)
        self._rank = self._peers.rank
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._begun_at: int | None = 0
        self._plan: tuple[list[tuple[str, tuple[int, ...], torch.dtype]], list[PlannedFile]] = ([], [])
        if self._rank == 0:
            self.folder.clean()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: TrainState,
        *,
        contents: Collection[str] = ("model", "state"),
        metric: float | None = None,
        adapter: Adapter | None = None,
        probe: Probe | None = None,
        background: bool = False,
    ) -> float:
        """Write ``global_step_N`` for ``state.step``. Collective. Waits for the save before it.

        Args:
            model: the transformers model, its parameters sharded or not.
            optimizer: needed where ``contents`` has "state".
            state: of the run.
            contents: "model" (Hugging Face files), "state" (``trainer_state/``), or both.
            metric: of this step, to find the best checkpoint by.
            adapter: with LoRA; ``trainer_state`` then holds the trained parameters only.
            probe: compare the exported model's token losses with these; rank 0 does.
            background: return once the tensors are copied to host memory, and write on a thread.

        Returns:
            Seconds that training waited.

        Raises:
            CheckpointError: this save (or, with ``background``, the one before it) failed and ``on_error`` is "error".
        """
        self.wait()
        began = time.perf_counter()
        job = self._prepare(model, optimizer, state, frozenset(contents), adapter, copy=background)
        job.metric = metric if metric is not None and isfinite(metric) else None
        job.probe = probe
        if background:
            self._thread = threading.Thread(target=self._fulfil, args=(job,), name="checkpoint")
            self._thread.start()
        else:
            self._fulfil(job)
            self.wait()
        stall = time.perf_counter() - began
        logger.info("checkpoint of step %d: training waited %.2f s", state.step, stall)
        return stall

    def wait(self) -> None:
        """Wait for the save under way. Called by every rank.

        Raises:
            CheckpointError: it failed, and ``on_error`` is "error".
            RuntimeError: another rank did not answer; names it.
        """
        if self._thread is not None:
            # Its end, not its result: a thread still freeing tensors when the interpreter goes aborts the process.
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, CheckpointError) and self._on_error == "continue":
            logger.error("%s Training goes on, as trainer.on_disk_full=continue asks.", failure)
        elif failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the save and the deletions under way, and give the buffers back."""
        try:
            self.wait()
        finally:
            self.folder.finish_deletions()
            self._staging.close()

    def latest_good(self) -> Path | None:
        """The newest checkpoint that can be resumed from and passes every check; worse ones are named in a warning.

        Collective: the ranks share the reading. None where there is nothing to resume from.
        """
        names: list[str] = self._peers.all_gather([path.name for _, path in reversed(self.folder.checkpoints())])[0]
        for path in (self.folder.root / name for name in names):
            problem = self._problem(path)
            if problem is None:
                return path
            if self._rank == 0:
                logger.warning("not resuming from %s: %s", path.name, problem)
        return None

    def _problem(self, path: Path) -> str | None:
        problem = None
        try:
            manifest = verify(path, part=self._rank, parts=self._peers.size)
            if STATE_FILE in manifest.files:
                read_state(path)
            else:
                problem = f"{path} has no {STATE_FOLDER}/ (it was saved with trainer.save_contents=[model])."
        except (CheckpointError, OSError) as error:
            problem = str(error)
        return next((found for found in self._peers.all_gather(problem) if found is not None), None)

    def load(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, *, verified: bool = False
    ) -> TrainState:
        """Fill model, optimiser and random generators from a checkpoint, on any number of ranks. Collective.

        Args:
            path: a ``global_step_N`` folder.
            model: as it was when saved (same architecture, same LoRA), sharded in any way.
            optimizer: None leaves the optimiser state unread.
            verified: it comes from ``latest_good``.

        Raises:
            CheckpointError: the checkpoint is damaged, has no state, or is of another model.
        """
        if not verified and (problem := self._problem(path)) is not None:
            raise CheckpointError(problem)
        content = read_state(path)
        saved = saved_tensors(content)
        parameters = named_tensors(model) if content["complete"] else trained_tensors(model)
        target = {f"{MODEL}{name}": tensor.detach() for name, tensor in parameters.items()}
        compare_tensors(path, {k: v for k, v in saved.items() if k.startswith(MODEL)}, target)
        if optimizer is not None:
            wanted = {key: value for key, value in saved.items() if key.startswith(OPTIMIZER)}
            target.update(allocate_optimizer_state(parameters, optimizer, wanted))
        read_tensors(path / STATE_FOLDER, target, self._peers.group)
        if len(content["rng"]) == self._peers.size:
            restore_rng(content["rng"][self._rank])
        else:
            logger.warning("saved on %d processes: dropout draws will differ from there on", len(content["rng"]))
        state = TrainState.of(content)
        self._begun_at = state.step
        if self._rank == 0 and path.resolve().parent == self.folder.root.resolve():
            self._show(state.step)  # the run may have been killed between saving this checkpoint and showing it
        return state

    # --- the first half of a save: what, and its copy -----------------------------------------------------------

    def _prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: TrainState,
        contents: frozenset[str],
        adapter: Adapter | None,
        *,
        copy: bool,
    ) -> _Job:
        """Say what is to be written, and copy it to the host if it is to be written later."""
        parameters = named_tensors(model) if adapter is None else trained_tensors(model)
        job = _Job(replace(state), None, rng=capture_rng(), tied=is_tied(model))
        held = {name: self._piece(name, tensor, copy) for name, tensor in parameters.items()}
        if "state" in contents:
            assert optimizer is not None, "a resumable state needs the optimiser"
            job.training = {f"{MODEL}{name}": replace(piece, name=f"{MODEL}{name}") for name, piece in held.items()}
            for name, tensor in optimizer_tensors(parameters, optimizer).items():
                job.training[name] = self._piece(name, tensor, copy)
        if adapter is not None:
            job.adapter_config = dict(adapter.config)
            job.adapter = {name: self._rows("adapter", name, tensor) for name, tensor in adapter.tensors}
        if "model" in contents:
            job.weights = held
            if adapter is not None:
                job.weights = {name: self._rows("merged", name, tensor) for name, tensor in adapter.merged}
            job.weight_files = self._planned(model, job.weights)
        self._staging.finish()
        return job

    def _planned(self, model: nn.Module, pieces: Mapping[str, Piece]) -> list[PlannedFile]:
        """``plan_export``, once: for a mixture of 48 layers of 128 experts it takes a second, and training waits."""
        key = [(name, piece.shape, piece.dtype) for name, piece in pieces.items()]
        if self._plan[0] != key:
            self._plan = key, plan_export(model, pieces, self._handoff.layout)
        return self._plan[1]

    def _piece(self, name: str, tensor: Tensor, copy: bool) -> Piece:
        piece = piece_of(name, tensor, self._rank)
        return self._staging.copy(piece) if copy else piece

    def _rows(self, kind: str, name: str, tensor: Tensor) -> Piece:
        """A share of a tensor that exists only now, whole and on every rank: copied even for a save at once."""
        piece = rows_of(f"{kind}/{name}", tensor, self._rank, self._peers.size)
        return replace(self._staging.copy(piece), name=name)

    # --- the second half: files ---------------------------------------------------------------------------------

    def _fulfil(self, job: _Job) -> None:
        try:
            self._write(job)
        except BaseException as error:  # noqa: BLE001 - raised again on the thread that waits
            self._failure = error

    def _write(self, job: _Job) -> None:
        """Write, vote, prove, commit. Collective over the manager's own group."""
        began, step = time.perf_counter(), job.state.step
        self._agree(step, partial(self._begin, job))
        problems: list[str] = []
        records: dict[str, FileRecord] = {}
        folder = self.folder.temporary(step)
        self._attempt(records, problems, partial(write_local_pieces, folder, self._rank, job.training))
        for files, pieces in ((job.weight_files, job.weights), (job.adapter_files, job.adapter)):
            if files:
                collect = Exchange(pieces, self._peers).collect
                write = partial(write_tensor_files, folder, files, collect, self._rank, self._peers.size)
                self._attempt(records, problems, write)
        mine = {name: (record.size, record.sha256) for name, record in records.items()}
        gathered = self._peers.all_gather((mine, problems, job.rng))
        if failures := [problem for _, found, _ in gathered for problem in found]:
            self._agree(step, partial(self.folder.abandon, step))
            raise CheckpointError(f"The checkpoint of step {step} was not saved: {'; '.join(failures)}")
        merged = {name: FileRecord(*record) for found, _, _ in gathered for name, record in found.items()}
        self._agree(step, partial(self._finish, job, folder, merged, [rng for _, _, rng in gathered]))
        logger.info("checkpoint of step %d saved and proven in %.1f s", step, time.perf_counter() - began)

    def _attempt(
        self, records: dict[str, FileRecord], problems: list[str], write: Callable[[], Mapping[str, FileRecord]]
    ) -> None:
        try:
            records.update(write())
        except (OSError, CheckpointError) as error:
            problems.append(f"rank {self._rank}: {error}")

    def _agree(self, step: int, act: Callable[[], None]) -> None:
        """Have rank 0 act, and every rank fail if it failed."""
        problem = None
        if self._rank == 0:
            try:
                act()
            except Exception as error:  # whatever it is, the other ranks wait for the outcome
                logger.debug("saving step %d failed", step, exc_info=True)
                problem = f"{error}" if isinstance(error, (UserError, OSError)) else repr(error)
                self.folder.abandon(step)
        problem = self._peers.all_gather(problem)[0]
        if problem is not None:
            raise CheckpointError(f"The checkpoint of step {step} was not saved: {problem}")

    def _begin(self, job: _Job) -> None:
        self.folder.root.mkdir(parents=True, exist_ok=True)
        if self._begun_at is not None:
            self.folder.set_aside(self._begun_at)
            self._begun_at = None
        require_space(self.folder.root, job.nbytes)
        folder = self.folder.begin(job.state.step)
        if job.training:
            (folder / STATE_FOLDER).mkdir()

    def _finish(self, job: _Job, folder: Path, records: dict[str, FileRecord], rng: list[Any]) -> None:
        """Rank 0, once every tensor file is written: the small files, the proof, the manifest, the rename."""
        verdict: dict[str, Any] = {}
        if job.weight_files:
            records.update(write_hub_files(folder, job.weight_files, self._handoff))
            verdict = prove_model(folder, job.weight_files, self._handoff, tied=job.tied)
            if job.probe is not None:
                verdict["probe"] = prove_answers(folder, job.probe)
        if job.adapter:
            name = f"{ADAPTER_FOLDER}/adapter_config.json"
            records[name] = write_json(folder / name, job.adapter_config)
        if job.training:
            records.update(self._write_state(job, folder, rng))
        content = dict(sorted(records.items()))
        write_manifest(folder, Manifest(job.state.step, job.metric, content, verdict, self._fingerprints(job, records)))
        self.folder.commit(job.state.step)
        self._show(job.state.step, anew=True)
        self.folder.retire(self._keep, self._keep_every, self.folder.best())

    def _show(self, newest: int, *, anew: bool = False) -> None:
        """Rank 0: let the root be the model it should be: the best, or the last one up to step ``newest``."""
        models = [step for step, path in self.folder.checkpoints() if step <= newest and holds_model(path)]
        if not models:
            return
        best = self.folder.best()
        wanted = best if self._publish == "best" and best in models else models[-1]
        assert wanted is not None
        if self.folder.published() != wanted or (anew and wanted == newest):
            self.folder.publish(wanted)

    def _write_state(self, job: _Job, folder: Path, rng: list[Any]) -> dict[str, FileRecord]:
        tensors = {name: [dtype_name(p.dtype), list(p.shape)] for name, p in job.training.items()}
        content = {
            "format_version": FORMAT_VERSION,
            "complete": job.adapter_config is None,
            "state": job.state.as_dict(),
            "source": str(self._handoff.source),
            "adapter_config": job.adapter_config,
            "dtypes": self._handoff.layout.stored.as_json(),
            "tied": job.tied,
            "tensors": tensors,
            "rng": rng,
        }
        # The state must be exportable on its own: after the model beside it, and the source model, are gone.
        small = write_hub_files(folder / HUB_FOLDER, (), self._handoff)
        records = {f"{HUB_FOLDER}/{name}": record for name, record in small.items()}
        records[STATE_FILE] = write_json(folder / STATE_FILE, content)
        return records

    def _fingerprints(self, job: _Job, records: Mapping[str, FileRecord]) -> dict[str, Any]:
        template = self._handoff.chat_template or source_template(self._handoff.source) or ""
        weights = json.dumps([[file.path, records[file.path].sha256] for file in job.weight_files])
        return {
            **self._handoff.fingerprints,
            "model": sha256(weights.encode()).hexdigest() if job.weight_files else None,
            "chat_template": sha256(template.encode()).hexdigest(),
            "data": job.state.data_fingerprint,
            "tokens": job.state.tokens,
            "trained_tokens": job.state.trained_tokens,
            "source": str(self._handoff.source),
        }
