"""Tensors written one at a time make the files that safetensors itself reads; plans cut them as asked."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fsdpsft.checkpoint.pieces import Box, Exchange, Peers, Piece, Request, piece_of, rows_of
from fsdpsft.checkpoint.safetensors import DTYPE_NAMES, TensorFileWriter, TensorSpec, dtype_named, prove_tensor_file
from fsdpsft.checkpoint.tensor_plan import Unit, split_into_files, write_tensor_files
from fsdpsft.errors import CheckpointError
from fsdpsft.filesystem import record_of


def test_every_dtype_and_shape_comes_back(tmp_path) -> None:
    torch.manual_seed(0)
    tensors = {f"{d}.{s}": torch.randn(s).mul(9).to(d) for d in DTYPE_NAMES for s in [(), (0, 3), (5,), (2, 3, 4)]}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    writer = TensorFileWriter(tmp_path / "x.safetensors", specs, {"format": "pt"})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    record = writer.close()
    assert record == record_of(tmp_path / "x.safetensors")
    prove_tensor_file(tmp_path / "x.safetensors", specs, record)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    writer = TensorFileWriter(tmp_path / "x.safetensors", [TensorSpec("t", tensor.dtype, (3, 2))], {})
    writer.write("t", tensor)
    writer.close()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensor)


def test_the_proof_sees_a_changed_byte_and_a_changed_shape(tmp_path) -> None:
    path, specs = tmp_path / "x.safetensors", [TensorSpec("t", torch.float32, (4,))]
    writer = TensorFileWriter(path, specs, {})
    writer.write("t", torch.ones(4))
    record = writer.close()
    with pytest.raises(CheckpointError, match=r"t is F32 \[4\] on disk, not F32 \[2, 2\]"):
        prove_tensor_file(path, [TensorSpec("t", torch.float32, (2, 2))], record)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="other bytes than were written"):
        prove_tensor_file(path, specs, record)


def unit(name: str, elements: int, dtype: torch.dtype = torch.float32) -> Unit:
    return Unit((name,), (TensorSpec(name, dtype, (elements,)),))


def test_files_are_cut_in_order_and_named_like_the_hub() -> None:
    units = [unit("a", 10), unit("b", 15), unit("c", 100), unit("d", 5)]
    assert [f.path for f in split_into_files(units, 1000)] == ["model.safetensors"]
    files = split_into_files(units, 100)
    assert [f.path for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [[s.name for s in f.specs] for f in files] == [["a", "b"], ["c"], ["d"]]


def test_wider_dtypes_come_first_in_a_file_so_that_each_is_aligned(tmp_path) -> None:
    units = [unit("a", 3, torch.bfloat16), unit("b", 2), unit("c", 1, torch.bfloat16)]
    (file,) = split_into_files(units, 1000)
    assert [s.name for s in file.specs] == ["b", "a", "c"]
    tensors = {"a": torch.ones(3), "b": torch.arange(2.0), "c": torch.zeros(1)}
    exchange = Exchange({name: piece_of(name, tensor, 0) for name, tensor in tensors.items()}, Peers())
    records = write_tensor_files(tmp_path, [file], exchange.collect)
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["b"], tensors["b"]) and torch.equal(loaded["a"], tensors["a"].bfloat16())
    assert records == {"model.safetensors": record_of(tmp_path / "model.safetensors")}


def test_boxes_that_leave_a_gap_are_refused() -> None:
    half = Piece("t", torch.float32, (4,), Box((0,), (2,)), torch.zeros(2))
    with pytest.raises(CheckpointError, match="hold 2 elements of a tensor of shape"):
        Exchange({"t": half}, Peers())


def test_shares_of_rows_make_up_the_tensor() -> None:
    tensor = torch.arange(15).view(5, 3)
    for size in (1, 2, 4, 7):
        whole = torch.full_like(tensor, -1)
        for rank in range(size):
            piece = rows_of("t", tensor, rank, size)
            if piece.box is not None:
                assert piece.local is not None and (whole[piece.box.slices] == -1).all()
                whole[piece.box.slices] = piece.local
        assert torch.equal(whole, tensor)


def test_collecting_casts(tmp_path) -> None:
    exchange = Exchange({"t": piece_of("t", torch.tensor([1.0, 1 / 3]), 0)}, Peers())
    found = exchange.collect([Request("t", torch.bfloat16)])
    assert found is not None and torch.equal(found, torch.tensor([1.0, 1 / 3]).bfloat16())


def test_names_of_dtypes_are_not_looked_up_in_torch() -> None:
    assert dtype_named("bfloat16") is torch.bfloat16
    for name in ("load", "float31", "os"):
        with pytest.raises(CheckpointError, match="not the name of a dtype"):
            dtype_named(name)
