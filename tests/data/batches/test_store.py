"""Token stores: what goes in comes out, to the token, and a torn store does not open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fsdpsft.data.batches import store as store_module
from fsdpsft.data.batches.store import MANIFEST, TokenStore, sealed
from fsdpsft.data.batches.store_build import build, open_or_build
from fsdpsft.data.batches.store_parts import BuildOptions, truncate
from fsdpsft.data.mask.template import Encoded
from fsdpsft.data.rows.sources import Row, resolve_sources
from fsdpsft.errors import DataError, RowError
from tests.data.memory_store import memory_store
from tests.data.toy_encoder import ToyEncoder, write_rows

NO_PROCESSES = {"num_workers": 1, "max_bad_share": 1.0}


def build_from(tmp_path: Path, rows, encoder=None, **options) -> TokenStore:
    write_rows(tmp_path / "rows.jsonl", rows)
    sources = resolve_sources(str(tmp_path / "rows.jsonl"))
    build(tmp_path / "store", sources, encoder or ToyEncoder(), BuildOptions(**{**NO_PROCESSES, **options}))
    return TokenStore.open(tmp_path / "store")


def contents(store: TokenStore):
    return [(s.input_ids.tolist(), s.loss_weights.tolist()) for s in map(store.sample, range(len(store)))]


ROWS = [
    {"ids": [5, 6, 7, 8], "weights": [0, 0, 1, 1]},
    {"ids": [9, 10], "weights": [1, 0.5]},
    {"ids": [11, 12, 13, 14, 15], "weights": [0, 2, 2, 0, 1]},
]


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_round_trip(tmp_path, vocab, dtype):
    store = build_from(tmp_path, ROWS, ToyEncoder(vocab_size=vocab))
    assert contents(store) == [(row["ids"], row["weights"]) for row in ROWS]
    assert store.tokens.dtype == dtype
    assert store.sample(0).input_ids.dtype == np.uint32
    assert store.lengths.tolist() == [4, 2, 5]
    assert store.trained.tolist() == [2, 1, 3]
    assert store.weights.tolist() == [2.0, 0.5, 5.0]
    assert store.row_numbers.tolist() == [0, 1, 2]
    assert (store.stats["rows"], store.stats["samples"], store.stats["tokens"], store.stats["trained_tokens"]) == (
        3,
        3,
        11,
        6,
    )
    assert not list(tmp_path.glob(".building*"))


def test_in_memory_store_is_the_same(tmp_path):
    on_disk = build_from(tmp_path, ROWS)
    in_memory = memory_store([(row["ids"], row["weights"]) for row in ROWS])
    assert contents(in_memory) == contents(on_disk)
    for name in ("lengths", "trained", "weights", "offsets", "run_offsets", "row_numbers"):
        assert getattr(in_memory, name).tolist() == getattr(on_disk, name).tolist()
        assert getattr(in_memory, name).dtype == getattr(on_disk, name).dtype


def test_large_ids_and_weights_survive(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(700):
        length = int(rng.integers(2, 40))
        weights = rng.choice([0.0, 0.25, 1.0, 3.5], length)
        weights[-1] = 1.0
        rows.append({"ids": rng.integers(0, 200_000, length).tolist(), "weights": weights.tolist()})
    store = build_from(tmp_path, rows, ToyEncoder(vocab_size=200_000))
    assert contents(store) == [(row["ids"], row["weights"]) for row in rows]


def test_sources_keep_their_order_and_names(tmp_path):
    for name, count in (("b", 3), ("a", 2)):
        write_rows(tmp_path / f"{name}.jsonl", [{"ids": [i, i + 1], "weights": [1, 1]} for i in range(count)])
    sources = resolve_sources([str(tmp_path / "b.jsonl"), {"path": str(tmp_path / "a.jsonl"), "weight": 2.0}])
    build(tmp_path / "store", sources, ToyEncoder(), BuildOptions(num_workers=1))
    store = TokenStore.open(tmp_path / "store")
    assert (store.source_names, store.source_counts) == (("b", "a"), (3, 2))
    assert [store.source_of(i) for i in range(5)] == [0, 0, 0, 1, 1]
    assert store.describe(4) == f"{tmp_path / 'a.jsonl'}, row 1"
    assert store.stats["sources"]["a"]["samples"] == 2


def test_no_such_sample():
    store = memory_store([([1, 2], [1, 1])])
    with pytest.raises(IndexError):
        store.sample(1)
    with pytest.raises(IndexError):
        store.sample(-1)


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.bin", "runs.bin", "stats.json"])
@pytest.mark.parametrize("damage", ["shorten", "delete"])
def test_a_torn_store_does_not_open(tmp_path, name, damage):
    build_from(tmp_path, ROWS)
    file = tmp_path / "store" / name
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} has .* the store is torn"):
        TokenStore.open(tmp_path / "store")


def test_no_store_half_a_manifest_or_another_version_does_not_open(tmp_path):
    with pytest.raises(DataError, match="not a finished token store"):
        TokenStore.open(tmp_path)
    build_from(tmp_path, ROWS)
    manifest = tmp_path / "store" / MANIFEST
    whole = manifest.read_text()
    manifest.write_text(sealed({**json.loads(whole)["content"], "version": 0}))
    with pytest.raises(DataError, match="version 0"):
        TokenStore.open(tmp_path / "store")
    manifest.write_text('{"version": 1, "bytes": {}}')
    with pytest.raises(DataError, match=r"fsdpsft 0\.1\.0, which has no checksums"):
        TokenStore.open(tmp_path / "store")
    for text in (whole[: len(whole) // 2], "", "[" * 100_000):
        manifest.write_text(text)
        with pytest.raises(DataError, match="not a finished token store"):
            TokenStore.open(tmp_path / "store")
    for text in ("{}", "[]", "3", whole.replace('"lengths.bin": [\n    12', '"lengths.bin": [\n    13')):
        manifest.write_text(text)
        with pytest.raises(DataError, match="not as it was written"):
            TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("name", ["row_numbers.bin", "stats.json", "tokens.bin", "offsets.bin", MANIFEST])
def test_one_flipped_bit_is_noticed_and_the_store_built_anew(tmp_path, caplog, name):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    sources, options = resolve_sources(str(tmp_path / "rows.jsonl")), BuildOptions(num_workers=1)
    first = open_or_build(sources, ToyEncoder(), options, tmp_path / "cache", progress=False)
    file = tmp_path / "cache" / first.fingerprint / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = open_or_build(sources, ToyEncoder(), options, tmp_path / "cache", progress=False)
    assert contents(again) == [(row["ids"], row["weights"]) for row in ROWS]
    assert (again.row_numbers.tolist(), again.stats["rows"]) == ([0, 1, 2], 3)
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(str(file.parent)) and line.endswith("the data is tokenised anew")


def test_large_arrays_are_hashed_when_asked_for(tmp_path, monkeypatch):
    build_from(tmp_path, ROWS)
    monkeypatch.setattr(store_module, "SMALL_BYTES", 8)
    tokens = tmp_path / "store" / "tokens.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    TokenStore.open(tmp_path / "store")
    with pytest.raises(DataError, match=r"tokens\.bin is not as it was written"):
        TokenStore.open(tmp_path / "store", every_byte=True)


def test_a_large_array_found_damaged_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SMALL_BYTES", 8)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    sources, options = resolve_sources(str(tmp_path / "rows.jsonl")), BuildOptions(num_workers=1)
    first = open_or_build(sources, ToyEncoder(), options, tmp_path / "cache", progress=False)
    tokens = tmp_path / "cache" / first.fingerprint / "tokens.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    again = open_or_build(sources, ToyEncoder(), options, tmp_path / "cache", progress=False, every_byte=True)
    assert contents(again) == [(row["ids"], row["weights"]) for row in ROWS]


# ------------------------------------------------------------------------------------------------- truncation, bad rows

LONG = {"ids": [1, 2, 3, 4, 5, 6], "weights": [0, 0, 1, 0, 0, 2]}


@pytest.mark.parametrize(
    ("mode", "limit", "expected"),
    [
        ("left", 4, ([3, 4, 5, 6], [1, 0, 0, 2])),
        ("right", 4, ([1, 2, 3, 4], [0, 0, 1, 0])),
        ("left", 6, ([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 0, 2])),
        ("right", 6, ([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 0, 2])),
    ],
)
def test_truncation_cuts_tokens_and_mask_at_the_same_place(mode, limit, expected):
    sample = Encoded(np.array(LONG["ids"]), np.array(LONG["weights"]))
    kept = truncate(sample, BuildOptions(limit, mode), Row("f", 0, {}))
    assert (kept.input_ids.tolist(), kept.loss_weights.tolist()) == expected


def test_left_truncation_counts_labels_not_marks(tmp_path):
    """Of the kept 3 4 5 6 the first token is marked, but nothing comes before it that could predict it."""
    store = build_from(tmp_path, [LONG], max_length=4, truncation="left")
    assert (store.trained.tolist(), store.weights.tolist()) == ([1], [2.0])
    assert store.stats["truncated"] == 1


def test_truncation_that_leaves_nothing_to_train_drops_the_row_and_says_so(tmp_path):
    store = build_from(tmp_path, [*ROWS, LONG], max_length=5, truncation="right")
    assert len(store) == 4
    early = {"ids": [1, 2, 3, 4, 5, 6], "weights": [0, 0, 0, 0, 0, 1]}
    (tmp_path / "second").mkdir()
    store = build_from(tmp_path / "second", [*ROWS, early], max_length=5, truncation="right")
    assert store.row_numbers.tolist() == [0, 1, 2]
    assert store.stats["dropped"] == {"no trained token left after truncation": 1}
    assert "row 3" in store.stats["examples"][0]


def test_truncation_drop(tmp_path):
    store = build_from(tmp_path, [*ROWS, LONG], max_length=5, truncation="drop")
    assert len(store) == 3
    assert store.stats["dropped"] == {"longer than data.max_length": 1}


def test_truncation_error_names_file_row_length_and_key(tmp_path):
    with pytest.raises(RowError, match=r"rows\.jsonl, row 3 \(line 4\): 6 tokens, more than data\.max_length=5"):
        build_from(tmp_path, [*ROWS, LONG], max_length=5)
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".building*"))


BAD = {"bad": "role"}
MUTE = {"ids": [1, 2, 3], "weights": [1, 0, 0]}


def test_bad_rows_are_errors_by_default(tmp_path):
    with pytest.raises(RowError, match=r"row 1: role"):
        build_from(tmp_path, [ROWS[0], BAD])
    with pytest.raises(RowError, match=r"row 0 .*no token of it is trained.*data\.on_bad_row"):
        build_from(tmp_path, [MUTE])
    with pytest.raises(RowError, match=r"row 0 .*token id 9, but the tokenizer has only 9"):
        build_from(tmp_path, [{"ids": [1, 9], "weights": [0, 1]}], ToyEncoder(vocab_size=9))


def test_skipped_rows_are_counted_by_reason_and_source(tmp_path):
    write_rows(tmp_path / "good.jsonl", ROWS)
    write_rows(tmp_path / "poor.jsonl", [BAD, ROWS[0], MUTE, BAD])
    with (tmp_path / "poor.jsonl").open("a") as file:
        file.write('{"ids": [1, 2\n')
    sources = resolve_sources([str(tmp_path / "good.jsonl"), str(tmp_path / "poor.jsonl")])
    build(tmp_path / "store", sources, ToyEncoder(), BuildOptions(on_bad_row="skip", num_workers=1))
    store = TokenStore.open(tmp_path / "store")
    assert (len(store), store.stats["rows"]) == (4, 8)
    poor = store.stats["sources"]["poor"]
    assert (poor["rows"], poor["samples"]) == (5, 1)
    assert {k: poor["skipped"][k] for k in ("role", "no trained token")} == {"role": 2, "no trained token": 1}
    assert sum(poor["skipped"].values()) == 4
    assert store.stats["sources"]["good"]["skipped"] == {}
    assert store.row_numbers.tolist() == [0, 1, 2, 1]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none of 2 rows gave a sample.*2 skipped: role"):
        build_from(tmp_path, [BAD, BAD], on_bad_row="skip")
    assert not (tmp_path / "store").exists()


def test_duplicates_are_counted_for_the_later_source(tmp_path):
    rows = [{"ids": [i % 5, 7], "weights": [1, 1]} for i in range(12)]
    write_rows(tmp_path / "a.jsonl", rows[:6])
    write_rows(tmp_path / "b.jsonl", rows[6:])
    sources = resolve_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    build(tmp_path / "store", sources, ToyEncoder(), BuildOptions(num_workers=1))
    stats = TokenStore.open(tmp_path / "store").stats
    assert (stats["duplicates"], stats["sources"]["a"]["duplicates"], stats["sources"]["b"]["duplicates"]) == (7, 1, 6)


def test_a_row_may_give_several_samples(tmp_path):
    store = build_from(tmp_path, [{**ROWS[0], "times": 3}, ROWS[1]])
    assert store.row_numbers.tolist() == [0, 0, 0, 1]
