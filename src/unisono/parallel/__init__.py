"""Any computation, cut into tasks and run by many workers, with the result that one worker gives.

`map` and `map_reduce` run a function over items; `add` and `matmul` use them. docs/parallel.md is the guide.
"""

from typing import Any

from unisono.errors import ParallelError, TaskError
from unisono.parallel.algebra import add, matmul
from unisono.parallel.calls import map, map_reduce
from unisono.parallel.item_batches import key
from unisono.parallel.sharing import Failure

__all__ = ["Failure", "ParallelError", "Ray", "TaskError", "add", "key", "map", "map_reduce", "matmul"]


def __getattr__(name: str) -> Any:
    if name == "Ray":
        from unisono.parallel.ray_actors import Ray

        return Ray
    raise AttributeError(f"module 'unisono.parallel' has no attribute {name!r}")
