"""The one pool of processes of the data side: rows are encoded and proven in it, in order, one item a process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from fsdpsft.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_POLL_SECONDS = 0.2
_ITEMS_AHEAD = 4  # per process: more would only wait in memory
_YOUNG_OBJECTS = 50_000  # between collections: a batch of rows makes tens of thousands, hardly any of them in cycles

_function: Callable[[Any], Any] | None = None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[T], R], items: Iterable[T], processes: int) -> Generator[R, None, None]:
    """Apply ``function`` to each item and yield the results in the order of the items.

    The processes end with this one, however it ends, and when the iterator is closed or raises.

    Args:
        function: what it holds is shared with the processes on Linux, and pickled elsewhere.
        items: pickled, each on its own; read only as far ahead as keeps the processes busy.
        processes: 1 takes no pool.

    Raises:
        DataError: a process was killed. Whatever ``function`` raises is raised here.
    """
    if processes <= 1:
        yield from map(function, items)
        return
    # Forked processes share what is in memory and do not run the user's main module again. Elsewhere than on Linux,
    # forking is not safe with the system's libraries.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ending = context.RawValue("b", 0)  # no lock: a process that was killed would keep it
    arguments = (function, os.getpid(), ending)
    with _ready_to_fork():
        pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=arguments)
        try:
            yield from in_order(pool, _apply, items, _ITEMS_AHEAD * processes)
            pool.shutdown(wait=True)
        except BrokenProcessPool as error:
            raise DataError(
                "A process that was reading rows was killed, most likely because memory ran out; set data.num_workers "
                "to a smaller number."
            ) from error
        finally:
            ending.value = 1
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """Results of a pool in the order of the items, of which at most ``most`` wait in it."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start(function: Callable[[Any], Any], parent: int, ending: Any) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # not the parent's handlers
    # The parallelism is in the processes; threads of the tokenizers' own would not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(_YOUNG_OBJECTS)
    _function = function
    threading.Thread(target=_follow, args=(parent, ending), daemon=True).start()


def _follow(parent: int, ending: Any) -> None:
    """End this process when no one needs its results: its parent died (whose locks it also holds), or gave up."""
    while os.getppid() == parent and not ending.value:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)


@contextmanager
def _ready_to_fork() -> Iterator[None]:
    """Keep collections from copying shared memory, and the tokenizers library from warning about forks."""
    name = "TOKENIZERS_PARALLELISM"
    unset = name not in os.environ
    os.environ.setdefault(name, "false")
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if unset:
            del os.environ[name]
