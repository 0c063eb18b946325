"""A checkpoint is what its manifest says, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdpsft.checkpoint.folder import Manifest, read_manifest, verify, write_manifest
from fsdpsft.errors import CheckpointError
from fsdpsft.filesystem import FileRecord, write_bytes


def make(folder: Path) -> Manifest:
    (folder / "sub").mkdir()
    files = {name: write_bytes(folder / name, name.encode() * 100) for name in ("a.bin", "sub/b.bin")}
    manifest = Manifest(7, 0.5, files, {"tensors": 3}, {"tokens": 9})
    write_manifest(folder, manifest)
    return manifest


def test_what_is_written_is_read(tmp_path) -> None:
    assert make(tmp_path) == read_manifest(tmp_path) == verify(tmp_path)


def test_sha256_is_that_of_the_content(tmp_path) -> None:
    record = write_bytes(tmp_path / "x", b"abc")  # the test vector of FIPS 180-4
    assert record == FileRecord(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


@pytest.mark.parametrize("name", ["a.bin", "sub/b.bin"])
def test_every_kind_of_harm_is_named(tmp_path, name) -> None:
    make(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(CheckpointError, match=f"{name} does not match its checksum"):
        verify(tmp_path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{name} has .* bytes instead of"):
        verify(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify(tmp_path)


def test_ranks_share_the_reading(tmp_path) -> None:
    make(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"a.bim" * 100)
    complaints = []
    for part in range(2):
        try:
            verify(tmp_path, part=part, parts=2)
        except CheckpointError as error:
            complaints.append(str(error))
    assert len(complaints) == 1


def test_only_a_part_may_be_asked_for(tmp_path) -> None:
    make(tmp_path)
    (tmp_path / "a.bin").unlink()
    verify(tmp_path, below="sub/")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside"])
def test_a_manifest_cannot_reach_outside(tmp_path, name) -> None:
    write_manifest(tmp_path, Manifest(1, None, {name: FileRecord(0, "")}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        verify(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', "null"])
def test_a_broken_manifest_is_refused(tmp_path, content) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)


def test_another_format_is_named_not_called_damaged(tmp_path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2, "new": 0'))
    with pytest.raises(CheckpointError, match=r"format_version 2; .* Resume with the version that wrote it"):
        read_manifest(tmp_path)
