"""The state that a group of workers goes on from: each worker sends its own to all, and different ones are refused.

Every worker reads its own run folder, and the folders of several hosts may differ. Owns the comparison; the caller
finds the state.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from unisono.errors import LostPeerError, RunFolderError
from unisono.exchange.protocol import Exchange

COMMIT = "commit "


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The state that one worker would go on from.

    step: steps done. state: distinguishes states of the same step: "" for the beginning, the digest of a checkpoint,
    `COMMIT` and its number of a snapshot. The beginning needs none: the fingerprints, which workers compare before,
    contain the first weights. place: where it was found, in words. faults: what was wrong with newer checkpoints.
    """

    step: int
    state: str
    place: str
    faults: list[str] = field(default_factory=list)
    host: str = field(default_factory=socket.gethostname)


def agree(mine: Origin, exchange: Exchange) -> list[Origin]:
    """Send this worker's state to all workers; return those of all, by rank. Every worker of a group calls this; when
    it returns on any worker, all have read their folders.

    Raises:
        RunFolderError, LostPeerError: as `compare` says, on every worker.
    """
    content = json.dumps(dataclasses.asdict(mine)).encode()
    everyone = [Origin(**json.loads(found)) for found in exchange.gather_bytes(content)]
    compare(everyone)
    return everyone


def compare(everyone: Sequence[Origin]) -> None:
    """Refuse workers that would begin from different states: their contributions would be added without an error.

    Raises:
        RunFolderError: names the workers and their states.
        LostPeerError: they see different commits of a snapshot, so one of them belongs to another group.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for rank, one in enumerate(everyone):
        groups.setdefault((one.step, one.state), []).append(rank)
    if len(groups) == 1:
        return
    lines = [_describe([(rank, everyone[rank]) for rank in ranks]) for ranks in groups.values()]
    if any(one.state.startswith(COMMIT) for one in everyone):
        raise LostPeerError("the workers do not see the same commit:\n  " + "\n  ".join(lines))
    raise RunFolderError(
        "the workers would go on from different states, so their steps do not belong together:\n  "
        + "\n  ".join(lines)
        + "\nLet --run-folder lie on storage that all hosts share, or copy the newest checkpoint to every host; or "
        "begin anew, in a folder that is on none of them."
    )


def _describe(group: Sequence[tuple[int, Origin]]) -> str:
    """One line for workers with the same state."""
    ranks = ", ".join(str(rank) for rank, _ in group)
    hosts = ", ".join(dict.fromkeys(one.host for _, one in group))
    first = group[0][1]
    state = f" ({first.state if first.state.startswith(COMMIT) else 'content ' + first.state[:12]})" * bool(first.state)
    return f"worker{'s' * (len(group) > 1)} {ranks} on {hosts}: after step {first.step}{state}, {first.place}"
