"""Processes that torchrun starts again do not find the addresses of those that died."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from fsdpsft.distributed.mesh import _fresh_store

LIMIT = timedelta(seconds=20)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The environment of a worker of two on one node, and the store that the agent lends all its restarts."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return server


def test_a_restart_begins_with_an_empty_store(torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, peer = _fresh_store(2, LIMIT), _fresh_store(2, LIMIT)
    first.set("address of rank 1", "of a process that will die")
    assert peer.get("address of rank 1") == b"of a process that will die"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not _fresh_store(2, LIMIT).check(["address of rank 1"])


def test_over_several_nodes_the_count_of_one_agent_says_nothing(
    torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    _fresh_store(2, LIMIT).set("address of rank 1", "here")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the other node's agent may still be at 0
    assert _fresh_store(2, LIMIT).check(["address of rank 1"])
