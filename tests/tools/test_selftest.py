"""The self-test holds on models that are right, and sees what is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsdpsft import load_config, parallelize
from fsdpsft.errors import ConfigError
from fsdpsft.model import lora
from fsdpsft.model.attention import AttentionContext
from fsdpsft.model.attention_backends import BACKENDS, attend_sdpa
from fsdpsft.testing import save_tiny_model
from fsdpsft.tools import selftest
from fsdpsft.tools.selftest import CHECKS, Options, Outcome, Row, Subject, prepare_subject, reference_outcome, run_check

FAST = Options(documents=6, length=40)
FAMILIES = {
    "qwen2": {},
    "gemma2": {
        "model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 16, "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0, "query_pre_attn_scalar": 16,
    },
    "mixtral": {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selftest") / request.param
    return save_tiny_model(folder, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Subject, Outcome]]:
    folder = save_tiny_model(tmp_path_factory.mktemp("selftest") / "model")
    with prepare_subject(load_config([f"model.partial_pretrain={folder}", "data.train_files=null"]), FAST) as subject:
        yield subject, reference_outcome(subject)


def row(title: str, subject: Subject, reference: Outcome) -> Row:
    return run_check(next(check for check in CHECKS if title in check.title), subject, reference)


def test_all_that_needs_one_process_holds(model: Path) -> None:
    config = load_config([f"model.partial_pretrain={model}", "data.train_files=null"])
    with prepare_subject(config, FAST) as subject:
        reference = reference_outcome(subject)
        rows = [run_check(check, subject, reference) for check in CHECKS if check.processes == 1]
    assert [r for r in rows if not r.holds or r.difference is None] == []
    assert max(r.difference or 0.0 for r in rows) < 1e-5


def test_command_line_on_given_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path / "model", num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=3)
    data = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"sum of {i}?", "response": f"it is {i}"} for i in range(9)]
    data.write_text("\n".join(map(json.dumps, rows)))
    assert selftest.main([
        f"model.partial_pretrain={folder}", f"data.train_files={data}", f"data.cache_dir={tmp_path / 'cache'}",
        "selftest.documents=5", "+selftest.length=24",
    ]) == 0  # fmt: skip
    table = capfd.readouterr().out
    assert "2 layers, on cpu: 5 given documents" in table
    assert "skipped  the model has 3 query heads" in table  # Ulysses 4
    assert table.count(" ok") == len(CHECKS) - 1
    assert "Everything holds." in table


def test_attention_that_ignores_documents_is_caught(
    qwen2: tuple[Subject, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(q, k, v, spec, context):  # type: ignore[no-untyped-def]
        total = q.shape[0] * q.shape[2]
        return attend_sdpa(q, k, v, spec, AttentionContext(torch.tensor([0, total]), (total,), total, blind))

    monkeypatch.setattr(parallelize, "choose_backend", lambda name, needs: replace(BACKENDS["sdpa"], attend=blind))
    isolation, packed = row("see each other", *qwen2), row("packed = one", *qwen2)
    assert not isolation.holds
    assert isolation.difference is not None and isolation.difference > 1e-3
    assert not packed.holds
    assert packed.difference is not None and packed.difference > 1e-2


def test_adapters_merged_wrongly_are_caught(qwen2: tuple[Subject, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    assert row("LoRA", *qwen2).holds
    monkeypatch.setattr(lora, "_merged_weight", lambda layer: layer.base_layer.weight)
    assert not row("LoRA", *qwen2).holds


def test_a_lost_gradient_and_a_nan_are_misses() -> None:
    right = Outcome(1.0, {"a": torch.ones(4), "b": torch.full((4,), 1e-9)})
    assert right.difference(right) == 0
    assert Outcome(1.0, {"a": torch.zeros(4), "b": right.gradients["b"]}).difference(right) == 1
    assert Outcome(1.0, {"a": torch.ones(4), "b": torch.zeros(4)}).difference(right) < 1e-5  # nothing but rounding
    assert not Row("x", Outcome(float("nan"), {}).difference(right), 1.0).holds
    assert not Row("x", None, 1.0, "ended", error=True).holds


def test_no_packing_no_packed_rows(qwen2: tuple[Subject, Outcome]) -> None:
    subject, reference = replace(qwen2[0], packed=False), qwen2[1]
    assert row("see each other", subject, reference).note == "use_remove_padding=false"
    assert row("padded", subject, reference).holds


def test_mistaken_keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.main(["model.partial_pretrain=x", "selftest.layer=2"]) == 1
    assert "did you mean selftest.layers?" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_config(["model.partial_pretrain=x", "data.train_files=null"])
    with pytest.raises(ConfigError, match="without torchrun"), prepare_subject(config, FAST):
        pass
