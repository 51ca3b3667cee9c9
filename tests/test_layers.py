"""Imports flow down the layers of the design, and modules form no cycles.

Imports for type checkers only (`if TYPE_CHECKING`) count like all others. The package's own `__init__` is left out: it
names what users import, and loads it lazily.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import petals_lightning

PACKAGE = Path(petals_lightning.__file__).parent
LAYERS = [
    {"errors", "heap", "library_messages"},
    {"options"},
    {"protocol", "sample"},
    {"swarm"},
    {"hf"},
    {"client", "server"},  # beside each other, and never one from the other
    {"models"},
    {"data", "strategies"},
    {"callbacks", "modules"},
    {"training", "api"},
    {"cli"},
]
SERVER_LAYERS = [
    {"refusal", "peer_links"},
    {"access", "blocks", "execution"},  # beside each other
    {"sessions"},
    {"config", "loading", "resources"},
    {"announcer", "memory_plan", "metrics", "placement", "stream_requests", "petals"},
    {"client_stream", "rebalancing", "span_loader"},
    {"running_server"},
    {"server"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
SERVER_RANK = {part: rank for rank, layer in enumerate(SERVER_LAYERS) for part in layer}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


SERVER_MODULES = [path for path in MODULES if path.is_relative_to(PACKAGE / "server") and path.stem != "__init__"]


def name_of(path: Path) -> str:
    """The dotted name of a module within the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def part_of(path: Path) -> str:
    return name_of(path).split(".")[0]


def names_in(nodes: Iterable[ast.AST], path: Path) -> set[str]:
    """What import statements among syntax nodes name, within the package: modules, and what they take from these."""
    found = set()
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "petals_lightning" and rest and not rest.startswith("__"):
                found.add(rest)
    return found


def imports_of(path: Path) -> set[str]:
    """The parts of this package that a module imports, at its top or inside functions."""
    return {name.split(".")[0] for name in names_in(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), path)}


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not those in functions."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt))


def import_graph() -> dict[str, set[str]]:
    """For each module those that it imports at its top."""
    modules = {name_of(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        names = names_in(statements(ast.parse(path.read_text(encoding="utf-8")).body), path)
        parents = {name.rpartition(".")[0] for name in names}  # what is imported may be in a module
        graph[name_of(path)] = ({*names, *parents} & modules) - {name_of(path)}
    return graph


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of some cycle in their order, or none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(graph[module]):
                if cycle := search(other, [*path, module]):
                    return cycle
            done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(graph))), [])


def test_all_modules_are_found():
    assert {part_of(path) for path in MODULES} >= {
        "errors",
        "protocol",
        "swarm",
        "hf",
        "client",
        "server",
        "models",
        "cli",
    }
    assert len(MODULES) > 30


def test_imports_are_found():
    assert imports_of(PACKAGE / "client" / "pipeline.py") >= {"client", "errors", "protocol"}
    assert "server" in imports_of(PACKAGE / "cli" / "serve.py"), "imports inside functions count too"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_layers_below_only(path):
    mine = part_of(path)
    assert mine in RANK, f"{mine} has no place in LAYERS yet"
    for other in imports_of(path) - {mine}:
        assert RANK[other] < RANK[mine], f"{mine} imports {other}"


def test_cycles_are_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = import_graph()
    assert "server.resources" in graph["server.stream_requests"]
    assert sum(map(len, graph.values())) > 300


def test_no_modules_import_each_other_in_a_cycle():
    assert cycle_in(import_graph()) == []


@pytest.mark.parametrize("path", SERVER_MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_down_the_folders_of_the_server(path):
    def server_part(name: str) -> str:
        return name.removeprefix("server.").split(".")[0]

    mine = server_part(name_of(path))
    assert mine in SERVER_RANK, f"server/{mine} has no place in SERVER_LAYERS yet"
    for other in names_in(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), path):
        if other.startswith("server.") and server_part(other) != mine:
            assert SERVER_RANK[server_part(other)] < SERVER_RANK[mine], f"server/{mine} imports {other}"
