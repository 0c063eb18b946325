"""Nothing of a checkpoint can run code, and nothing is written outside."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fsdpsft
from fsdpsft.checkpoint.export import Handoff
from fsdpsft.checkpoint.manager import CheckpointManager
from fsdpsft.checkpoint.state import TrainState
from fsdpsft.errors import CheckpointError
from fsdpsft.testing import save_tiny_model
from fsdpsft.tools.export import main

UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    source = save_tiny_model(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    CheckpointManager(tmp_path / "run", Handoff(source)).save(
        model, torch.optim.AdamW(model.parameters()), TrainState(1)
    )
    return source, tmp_path / "run/global_step_1"


def test_pickles_planted_in_a_checkpoint_stay_shut(saved, tmp_path) -> None:
    source, path = saved
    trace = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.exists()  # the bomb works
    trace.unlink()
    for folder in (path, path / "trainer_state", path / "trainer_state/model_files", tmp_path / "run"):
        for name in (
            ".metadata",
            "__0_0.distcp",
            "pytorch_model.bin",
            "optimizer.pt",
            "training_args.bin",
            "rng_state.pth",
        ):
            (folder / name).write_bytes(bomb)
    model = AutoModelForCausalLM.from_pretrained(source)
    manager = CheckpointManager(tmp_path / "run", Handoff(source))
    newest = manager.latest_good()
    assert newest == path
    manager.load(newest, model, torch.optim.AdamW(model.parameters()))
    assert main([f"from={path}/trainer_state", f"to={tmp_path}/a"]) == 0
    assert main([f"from={path}", f"to={tmp_path}/b"]) == 0
    assert not trace.exists()
    assert not list((tmp_path / "a").glob("*.bin")) and not list((tmp_path / "b").glob("*.bin"))


def test_pickled_weights_are_refused(saved, tmp_path, capsys) -> None:
    source, _ = saved
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert main([f"from={source}", f"to={tmp_path}/a"]) == 1
    assert not (tmp_path / "exploded").exists()


def test_no_module_unpickles() -> None:
    for path in Path(fsdpsft.__file__).parent.rglob("*.py"):
        if path.name == "testing.py":  # its pickles pass between a test's own processes
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {n.split(".")[0] for n in names} & UNPICKLERS, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"eval", "exec", "torch.load"}, f"{path}:{node.lineno}"


def test_a_dtype_in_a_state_is_no_door_into_torch(saved, tmp_path) -> None:
    source, path = saved
    (path / "manifest.json").unlink()
    file = path / "trainer_state/state.json"
    content = json.loads(file.read_text())
    content["tensors"]["model/model.norm.weight"][0] = "load"
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not the name of a dtype"):
        CheckpointManager(tmp_path / "run", Handoff(source)).load(
            path, AutoModelForCausalLM.from_pretrained(source), None, verified=True
        )
