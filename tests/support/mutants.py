"""Mutants: small faults, made by a program in the code that graphs are traced from.

A mutant replaces the code of one function, so every module that has imported the function runs the mutant.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

MODULES = (
    "pipeline.speculation.noise",
    "pipeline.speculation.sampling",
    "pipeline.speculation.shaping",
    "pipeline.speculation.acceptance",
    "pipeline.speculation.model",
    "pipeline.speculation.phases",
    "pipeline.speculation.drafters",
    "pipeline.models.parallel",
    "pipeline.models.decoder",
    "pipeline.models.routing",
    "pipeline.models.eagle3_layer",
    "pipeline.models.dflash_layers",
    "pipeline.models.weights",
    "pipeline.graphs.module",
    "pipeline.graphs.arguments",
    "pipeline.graphs.verify_arguments",
    "pipeline.graphs.packing",
    "pipeline.backends.inductor.seams",
    "pipeline.stages.windows",
    "pipeline.runtime.chunks",
    "pipeline.runtime.batch",
)
"""Sampling, rules, acceptance, masks, positions, caches, RoPE, norms, experts, taps, vocabulary maps, arguments,
packing, the cuts for ranks and their collectives, chunks of prompts, the choice of buckets.
"""

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift, ast.FloorDiv: ast.Mult,
}  # fmt: skip
RENAMED = {"amax": "amin", "amin": "amax", "cos": "sin", "sin": "cos", "cumsum": "flip"}


EXPLAINED = {
    "self.partner_vocab > self.config.vocab -> ": "equal: a partner's vocabulary is named only if it differs",
    "Eagle3.score: position_B < ": "changes features of rows that are not scored, which are set again before use",
    "(low + 0.5) * 2.0 ** (-BITS) -> high - ": "random numbers by 1e-7: tests/speculation/test_sampling.py",
    "score_arguments: 0 -> 1": "equal: the tokens of rows without a request are not read",
    "_packed_shape: len(window.spec.shape) > 1": "equal: a vector in one column has the bytes of a vector",
    "_packs_whole: part.last - part.first -> part.last + ": "equal: only whether a width is even counts",
    "_packs_whole: part.last - part.first -> part.last - ": "equal: the first begins at 0, and all have one width",
    "stored_sizes: ": "sizes of what a killed call has written: tests/stages/test_shard.py",
    "row_writes: inside_BT & keep_BT -> ": "equal: keys of rejected drafts are written again before a query sees them",
    "padded_vocab: BLOCK * tp -> ": "the length of the padding, which no token has: tests/stages/test_shard.py",
    "_refuse_overflow: ": "float16 only: tests/stages/test_shard.py",
    "Attend.within: keys - 1 -> ": "changes what padding behind the keys sees, which nothing reads",
    "attend_up_to: 0.0 -> ": "equal: the softmax ignores a constant; sinks, which do not, have their own operator here",
    "_cheapest: best[first][0] + ": "costs: which prompts share a graph: tests/runtime/test_chunks.py",
    "local_heads: tp <= config.kv_heads -> ": "equal: with a rank for each key head both sides are the same number",
    "Model.within: rows.position_B < ": "a row without room, which no caller runs: tests/speculation/test_phases.py",
    "Eagle3.after_verify: self.model.config.vocab - 1 -> ": "equal: `readable` clamps to the ids of a smaller head",
    "Batch._prefill: 0 -> 1": "a statistic: tests/runtime/test_long_prompts.py",
    "Batch._prefill: chunk.start > 0 -> ": "a statistic: tests/runtime/test_long_prompts.py",
    "_reading: not graph.continues -> ": "costs: which graphs read a prompt: tests/runtime/test_chunks.py",
    "take: 1 -> 2": "equal: of the position that is taken twice, one is kept",
    "after_verify: history.shape[1] - 2 -> ": "equal: a step emits at most K + 1 tokens, so the bound is never reached",
}
"""Why some mutants pass, by a part of their text: what they change cannot be seen in these pairs, or not at all."""


@dataclass(frozen=True)
class Mutant:
    """A change of one function, by its module and qualified name; `lines` are those of the changed statement."""

    module: str
    function: str
    line: int
    lines: range
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
        statements = _statements(node)
        for number, what, line in _changes(node):
            changed = copy.deepcopy(node)
            _apply(changed, number)
            code = _compiled(tree, node, changed, module.__file__ or "", name)
            lines = min((lines for lines in statements if line in lines), key=len)
            yield Mutant(module_name, name, line, lines, what, code)


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("__"):
                    yield f"{node.name}.{part.name}", part


def _statements(function: ast.FunctionDef) -> list[range]:
    """Return the lines of every statement; of one with a body, those before it."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = (node.end_lineno or node.lineno) + 1
            found.append(range(node.lineno, max(body[0].lineno, node.lineno + 1) if body else end))
    return [*found, range(function.lineno, (function.end_lineno or function.lineno) + 1)]


def _nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """Return the nodes of a function's body in a fixed order, without docstrings and annotations."""
    body = [part for part in function.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
    annotations = {id(inner) for part in body for node in ast.walk(part) if isinstance(node, ast.AnnAssign)
                   for inner in ast.walk(node.annotation)}  # fmt: skip
    return [node for part in body for node in ast.walk(part) if id(node) not in annotations]


def _changes(function: ast.FunctionDef) -> Iterator[tuple[tuple[int, int], str, int]]:
    """Yield what can be changed: the numbers of node and change, a description, the line."""
    returns_tensor = function.returns is not None and ast.unparse(function.returns) == "Tensor"
    for number, node in enumerate(_nodes(function)):
        for kind, change in enumerate(CHANGES):
            changed = copy.deepcopy(node)
            if change(changed) and (change is not _swap_rows or returns_tensor):
                what = f"{ast.unparse(node)[:60]} -> {ast.unparse(changed)[:60]}"
                yield (number, kind), what, getattr(node, "lineno", function.lineno)


def _apply(function: ast.FunctionDef, change: tuple[int, int]) -> None:
    number, kind = change
    CHANGES[kind](_nodes(function)[number])


def _change_operator(node: ast.AST) -> bool:
    """Negate or shift a comparison, change an operation, negate a condition, swap two alternatives."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        node.ops[0] = COMPARED[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        node.op = COMPUTED[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        node.operand = ast.UnaryOp(node.op, node.operand)
    elif isinstance(node, ast.IfExp):
        node.body, node.orelse = node.orelse, node.body
    else:
        return False
    return True


def _change_number(node: ast.AST) -> bool:
    """Add one to a number."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 1
        return True
    return False


def _change_call(node: ast.AST) -> bool:
    """Swap the two values of `where`, or call the opposite of a function."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    if node.func.attr == "where" and len(node.args) == 3:
        node.args[1], node.args[2] = node.args[2], node.args[1]
        return True
    if node.func.attr in RENAMED:
        node.func.attr = RENAMED[node.func.attr]
        return True
    return False


def _drop_term(node: ast.AST) -> bool:
    """Drop the second term of a sum or difference."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        node.right = ast.BinOp(node.right, ast.Mult(), ast.Constant(0))
        return True
    return False


def _swap_rows(node: ast.AST) -> bool:
    """Return a tensor with its rows in the opposite order."""
    if isinstance(node, ast.Return) and node.value is not None:
        node.value = ast.Call(ast.Attribute(node.value, "flip", ast.Load()), [ast.Constant(0)], [])
        return True
    return False


CHANGES = (_change_operator, _change_number, _change_call, _drop_term, _swap_rows)


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
def executed_lines() -> Iterator[set[tuple[str, int]]]:
    """Record the lines of `MODULES` that run, as module and number, in all threads: ranks are threads."""
    files = {importlib.import_module(name).__file__: name for name in MODULES}
    seen: set[tuple[str, int]] = set()

    def called(frame, event, argument):
        module = files.get(frame.f_code.co_filename)
        if module is None:
            return None

        def line(frame, event, argument):
            seen.add((module, frame.f_lineno))
            return line

        return line(frame, event, argument)

    sys.settrace(called)
    threading.settrace(called)
    try:
        yield seen
    finally:
        sys.settrace(None)
        threading.settrace(None)
