"""Mutants: small faults, made by a program in the code that graphs are traced from.

A mutant replaces the code of one function, so every module that has imported the function runs the mutant.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

MODULES = (
    "pipeline.speculation.noise",
    "pipeline.speculation.sampling",
    "pipeline.speculation.acceptance",
    "pipeline.speculation.model",
    "pipeline.speculation.phases",
    "pipeline.speculation.drafters",
    "pipeline.models.parallel",
    "pipeline.models.decoder",
    "pipeline.models.eagle3_layer",
    "pipeline.graphs.module",
    "pipeline.graphs.arguments",
)
"""Sampling, acceptance, masks, positions, caches, RoPE, norms, taps, vocabulary maps, arguments."""

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift, ast.FloorDiv: ast.Mult,
}  # fmt: skip
RENAMED = {"amax": "amin", "amin": "amax", "cos": "sin", "sin": "cos", "cumsum": "flip"}


EXPLAINED = {
    "Model.read: 0 -> 1": "equal: all rows of a prompt have the same positions",
    "self.partner_vocab > self.config.vocab -> ": "equal: a partner's vocabulary is named only if it differs",
    "Eagle3.after_decode: rows.position_B": "changes proposals of an untrained head, of which none is accepted",
    "Eagle3.propose: rows.position_B": "changes proposals of an untrained head, of which none is accepted",
    "Eagle3.score: position_B < ": "changes features of rows that are not scored, which are set again before use",
    "Eagle3.writes: rows.alive_B": "changes caches of an untrained head, whose proposals are not accepted",
    "vocab_rows: tp == 1": "equal on one rank; of several: tests/speculation/test_phases.py, tests/backends",
    "seams.tp -> ": "equal on one rank; of several: tests/backends/inductor/test_ranks.py",
    "(low + 0.5) * 2.0 ** (-BITS) -> high - ": "changes random numbers by 1e-7 of their range",
}
"""Why some mutants pass, by a part of their text: what they change cannot be seen in these pairs, or not at all."""


@dataclass(frozen=True)
class Mutant:
    """A change of one function, by its module and qualified name."""

    module: str
    function: str
    line: int
    what: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.module.removeprefix('pipeline.')}:{self.line} {self.function}: {self.what}"

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Run with the fault."""
        function = function_of(importlib.import_module(self.module), self.function)
        original = function.__code__
        function.__code__ = self.code
        try:
            yield
        finally:
            function.__code__ = original


def function_of(module: ModuleType, name: str) -> FunctionType:
    """Return a function or the function of a method or property by its qualified name."""
    found = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    return inspect.unwrap(found.__func__ if isinstance(found, staticmethod) else found)


def mutants(module_name: str) -> Iterator[Mutant]:
    """Yield every mutant of a module."""
    module = importlib.import_module(module_name)
    tree = ast.parse(inspect.getsource(module))
    for name, node in _functions(tree):
        for number, what, line in _changes(node):
            changed = copy.deepcopy(node)
            _apply(changed, number)
            code = _compiled(tree, node, changed, module.__file__ or "", name)
            yield Mutant(module_name, name, line, what, code)


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("__"):
                    yield f"{node.name}.{part.name}", part


def _nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """Return the nodes of a function's body in a fixed order, without docstrings and annotations."""
    body = [part for part in function.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
    annotations = {id(inner) for part in body for node in ast.walk(part) if isinstance(node, ast.AnnAssign)
                   for inner in ast.walk(node.annotation)}  # fmt: skip
    return [node for part in body for node in ast.walk(part) if id(node) not in annotations]


def _changes(function: ast.FunctionDef) -> Iterator[tuple[int, str, int]]:
    """Yield what can be changed: the number of the change, a description, the line."""
    for number, node in enumerate(_nodes(function)):
        if what := _describe(node):
            yield number, what, getattr(node, "lineno", function.lineno)


def _describe(node: ast.AST) -> str | None:
    changed = copy.deepcopy(node)
    if not _change(changed):
        return None
    return f"{ast.unparse(node)[:60]} -> {ast.unparse(changed)[:60]}"


def _apply(function: ast.FunctionDef, number: int) -> None:
    _change(_nodes(function)[number])


def _change(node: ast.AST) -> bool:
    """Change a node in place; False if there is no change for its kind."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        node.ops[0] = COMPARED[type(node.ops[0])]()
        return True
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        node.op = COMPUTED[type(node.op)]()
        return True
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return True
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    if node.func.attr == "where" and len(node.args) == 3:
        node.args[1], node.args[2] = node.args[2], node.args[1]
        return True
    if node.func.attr in RENAMED:
        node.func.attr = RENAMED[node.func.attr]
        return True
    return False


def _compiled(
    tree: ast.Module, node: ast.FunctionDef, changed: ast.FunctionDef, file: str, name: str
) -> CodeType:  # fmt: skip
    """Compile a module with one function changed; return the code of that function."""
    owner = next((part for part in tree.body if isinstance(part, ast.ClassDef) and node in part.body), None)
    body = tree.body if owner is None else owner.body
    place = body.index(node)
    body[place] = changed
    try:
        code = compile(ast.fix_missing_locations(tree), file, "exec")
    finally:
        body[place] = node
    for part in name.split("."):
        code = next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == part)
    return code


@contextmanager
def executed_functions() -> Iterator[set[str]]:
    """Record the functions of `MODULES` that run, as module and qualified name."""
    files = {importlib.import_module(name).__file__: name for name in MODULES}
    seen: set[str] = set()

    def record(frame, event, argument):
        if event == "call" and (module := files.get(frame.f_code.co_filename)):
            seen.add(f"{module}:{frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name}")

    sys.setprofile(record)
    try:
        yield seen
    finally:
        sys.setprofile(None)
