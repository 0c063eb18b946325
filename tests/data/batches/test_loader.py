"""Steps: the same on any hardware, the global numbers against a slow count, the thread that leaves when told."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsdpsft.batch import IGNORE_INDEX
from fsdpsft.data.batches.loader import STEPS_AHEAD, Loader, LoaderSettings
from fsdpsft.errors import ConfigError, DataError
from tests.data.memory_store import memory_store

PAD = 0


def make_store(count=37, seed=0, longest=50, sources=None):
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(rng.integers(2, longest))
        weights = (rng.random(length) < 0.4) * rng.choice([0.5, 1.0, 2.0], length)
        weights[-1] = 1.0
        samples.append((rng.integers(1, 1000, length), weights))
    return memory_store(samples, sources)


def loader_of(store, **changes):
    arguments = {"train_batch_size": 8, "token_budget": 64, "pad_token_id": PAD, "seed": 3}
    return Loader(store, LoaderSettings(**{**arguments, **changes}))


def documents(batch):
    """Undo a pack: each real document's tokens, labels and weights."""
    bounds = batch.cu_seqlens.tolist()
    pieces = list(itertools.pairwise(bounds))[: len(batch.rows)]
    return [
        (batch.input_ids[0, a:b].tolist(), batch.labels[0, a:b].tolist(), batch.loss_weights[0, a:b].tolist())
        for a, b in pieces
    ]


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 12), seed=st.integers(0, 100), padded=st.booleans(), sp_size=st.sampled_from([1, 2]))
def test_same_samples_and_numbers_on_1_2_3_8_ranks(step, seed, padded, sp_size):
    store = make_store()
    seen = []
    for dp_size in (1, 2, 3, 8):
        steps = [
            loader_of(store, seed=seed, dp_rank=rank, dp_size=dp_size, padded=padded, sp_size=sp_size).step(step)
            for rank in range(dp_size)
        ]
        assert len({len(s.micro_batches) for s in steps}) == 1
        assert len({(s.loss_denominator, s.num_tokens, s.num_trained_tokens, s.epoch) for s in steps}) == 1
        batches = [batch for s in steps for batch in s.micro_batches]
        assert all(batch.input_ids.numel() <= 64 * sp_size for batch in batches)
        assert all(batch.input_ids.numel() % sp_size == 0 for batch in batches)
        assert sorted(row for batch in batches for row in batch.rows) == sorted(steps[0].rows.tolist())
        seen.append((steps[0].rows.tolist(), steps[0].loss_denominator, steps[0].num_tokens))
    assert all(s == seen[0] for s in seen)


@pytest.mark.parametrize("padded", [False, True])
def test_global_numbers_against_a_slow_count(padded):
    store = make_store()
    for index in range(10):
        parts = [loader_of(store, dp_rank=rank, dp_size=3, padded=padded).step(index) for rank in range(3)]
        batches = [batch for part in parts for batch in part.micro_batches]
        weight = sum(w for b in batches for w in b.loss_weights.flatten().tolist())
        trained = sum(label != IGNORE_INDEX for b in batches for label in b.labels.flatten().tolist())
        tokens = sum(len(store.sample(row).input_ids) for b in batches for row in b.rows)
        assert parts[0].loss_denominator == pytest.approx(weight, rel=1e-12)
        assert (parts[0].num_trained_tokens, parts[0].num_tokens) == (trained, tokens)
        assert sum(len(b.trained_index) for b in batches) == trained


def test_documents_arrive_whole_with_labels_shifted_once():
    store = make_store()
    step = loader_of(store, train_batch_size=5).step(2)
    for batch in step.micro_batches:
        for row, (ids, labels, weights) in zip(batch.rows, documents(batch), strict=True):
            sample = store.sample(row)
            assert ids == sample.input_ids.tolist()
            assert labels[-1] == IGNORE_INDEX
            for t in range(len(ids) - 1):
                counts = sample.loss_weights[t + 1] > 0
                assert labels[t] == (ids[t + 1] if counts else IGNORE_INDEX)
                assert weights[t] == sample.loss_weights[t + 1]


def same(a, b):
    pairs = zip(a.micro_batches, b.micro_batches, strict=True)
    return a.rows.tolist() == b.rows.tolist() and all(torch.equal(x.input_ids, y.input_ids) for x, y in pairs)


def test_step_is_pure_and_iterate_yields_the_same_steps():
    loader = loader_of(make_store())
    later = loader.step(7)
    loader.step(1)
    assert same(later, loader.step(7))
    steps = list(loader.iterate(3, 9))
    assert [s.index for s in steps] == list(range(3, 9))
    assert [s.epoch for s in steps] == [0, 0, 1, 1, 1, 1]
    assert all(same(s, loader.step(s.index)) for s in steps)
    assert len(list(loader.iterate())) == len(loader) == 5


def test_iterate_builds_ahead_but_no_further():
    loader = loader_of(make_store())
    built, reached = [], threading.Event()
    original = loader.step

    def counted(index):
        built.append(index)
        if len(built) == STEPS_AHEAD + 1:
            reached.set()
        return original(index)

    loader.step = counted
    steps = loader.iterate(0, 100)
    assert next(steps).index == 0
    assert reached.wait(5)
    assert built == list(range(STEPS_AHEAD + 1))
    steps.close()


def test_leaving_early_ends_the_thread():
    steps = loader_of(make_store()).iterate(0, 10**9)
    next(steps)
    assert any(t.name.startswith("fsdpsft-loader") for t in threading.enumerate())
    steps.close()
    assert not any(t.name.startswith("fsdpsft-loader") for t in threading.enumerate())


def test_an_error_in_the_thread_reaches_the_loop_at_its_own_step():
    loader = loader_of(make_store())
    original = loader.step
    loader.step = lambda index: original(index) if index != 2 else (_ for _ in ()).throw(DataError("row 17 is torn"))
    seen = []
    with pytest.raises(DataError, match="row 17 is torn"):
        for step in loader.iterate(0, 5):
            seen.append(step.index)
    assert seen == [0, 1]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_evaluation_takes_every_row_once_and_in_order(dp_size):
    store = make_store(11)
    parts = [
        list(loader_of(store, evaluation=True, train_batch_size=4, dp_rank=r, dp_size=dp_size).iterate())
        for r in range(dp_size)
    ]
    assert [s.rows.tolist() for s in parts[0]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert sum(s.loss_denominator for s in parts[0]) == pytest.approx(store.weights.sum())
    for steps in zip(*parts, strict=True):
        assert len({len(s.micro_batches) for s in steps}) == 1
        rows = sorted(row for s in steps for b in s.micro_batches for row in b.rows)
        assert rows == steps[0].rows.tolist()


def test_idle_rank_gets_a_micro_batch_without_labels():
    store = memory_store([([5, 6, 7], [0, 1, 1])])
    step = loader_of(store, dp_rank=1, dp_size=2, sp_size=2).step(0)
    assert [b.rows for b in step.micro_batches] == [()]
    assert step.micro_batches[0].input_ids.tolist() == [[PAD, PAD]]
    assert step.micro_batches[0].trained_index.numel() == 0
    assert (step.loss_denominator, step.num_trained_tokens, step.num_tokens) == (2.0, 2, 3)


def test_first_samples_only():
    store = make_store(20, sources={"a": 5, "b": 15})
    assert sorted(np.concatenate([s.rows for s in loader_of(store, max_samples=12).iterate()]).tolist()) == list(
        range(12)
    )


def test_source_weights():
    store = make_store(20, sources={"a": 5, "b": 15})
    rows = np.concatenate([s.rows for s in loader_of(store, source_weights=(2.0, 1.0)).iterate()])
    assert np.bincount(rows, minlength=20).tolist() == [2] * 5 + [1] * 15
    with pytest.raises(ConfigError, match="1 source weights were given for 2 sources"):
        loader_of(store, source_weights=(2.0,))


def test_a_step_without_a_trained_token_names_its_rows():
    store = memory_store([([1, 2], [1, 0]), ([1, 2, 3], [0, 0, 0])])
    with pytest.raises(DataError, match=r"(?s)step 0 is trained.*memory, row 0.*data\.train_batch_size") as caught:
        loader_of(store).step(0)
    assert "memory, row 1" in str(caught.value)
    assert loader_of(store, evaluation=True).step(0).loss_denominator == 0.0


def test_a_sample_over_the_budget_is_named_before_the_first_step():
    store = memory_store([([1] * 5, [1] * 5), ([1] * 9, [1] * 9)])
    with pytest.raises(DataError, match=r"memory, row 1 has 9 tokens.*data\.max_token_len_per_gpu"):
        loader_of(store, token_budget=8)
    assert len(loader_of(store, token_budget=8, sp_size=2).step(0).micro_batches) == 1
