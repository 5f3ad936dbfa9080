"""Limits of the system: the one on open files is raised where workers need more of them, others are named.

Owns how many files workers need, and the words for an error that a limit has caused.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unisono.errors import RecipeError, WorkerError

FILES_EACH = 7  # that a worker, or the process that starts workers, has open for each worker, at most
FILES_BESIDE = 64  # for all else that unisono opens: memory, datasets, the run folder
NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "could not create a primitive")


@contextmanager
def within_limits(workers: int) -> Iterator[None]:
    """Within, `allow_files` is in force; afterwards the limit is as before.

    Raises:
        RecipeError: the system allows fewer files.
        WorkerError: what is done within needs more than another limit allows; says which.
    """
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if workers > 1:
            allow_files(workers)
        yield
    except (OSError, MemoryError) as error:
        if why := explain(error):
            raise WorkerError(why) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def allow_files(workers: int, *, refuse: bool = True) -> None:
    """Raise this process's limit on open files, and that of processes that it will start, to what so many workers of
    one host need.

    Raises:
        RecipeError: the system allows fewer; where not `refuse`, the limit is raised as far as it may be.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        mine = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:  # no /proc, or no file is left to read it
        mine = FILES_BESIDE
    needed = mine + FILES_BESIDE + FILES_EACH * workers
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        if refuse:
            raise RecipeError(
                f"`--workers {workers}`: each process needs up to {needed} open files, and the system allows {hard} "
                f"(ulimit -Hn). Use {max(1, (hard - mine - FILES_BESIDE) // FILES_EACH)} workers at most, or raise the "
                "limit (ulimit -n; LimitNOFILE of systemd; --ulimit nofile of Docker)."
            )
        needed = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def explain(error: BaseException) -> str:
    """Which limit has caused an error, what it allows, and what to do; "": none that is known."""
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    if number == errno.EMFILE:
        allowed = _name(resource.RLIMIT_NOFILE)
        return f"too many open files: a process may have {allowed} (ulimit -n). Raise it, or use fewer workers."
    if number == errno.ENFILE:
        return "too many open files in the whole system (sysctl fs.file-max). Close some, or use fewer workers."
    if number == errno.EAGAIN or any(sign in text for sign in NO_THREAD):
        allowed = _name(resource.RLIMIT_NPROC)
        return (
            f"no further process or thread can be started: the system allows this user {allowed} (ulimit -u), and a "
            "container may allow fewer (pids.max of its control group). Raise it, or use fewer workers."
        )
    if number == errno.ENOMEM or isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        allowed = _name(resource.RLIMIT_AS)
        return (
            f"no memory could be allocated: the system allows a process {allowed} bytes of address space (ulimit -v), "
            f"and this one has {_mapped_bytes()}. Raise the limit, or use smaller microbatches, or fewer workers."
        )
    return ""


def _name(limit: int) -> str:
    allowed = resource.getrlimit(limit)[0]
    return "any number of" if allowed == resource.RLIM_INFINITY else str(allowed)


def _mapped_bytes() -> int | str:
    """The address space of this process."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return "an unknown number"
