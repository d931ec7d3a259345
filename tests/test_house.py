"""The house rules of the package, read from its source alone: nothing of the package is imported here."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "localmoe"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80

# Rooms from the ground up: an import goes to a lower floor or stays in its own room. "" is localmoe/__init__.py.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "folders", "interrupt"),
    ("cgroup", "conversation"),
    ("formats", "memory", "processors", "settings", "pretokenizers"),
    ("guard", "pages", "prefault"),
    ("loader", "kernels"),
    ("named_templates", "sampling", "sandbox", "tekken", "vocabulary"),
    ("arch", "tokenizer", "template"),
    ("quantisation", "template_fit", "turns"),
    ("endings", "experts"),
    ("network",),
    ("model",),
    ("prompt_cache",),
    ("engine",),
    ("prompting", "reasoning"),
    ("thinking",),
    ("answering",),
    ("inspection", "benchmark", "conversion", "evaluation", "session", "template_doctor"),
    ("discovery", "notebook", "outlook"),
    ("", "doctor"),
    ("repl",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# A family knows the op list (the cache with it) and the checkpoint, and nothing else of the rooms below it.
ARCH_MAY_IMPORT = {
    "localmoe.errors",
    "localmoe.formats",
    "localmoe.kernels.ops",
    "localmoe.kernels.program",
    "localmoe.loader.checkpoint",
    "localmoe.loader.metadata",
}
ARCH_HELPERS = {"__init__", "table", "rope"}
FAMILY_NAMES = {"MODEL_TYPES", "Config", "load", "forward"}
PRINTING_PLACES = ("cli/", "repl/render.py")
UNWELCOME_NAME = re.compile(r"^_*Base([A-Z].*)?$|Manager$|(^|_)utils$|_impl$", re.ASCII)


@dataclass(frozen=True)
class Import:
    """One module that a file imports, and whether it is only there for the type checker."""

    target: str
    line: int
    typing_only: bool


@dataclass(frozen=True)
class Source:
    """One file of the package: its dotted name, its text and its syntax tree."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def place(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def module(self) -> str:
        parts = ("localmoe", *self.path.relative_to(PACKAGE).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (n for n in ast.walk(self.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


SOURCES = [Source(path) for path in sorted(PACKAGE.rglob("*.py"))]
MODULES = {source.module: source for source in SOURCES}
each_file = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.place)


def imports(source: Source) -> Iterator[Import]:
    """Every import of a module of the package, those inside functions and under TYPE_CHECKING included."""
    package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
    typing_only = {
        id(node)
        for branch in ast.walk(source.tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, node.module] if node.module else above)
            submodules = [f"{origin}.{alias.name}" for alias in node.names]
            targets = [name if name in MODULES else origin for name in submodules]
        else:
            continue
        yield from (
            Import(target, node.lineno, id(node) in typing_only)
            for target in dict.fromkeys(targets)
            if target.split(".")[0] == "localmoe" and target != source.module
        )


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@each_file
def test_a_file_lies_on_a_known_floor(source: Source) -> None:
    assert room(source.module) in FLOOR, f"give localmoe/{source.place} a place in FLOORS"


@each_file
def test_imports_run_downwards_only(source: Source) -> None:
    here = room(source.module)
    upwards = [
        f"localmoe/{source.place}:{found.line} imports {found.target}"
        for found in imports(source)
        if room(found.target) != here and FLOOR.get(room(found.target), len(FLOORS)) >= FLOOR.get(here, 0)
    ]
    assert not upwards, "\n".join(upwards)


@each_file
def test_a_family_knows_only_ops_checkpoint_and_cache(source: Source) -> None:
    strangers = [
        f"localmoe/{source.place}:{found.line} imports {found.target}"
        for found in imports(source)
        if room(source.module) == "arch" and room(found.target) != "arch" and found.target not in ARCH_MAY_IMPORT
    ]
    assert not strangers, "\n".join(strangers)


def test_no_imports_run_in_a_circle() -> None:
    graph = {m: {i.target for i in imports(s) if not i.typing_only and i.target in MODULES} for m, s in MODULES.items()}
    finished: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle: " + " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for target in sorted(graph[module]):
                walk(target, (*path, module))
            finished.add(module)

    for module in graph:
        walk(module, ())


@each_file
def test_a_file_says_first_what_it_is(source: Source) -> None:
    first = source.tree.body[0] if source.tree.body else None
    assert first is not None, f"localmoe/{source.place} is empty"
    assert ast.get_docstring(source.tree), f"localmoe/{source.place} has no docstring"
    assert first.lineno == 1, f"localmoe/{source.place}: the docstring is not the first line"


def test_files_and_functions_keep_their_size() -> None:
    files = sorted(((s.lines, s.place) for s in SOURCES), reverse=True)
    functions = sorted(
        ((length(f), f"{s.place}:{f.lineno} {f.name}") for s in SOURCES for f in s.functions()), reverse=True
    )
    print(f"\n{len(files)} files, {sum(n for n, _ in files)} lines, median {files[len(files) // 2][0]}")
    for lines, place in files[:10] + functions[:10]:
        print(f"{lines:6} {place}")
    too_long = [f"{n} lines: {place}" for n, place in files if n > MAX_FILE_LINES]
    too_long += [f"{n} lines: {place}" for n, place in functions if n > MAX_FUNCTION_LINES]
    assert not too_long, "\n".join(too_long)


def prints(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="print")):
            return True
        case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr" | "__stdout__" | "__stderr__"):
            return True
        case ast.ImportFrom(module="sys"):
            return any(alias.name in ("stdout", "stderr") for alias in node.names)
    return False


@each_file
def test_only_render_and_cli_print(source: Source) -> None:
    lines = [node.lineno for node in ast.walk(source.tree) if prints(node) and isinstance(node, (ast.stmt, ast.expr))]
    assert source.place.startswith(PRINTING_PLACES) or not lines, f"localmoe/{source.place} prints in lines {lines}"


@each_file
def test_no_module_state_is_written_at_run_time(source: Source) -> None:
    lines = [node.lineno for node in ast.walk(source.tree) if isinstance(node, ast.Global)]
    assert not lines, f"localmoe/{source.place} writes globals in lines {lines}"


@each_file
def test_names_say_what_a_thing_is(source: Source) -> None:
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.walk(source.tree) if isinstance(node, definitions)]
    unwelcome = [name for name in (source.path.stem, *names) if UNWELCOME_NAME.search(name)]
    assert not unwelcome, f"localmoe/{source.place}: {unwelcome}"


@each_file
def test_an_ignored_type_error_names_its_code(source: Source) -> None:
    lines = [n for n, line in enumerate(source.text.splitlines(), 1) if re.search(r"#\s*type:\s*ignore(?!\[)", line)]
    assert not lines, f"localmoe/{source.place}: type: ignore without a code in lines {lines}"


@pytest.mark.parametrize(
    "source",
    [s for s in SOURCES if room(s.module) == "arch" and s.path.stem not in ARCH_HELPERS],
    ids=lambda source: source.place,
)
def test_an_architecture_is_a_module_of_four_names(source: Source) -> None:
    defined: set[str] = set()
    for node in source.tree.body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                defined.add(name)
            case ast.Assign(targets=targets):
                defined.update(target.id for target in targets if isinstance(target, ast.Name))
    assert defined >= FAMILY_NAMES, f"localmoe/{source.place} lacks {sorted(FAMILY_NAMES - defined)}"


def test_every_folder_of_the_package_is_packaged() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folders = {source.module for source in SOURCES if source.path.name == "__init__.py"}
    assert folders == set(settings["setuptools"]["packages"]) - set(settings["setuptools"]["package-dir"])


def test_every_file_excepted_from_mypy_exists() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    excepted = {m for o in settings["mypy"]["overrides"] for m in o["module"] if m.startswith("localmoe.")}
    assert excepted <= set(MODULES)


def test_constraints_pin_every_package_with_hashes_and_name_no_address() -> None:
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("#")]
    loose = [e.split()[0] for e in entries if not re.match(r"\S+==\S+ ", e) or "--hash=sha256:" not in e]
    assert entries
    assert not loose, f"not pinned with a hash: {loose}"
    assert not re.search(r"://|--index|--find-links|--extra|@ ", text)
