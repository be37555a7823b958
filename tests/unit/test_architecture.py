"""Imports point downward only, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "texforce_ray"
NAME = PACKAGE.name

# Lowest first. A module may import those of its own row and of the rows above it here.
LAYERS = [
    ["errors", "signals", "watch"],
    ["paths"],
    ["randomness"],
    ["config", "config_help", "overrides", "config_io", "trust"],
    ["shapes"],
    ["rewards", "prompts", "model.snapshot", "model.inspection", "model.location", "records"],
    ["diffusion", "model"],
    ["rl"],
    ["actors"],
    ["telemetry", "collect", "evaluation", "policy", "profiling", "monitor", "recorder"],
    ["driver"],
    ["run", "status", "plan", "evaluate", "fuse", "report", "judge", "capacity", "rewards.check"],
    ["experiments", "shapes.measure", "cli"],
]


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [NAME, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _statements(node: ast.AST, *, deferred: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run: never those for type checkers, those in functions if `deferred`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deferred
        ):
            continue
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(other, deferred=deferred)
        else:
            yield from _statements(child, deferred=deferred)


def _imports(module: str, *, deferred: bool) -> set[str]:
    """Modules of the package that `module` imports itself."""
    found = set()
    for node in _statements(ast.parse(MODULES[module].read_text()), deferred=deferred):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert not node.level, f"{module}: relative import in line {node.lineno}"
            source = node.module or ""
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {source}
    return {name for name in found if name in MODULES and name != module}


def _layer(module: str) -> int | None:
    """The row that names the module or, failing that, the closest of its parents."""
    name = module.removeprefix(NAME).removeprefix(".")
    while name:
        for index, row in enumerate(LAYERS):
            if name in row:
                return index
        name = name.rpartition(".")[0]
    return None


def test_every_module_has_its_place() -> None:
    homeless = [module for module in MODULES if module != NAME and _layer(module) is None]
    assert not homeless, f"add them to LAYERS: {homeless}"


@pytest.mark.parametrize("module", [module for module in MODULES if module != NAME])
def test_imports_point_downward(module: str) -> None:
    own = _layer(module)
    upward = [
        other
        for other in _imports(module, deferred=True)
        if other != NAME and (_layer(other) or 0) > (own or 0)
    ]
    assert not upward, f"{module} imports {upward} from a higher layer"


def test_nothing_imports_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(_imports(module, deferred=False)):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_ray_is_known_to_actors_and_above_alone() -> None:
    allowed = LAYERS.index(["actors"])
    users = set()
    for module, path in MODULES.items():
        for node in _statements(ast.parse(path.read_text()), deferred=True):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            if any(name and name.partition(".")[0] == "ray" for name in names):
                users.add(module)
    assert users
    assert not [module for module in users if (_layer(module) or 0) < allowed]
