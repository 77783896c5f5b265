"""The tree: which layer may import which, and that no two modules import each other."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import storage

FOLDERS = ("web", "work", "engine", "files", "commands")
FILES = [path for part in (".", *FOLDERS) for path in sorted((storage.PROGRAM / part).glob("*.py"))]
SHARED = {"messages", "logs"}
MAY = {  # a layer -> what it may import beside itself and SHARED
    "server": {"web", "work", "jobs", "files", "storage", "settings", "commands", "cluster"},
    "web": {"work", "jobs", "files", "storage", "settings", "cluster", "engine.screens"},
    "work": {"jobs", "files", "storage", "engine.screens", "engine.budgets", "infer"},
    "cluster": {"work", "jobs", "files", "storage"},
    "jobs": {"storage", "files.database"},
    "infer": {"engine", "files", "storage", "commands"},
    "engine": {"files", "storage"},
    "files": {"storage", "engine.pages"},
    "storage": {"commands"},  # its command line
    "commands": {"engine", "files", "storage", "infer", "settings"},
    "settings": {"storage", "work"},
    "copyparty_hook": {"work"},
    "messages": set(),
    "logs": set(),
}
LOADED_LATE = {  # inside functions alone: what they bring is heavy, or the name is a process's own entry
    ("work.workers", "infer"), ("files.books", "engine.pages"), ("storage", "commands.verify"),
    ("infer", "commands.cli"), ("server", "commands.submit"),
    ("commands.doctor", "infer"), ("commands.doctor", "engine.upscaling"),
}  # fmt: skip


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(storage.PROGRAM).with_suffix("").parts)


MODULES = {name_of(path) for path in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Our modules that the code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from MODULES.intersection(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.ImportFrom):
            yield from MODULES.intersection(f"{node.module}.{alias.name}" for alias in node.names)


def at_the_top(path: Path) -> ast.Module:
    """A module without what only runs later, or only for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = (ast.FunctionDef, ast.ClassDef, ast.If)
    return ast.Module([node for node in tree.body if not isinstance(node, late)], [])


def test_each_layer_imports_what_lies_under_it_and_nothing_else():
    for path in FILES:
        module = name_of(path)
        layer = module.partition(".")[0]
        for other in imported(ast.parse(path.read_text(encoding="utf-8"))):
            allowed = MAY[layer] | SHARED | {layer}
            assert {other, other.partition(".")[0]} & allowed, f"{module} imports {other}"


def test_no_two_modules_import_each_other():
    graphlib.TopologicalSorter({name_of(path): {*imported(at_the_top(path))} for path in FILES}).prepare()


def test_what_is_loaded_late_is_not_loaded_at_the_top():
    tops = {(name_of(path), other) for path in FILES for other in imported(at_the_top(path))}
    assert not tops & LOADED_LATE
    everywhere = {
        (name_of(path), other)
        for path in FILES
        for other in imported(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert everywhere >= LOADED_LATE


def test_all_of_it_is_installed():
    given = tomllib.loads((storage.PROGRAM / "pyproject.toml").read_text(encoding="utf-8"))
    parts = given["tool"]["setuptools"]
    assert {*parts["packages"]} == {*FOLDERS}
    assert {*parts["py-modules"]} == {name for name in MODULES if "." not in name}
    data = {
        path.relative_to(storage.PROGRAM).as_posix()
        for folder in FOLDERS
        for path in (storage.PROGRAM / folder).iterdir()
        if path.is_file() and path.suffix != ".py"
    }
    assert data == {f"{folder}/{name}" for folder, names in parts["package-data"].items() for name in names}
