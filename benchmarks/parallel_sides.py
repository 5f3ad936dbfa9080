"""What each side of `parallel.py` does: tasks of next to no work, and arrays of 1 MB there and back, with 2 workers.

python benchmarks/parallel_sides.py SIDE TASKS ARRAYS    prints seconds as JSON
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

WORKERS = 2
ELEMENTS = 1 << 17  # of float64: 1 MiB
IN_FLIGHT = 4 * WORKERS  # arrays that Ray has at once, so that its store is large enough
RAY = {"num_cpus": WORKERS, "include_dashboard": False, "object_store_memory": 500 << 20, "logging_level": "ERROR"}

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def double(item: int) -> int:
    """Next to no work."""
    return 2 * item


def add_one(item: np.ndarray) -> np.ndarray:
    """A pass over an array."""
    return item + 1


def on_processes(function: Callable[[Any], Any], items: Iterable[Any], **arguments: Any) -> Iterator[Any]:
    """unisono, either engine."""
    from unisono import parallel

    return parallel.map(function, items, workers=WORKERS, **arguments)


def on_executor(function: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterator[Any]:
    """The standard library's pool, from its start to its end."""
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(function, items, chunksize=chunksize)


def on_ray(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """A Ray task for each item: all at once if they are small, else some in flight."""
    import ray

    remote = ray.remote(function)
    if function is double:
        yield from ray.get([remote.remote(item) for item in items])
        return
    flying: deque[Any] = deque()
    for item in items:
        flying.append(remote.remote(item))
        if len(flying) >= IN_FLIGHT:
            yield ray.get(flying.popleft())
    while flying:
        yield ray.get(flying.popleft())


SIDES: dict[str, tuple[Map, Map]] = {  # for small tasks, for arrays
    "unisono": (on_processes, on_processes),
    "unisono, seed=None": (partial(on_processes, seed=None), partial(on_processes, seed=None)),
    "executor": (partial(on_executor, chunksize=1), partial(on_executor, chunksize=1)),
    "executor, tuned": (partial(on_executor, chunksize=512), partial(on_executor, chunksize=4)),
    "unisono on Ray": (partial(on_processes, engine="ray"), partial(on_processes, engine="ray")),
    "Ray tasks": (on_ray, on_ray),
}


def measure(side: str, tasks: int, arrays: int) -> dict[str, float]:
    """Seconds of a call with a task for each worker, of one with many, and from the first array of many to the last."""
    small, large = SIDES[side]
    if "Ray" in side:
        import ray

        ray.init(address="local", **RAY)
        deque(small(double, range(WORKERS)), maxlen=0)  # its processes take a while to come up
    first, _ = _time(small(double, range(WORKERS)), WORKERS)
    whole, _ = _time(small(double, range(tasks)), tasks)
    sent = (np.full(ELEMENTS, number, np.float64) for number in itertools.count())
    _, moved = _time(large(add_one, itertools.islice(sent, arrays)), arrays)
    return {"first": first, "whole": whole, "arrays": moved}


def _time(results: Iterator[Any], count: int) -> tuple[float, float]:
    """Seconds of all, and of all after the first."""
    begin = time.perf_counter()
    next(results)
    first = time.perf_counter()
    assert sum(1 for _ in results) == count - 1
    end = time.perf_counter()
    return end - begin, end - first


if __name__ == "__main__":
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
