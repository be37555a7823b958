"""Imports point downward only, nothing imports in a circle, and no file is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "texforce_ray"
NAME = PACKAGE.name
MOST_LINES = 350

# Lowest first. A module may import those of its own row and of the rows above it here. Modules that
# are commands (`python -m ...`) come last: they may import all of these, and nothing imports them.
LAYERS = [
    ["errors"],
    ["console", "files", "paths", "randomness"],
    ["config"],
    ["artifacts", "shapes"],
    ["prompts", "records", "rewards"],
    ["diffusion", "model"],
    ["rl"],
    ["cluster"],
    ["actors"],
    ["crew"],
    ["testing"],
    ["observability"],
    ["driver"],
    ["experiments"],
]


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [NAME, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _statements(node: ast.AST, *, deferred: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports or, without `deferred`, those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif deferred:
            yield from _statements(child, deferred=True)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(other, deferred=False)
        else:
            yield from _statements(child, deferred=False)


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


COMMANDS = {
    module for module, path in MODULES.items() if '__name__ == "__main__"' in path.read_text()
}


def _layer(module: str) -> int:
    """The row of the package's part that the module belongs to; commands come after all rows."""
    if module in COMMANDS:
        return len(LAYERS)
    part = module.split(".")[1]
    return next((index for index, row in enumerate(LAYERS) if part in row), -1)


INNER = [module for module in MODULES if module != NAME]


def test_every_module_has_its_place() -> None:
    homeless = [module for module in INNER if _layer(module) < 0]
    assert not homeless, f"add them to LAYERS: {homeless}"


def test_nothing_but_commands_and_ground_stands_at_the_root() -> None:
    ground = {f"{NAME}.{name}" for row in LAYERS[:2] for name in row}
    files = {m for m in INNER if m.count(".") == 1 and MODULES[m].name != "__init__.py"}
    assert files <= ground | COMMANDS


@pytest.mark.parametrize("module", INNER)
def test_imports_point_downward(module: str) -> None:
    others = _imports(module, deferred=True) - {NAME}
    upward = [other for other in others if _layer(other) > _layer(module)]
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


@pytest.mark.parametrize("folder", [NAME, "tests", "benchmarks", "examples", "cluster", "docs"])
def test_no_file_is_too_long_to_have_one_role(folder: str) -> None:
    files = sorted((PACKAGE.parent / folder).rglob("*.py"))
    lines = {str(file.relative_to(PACKAGE.parent)): file.read_text().count("\n") for file in files}
    assert lines
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_ray_is_known_to_the_cluster_and_above_alone() -> None:
    allowed = LAYERS.index(["cluster"])
    users = set()
    for module, path in MODULES.items():
        for node in _statements(ast.parse(path.read_text()), deferred=True):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            if any(name and name.partition(".")[0] == "ray" for name in names):
                users.add(module)
    assert users
    assert not [module for module in users if _layer(module) < allowed]
