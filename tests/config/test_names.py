"""A name of another trainer is answered with our key, or with why there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fsdpsft.config.load import load_config
from fsdpsft.config.names import ALIASES, TRAINERS, find_peer, other_trainers, peers, unknown_key
from fsdpsft.config.schema import KEYS
from fsdpsft.errors import ConfigError

PEERS = yaml.safe_load(Path(__file__).with_name("peer_keys.yaml").read_text())


def names() -> Iterator[tuple[str, str]]:
    for trainer, text in PEERS.items():
        yield from ((trainer, name) for name in text.split() if name not in KEYS and name not in ALIASES)


def trl_fields() -> set[str]:
    trl = pytest.importorskip("trl")
    classes = (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
    return {field.name for cls in classes for field in dataclasses.fields(cls)} | {"datasets", "test_split_size"}


def test_every_key_of_the_peers_has_an_answer() -> None:
    assert len(list(names())) > 750
    silent = [(trainer, name) for trainer, name in names() if find_peer(name, trainer) is None]
    assert silent == []


def test_every_key_of_the_installed_trl_has_an_answer() -> None:
    found = trl_fields()
    assert len(found) > 150
    assert [name for name in sorted(found) if find_peer(name, "trl") is None] == []


def test_every_answer_names_a_key_of_ours_or_a_reason() -> None:
    for section in other_trainers():
        for name, peer in peers(section).items():
            assert peer.ours in KEYS or (not peer.ours and len(peer.note) > 15), (section, name)
            assert set(peer.also) <= set(KEYS), (section, name)
            assert str(peer) in str(unknown_key(name)), (section, name)


def test_no_name_stands_twice_in_a_section() -> None:
    for section, content in other_trainers().items():
        every = [*content.get("keys", {})]
        for kind in ("harmless", "missing", "refused"):
            every += [name for names in content.get(kind, {}).values() for name in names.split()]
        assert len(every) == len(set(every)), (section, sorted(name for name in every if every.count(name) > 1))


def test_defaults_and_signs_are_keys_of_that_trainer() -> None:
    for trainer in TRAINERS:
        for name in [*other_trainers()[trainer]["signs"], *other_trainers()[trainer].get("defaults", {})]:
            assert name in KEYS or find_peer(name, trainer) is not None, (trainer, name)


def test_trls_defaults_are_those_of_the_installed_one() -> None:
    trl = pytest.importorskip("trl")
    stated = {**other_trainers()["trl"]["defaults"]}
    assert stated.pop("lora_target_modules") == ["q_proj", "v_proj"]  # PEFT's choice where TRL leaves it open
    for cls in (trl.SFTConfig, trl.ModelConfig):
        for field in dataclasses.fields(cls):
            if field.name in stated:
                assert field.default == stated.pop(field.name), field.name
    assert stated == {}


def test_a_whole_file_of_another_trainer_is_sent_to_convert(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\nlearning_rate: 1e-4\n")
    with pytest.raises(ConfigError, match=r"here it is model.partial_pretrain.*fsdpsft convert .*a.yaml rewrites"):
        load_config([str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("learning_rate=2e-5", r"unknown key learning_rate: here it is optim.lr \(peak learning rate\)"),
        ("optim.learning_rate=2e-5", r"here it is optim.lr"),
        (
            "per_device_train_batch_size=4",
            r"data.micro_batch_size_per_gpu .*; the global batch is data.train_batch_size",
        ),
        ("gradient_accumulation_steps=4", "data.train_batch_size"),
        ("batch_size=4", r"of axolotl: .*data.train_batch_size(.|\n)*of torchtune: .*data.micro_batch_size_per_gpu"),
        ("load_in_4bit=true", "quantised ones are not loaded"),
        ("neftune_noise_alpha=5", "noise on embeddings is not here"),
        ("engine.fsdp_size=8", "model.fsdp_config.replicate_size"),
        ("tokenizer.max_seq_len=8", "data.max_length"),
        ("fsdp_config.auto_wrap_policy=x", "blocks are found by themselves"),
        ("optim.weight_decy=1", r"did you mean optim.weight_decay\?"),
        ("lr=1", r"did you mean optim.lr\?"),
        ("flux_capacitor=1", r"unknown key flux_capacitor \(all keys"),
    ],
)
def test_the_error_says_what_to_type(typed: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([typed])
