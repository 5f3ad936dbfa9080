"""A batch at a worker: it receives items, sends results back one by one, and then sends the batch's outcome.

Owns the handling of values that cannot be sent, in either direction. Does not depend on how they are sent.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import replace
from typing import Any

from unisono.parallel.item_batches import ItemBatch, ItemFault, MapJob, Outcome, describe, run
from unisono.parallel.wire import Unreadable, travels


def pack_items(batch: ItemBatch, add: Callable[[Any], None]) -> tuple[list[int], list[ItemFault]]:
    """Give a batch's items to `add`; return the numbers of those that it took, and faults for the others."""
    numbers: list[int] = []
    faults: list[ItemFault] = []
    for number, item in zip(batch.numbers, batch.items, strict=True):
        try:
            add(item)
        except Exception as error:  # noqa: BLE001 - a user's class; reported with its item
            faults.append(describe(number, error))
        else:
            numbers.append(number)
    return numbers, faults


def perform(
    job: MapJob, batch: ItemBatch, board: MutableSequence[int] | memoryview, send: Callable[[Any], None]
) -> None:
    """Run a batch at a worker.

    `send` takes one result at a time, or raises; at the end it takes the outcome, with places for the results.
    """
    numbers, items, faults = _sort(batch.numbers, batch.items, "its item")
    outcome = run(job, ItemBatch(id=batch.id, numbers=numbers, items=items), board, send)
    outcome.faults = [_lighten(fault) for fault in faults + outcome.faults]
    if outcome.broken:
        outcome.broken = _lighten(outcome.broken)
        outcome.nodes.clear()
    sent = []
    for node, value in outcome.nodes:
        try:
            send(value)
        except Exception as error:  # noqa: BLE001 - a user's class
            outcome.faults.append(_tell(node.index << node.level, f"its result cannot be sent: {error}"))
        else:
            sent.append((node, None))
    outcome.nodes = sent
    send(outcome)


def restore(values: Sequence[Any]) -> Outcome:
    """The outcome of a batch from all that `perform` has sent."""
    *results, outcome = values
    if isinstance(outcome, Unreadable):
        raise outcome.error
    if outcome.nodes:
        places = {node.index << node.level: node for node, _ in outcome.nodes}
        firsts, values, faults = _sort(list(places), results, "its result")
        outcome.nodes = [(places[first], value) for first, value in zip(firsts, values, strict=True)]
    else:
        outcome.done, outcome.values, faults = _sort(outcome.done, results, "its result")
    outcome.faults += faults
    return outcome


def _sort(numbers: Sequence[int], values: Sequence[Any], what: str) -> tuple[list[int], list[Any], list[ItemFault]]:
    """Values that could be rebuilt, and faults for the others."""
    if not any(isinstance(value, Unreadable) for value in values):
        return list(numbers), list(values), []
    pairs = list(zip(numbers, values, strict=True))
    faults = [
        _tell(number, f"{what} was sent, but cannot be put together again: {value.error!r}")
        for number, value in pairs
        if isinstance(value, Unreadable)
    ]
    whole = [(number, value) for number, value in pairs if not isinstance(value, Unreadable)]
    return [number for number, _ in whole], [value for _, value in whole], faults


def _tell(number: int, told: str) -> ItemFault:
    return ItemFault(number=number, error=told, trace=told)


def _lighten(fault: ItemFault) -> ItemFault:
    """The fault without its exception, if that cannot be sent."""
    return fault if fault.exception is None or travels(fault.exception) else replace(fault, exception=None)
