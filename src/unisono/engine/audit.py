"""A check for silent corruption: every n-th step, another worker computes a microbatch again, and bits are compared.

A contribution is a pure function, so two workers that differ prove that a processor, its memory or a library has
failed; a third computation shows which worker it was. Only a deterministic trainer can do this. A single worker
computes the microbatch twice.

Owns the choice of the microbatch, the comparison and the verdict. The step is not committed where bits differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from unisono.data.order import Order, Step
from unisono.determinism import keys
from unisono.engine.contribution import Contributes, Contribution, Contributor
from unisono.engine.trace import digest
from unisono.errors import CorruptionError, LostPeerError
from unisono.exchange.protocol import Exchange

Digests = Mapping[str, str]
"""Parameter (or "loss") → digest of its bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """Two workers computed different bits for microbatch `microbatch` of step `step`, which is not committed.

    workers: those that are suspected. parameters: names of what differs.
    """

    step: int
    microbatch: int
    workers: list[int]
    parameters: list[str]


class Audit:
    """A contributor that keeps the digests to be audited, and the audit itself.

    inner: the contributor for training. judge: the one that computes again. take: loads a microbatch. tell: gets the
    event of a difference.
    """

    def __init__(
        self,
        inner: Contributes,
        judge: Contributor,
        exchange: Exchange,
        order: Order,
        *,
        take: Callable[[Step, int], dict[str, Tensor]],
        tell: Callable[[Disagreement], None],
        every: int,
    ) -> None:
        self._inner = inner
        self._judge = judge
        self._exchange = exchange
        self._order = order
        self._take = take
        self._tell = tell
        self._every = every
        self._digests: Digests = {}

    def contribute(self, step: int, number: int, microbatch: dict[str, Tensor]) -> Contribution:
        """Compute a contribution, and keep its digests if it will be audited."""
        if not self._is_due(step) or number != self._choose(step):
            return self._inner.contribute(step, number, microbatch)
        offload = self._exchange.offload
        with offload.paused() if offload else nullcontext():  # an audited worker computes every bit itself
            found = self._inner.contribute(step, number, microbatch)
        self._digests = self._digest(found)
        return found

    def _is_due(self, step: int) -> bool:
        return bool(self._every) and (step + 1) % self._every == 0

    def _choose(self, step: int) -> int:
        return keys.key(self._judge.seed, "audit", step) % len(self._order.step(step).microbatches)

    def check(self, step: Step, shares: Sequence[range]) -> None:
        """Compare, if this step is audited; every worker calls this.

        Raises:
            CorruptionError: on a worker whose bits were wrong.
            LostPeerError: on the others: the step is not to be committed.
        """
        if not self._is_due(step.number):
            return
        rank, workers, number = self._exchange.rank, self._exchange.workers, self._choose(step.number)
        owner = next(rank for rank, share in enumerate(shares) if number in share)
        auditor = owner if workers == 1 else (owner + 1 + step.number // self._every % (workers - 1)) % workers
        first = self._digests if rank == owner else {}
        again = self._compute_again(step, number) if rank == auditor else {}
        said = self._share([first, again])
        if said[owner][0] == said[auditor][1]:
            return
        votes = [vote[0] for vote in self._share([self._compute_again(step, number)])]
        suspects, names = find_wrong(
            first=said[owner][0], owner=owner, again=said[auditor][1], auditor=auditor, votes=votes
        )
        if rank == 0:
            self._tell(Disagreement(step=step.number + 1, microbatch=number, workers=suspects, parameters=names))
        told = f"step {step.number + 1}, microbatch {number}: {', '.join(names[:5])}"
        if rank in suspects:
            raise CorruptionError(f"an audit found wrong bits ({told})")
        raise LostPeerError(f"an audit found wrong bits on another worker ({told})")

    def _compute_again(self, step: Step, number: int) -> Digests:
        return self._digest(self._judge.contribute(step.number, number, self._take(step, number)))

    def _digest(self, found: Contribution) -> Digests:
        names = [segment.name for segment in self._judge.replica.space.segments]
        return {"loss": float(found.loss).hex(), **{
            name: digest(part) for name, part in zip(names, found.parts, strict=True)
        }}  # fmt: skip

    def _share(self, mine: list[Digests]) -> list[list[Digests]]:
        return [json.loads(content) for content in self._exchange.gather_bytes(json.dumps(mine).encode())]


def find_wrong(
    *, first: Digests, owner: int, again: Digests, auditor: int, votes: Sequence[Digests]
) -> tuple[list[int], list[str]]:
    """The workers that were wrong, and the names of what differed.

    first: the bits that the owner had computed. again: those of the auditor. votes: those that every worker, by rank,
    computed after they differed. The majority is right; where there is no majority, both are suspected.
    """
    names = [name for name in {**first, **again} if first.get(name) != again.get(name)]
    counted = Counter(json.dumps(vote, sort_keys=True) for vote in votes)
    text, most = counted.most_common(1)[0]
    if 2 * most <= len(votes):
        return sorted({owner, auditor}), names
    truth = json.loads(text)
    wrong = {rank for rank, vote in enumerate(votes) if vote != truth}
    wrong |= {owner} if first != truth else set()
    wrong |= {auditor} if again != truth else set()
    return sorted(wrong), names
