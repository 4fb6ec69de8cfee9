"""Chunked work in several processes, with results that do not depend on their number."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count
from typing import TypeVar

T = TypeVar("T")


def chunks(make: Callable[[int], T], processes: int = 1) -> Iterator[T]:
    """Yields make(0), make(1), ... without end; worker processes, if any, make a few ahead.

    With several processes `make` must be picklable: a module-level function, or a functools.partial of one.
    """
    if processes == 1:
        yield from map(make, count())
        return
    # Spawned, not forked: a fork of a process with threads (JAX, array_record) may deadlock.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_follow_parent)
    try:
        ahead: deque[Future[T]] = deque()
        for chunk in count():
            ahead.append(pool.submit(make, chunk))
            if len(ahead) > 2 * processes:
                yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Ignores ctrl-C, which the parent handles, and exits when the parent is gone, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
