"""This process's connection to a Ray cluster: made when a call needs it, closed when the last call has ended.

Owns the connection, the authentication token, and a cluster on this host where there is no other. A connection that
the user has made is used unchanged, and is not closed.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from unisono.errors import ParallelError

OLDEST = (2, 54)
"""The oldest version of Ray that is allowed: it authenticates by token."""

HASH_SEED = "PYTHONHASHSEED"
"""If it is not set, each Python process has its own order of strings in sets."""


class Connection:
    """Counts the calls that use it.

    seeded: whether the cluster's processes have the hash seed already; giving it to each actor costs it a second.
    """

    seeded = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours = False
        self._before: dict[str, str | None] = {}

    def open(self, address: str | None, token: str | None, workers: int) -> None:
        """Connect if there is no connection yet."""
        with self._lock:
            ray = import_ray() if "ray" in sys.modules else None
            if ray is None or not ray.is_initialized():
                self._connect(address, token, workers)
                self._ours = True
            self._users += 1

    def close(self) -> None:
        """Disconnect if no other call needs the connection."""
        with self._lock:
            self._users -= 1
            if self._ours and not self._users:
                self._ours = self.seeded = False
                import_ray().shutdown()
                self._present(self._before)

    def _connect(self, address: str | None, token: str | None, workers: int) -> None:
        wanted: dict[str, str | None] = {}
        if token is not None:
            wanted = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        elif address is None:
            wanted = {"RAY_AUTH_MODE": "token"}
            if not (
                os.environ.get("RAY_AUTH_TOKEN")
                or os.environ.get("RAY_AUTH_TOKEN_PATH")
                or (Path.home() / ".ray" / "auth_token").exists()
            ):
                wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        if address is None:
            wanted |= {"RAY_USAGE_STATS_ENABLED": "0", HASH_SEED: os.environ.get(HASH_SEED, "0")}
        self._before = {name: os.environ.get(name) for name in wanted}
        self._present(wanted)
        ray = import_ray()
        local = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
        try:
            ray.init(address=address or "local", logging_level="WARNING", **local)
        except Exception as error:
            self._present(self._before)
            told = (
                "no Ray cluster could be started here" if address is None else f"address = {address!r}: no connection"
            )
            raise ParallelError(
                f"parallel.Ray: {told}: {error}. Check the address, that the cluster runs the same versions of Python "
                "and Ray, and its token (token = …, or RAY_AUTH_TOKEN)."
            ) from error
        self.seeded = address is None

    def _present(self, variables: dict[str, str | None]) -> None:
        """Set variables, and let Ray read them again if it has read them before."""
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if variables and "ray" in sys.modules:
            raylet: Any = import_module("ray._raylet")  # as `ray.init` does; there is no public way
            raylet.Config.initialize("")
            raylet.AuthenticationTokenLoader.instance().reset_cache()


connection = Connection()


def is_open() -> bool:
    """Whether this process is connected to a cluster."""
    return "ray" in sys.modules and bool(import_ray().is_initialized())


def import_ray() -> Any:
    """Ray, if it is installed and new enough."""
    try:
        import ray
    except ImportError as error:
        raise ParallelError("engine 'ray': Ray is not installed. Do: pip install 'unisono[ray]'") from error
    version = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if version < OLDEST:
        raise ParallelError(
            f"engine 'ray': Ray {ray.__version__} is installed; allowed are versions from {OLDEST[0]}.{OLDEST[1]}, "
            "which authenticate by token. Do: pip install --upgrade 'unisono[ray]'"
        )
    return ray
