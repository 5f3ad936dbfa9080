"""The purity probe: is a contribution a function of its arguments only?

Computes contributions of two microbatches in the order a, b, b, a and compares bits. State that a model keeps between
calls, and randomness that does not come from the key, show as a difference; so does a model that writes to its own
weights, which all workers of a host read in one place.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from unisono.engine.contribution import Contribution, Contributor
from unisono.engine.replica import same_bits
from unisono.errors import ImpureError


def probe(contributor: Contributor, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise ImpureError, naming the module, if the same microbatch contributes other bits the second time.

    `first` and `second` should differ in shape.
    """
    backend = contributor.replica.backend
    before = backend.remembered()
    weights = {parameter.name: parameter.value.clone() for parameter in backend.parameters()}
    columns = {name: column.clone() for name, column in first.items()}
    a = contributor.contribute(0, 0, first)
    if written := [name for name, column in columns.items() if not same_bits(column, first[name])]:
        raise ImpureError(
            f"the task's loss writes into column {written[0]!r} of its microbatch; it may be needed again, to audit "
            "the step or after a loss. Work on a copy (column.clone()), or use operations that do not end in _. "
            "--allow-impure (allow_impure=True) trains it without the promise of equal bits."
        )
    b = contributor.contribute(0, 1, second)
    b_again = contributor.contribute(0, 1, second)
    a_again = contributor.contribute(0, 0, first)
    for parameter in backend.parameters():
        if not same_bits(parameter.value, weights[parameter.name]):
            raise ImpureError(
                f"the model is not pure: computing a loss changes the weight {parameter.name!r}, which only an update "
                "may do. Keep such changes out of the forward pass (an embedding's max_norm is one). --allow-impure "
                "(allow_impure=True) trains it without the promise of equal bits."
            )
    names = [
        f"{'change of buffer' if segment.group < 0 else 'gradient of'} {segment.name!r} "
        f"in module {segment.name.rpartition('.')[0] or '(root)'!r}"
        for segment in contributor.replica.space.segments
    ]
    differing = _differing(names, a, a_again) or _differing(names, b, b_again)
    if differing:
        changed = [name for name, value in backend.remembered().items() if before.get(name) != value]
        where = f"attribute {', '.join(map(repr, changed[:3]))} changes between calls; " if changed else ""
        raise ImpureError(
            f"the model is not pure: the same microbatch gave another {differing[0]} the second time "
            f"({where}{len(differing)} differ in all). Keep no state outside parameters and registered buffers, "
            "and draw random numbers from "
            "the global generators of torch, NumPy or Python only. --allow-impure (allow_impure=True) trains it "
            "without the promise of equal bits."
        )


def compare_taken(first: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> None:
    """Refuse a dataset that gives other tensors when the same samples are loaded a second time."""
    for name, column in first.items():
        if not same_bits(column, again.get(name)):
            raise ImpureError(
                f"the dataset is not pure: loaded a second time, the same samples gave another {name!r}. Keep no state "
                "in it, and draw random numbers from the global generators of torch, NumPy or Python, which are seeded "
                "for each sample; make a generator of your own from these, in __getitem__. --allow-impure "
                "(allow_impure=True) trains it without the promise of equal bits."
            )


def _differing(names: list[str], one: Contribution, other: Contribution) -> list[str]:
    found = [] if same_bits(one.loss, other.loss) and one.terms == other.terms else ["loss"]
    for name, left, right in zip(names, one.parts, other.parts, strict=True):
        if not same_bits(left, right):
            found.append(name)
    if not same_bits(one.integers, other.integers):
        found.append("change of an integer buffer")
    # the loss differs with almost any fault; a parameter names a module, so it comes first
    return found[1:] + found[:1] if found and found[0] == "loss" else found
