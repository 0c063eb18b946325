"""The device of a process, and the settings of its allocator."""

from __future__ import annotations

import os

import pytest
import torch

from fsdpsft.distributed.mesh import choose_device


@pytest.mark.parametrize("theirs", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_expand_where_the_user_has_set_nothing(monkeypatch: pytest.MonkeyPatch, theirs: str | None) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if theirs is not None:
        monkeypatch.setenv(theirs, "max_split_size_mb:64")
    assert choose_device("auto").type == "cuda"
    found = {name: os.environ[name] for name in names if name in os.environ}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # put back after the test, whoever set it
    assert found == ({theirs: "max_split_size_mb:64"} if theirs else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
