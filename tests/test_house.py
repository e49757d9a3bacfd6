"""The house rules of mmsr_jax, read from the imports: which room may know which.

Floors: a room may import rooms on lower floors, and itself. Rooms on one floor are sisters that
never import one another. The walls say which libraries stay out of which rooms.
"""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).parents[1]
HOUSE = REPO / "mmsr_jax"

FLOORS = {
    "cli": 9,
    "loops": 8,
    "bench": 8,
    "build": 7,
    "experiment": 6,
    "evaluation": 5,
    "report": 5,
    "agent": 4,
    "engine": 3,
    "train": 3,
    "embed": 3,
    "data": 3,
    "inputs": 2,
    "weights": 2,
    "rewards": 2,
    "model": 1,
    "tools": 1,
    "protocol": 1,
    "parallel": 0,
    "types": 0,
    "logs": 0,
}
GRAB_BAGS = {"util", "utils", "helper", "helpers", "common", "misc"}
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
TEXT = {"transformers", "tokenizers", "jinja2"}
MATHEMATICS = {"jax.numpy", "jax.nn", "jax.lax", "numpy", "scipy", "optax", "math", "statistics"}
MAX_LINES = 400


def modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file, for every module of the package."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str, *, lazy: bool = True) -> set[str]:
    """Dotted names that `source` imports; without `lazy`, only what importing it would run."""
    names = set()
    pending = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"relative import in line {node.lineno}")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return names


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def own(name: str) -> str | None:
    """The module of this package that `name` (a module, or something in one) stands for."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name if "." in name else None


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def graph(*, lazy: bool) -> dict[str, set[str]]:
    """Module -> modules of this package that it imports."""
    edges = {}
    for module, path in MODULES.items():
        named = imports(path.read_text(), lazy=lazy)
        edges[module] = {found for name in named if (found := own(name)) and found != module}
    return edges


def reach(start: set[str], edges: dict[str, set[str]]) -> set[str]:
    """Every module that importing `start` imports, parents' `__init__` included."""
    seen: set[str] = set()
    pending = list(start)
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending.extend(edges[module])
            parent = module.rpartition(".")[0]
            if parent in MODULES:
                pending.append(parent)
    return seen


def offenders(modules_: set[str], libraries: set[str], *, lazy: bool = True) -> list[str]:
    return sorted(
        f"{module} imports {name}"
        for module in modules_
        for name in imports(MODULES[module].read_text(), lazy=lazy)
        if any(under(name, library) for library in libraries)
    )


def in_rooms(*rooms: str) -> set[str]:
    return {module for module in MODULES if room(module) in rooms}


def test_reader_of_imports():
    source = "import a.b\nif True:\n    from c import d\ndef f():\n    import e\n"
    assert imports(source) == {"a.b", "c.d", "e"}
    assert imports(source, lazy=False) == {"a.b", "c.d"}
    with pytest.raises(ValueError, match="relative import in line 1"):
        imports("from . import x")
    assert own("mmsr_jax.types.Author") == "mmsr_jax.types"
    assert own("numpy.random") is None and own("mmsr_jax.__version__") is None


def test_every_room_has_a_floor():
    unknown = {room(module) for module in MODULES} - {""} - set(FLOORS)
    assert not unknown, f"rooms without a floor in design.md: {sorted(unknown)}"


def test_a_room_imports_only_rooms_below_it():
    wrong = [
        f"{module} ({FLOORS[room(module)]}) imports {other} ({FLOORS[room(other)]})"
        for module, others in graph(lazy=True).items()
        if room(module)
        for other in others
        if room(other) != room(module) and FLOORS[room(other)] >= FLOORS[room(module)]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circles():
    edges = graph(lazy=True)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join(path[path.index(module) :] + (module,))
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, path + (module,))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_flax_lives_in_the_model():
    assert not offenders(set(MODULES) - in_rooms("model"), {"flax"})


def test_the_model_never_sees_text():
    assert not offenders(in_rooms("model"), TEXT)


def test_tools_rewards_and_the_language_of_search_know_no_jax():
    rooms = in_rooms("tools", "rewards", "protocol", "types", "logs")
    assert not offenders(reach(rooms, graph(lazy=True)), DEVICE)


def test_training_never_sees_the_engine_or_the_agent():
    below = reach(in_rooms("train"), graph(lazy=True))
    assert not {module for module in below if room(module) in {"engine", "agent"}}


def test_loops_contain_no_mathematics():
    assert not offenders(in_rooms("loops"), MATHEMATICS)


def test_the_command_line_starts_without_jax():
    heavy = DEVICE | {"transformers", "matplotlib", "tensorflow_datasets", "grain"}
    first = reach(in_rooms("cli"), graph(lazy=False))
    assert not offenders(first, heavy, lazy=False)


def test_files_are_short():
    files = [*HOUSE.rglob("*.py"), *(REPO / "configs").rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    long = {str(path.relative_to(REPO)): n for path, n in lengths.items() if n > MAX_LINES}
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_no_grab_bags():
    names = [path for path in HOUSE.rglob("*") if path.stem.strip("_") in GRAB_BAGS]
    assert not names
