"""Streams: data of unknown length that is read from its beginning, in one order.

Every worker reads the same stream and keeps the samples of the present step and the one before: nothing travels between
workers, and shares may move. Sample i is the i-th that the stream gives; the generators are seeded before each from
(seed, i). If the stream has a state (`state_dict`, `load_state_dict`), its state after each step goes into the run's
commits and checkpoints, so a resumed run reads nothing again. A state that does not lead to the same samples is not
used: the stream is read from its beginning.

Owns the reading, the states, and the checks of both. The checks run in a process of their own, so that they do not
advance the stream here. `order.py` numbers the steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from torch import Tensor

from unisono.data.columns import hash_tensors
from unisono.data.items import Collate, check_collated, name_values, one_thread, stack
from unisono.determinism import keys
from unisono.errors import DataError
from unisono.processes.forking import describe_end, end_with_parent, fork

PROBED = 16  # samples that are read twice, to check that they are the same
CHECKED = 4  # samples after a state that check it: a shuffle buffer's state may not lead to the same ones
KEPT_STATES = 4
PATIENCE_SECONDS = 600
MOST_STATE_BYTES = 32 * 1024  # it is a part of every commit


class SampleStream:
    """The first `samples` items of an iterable, as a `Source` in their own order.

    samples_per_step: the global batch size; its state is remembered after so many.
    collate: as in `Items`. has_state: whether it has one.
    """

    padded = True
    prefetchable = False

    def __init__(self, data: Any, seed: int, collate: Collate | None, *, samples: int, samples_per_step: int) -> None:
        if iter(data) is data:
            raise DataError(
                f"{type(data).__name__} can be read once only, so no worker could read it again after a loss. Give an "
                "object whose __iter__ begins anew, such as a class with a generator function __iter__."
            )
        self._data = data
        self._seed = seed
        self._collate = collate
        self._samples_per_step = samples_per_step
        self.lengths = np.broadcast_to(np.int32(1), samples)
        self.left_out: dict[str, None] = {}
        self._window: dict[int, Any] = {}
        self._states: dict[int, Any] = {}
        self.has_state = hasattr(data, "state_dict") and hasattr(data, "load_state_dict")
        self._checks = self._start_checks()
        told = self._ask(0, None)
        self.left_out = dict.fromkeys(told["left_out"])
        self.sha256 = str(told["sha256"])
        self._iterator: Iterator[Any] = iter(data)
        self._position = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0, repeats: np.ndarray | None = None) -> dict[str, Tensor]:
        """Read on to the last of `samples`, if it has not been read, and collate them.

        Raises:
            DataError: the stream ends before, or an item cannot be used.
        """
        wanted = samples.tolist()
        with one_thread():
            if min(wanted) not in self._window and min(wanted) < self._position:
                known = [position for position in self._states if position <= min(wanted)]
                self._begin(max(known, default=0))
            while self._position <= max(wanted):
                self._read()
            keys.seed_all(keys.key(self._seed, "collate", *wanted[:1]))
            return self._put_together([self._window[sample] for sample in wanted])

    def go_to(self, step: int, told: Any) -> bool:
        """Continue after `step` steps from what `state_at` returned for them; None: read from the beginning.

        Returns whether nothing has to be read again.
        """
        position = step * self._samples_per_step
        self._states = {}
        state = None if told is None else told["state"]
        if state is not None and self._ask(position, state)["next"] == told["next"]:
            self._states[position] = state
        self._begin(position if position in self._states else 0)
        return self._position == position

    def state_at(self, step: int) -> Any:
        """The stream's state after `step` steps, and a hash of what follows, as plain JSON; None: it has no state."""
        if not self.has_state:
            return None
        position = step * self._samples_per_step
        while self._position < position:
            self._read()
        if position not in self._states:
            self._remember()
        following = range(position, min(position + CHECKED, len(self)))
        while self._position < following.stop:
            self._read()
        return {"state": self._states[position], "next": self._hash([self._window[number] for number in following])}

    def _begin(self, position: int) -> None:
        """Read from `position` on, if its state is remembered; or from 0."""
        state = self._states.get(position)
        if state is not None:
            self._data.load_state_dict(_as_json(state))
        self._window = {}
        self._iterator = iter(self._data)
        self._position = position

    def _remember(self) -> None:
        state = self._data.state_dict()
        if len(text := json.dumps(state)) > MOST_STATE_BYTES:
            raise DataError(
                f"the stream's state has {len(text):,} bytes as JSON; allowed are {MOST_STATE_BYTES:,}, since every "
                "step's commit holds it. Keep positions in state_dict() rather than samples."
            )
        self._states[self._position] = state
        for old in sorted(self._states)[:-KEPT_STATES]:
            del self._states[old]

    def _read(self) -> None:
        position, each = self._position, self._samples_per_step
        if position % each == 0:
            if self.has_state and position not in self._states:
                self._remember()
            self._window = {number: item for number, item in self._window.items() if number >= position - each}
        keys.seed_all(keys.key(self._seed, "stream", position))
        try:
            self._window[position] = next(self._iterator)
        except StopIteration:
            raise DataError(
                f"the stream ended after {position:,} samples; max_steps × samples_per_step are {len(self):,}. Set "
                f"train.max_steps = {position // each} at most, or have __iter__ begin again when it comes to the end."
            ) from None
        self._position += 1

    def _put_together(self, items: list[Any]) -> dict[str, Tensor]:
        if self._collate is not None:
            return check_collated(self._collate(items))
        return stack([name_values(item, self.left_out) for item in items])

    def _hash(self, items: list[Any]) -> str:
        return hash_tensors(self._put_together(items)) if items else ""

    # In a process of its own: a copy of this one from before anything was read here. A later copy would lack
    # the threads that a library may have started for the stream meanwhile, and wait for them.

    def _start_checks(self) -> Connection:
        """Start the process; return the connection through which it is asked. It ends when that is closed."""
        mine, theirs = Pipe()
        fork(self._answer_checks, (mine, theirs, os.getpid()), "stream checks", hold=(signal.SIGINT, signal.SIGTERM))
        theirs.close()
        return mine

    def _ask(self, position: int, state: Any) -> dict[str, Any]:
        """Have the stream compared with itself (state None), or read on from the state that it had at `position`."""
        try:
            self._checks.send_bytes(json.dumps([position, state]).encode())
            if not self._checks.poll(PATIENCE_SECONDS):
                raise DataError(
                    f"the stream gave nothing for {PATIENCE_SECONDS} s in a forked process. If it was read "
                    'here before, its threads are not in forked ones: use launcher="spawn", or make it anew.'
                )
            told: dict[str, Any] = json.loads(self._checks.recv_bytes())
        except (EOFError, ConnectionError):
            raise DataError("the process that reads the stream to check it has ended. Start again.") from None
        if "error" in told:
            raise DataError(told["error"])
        return told

    def _answer_checks(self, parents: Connection, mine: Connection, parent: int) -> None:
        """Answer, each time in a copy of this process, so that the stream here stays as it is."""
        end_with_parent(parent)
        parents.close()
        while True:
            try:
                position, state = json.loads(mine.recv_bytes())
            except (EOFError, ConnectionError):
                os._exit(0)  # no clean-up of what was inherited
            child = fork(self._answer, (mine, position, state, os.getpid()), "stream check")
            child.join()
            if child.exitcode:
                error = f"a process that read the stream {describe_end(child.exitcode)}."
                mine.send_bytes(json.dumps({"error": error}).encode())

    def _answer(self, connection: Connection, position: int, state: Any, parent: int) -> None:
        end_with_parent(parent)
        told: dict[str, Any]
        try:
            told = self._compare() if state is None else {"next": self._hash_next(position, _as_json(state))}
        except DataError as error:
            told = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            told = {"error": f"the stream raised {type(error).__name__}: {error}"}
        connection.send_bytes(json.dumps(told).encode())
        os._exit(0)

    def _compare(self) -> dict[str, Any]:
        """Read the first samples twice."""
        first = self._hash_first()
        if not first:
            raise DataError("the stream has no samples. Give at least one.")
        if first != self._hash_first():
            raise DataError(
                "the stream gave other samples when it was read a second time, so workers would not see the same. Let "
                "__iter__ depend on nothing that it has left behind; random choices may come from the global "
                "generators of torch, NumPy and Python, which are seeded before each sample."
            )
        sha256 = hashlib.sha256("".join(first).encode()).hexdigest()
        return {"sha256": sha256, "left_out": list(self.left_out)}

    def _hash_first(self) -> list[str]:
        """The hashes of the first samples, fewer where the stream ends; its state after them has to be plain."""
        iterator, hashes = iter(self._data), []
        for position in range(min(PROBED, len(self))):
            keys.seed_all(keys.key(self._seed, "stream", position))
            try:
                item = next(iterator)
            except StopIteration:
                break
            hashes.append(self._hash([item]))
        if self.has_state:
            _as_json(self._data.state_dict())
        return hashes

    def _hash_next(self, position: int, state: Any) -> str:
        """The hash of what follows a state."""
        self._states = {position: state}
        self._begin(position)
        following = range(position, min(position + CHECKED, len(self)))
        for _ in following:
            self._read()
        return self._hash([self._window[number] for number in following])


def _as_json(state: Any) -> Any:
    """A state as it is after it was written to a checkpoint and read back.

    Raises:
        DataError: it would be another state.
    """
    try:
        found = json.loads(json.dumps(state))
        fault = "" if found == state else "it holds tuples, or keys that are no strings"
    except (TypeError, ValueError) as error:
        found, fault = None, str(error)
    if fault:
        raise DataError(
            f"the stream's state_dict() is not plain JSON: {fault}. Allowed are numbers, strings, lists, and mappings "
            "with strings as keys: a checkpoint holds nothing that would have to be unpickled."
        )
    return found
