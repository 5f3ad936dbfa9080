"""`map` and `map_reduce`: a function over items, by many workers, with the result that one worker gives.

Owns the arguments and their checks, quarantine and progress.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from unisono.errors import ParallelError
from unisono.parallel.executor import Engine
from unisono.parallel.gathering import Combined, Ordered
from unisono.parallel.item_batches import MapJob, describe
from unisono.parallel.sharing import Failure, Sharing, fail_to_combine
from unisono.processes.forking import is_terminal

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = bool | None | Callable[[int, int | None], None]


class Quarantine(Protocol):
    """The container for failures, such as a list."""

    def append(self, failure: Failure, /) -> None: ...


def map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | str = "auto",
    seed: int | None = 0,
    threads: int = 1,
    retries: int = 0,
    quarantine: Quarantine | None = None,
    timeout_seconds: float | None = None,
    progress: Progress = None,
    engine: str | Engine = "processes",
) -> Iterator[Result]:
    """Apply a function to each item, by many workers; yield the results in the order of the items.

    Items are read as they are needed, results are returned as soon as all before them exist; the number held in between
    is limited (256 MiB of them at most, and at least two per worker). As with the built-in `map`, nothing begins before
    the first result is requested; closing the iterator ends the workers.

    Args:
        function: takes an item. It is inherited by local processes, so lambdas and closures are allowed.
        items: any iterable. NumPy arrays, Arrow tables, pandas and Polars frames and torch tensors are sent without
            pickling their buffers; results likewise.
        workers: how many processes; "auto": one per core.
        seed: before each task the global generators of `random`, NumPy and torch are seeded from (seed, number of the
            item); `parallel.key()` returns that key. None: they are left alone, which saves 10 µs a task.
        threads: the number that kernels (OpenMP, BLAS) use in each worker. To use more cores, use more workers: the
            number of threads can decide the last bit.
        retries: how often a task that raised, or took too long, is run again, with the same key.
        quarantine: failures are appended to it and their results left out; None: the first one, in the order of the
            items, is raised.
        timeout_seconds: a worker at a task for longer is ended. None: never.
        progress: True: a bar on stderr; None: if that is a terminal; False: none. Or a function of (done, total).
        engine: "processes" of this host, "ray", or an engine with settings, such as `parallel.Ray(address=…)`.

    Raises:
        ParallelError: an argument cannot be used.
        TaskError: a task failed for good: it raised, its item or result cannot be sent, it took too long, or three
            workers ended at it. It names the item; the error that the task raised is its cause.
    """
    job = MapJob(function=function, seed=seed, threads=threads)
    chosen = _check(job, items, workers, retries, quarantine, timeout_seconds, engine)
    return _map(job, items, chosen, workers, retries, quarantine, timeout_seconds, progress)


def map_reduce(
    function: Callable[[Item], Result],
    combine: Callable[[Result, Result], Result],
    items: Iterable[Item],
    *,
    workers: int | str = "auto",
    seed: int | None = 0,
    threads: int = 1,
    retries: int = 0,
    quarantine: Quarantine | None = None,
    timeout_seconds: float | None = None,
    progress: Progress = None,
    engine: str | Engine = "processes",
) -> Result:
    """Apply a function to each item and combine the results two by two, in a fixed tree.

    The tree is that of `unisono.determinism.nodes`, over the items' numbers: `combine` need not be associative
    (floating-point addition is not) to give the same bits on any number of workers. Workers combine what they have, so
    that only complete nodes of the tree are sent. `combine(left, right)` may reuse `left`. An item in quarantine is a
    missing leaf: its sibling goes up unchanged. An error of `combine` itself ends the call.

    The other arguments, and the errors, are those of `map`.

    Raises:
        ParallelError: also where there are no items, or all are in quarantine.
    """
    if not callable(combine):
        raise ParallelError(f"combine = {combine!r}: not callable. Give a function of two results.")
    job = MapJob(function=function, combine=combine, seed=seed, threads=threads)
    chosen = _check(job, items, workers, retries, quarantine, timeout_seconds, engine)
    count = chosen.count(workers)
    combined: Combined = Combined(_tell_of(combine))
    failed: Failure | None = None
    pool = chosen.start(job, count, timeout_seconds)
    done = False
    try:
        with _show(progress, items) as show:
            sharing = Sharing(pool, items, count, retries)
            for settled in sharing.settle():
                for node, value in settled.nodes:
                    combined.put(node, value)
                    sharing.given += 1 << node.level
                for failure in settled.failures:
                    sharing.given += 1
                    if quarantine is not None:
                        quarantine.append(failure)
                        combined.miss(failure.number)
                        continue
                    sharing.stop_reading()  # the tasks before it may fail as well: the first one is raised
                    failed = failure if failed is None or failure.number < failed.number else failed
                show(sharing.given)
        done = True
    finally:
        pool.close(at_once=not done)
    if failed is not None:
        raise failed.as_error() from failed.exception
    result, some = combined.finish()
    if not some:
        raise ParallelError("map_reduce: there is no result to begin with. Give at least one item that can be used.")
    return result


def _map(
    job: MapJob,
    items: Iterable[Any],
    engine: Engine,
    workers: int | str,
    retries: int,
    quarantine: Quarantine | None,
    timeout_seconds: float | None,
    progress: Progress,
) -> Iterator[Any]:
    count = engine.count(workers)
    ordered = Ordered()
    pool = engine.start(job, count, timeout_seconds)
    done = False
    try:
        with _show(progress, items) as show:
            sharing = Sharing(pool, items, count, retries)
            for settled in sharing.settle():
                ordered.put(settled.values)
                ordered.put((failure.number, failure) for failure in settled.failures)
                del settled
                for value in ordered.drain():
                    if not isinstance(value, Failure):
                        yield value
                    elif quarantine is None:
                        raise value.as_error() from value.exception
                    else:
                        quarantine.append(value)
                    value = None
                sharing.given = ordered.next
                show(sharing.given)
        done = True
    finally:
        pool.close(at_once=not done)


def _check(
    job: MapJob,
    items: object,
    workers: object,
    retries: object,
    quarantine: object,
    timeout_seconds: object,
    engine: str | Engine,
) -> Engine:
    """Check the arguments; return the engine."""
    if not callable(job.function):
        raise ParallelError(f"function = {job.function!r}: not callable. Give a function of one item.")
    if not isinstance(items, Iterable):
        raise ParallelError(f"items = {items!r}: not iterable. Give a list, a generator, a dataset of rows.")
    if workers != "auto" and not (_whole(workers) and int(workers) >= 1):  # type: ignore[call-overload]
        raise ParallelError(f"workers = {workers!r}: allowed are whole numbers from 1, or 'auto' for one per core.")
    if not (_whole(job.threads) and job.threads >= 1):
        raise ParallelError(f"threads = {job.threads!r}: allowed are whole numbers from 1.")
    if not (_whole(retries) and int(retries) >= 0):  # type: ignore[call-overload]
        raise ParallelError(f"retries = {retries!r}: allowed are whole numbers from 0.")
    if job.seed is not None and not _whole(job.seed):
        raise ParallelError(f"seed = {job.seed!r}: allowed are whole numbers, or None.")
    if quarantine is not None and not hasattr(quarantine, "append"):
        raise ParallelError(
            f"quarantine = {quarantine!r}: allowed is what has an append method, such as a list, or None."
        )
    if timeout_seconds is not None and not (isinstance(timeout_seconds, int | float) and timeout_seconds > 0):
        raise ParallelError(f"timeout_seconds = {timeout_seconds!r}: allowed are numbers above 0, or None.")
    return find_engine(engine)


def _tell_of(combine: Callable[[Result, Result], Result]) -> Callable[[Result, Result], Result]:
    """`combine` in the caller's process: its errors are reported as those of a worker."""

    def combine_here(left: Result, right: Result) -> Result:
        try:
            return combine(left, right)
        except Exception as error:
            fault = describe(-1, error)
            raise fail_to_combine(fault.error, fault.trace) from error

    return combine_here


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def find_engine(engine: str | Engine) -> Engine:
    """The engine of a name, or the one given."""
    if engine == "processes":
        from unisono.parallel.local_processes import Processes

        return Processes()
    if engine == "ray":
        from unisono.parallel.ray_actors import Ray

        return Ray()
    if isinstance(engine, str) or not hasattr(engine, "start"):
        raise ParallelError(f"engine = {engine!r}: allowed are 'processes', 'ray', or parallel.Ray(…).")
    return engine


def _show(progress: Progress, items: Iterable[Any]) -> AbstractContextManager[Callable[[int], None]]:
    """The function that receives the number of finished items."""
    total = len(items) if isinstance(items, Sized) else None
    if callable(progress):
        return nullcontext(lambda done: progress(done, total))
    if progress is False or (progress is None and not is_terminal(sys.stderr)):
        return nullcontext(lambda done: None)
    from unisono.parallel.bar import Bar

    return Bar(total)
