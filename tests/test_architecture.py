"""The house rules: who may import whom, how large a file may grow, what may not be used, and that the map is true."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unisono"

LAYERS = (  # from top to bottom; imports point downwards, or sideways within a layer but never in a circle
    ("__init__", "__main__", "cli"),
    ("api",),
    ("runtime",),
    ("tracking",),
    ("engine",),
    ("backends",),
    ("tasks",),
    ("data", "kernels", "exchange", "parallel", "storage"),
    ("processes", "determinism", "config"),
    ("errors",),
)
APART = {("data", "exchange"), ("exchange", "data"), ("kernels", "data"), ("kernels", "exchange"), ("parallel", "data")}
OPTIONAL = {
    "transformers", "pandas", "polars", "ray", "jax", "matplotlib", "ftfy", "datasets", "fsspec", "s3fs",
    "phonenumbers", "tensorboard", "wandb", "mlflow",
}  # fmt: skip
FORBIDDEN_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "manager", "misc", "base"}
MOST_ENTRIES = 20
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
PICKLES = {
    # between a process and its own children, over a socket or in a memory file without a name: see the test below
    "unisono.parallel.wire": {"pickle"},
    # Ray's own serialisation, through Ray's own store: whoever uses a Ray cluster has it run what they send
    "unisono.parallel.ray_actors": {"cloudpickle"},
}
PICKLING_CALLS = re.compile(
    r"torch\.(load|save)\b|_object(_list|s)?\(|\bsend_object|\ballow_pickle\s*=\s*True|multiprocessing\.Queue|\bSimpleQueue\b"
)
LINES_PER_FILE = 400
LINES_PER_FUNCTION = 60

MODULES = sorted(SOURCE.rglob("*.py"))


def name_module(path: Path) -> str:
    """`src/unisono/engine/tree.py` → `unisono.determinism.tree`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


NAMES = {name_module(path) for path in MODULES}


def find_unit(module: str) -> str:
    """The file or folder right under `src/unisono` that a module lies in."""
    return module.split(".")[1] if "." in module else "__init__"


def find_layer(unit: str) -> int:
    return next(number for number, units in enumerate(LAYERS) if unit in units)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, wherever; `from unisono import x` is `unisono.x` where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in NAMES else module


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(parse(path)) if name in NAMES or name == "unisono"}


def test_every_module_has_its_layer() -> None:
    units = {find_unit(name_module(path)) for path in MODULES}
    assert units == {unit for layer in LAYERS for unit in layer}
    assert len([path for path in SOURCE.iterdir() if path.name != "__pycache__"]) <= MOST_ENTRIES


def test_names_are_used_once() -> None:
    """No two modules and no two classes share a name, so that a name says which one is meant."""
    modules = Counter(path.stem for path in MODULES if path.stem not in ("__init__", "__main__"))
    classes = Counter(node.name for path in MODULES for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef))
    assert [name for found in (modules, classes) for name, count in found.items() if count > 1] == []


def test_imports_point_downwards() -> None:
    faults = []
    for path in MODULES:
        unit = find_unit(name_module(path))
        for module in own_imports(path):
            other = find_unit(module)
            if other != unit and (find_layer(unit) > find_layer(other) or (unit, other) in APART):
                faults.append(f"{name_module(path)} imports {module}")
    assert faults == []


def test_no_circle() -> None:
    """Neither between modules nor between the units that they lie in."""
    for of in (lambda name: name, find_unit):
        graph: dict[str, set[str]] = {}
        for path in MODULES:
            here = of(name_module(path))
            if here not in ("__init__", "unisono.__init__"):  # the public face
                graph.setdefault(here, set()).update({of(module) for module in own_imports(path)} - {here})
        assert find_circle(graph) == []


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that lie on a circle or lead to one: what is left when leaves are taken off while there are any."""
    left = dict(graph)
    while leaves := [node for node, others in left.items() if not others & left.keys()]:
        for leaf in leaves:
            del left[leaf]
    return sorted(left)


def test_a_circle_would_be_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_engine_knows_exchanges_by_their_protocol_only() -> None:
    for path in (SOURCE / "engine").glob("*.py"):
        known = {module for module in own_imports(path) if find_unit(module) == "exchange"}
        assert known <= {"unisono.exchange.protocol"}, path


def test_engine_knows_no_framework_behind_its_backends() -> None:
    """The engine computes over torch tensors, and leaves models, their passes and their modes to a backend."""
    excepted = {"numerics.py"}  # its battery computes with the kernels of torch, gradients too, to tell processes apart
    passes = re.compile(r"torch\.(nn|autograd|autocast)\b|from torch import [^\n]*\bnn\b|\.backward\(|\.requires_grad")
    for path in (SOURCE / "engine").glob("*.py"):
        known = {module for module in own_imports(path) if find_unit(module) == "backends"}
        assert known <= {"unisono.backends.backend"}, path
        if path.name not in excepted:
            assert passes.findall(ast.unparse(parse(path))) == [], path  # comments are left out
    for path in (SOURCE / "backends").glob("*.py"):
        known = {module for module in own_imports(path) if find_unit(module) == "exchange"}
        assert known <= {"unisono.exchange.protocol"}, path


def test_optional_frameworks_are_imported_where_they_are_used() -> None:
    faults = []
    for path in MODULES:
        for node in parse(path).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):  # `if TYPE_CHECKING` costs nothing
                used = {name.split(".")[0] for name in imports(node)} & OPTIONAL
                faults += [f"{name_module(path)} imports {name} at its top" for name in used]
    assert faults == []


def test_nothing_pickles() -> None:
    """Pickle is neither written to nor read from a disk or a network. Two modules are excepted by name: `PICKLES`."""
    for path in MODULES:
        used = {part for name in imports(parse(path)) for part in name.split(".")} & PICKLING
        assert used <= PICKLES.get(name_module(path), set()), path
        assert PICKLING_CALLS.findall(path.read_text(encoding="utf-8")) == [], path


def test_what_pickles_has_no_file_and_no_address() -> None:
    """`parallel/wire.py` makes bytes and takes bytes. Where they go, others decide: `local_processes.py` through sockets
    without a name, `launchers/spawn.py` through a memory file without one, which only its children inherit."""
    wire = SOURCE / "parallel" / "wire.py"
    assert own_imports(wire) == set()
    assert not {name.split(".")[0] for name in imports(parse(wire))} & {"os", "pathlib", "socket", "mmap", "tempfile"}
    assert not re.search(r"\bopen\(|\bpickle\.(load|dump)\(", wire.read_text(encoding="utf-8"))
    users = {name_module(path) for path in MODULES if "unisono.parallel.wire" in own_imports(path)}
    launchers = {f"unisono.runtime.launchers.{name}" for name in ("spawn", "spawned")}
    parallel = {f"unisono.parallel.{name}" for name in ("messages", "outcomes", "local_processes", "ray_actors")}
    assert users <= parallel | launchers
    local = (SOURCE / "parallel" / "local_processes.py").read_text(encoding="utf-8")
    assert "socket.socketpair()" in local
    addressed = r"\.(bind|listen|connect|accept)\(|(?<!\.)\bopen\(|\bPath\("
    assert not re.search(addressed, local)
    spawn, spawned = ((SOURCE / "runtime" / "launchers" / f"{name}.py").read_text() for name in ("spawn", "spawned"))
    assert "self.file = new_file()" in spawn and "memfd_create" in (SOURCE / "engine" / "snapshot.py").read_text()
    assert not re.search(addressed, spawn) and not re.search(addressed, spawned)


def test_files_and_functions_hold_one_idea() -> None:
    faults = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LINES_PER_FILE:
            faults.append(f"{name_module(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                faults += [f"{name_module(path)}.{node.name}: {lines} lines"] if lines > LINES_PER_FUNCTION else []
    assert faults == []


def test_modules_are_named_and_described() -> None:
    for path in MODULES:
        assert not set(path.relative_to(SOURCE).with_suffix("").parts) & FORBIDDEN_NAMES, path
        assert ast.get_docstring(parse(path)), f"{path}: a module says what it owns"


def test_map_is_true() -> None:
    """ARCHITECTURE.md names every file and folder right under src/unisono, and no path that is not there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]*\w+(?:\.py\b|/)", text))
    units = {
        path.name + "/" * path.is_dir()
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    last = {name.removeprefix("src/unisono/") for name in named}
    assert units - last == set(), "not on the map"
    places = (ROOT, SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir()))
    made = {"runs/", "data/", "checkpoints/", "model/"}  # by commands
    assert {name for name in named - made if not any((place / name).exists() for place in places)} == set(), "not there"


def test_drawn_layers_are_the_ones_tested() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## The layers")[2].split("```")[1]
    drawn = [set(line.split(" · ")) for line in text.strip().splitlines()]
    assert drawn == [{"cli"}, *map(set, LAYERS[1:])]
