"""A trial before the first step: what happens at the end of an epoch or of a run happens once, on a few samples.

Owns what is tried, and the messages. A fault that hours would hide for hours shows in the first second. Nothing is
kept: the replica is left as it was, and every later computation seeds its generators from its own key.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unisono.backends.backend import Backend, Measurement
from unisono.config.recipe import Recipe
from unisono.data.source import Source
from unisono.determinism import keys
from unisono.engine.contribution import Contributor
from unisono.engine.evaluation import check_result
from unisono.errors import ContractError, RecipeError, RunFolderError, UserError
from unisono.tasks.metrics import summarise
from unisono.tasks.run_inputs import RunInputs
from unisono.tasks.task import Task

SAMPLES = 3
_SHOWN = 5
"""Names in a message."""


def try_loss(contributor: Contributor, small: Mapping[str, Tensor], double: Mapping[str, Tensor]) -> list[str]:
    """Contribute some samples, and the same samples twice in one microbatch; return warnings.

    Raises:
        ContractError: the loss depends on no parameter, so nothing would be learned.
    """
    names = [segment.name for segment in contributor.replica.space.parameters]
    one, two = contributor.contribute(0, 0, small), contributor.contribute(0, 0, double)
    gradients = one.parts[: len(names)]
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise ContractError(
            "the loss depends on no trainable parameter of the module that build() returned, so no step would change "
            "anything. Compute it with that module, outside torch.no_grad(), and without .detach(), .item() or "
            ".numpy() on the way; keep lists of layers in nn.ModuleList, so that they are part of it."
        )
    warnings = []
    if without := [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]:
        more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
        warnings.append(
            f"{len(without)} of {len(names)} trainable parameters have no part in the loss of the first samples, and "
            f"stay as they are where that is so for all samples: {', '.join(without[:_SHOWN])}{more}."
        )
    if not any(bool(_values(gradient).any()) for gradient in reached):
        warnings.append("the gradient of the first samples is 0 for every parameter: nothing may be learned.")
    loss, again = float(one.loss), float(two.loss)
    if two.terms == 2 * one.terms and abs(loss) > 1e-6 and 0.7 < again / loss < 1.4:
        warnings.append(
            f"the task's loss seems to be a mean: twice the samples have the loss {again:.4g}, not twice {loss:.4g}, "
            f"but {two.terms} terms instead of {one.terms}. It is divided by the terms of a step once more, so the "
            'gradient is too small. Return the sum (reduction="sum") and the number of its terms.'
        )
    return warnings


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def try_scores(backend: Backend, inputs: RunInputs, recipe: Recipe, device: torch.device) -> list[str]:
    """Measure and summarise a few samples, and look up the metric by which evaluations are compared; return warnings.

    Raises:
        ContractError: a result cannot be used.
        RecipeError: there is no such metric, or its direction is not known.
    """
    task, warnings = inputs.task, []
    source = inputs.validation or inputs.test
    if source is not None:
        results = _call(backend, task.measure, source, device)
        if not results:
            raise ContractError(
                'the task\'s measure returned nothing. Return at least {"loss": one number per sample}.'
            )
        metrics = task.metrics()
        spent = {name for metric in metrics for name in metric.inputs} - {"loss"}
        known = [name for name in summarise(results) if name not in spent] + [metric.name for metric in metrics]
        _check_metric(inputs, recipe, known)
        for metric in metrics:
            try:
                summarise(results, [metric])
            except ContractError:
                raise
            except Exception as error:  # noqa: BLE001 - a user's code; some metrics have no value for so few samples
                warnings.append(
                    f"the metric {metric.name!r} fails on the first {min(SAMPLES, len(source))} samples: "
                    f"{type(error).__name__}: {error}. If it fails on all samples, so will the evaluation."
                )
    return warnings


def try_prediction(backend: Backend, inputs: RunInputs, device: torch.device) -> list[str]:
    """Predict for a few samples, if the task can; return warnings."""
    task = inputs.task
    if type(task).predict is not Task.predict:
        try:
            _call(backend, task.predict, inputs.train, device, without=task.targets)
        except Exception as error:  # noqa: BLE001 - a user's code; the run itself does not need it
            return [
                f"{type(task).__name__}.predict fails on the first samples, so unisono predict would: "
                f"{type(error).__name__}: {error}"
            ]
    return []


def _call(
    backend: Backend, measure: Measurement, source: Source, device: torch.device, without: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The checked results of a task's method for the first samples of a source."""
    samples = np.arange(min(SAMPLES, len(source)))
    taken = {name: column.to(device) for name, column in source.take(samples).items() if name not in without}
    key = keys.key(0, "trial")
    keys.seed_all(key)
    found = {}
    with backend.measuring(measure) as compute:
        for name, values in compute(taken, key).items():
            checked = check_result(name, values, len(samples)).detach().cpu()
            found[name] = checked.to(torch.float64 if checked.is_floating_point() else torch.int64).numpy()
    return found


def _check_metric(inputs: RunInputs, recipe: Recipe, known: list[str]) -> None:
    chosen = recipe.evaluate
    used = inputs.validation is not None and (chosen.patience or chosen.keep_best)
    if chosen.metric in known or not (used or chosen.metric != type(chosen).model_fields["metric"].default):
        return
    raise RecipeError(
        f"'evaluate.metric' = {chosen.metric!r}: measured are {', '.join(dict.fromkeys(known))}. Name one of them."
    )


def try_export(inputs: RunInputs) -> None:
    """Write what the model folder holds beside the weights to a folder that is then removed.

    Raises:
        ContractError: the task's `export` fails. Any other error would count as the loss of a worker, and be repeated.
    """
    with tempfile.TemporaryDirectory(prefix="unisono-trial-") as folder:
        try:
            inputs.export(Path(folder))
        except UserError:
            raise
        except Exception as error:
            raise ContractError(
                f"{type(inputs.task).__name__}.export fails, so the run would end without a model: "
                f"{type(error).__name__}: {error}. Mend it; it is given a folder that exists."
            ) from error


def check_folder(folder: Path, *, model_bytes: int, checkpoint_bytes: int) -> list[str]:
    """Make the run folder; refuse one that cannot be written, or whose disk has no room for the model. Return a warning
    where it has none for a checkpoint beside it.

    Raises:
        RunFolderError: says which.
    """
    other = "give another one with --run-folder (run=…)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFolderError(
            f"the run folder {str(folder)!r} cannot be written: {error.strerror or error}. Mend it, or {other}."
        ) from None
    free = shutil.disk_usage(folder).free
    told = f"{str(folder)!r}: {free / 1e6:,.1f} MB are free"
    if free < model_bytes:
        raise RunFolderError(f"{told}, and the model needs {model_bytes / 1e6:,.1f} MB. Make room, or {other}.")
    if free < model_bytes + checkpoint_bytes:
        return [f"{told}, and a checkpoint with the model needs {(model_bytes + checkpoint_bytes) / 1e6:,.1f} MB."]
    return []
