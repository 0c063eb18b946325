"""A checkpoint comes back bit for bit on any number of processes, or is refused by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fsdpsft.checkpoint import safetensors as tensor_writer
from fsdpsft.checkpoint.export import Handoff, Probe
from fsdpsft.checkpoint.folder import read_manifest, write_manifest
from fsdpsft.checkpoint.manager import CheckpointManager
from fsdpsft.checkpoint.pieces import patience
from fsdpsft.checkpoint.state import STATE_FILE, TrainState
from fsdpsft.errors import CheckpointError
from fsdpsft.filesystem import record_of
from fsdpsft.model.streamed import token_losses
from fsdpsft.testing import run_distributed, save_tiny_model

FAMILIES = {
    "qwen2": {"model_type": "qwen2"},  # tied
    # experts are stored in another layout than they have in memory; three of them leave one of four ranks empty-handed
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "tie_word_embeddings": False},
}


def build(source: Path) -> tuple[PreTrainedModel, torch.optim.AdamW]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def contents(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of model and optimiser, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = full(parameter)
        found.update({f"{name}/{key}": full(value) for key, value in optimizer.state[parameter].items()})
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def reload_and_save(root: str, shape: tuple[int, ...], step: int) -> dict[str, dict[str, Tensor]]:
    """Load the newest checkpoint of each family, sharded over a mesh of this shape, and save it as ``step``."""
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    loaded = {}
    for family in FAMILIES:
        folder = Path(root) / family
        model, optimizer = build(folder / "source")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        manager = CheckpointManager(folder / "out", Handoff(folder / "source", max_shard_bytes=100_000))
        found = manager.latest_good()
        assert found is not None
        state = manager.load(found, model, optimizer, verified=True)
        loaded[family] = contents(model, optimizer)
        manager.save(model, optimizer, TrainState(step, tokens=state.tokens + 1), background=True)
        with torch.no_grad():  # what happens after the copy must not reach the files
            for parameter in model.parameters():
                parameter.add_(1.0)
        manager.close()
    return loaded if dist.get_rank() == 0 else {}


def fill_the_disk(root: Path, source: Path) -> str:
    """Rank 1's disk is full in the middle of a file; returns what the save raised."""
    model, _ = build(source)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    manager = CheckpointManager(root, Handoff(source, max_shard_bytes=100_000))
    whole = tensor_writer.TensorFileWriter._put
    if dist.get_rank() == 1:
        tensor_writer.TensorFileWriter._put = _refuse_after(whole, 5)
    manager.save(model, optimizer, TrainState(8), background=True)
    try:
        manager.wait()
    except CheckpointError as error:
        return str(error)
    finally:
        tensor_writer.TensorFileWriter._put = whole
    return ""


def _refuse_after(put, calls: int):
    count = [0]

    def full_disk(self, content) -> None:
        count[0] += 1
        if count[0] > calls:
            raise OSError(28, "No space left on device")
        put(self, content)

    return full_disk


def two_processes(root: str) -> tuple[dict[str, dict[str, Tensor]], str]:
    loaded = reload_and_save(root, (2,), 2)
    return loaded, fill_the_disk(Path(root) / "full", Path(root) / "qwen2" / "source")


Chain = tuple[Path, dict[str, dict[str, Tensor]], list[dict[str, dict[str, Tensor]]], list[str]]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Step 1 saved by one process, loaded by two and saved as step 2, loaded by four (2 x 2) and saved as step 3."""
    root = tmp_path_factory.mktemp("chain")
    truth = {}
    for family, settings in FAMILIES.items():
        folder = root / family
        save_tiny_model(folder / "source", **settings)
        model, optimizer = build(folder / "source")
        train_step(model, optimizer, 0)
        train_step(model, optimizer, 1)
        truth[family] = contents(model, optimizer)
        manager = CheckpointManager(folder / "out", Handoff(folder / "source", max_shard_bytes=100_000))
        manager.save(model, optimizer, TrainState(1, tokens=7))
        manager.close()
    two = run_distributed(two_processes, 2, str(root))
    four = run_distributed(reload_and_save, 4, str(root), (2, 2), 3)
    return root, truth, [two[0][0], four[0]], [message for _, message in two]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_to_two_to_four_and_back_bit_for_bit(chain, family) -> None:
    root, truth, seen, _ = chain
    for loaded in seen:
        assert_same(loaded[family], truth[family])
    model, optimizer = build(root / family / "source")
    manager = CheckpointManager(root / family / "out", Handoff(root / family / "source"))
    newest = manager.latest_good()
    assert newest is not None and newest.name == "global_step_3"
    assert manager.load(newest, model, optimizer) == TrainState(3, tokens=9)
    assert_same(contents(model, optimizer), truth[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_number_of_processes_leaves_no_trace_in_the_model_files(chain, family) -> None:
    root, _, _, _ = chain
    manifests = [read_manifest(root / family / "out" / f"global_step_{step}") for step in (1, 2, 3)]
    files = [{n: r for n, r in m.files.items() if not n.startswith("trainer_state/")} for m in manifests]
    assert files[0] == files[1] == files[2]
    assert len([name for name in files[0] if name.startswith("model-")]) > 3
    assert len({m.fingerprints["model"] for m in manifests}) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["out/global_step_3", "out"])
def test_every_folder_loads_as_a_hugging_face_model(chain, family, where) -> None:
    root, truth, _, _ = chain
    model, report = AutoModelForCausalLM.from_pretrained(root / family / where, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, truth[family][name]), name
    assert AutoTokenizer.from_pretrained(root / family / where).chat_template is not None


def test_state_is_readable_by_torch_alone(chain) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    root, truth, _, _ = chain
    name = "model.embed_tokens.weight"
    target = {f"model/{name}": torch.zeros_like(truth["qwen2"][name])}
    folder = root / "qwen2/out/global_step_3/trainer_state"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(target, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert torch.equal(target[f"model/{name}"], truth["qwen2"][name])


def test_no_pickle_in_a_checkpoint(chain) -> None:
    root, _, _, _ = chain
    for path in (root / "qwen2/out/global_step_3").rglob("*"):
        assert path.is_dir() or path.suffix in {".json", ".safetensors", ".jinja", ".txt"}, path


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_leaves_nothing(chain) -> None:
    root, _, _, messages = chain
    assert messages[0] == messages[1]
    assert "step 8 was not saved" in messages[0] and "rank 1" in messages[0] and "No space left" in messages[0]
    assert list((root / "full").iterdir()) == []


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, PreTrainedModel, torch.optim.Optimizer, CheckpointManager]:
    source = save_tiny_model(tmp_path / "source")
    model, optimizer = build(source)
    train_step(model, optimizer, 0)
    return tmp_path, model, optimizer, CheckpointManager(tmp_path / "out", Handoff(source, max_shard_bytes=150_000))


def damage(path: Path, how: str) -> str:
    """Harm a checkpoint and return what the complaint must name."""
    victim = sorted(path.glob("model-*.safetensors"))[0]
    if how == "bit flipped in the weights":
        content = bytearray(victim.read_bytes())
        content[-100] ^= 1
        victim.write_bytes(content)
        return victim.name
    if how == "truncated":
        os.truncate(victim, victim.stat().st_size - 1)
        return victim.name
    if how == "half deleted":
        shutil.rmtree(path / "trainer_state")
        return "trainer_state"
    manifest = path / "manifest.json"
    deep = "[" * 100_000 + "]" * 100_000
    if how == "state nested deep":  # by somebody who knows how to write a manifest
        (path / STATE_FILE).write_text(deep)
        content = read_manifest(path)
        write_manifest(path, replace(content, files={**content.files, STATE_FILE: record_of(path / STATE_FILE)}))
        return "state.json"
    if how == "manifest nested deep":
        manifest.write_text(deep)
    elif how == "manifest not UTF-8":
        manifest.write_bytes(b"\xff\xfe{}")
    elif how == "manifest a list":
        manifest.write_text("[]")
    elif how == "manifest torn":
        os.truncate(manifest, manifest.stat().st_size // 2)
    elif how == "manifest gone":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    return "manifest.json"


@pytest.mark.parametrize(
    "how",
    [
        "bit flipped in the weights",
        "truncated",
        "half deleted",
        "manifest torn",
        "manifest gone",
        "manifest changed",
        "manifest nested deep",
        "manifest not UTF-8",
        "manifest a list",
        "state nested deep",
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(run, caplog, how) -> None:
    folder, model, optimizer, manager = run
    manager.save(model, optimizer, TrainState(1))
    manager.save(model, optimizer, TrainState(2))
    bad = folder / "out" / "global_step_2"
    named = damage(bad, how)
    with pytest.raises(CheckpointError, match=named):
        manager.load(bad, model, optimizer)
    with caplog.at_level(logging.WARNING):
        assert manager.latest_good() == folder / "out" / "global_step_1"
    assert "global_step_2" in caplog.text and named in caplog.text


def test_failure_in_the_background_is_raised_by_the_next_call(run, monkeypatch) -> None:
    folder, model, optimizer, manager = run
    manager.save(model, optimizer, TrainState(1))
    with monkeypatch.context() as patch:
        patch.setattr(tensor_writer.TensorFileWriter, "_put", _refuse_after(tensor_writer.TensorFileWriter._put, 9))
        manager.save(model, optimizer, TrainState(2), background=True)
        with pytest.raises(CheckpointError, match=r"step 2 was not saved.*No space left"):
            manager.save(model, optimizer, TrainState(3), background=True)
    assert [p.name for _, p in manager.folder.checkpoints()] == ["global_step_1"]
    assert not list((folder / "out").glob(".tmp-*"))
    assert manager.latest_good() == folder / "out" / "global_step_1"


def test_failed_saves_may_be_survived(run, monkeypatch, caplog) -> None:
    folder, model, optimizer, _ = run
    manager = CheckpointManager(folder / "out", Handoff(folder / "source"), on_error="continue")
    with monkeypatch.context() as patch:
        patch.setattr(tensor_writer.TensorFileWriter, "_put", _refuse_after(tensor_writer.TensorFileWriter._put, 9))
        manager.save(model, optimizer, TrainState(1))
    assert "step 1 was not saved" in caplog.text
    manager.save(model, optimizer, TrainState(2))
    assert manager.latest_good() == folder / "out" / "global_step_2"


def test_too_little_space_is_noticed_before_writing(run, monkeypatch) -> None:
    folder, model, optimizer, manager = run
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000_000))
    manager.save(model, optimizer, TrainState(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=67_500_000))
    with pytest.raises(CheckpointError, match=r"needs 1,3\d\d,\d\d\d bytes .* 67,500,000 are free"):
        manager.save(model, optimizer, TrainState(2))
    assert manager.latest_good() == folder / "out" / "global_step_1"


def test_the_probe_refuses_a_model_that_answers_otherwise(run, caplog) -> None:
    folder, model, optimizer, manager = run
    ids = torch.arange(12)
    losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1].detach(), ids[1:], reduction="none")
    manager.save(model, optimizer, TrainState(1), probe=Probe(ids, losses, token_losses))
    verdict = read_manifest(folder / "out" / "global_step_1").verdict["probe"]
    assert verdict["compared"] is True and verdict["largest_nats"] < 1e-4
    with pytest.raises(CheckpointError, match=r"token losses .* 0\.01 nats \(median\) away"):
        manager.save(model, optimizer, TrainState(2), probe=Probe(ids, losses + 0.01, token_losses))
    assert not (folder / "out" / "global_step_2").exists()

    def cannot_tell(folder: Path, ids: Tensor) -> Tensor:
        raise NotImplementedError("it reads what it does not call")

    with caplog.at_level(logging.WARNING):
        manager.save(model, optimizer, TrainState(3), probe=Probe(ids, losses, cannot_tell))
    verdict = read_manifest(folder / "out" / "global_step_3").verdict["probe"]
    assert verdict == {"compared": "no: it reads what it does not call"} and "were not compared" in caplog.text


def test_contents_model_only_and_state_only(run) -> None:
    folder, model, optimizer, manager = run
    manager.save(model, optimizer, TrainState(1), contents=("state",))
    manager.save(model, None, TrainState(2), contents=("model",))
    assert not list((folder / "out/global_step_1").glob("*.safetensors"))
    assert not (folder / "out/global_step_2/trainer_state").exists()
    assert manager.latest_good() == folder / "out/global_step_1"
    with pytest.raises(CheckpointError, match="no trainer_state"):
        manager.load(folder / "out/global_step_2", model, optimizer)


def test_another_model_is_refused(run, tmp_path) -> None:
    folder, model, optimizer, manager = run
    manager.save(model, optimizer, TrainState(1))
    wider, _ = build(save_tiny_model(tmp_path / "wider", intermediate_size=128))
    with pytest.raises(CheckpointError, match=r"shape \(96, 64\), this model's has \(128, 64\)"):
        manager.load(folder / "out/global_step_1", wider, None)
    deeper, _ = build(save_tiny_model(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        manager.load(folder / "out/global_step_1", deeper, None)


def test_random_generators_go_on_where_they_were(run) -> None:
    folder, model, optimizer, manager = run
    manager.save(model, optimizer, TrainState(1))
    expected = torch.rand(3)
    torch.manual_seed(99)
    manager.load(folder / "out/global_step_1", model, optimizer)
    assert torch.equal(torch.rand(3), expected)


def test_best_stays_old_go_and_the_root_shows_the_best(run) -> None:
    folder, model, optimizer, _ = run
    handoff = Handoff(folder / "source", max_shard_bytes=150_000)
    manager = CheckpointManager(folder / "out", handoff, keep=2, keep_every=5, publish="best")
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, float("nan")], 1):
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        manager.save(model, optimizer, TrainState(step), metric=loss)
    manager.close()
    assert [step for step, _ in manager.folder.checkpoints()] == [2, 5, 6, 7]
    assert AutoModelForCausalLM.from_pretrained(folder / "out").model.norm.weight[0] == 2
    assert not [p for p in (folder / "out").iterdir() if p.name.startswith(".")]


def test_a_bfloat16_source_gives_a_bfloat16_model_from_float32_masters(tmp_path) -> None:
    source = save_tiny_model(tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    model, optimizer = build(source)
    train_step(model, optimizer, 0)
    CheckpointManager(tmp_path / "out", Handoff(source)).save(model, optimizer, TrainState(1))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())
    state = json.loads((tmp_path / "out/global_step_1/trainer_state/state.json").read_text())
    assert state["tensors"]["model/model.norm.weight"][0] == "float32"


def test_a_run_begun_again_puts_later_checkpoints_aside(run, caplog) -> None:
    folder, model, optimizer, manager = run
    for step in (1, 2, 3):
        manager.save(model, optimizer, TrainState(step))
    again = CheckpointManager(folder / "out", Handoff(folder / "source"), keep=1)
    again.load(folder / "out/global_step_1", model, optimizer)
    again.save(model, optimizer, TrainState(2))
    again.close()
    assert [step for step, _ in again.folder.checkpoints()] == [2]
    assert {p.name for p in (folder / "out").glob("aside_*")} == {"aside_global_step_2", "aside_global_step_3"}
    assert "another run" in caplog.text
    fresh = CheckpointManager(folder / "out", Handoff(folder / "source"))
    fresh.save(model, optimizer, TrainState(1))
    assert (folder / "out/aside_global_step_2.1").is_dir()
    assert fresh.latest_good() == folder / "out/global_step_1"


def test_a_run_killed_before_its_root_was_switched_switches_it_on_resume(run) -> None:
    folder, model, optimizer, manager = run
    manager.save(model, optimizer, TrainState(1))
    manager.folder.publish = lambda step: None  # what a kill at that moment comes to
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    manager.save(model, optimizer, TrainState(2))
    assert AutoModelForCausalLM.from_pretrained(folder / "out").model.norm.weight[0] != 7
    again = CheckpointManager(folder / "out", Handoff(folder / "source"))
    newest = again.latest_good()
    assert newest is not None
    again.load(newest, model, optimizer, verified=True)
    assert AutoModelForCausalLM.from_pretrained(folder / "out").model.norm.weight[0] == 7


def test_no_thread_outlives_close(run) -> None:
    """The thread that saves is waited for to its very end, with all that it still has to free."""
    _, model, optimizer, manager = run

    class Slow(dict):  # type: ignore[type-arg]
        def __del__(self) -> None:
            time.sleep(0.5)

    prepare = manager._prepare
    manager._prepare = lambda *args, **more: replace(prepare(*args, **more), rng=Slow())
    before = threading.active_count()
    manager.save(model, optimizer, TrainState(1), background=True)
    del manager._prepare
    manager.close()
    assert threading.active_count() == before


def test_a_state_of_version_0_1_0_is_resumed_from(run) -> None:
    """It differs from today's by three fields that nothing read."""
    folder, model, optimizer, manager = run
    manager.save(model, optimizer, TrainState(1, tokens=5))
    path = folder / "out/global_step_1"
    state = json.loads((path / STATE_FILE).read_text())
    state["state"].update(extra={}, best_metric=0.5, best_step=1)
    (path / STATE_FILE).write_text(json.dumps(state, indent=2))
    content = read_manifest(path)
    write_manifest(path, replace(content, files={**content.files, STATE_FILE: record_of(path / STATE_FILE)}))
    assert manager.latest_good() == path
    assert manager.load(path, model, optimizer) == TrainState(1, tokens=5)


def stop_one_in_its_save(root: str, source: str, stopped: int) -> str:
    """One rank is stopped (SIGSTOP) in the middle of a save; returns what the other one raises."""
    model, optimizer = build(Path(source))
    manager = CheckpointManager(Path(root), Handoff(Path(source)), timeout=timedelta(seconds=3))
    if dist.get_rank() == stopped:
        # Woken up after a while, for the test to end.
        subprocess.Popen(["sh", "-c", f"sleep 25; kill -CONT {os.getpid()}"])
        manager._attempt = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    train_step(model, optimizer, 0)
    manager.save(model, optimizer, TrainState(1), background=True)
    began = time.monotonic()
    try:
        manager.wait()
    except (RuntimeError, CheckpointError) as error:
        return f"{time.monotonic() - began:.0f} {error}"
    return ""


@pytest.mark.parametrize("stopped", [0, 1])
def test_waiting_for_a_stopped_rank_ends_and_names_it(tmp_path, stopped) -> None:
    source = save_tiny_model(tmp_path / "source")
    words = run_distributed(stop_one_in_its_save, 2, str(tmp_path / "out"), str(source), stopped)
    seconds, _, message = words[1 - stopped].partition(" ")
    assert f"rank {1 - stopped} was waiting for rank {stopped}" in message and "imed out" in message
    assert float(seconds) < 20


def test_patience_grows_with_the_model() -> None:
    assert patience(20, 0) == timedelta(seconds=20)
    assert patience(600, 7_000_000_000) == timedelta(seconds=600 + 1120)
