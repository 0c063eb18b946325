"""Building: by many processes as by one, once for all who ask, and nothing half-built is ever taken for whole."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsdpsft.data.batches import store_build as token_store_build
from fsdpsft.data.batches.store import TokenStore
from fsdpsft.data.batches.store_build import build, cache_folders, open_or_build, store_key
from fsdpsft.data.batches.store_parts import BuildOptions
from fsdpsft.data.rows.sources import resolve_sources
from fsdpsft.errors import ConfigError, DataError, RowError
from fsdpsft.filesystem import exclusive, is_held
from tests.data.toy_encoder import ToyEncoder, write_rows

ALONE = BuildOptions(num_workers=1)
PAIR = BuildOptions(num_workers=2)


@pytest.fixture
def small_shards(monkeypatch):
    """Cut files into pieces of about a kilobyte, so that little data already makes many shards."""
    original = token_store_build.shards
    monkeypatch.setattr(token_store_build, "shards", lambda source, _: original(source, 1000))


def rows_of(count):
    return [{"ids": [i % 900 + 1, 7, 8 + i % 3], "weights": [0, 1, 1]} for i in range(count)]


def sources_in(folder: Path, count=600):
    write_rows(folder / "rows.jsonl", rows_of(count))
    return resolve_sources(str(folder / "rows.jsonl"))


def contents(store: TokenStore):
    return [(s.input_ids.tolist(), s.loss_weights.tolist()) for s in map(store.sample, range(len(store)))]


def test_the_store_does_not_depend_on_the_number_of_processes(tmp_path, small_shards):
    sources = sources_in(tmp_path)
    for workers in (1, 3):
        build(tmp_path / f"by-{workers}", sources, ToyEncoder(), BuildOptions(num_workers=workers))
    names = sorted(path.name for path in (tmp_path / "by-1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "by-3").iterdir())
    for name in names:
        assert (tmp_path / "by-1" / name).read_bytes() == (tmp_path / "by-3" / name).read_bytes()
    store = TokenStore.open(tmp_path / "by-3")
    assert contents(store) == [(row["ids"], row["weights"]) for row in rows_of(600)]
    assert store.files == ((str(tmp_path / "rows.jsonl"), 600),)
    assert store.describe(599).endswith("rows.jsonl, row 599")


def test_an_error_in_a_process_is_the_users_error(tmp_path, small_shards):
    write_rows(tmp_path / "rows.jsonl", [*rows_of(300), {"bad": "role"}, *rows_of(300)])
    sources = resolve_sources(str(tmp_path / "rows.jsonl"))
    with pytest.raises(RowError, match="row 300: role") as caught:
        build(tmp_path / "store", sources, ToyEncoder(), BuildOptions(num_workers=2))
    assert caught.value.reason == "role"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_process_that_is_killed_is_a_named_error(tmp_path, small_shards):
    sources = sources_in(tmp_path)
    with pytest.raises(DataError, match=r"was killed.*data\.num_workers"):
        build(tmp_path / "store", sources, ToyEncoder(die_at=400), BuildOptions(num_workers=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize("value", [None, "true"])
def test_the_users_tokenizer_setting_is_left_alone(tmp_path, small_shards, monkeypatch, value):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if value is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    before = dict(os.environ)
    build(tmp_path / "store", sources_in(tmp_path), ToyEncoder(), BuildOptions(num_workers=2))
    assert dict(os.environ) == before


# ------------------------------------------------------------------------------------------------------------------ key


def test_a_second_call_opens_what_the_first_built(tmp_path, monkeypatch):
    sources = sources_in(tmp_path)
    first = open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", progress=False)
    monkeypatch.setattr(token_store_build, "build", None)
    second = open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", may_build=False)
    assert (second.fingerprint, contents(second)) == (first.fingerprint, contents(first))


def test_the_key_is_the_content(tmp_path):
    sources, options = sources_in(tmp_path), BuildOptions(max_length=9)

    def key(sources=sources, encoder=ToyEncoder(), options=options):  # noqa: B008
        return store_key(sources, encoder, options, [tmp_path])

    known = key()
    (tmp_path / "elsewhere").mkdir()
    assert key(sources_in(tmp_path / "elsewhere")) == known
    assert key(options=BuildOptions(max_length=9, num_workers=7, max_bad_share=0.5)) == known
    others = [
        key(encoder=ToyEncoder(fingerprint="another template")),
        key(options=BuildOptions(max_length=8)),
        key(options=BuildOptions(max_length=9, truncation="left")),
        key(options=BuildOptions(max_length=9, on_bad_row="skip")),
        key(sources_in(tmp_path, 601)),
    ]
    assert len({known, *others}) == 6


def test_content_is_hashed_once_and_again_after_any_change(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store_build, "_SETTLED_NS", -1)
    calls = []
    original = token_store_build.fingerprint
    monkeypatch.setattr(token_store_build, "fingerprint", lambda source: calls.append(1) or original(source))
    sources = sources_in(tmp_path)
    known = store_key(sources, ToyEncoder(), ALONE, [tmp_path])
    assert store_key(sources, ToyEncoder(), ALONE, [tmp_path]) == known
    assert len(calls) == 1
    file = tmp_path / "rows.jsonl"
    stat = file.stat()
    file.write_text(file.read_text().replace("7", "6"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store_key(sources, ToyEncoder(), ALONE, [tmp_path]) != known
    assert len(calls) == 2


def test_a_torn_store_is_built_again(tmp_path, caplog):
    sources = sources_in(tmp_path)
    store = open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", progress=False)
    (tmp_path / "cache" / store.fingerprint / "tokens.bin").write_bytes(b"")
    again = open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", progress=False)
    assert len(contents(again)) == 600
    assert "tokens.bin has 0 bytes, not 3600: the store is torn; the data is tokenised anew" in caplog.text


def test_too_many_bad_rows_are_an_error_also_the_second_time(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*rows_of(18), {"bad": "role"}, {"bad": "role"}])
    sources = resolve_sources(str(tmp_path / "rows.jsonl"))
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 20 rows .*data\.max_bad_share=0\.05 .*2 skipped: role"):
            open_or_build(sources, ToyEncoder(), BuildOptions(on_bad_row="skip"), tmp_path / "cache", progress=False)
    options = BuildOptions(on_bad_row="skip", max_bad_share=0.1)
    assert len(open_or_build(sources, ToyEncoder(), options, tmp_path / "cache", progress=False)) == 18


# -------------------------------------------------------------------------------------------------- where it is kept


@contextmanager
def full_disk(folder: Path):
    """A file system of its own with hardly any room."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("options", [ALONE, PAIR])
def test_a_full_disk_is_told_and_nothing_unfinished_is_left(tmp_path, small_shards, options):
    sources = sources_in(tmp_path)
    with full_disk(tmp_path / "cache") as cache:
        with pytest.raises(ConfigError, match=r"data\.cache_dir: .*cache cannot be written to \(No space left"):
            open_or_build(sources, ToyEncoder(), options, cache, progress=False)
        assert not list(cache.glob(".building-*"))


def test_where_no_folder_is_named_another_is_tried(tmp_path, monkeypatch, caplog):
    sources = sources_in(tmp_path)
    (tmp_path / "home").write_text("in the way of the folder")
    monkeypatch.setattr(token_store_build, "DEFAULT_CACHE", str(tmp_path / "home" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for may_build in (True, False):
        assert len(open_or_build(sources, ToyEncoder(), ALONE, may_build=may_build, progress=False)) == 600
    assert f"{tmp_path / 'home' / 'cache'} cannot be written to (Not a directory)" in caplog.text
    (spare,) = tmp_path.glob("fsdpsft-*")
    assert len(list(spare.glob("*/manifest.json"))) == 1
    with pytest.raises(ConfigError, match=r"home/cache cannot be written to .* name another folder"):
        open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "home" / "cache", progress=False)


def test_a_cache_that_can_only_be_read_serves_what_it_has(tmp_path, monkeypatch):
    sources = sources_in(tmp_path)
    known = open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", progress=False)
    monkeypatch.setattr(token_store_build, "_SETTLED_NS", -1)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    again = open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", progress=False)
    assert again.fingerprint == known.fingerprint


def test_a_spare_folder_of_another_user_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spare = tmp_path / f"fsdpsft-{os.getuid()}"
    assert cache_folders(None)[1:] == [spare]
    spare.symlink_to(tmp_path)
    assert cache_folders(None)[1:] == []


def test_stores_of_earlier_versions_are_named(tmp_path, caplog):
    (tmp_path / "cache" / "abc").mkdir(parents=True)
    (tmp_path / "cache" / "abc" / "manifest.json").write_text('{"version": 1, "bytes": {}}')
    with caplog.at_level(logging.INFO):
        open_or_build(sources_in(tmp_path), ToyEncoder(), ALONE, tmp_path / "cache", progress=False)
    assert "holds 1 token stores of an earlier version, never read again: abc" in caplog.text


# -------------------------------------------------------------------------------------------------- several builders

FORK = multiprocessing.get_context("fork")


def open_store(tmp_path, name, seconds, may_build):
    """What a building process runs; leaves its log and the number of samples in files."""
    logging.basicConfig(filename=tmp_path / f"{name}.log", level=logging.INFO, force=True)
    sources = resolve_sources(str(tmp_path / "rows.jsonl"))
    store = open_or_build(
        sources, ToyEncoder(seconds_per_batch=seconds), PAIR, tmp_path / "cache", may_build=may_build, progress=False
    )
    (tmp_path / f"{name}.count").write_text(str(len(store)))


def start(tmp_path, name, seconds=0.0, may_build=True):
    process = FORK.Process(target=open_store, args=(tmp_path, name, seconds, may_build))
    process.start()
    return process


def said(tmp_path, name):
    log = tmp_path / f"{name}.log"
    return log.read_text() if log.exists() else ""


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def parts_of(tmp_path):
    return list((tmp_path / "cache").glob(".building-*/part-*.tokens"))


def lock_of(tmp_path):
    return next((tmp_path / "cache").glob("*.lock"))


def test_killed_builder_leaves_nothing_and_a_waiting_one_takes_over(tmp_path, small_shards):
    sources_in(tmp_path)
    victim = start(tmp_path, "victim", seconds=0.3)
    wait_until(lambda: len(parts_of(tmp_path)) > 2)
    assert is_held(lock_of(tmp_path))
    heir = start(tmp_path, "heir")
    wait_until(lambda: f"waiting for process {victim.pid} on" in said(tmp_path, "heir"))
    victim.kill()
    victim.join()
    heir.join(60)
    assert (heir.exitcode, (tmp_path / "heir.count").read_text()) == (0, "600")
    assert f"taking over from process {victim.pid} on" in said(tmp_path, "heir")
    stores = [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "content"]
    assert len(stores) == 1
    assert contents(TokenStore.open(stores[0])) == [(row["ids"], row["weights"]) for row in rows_of(600)]


def test_killed_builder_alone_leaves_no_store_and_no_lock(tmp_path, small_shards):
    sources = sources_in(tmp_path)
    victim = start(tmp_path, "victim", seconds=0.3)
    wait_until(lambda: len(parts_of(tmp_path)) > 2)
    victim.kill()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    key = store_key(sources, ToyEncoder(), PAIR, [tmp_path / "cache"])
    assert not (tmp_path / "cache" / key).exists()
    wait_until(lambda: not is_held(lock_of(tmp_path)), 10)  # its own processes follow it
    for scratch in (tmp_path / "cache").glob(".building-*"):
        with pytest.raises(DataError, match="not a finished token store"):
            TokenStore.open(scratch)
    assert len(open_or_build(sources, ToyEncoder(), PAIR, tmp_path / "cache", progress=False)) == 600
    assert not list((tmp_path / "cache").glob(".building-*"))


def test_processes_that_may_not_build_wait_for_the_one_that_may(tmp_path, small_shards):
    sources_in(tmp_path)
    waiters = [start(tmp_path, f"waiter-{number}", may_build=False) for number in range(2)]
    builders = [start(tmp_path, f"builder-{number}", seconds=0.02) for number in range(2)]
    for process in (*waiters, *builders):
        process.join(60)
        assert process.exitcode == 0
    assert sorted(path.read_text() for path in tmp_path.glob("*.count")) == ["600"] * 4
    assert not said(tmp_path, "waiter-0")


def test_waiting_ends_when_the_builder_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store_build, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(token_store_build, "PATIENCE_SECONDS", 0.6)
    sources = sources_in(tmp_path)
    with pytest.raises(DataError, match="and none is made"):
        open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", may_build=False)
    key = store_key(sources, ToyEncoder(), ALONE, [tmp_path / "cache"])
    (tmp_path / "cache").mkdir()
    holder = multiprocessing.get_context("fork").Process(
        target=hold_for, args=(tmp_path / "cache" / f"{key}.lock", 0.5)
    )
    holder.start()
    with pytest.raises(DataError, match=rf"process {holder.pid} on .* ended without it"):
        open_or_build(sources, ToyEncoder(), ALONE, tmp_path / "cache", may_build=False)
    holder.join()


def hold_for(lock, seconds):
    with exclusive(lock, "testing"):
        time.sleep(seconds)
