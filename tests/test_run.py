"""A run as a whole: who may write to its folder."""

from __future__ import annotations

import json
from functools import partial

import pytest

from fsdpsft import load_config, run
from fsdpsft.errors import ConfigError
from fsdpsft.filesystem import is_held
from fsdpsft.testing import save_tiny_model


def test_a_run_keeps_its_folder_to_itself_while_it_lasts(tmp_path, monkeypatch):
    rows = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config([
        f"data.train_files={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1",
        f"model.partial_pretrain={save_tiny_model(tmp_path / 'model')}", "data.train_batch_size=2",
        f"trainer.default_local_dir={tmp_path / 'out'}", "trainer.logger=[]",
    ])  # fmt: skip
    monkeypatch.setattr(run, "only_run_in", partial(run.only_run_in, patience_s=0))
    with run.open_run(config):
        assert is_held(tmp_path / "out" / ".lock")
        with pytest.raises(ConfigError, match="is training into this folder"), run.open_run(config):
            pytest.fail("two runs in one folder")
    assert not is_held(tmp_path / "out" / ".lock")
    monkeypatch.setenv("RANK", "1")  # the other processes of a run ask for no lock, or rank 0 would keep them out
    with run.only_run_in(tmp_path / "out"), run.open_run(config):
        pass
