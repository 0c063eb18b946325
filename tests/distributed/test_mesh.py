"""The device of a process, and the settings of its allocator."""

from __future__ import annotations

import os

import pytest
import torch

from fsdpsft.distributed.mesh import choose_device


@pytest.mark.parametrize("theirs", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_expand_where_the_user_has_set_nothing(monkeypatch: pytest.MonkeyPatch, theirs: str | None) -> None:
    environment = {} if theirs is None else {theirs: "max_split_size_mb:64"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert choose_device("auto").type == "cuda"
    expected = (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if theirs is None else {theirs: "max_split_size_mb:64"}
    )
    assert environment == expected
