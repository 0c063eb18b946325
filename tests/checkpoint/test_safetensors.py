"""Row reads against whole tensors from the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsdpsft.checkpoint import safetensors as tensor_files
from fsdpsft.checkpoint.safetensors import TensorFiles, open_model_files
from fsdpsft.errors import ModelError


@pytest.fixture
def stored(tmp_path: Path) -> tuple[TensorFiles, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(37, 5), "bf16": torch.randn(37, 5).bfloat16(), "f16": torch.randn(8, 3, 2).half(),
        "f64": torch.randn(4).double(), "i64": torch.arange(12).view(3, 4), "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    return open_model_files(tmp_path), tensors


def test_whole_tensors(stored: tuple[TensorFiles, dict[str, torch.Tensor]]) -> None:
    files, tensors = stored
    assert set(files) == set(tensors)
    for name, tensor in tensors.items():
        assert files[name].dtype == tensor.dtype
        assert torch.equal(files.read(name), tensor)


@pytest.mark.parametrize("chunk", [1, 64, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks(
    stored: tuple[TensorFiles, dict[str, torch.Tensor]], chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk)
    files, tensors = stored
    for name, rows, columns in (("bf16", (0, 37), (0, 5)), ("bf16", (11, 30), (0, 5)), ("f32", (36, 37), (1, 4))):
        target = torch.full((rows[1] - rows[0], columns[1] - columns[0]), torch.nan, dtype=dtype)
        files.read_into(name, target, (rows[0], columns[0]))
        assert torch.equal(target, tensors[name][slice(*rows), slice(*columns)].to(dtype))
    deep = torch.empty(3, 2, 1)
    files.read_into("f16", deep, (2, 1, 1))
    assert torch.equal(deep, tensors["f16"][2:5, 1:3, 1:2].float())
    strided = torch.zeros(5, 37).T  # memory that the bytes must not be read into as they lie
    files.read_into("f32", strided, (0, 0))
    assert torch.equal(strided, tensors["f32"])


def test_only_the_rows_are_read(stored: tuple[TensorFiles, dict[str, torch.Tensor]]) -> None:
    files, _ = stored
    files.read_into("f32", torch.empty(9, 5), (20, 0))
    assert files.bytes_read == 9 * 5 * 4
    files.read_into("f32", torch.empty(0, 5), (37, 0))  # what the last of too many processes keeps
    assert files.bytes_read == 9 * 5 * 4


def test_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 16)
    ones, late = torch.ones(9, 3), torch.ones(9, 3)
    late[-1, -1] = 2
    save_file({"a": ones, "b": ones.clone(), "late": late, "flat": torch.ones(27)}, tmp_path / "model.safetensors")
    files = open_model_files(tmp_path)
    assert files.equal("a", "b")
    assert not files.equal("a", "late")
    assert not files.equal("a", "flat")


def test_torn_and_foreign_files(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, whole)
    content = whole.read_bytes()
    whole.write_bytes(content[:-8])
    with pytest.raises(ModelError, match="cut short: tensor a ends at"):
        open_model_files(tmp_path)
    whole.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="not a safetensors file"):
        open_model_files(tmp_path)
    whole.write_bytes((5).to_bytes(8, "little") + b"hello")
    with pytest.raises(ModelError, match="header cannot be read"):
        open_model_files(tmp_path)
    whole.unlink()
    with pytest.raises(ModelError, match="Found: nothing"):
        open_model_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickle files, which can run any code"):
        open_model_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        open_model_files(tmp_path)


SHARD = "model-00001-of-00001.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (b"", "not JSON"),
        (b"[]", "holds list"),
        (b'{"weight_map": {"a": "mod', "not JSON"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": ["a"]}', "has no weight_map"),
        (b'{"weight_map": {"a": 1}}', "has no weight_map"),
        (DEEP.encode(), "nested too deep"),
        (b'{"weight_map": {"a": "\xff"}}', "not JSON"),
        (b'{"weight_map": {"a": "../secret.safetensors"}}', "no file of this folder"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "no file of this folder"),
        (b'{"weight_map": {"a": "."}}', "no file of this folder"),
    ],
)
def test_a_hostile_index_is_refused_by_name(tmp_path: Path, index: bytes, complaint: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (folder / SHARD, tmp_path / "secret.safetensors"):
        save_file({"a": torch.ones(3)}, file)
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ModelError, match=complaint) as refusal:
        open_model_files(folder)
    assert "model.safetensors.index.json" in str(refusal.value)


def test_links_may_leave_the_folder_only_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "repo/blobs").mkdir(parents=True)
    save_file({"a": torch.ones(3)}, tmp_path / "repo/blobs/0af1")
    for place in ("repo/snapshots/main", "repo/elsewhere/main"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / SHARD).symlink_to("../../blobs/0af1")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": SHARD}}))
    assert torch.equal(open_model_files(tmp_path / "repo/snapshots/main").read("a"), torch.ones(3))
    with pytest.raises(ModelError, match=r"is a link to .*0af1, outside the folder"):
        open_model_files(tmp_path / "repo/elsewhere/main")


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        DEEP,
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}',
    ],
)
def test_a_hostile_header_is_refused_by_name(tmp_path: Path, header: str) -> None:
    content = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_model_files(tmp_path)
