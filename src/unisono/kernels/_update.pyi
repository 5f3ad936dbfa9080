from array import array

def mean(n: int, nodes: tuple[tuple[int, int], ...], weight: float, target: int, squares: int, /) -> None: ...
def adam(
    n: int,
    nodes: tuple[tuple[int, int], ...],
    weight: float,
    factor: float,
    squares: int,
    old: tuple[int, ...],
    new: tuple[int, ...],
    pieces: array[int],
    settings: tuple[tuple[float, float, float], ...],
    beta1: float,
    beta2: float,
    epsilon: float,
    decoupled: bool,
    past_caches: bool,
    /,
) -> None: ...
