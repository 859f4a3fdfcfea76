"""Rewrites the source of one method: a loop over experts watched, or replaced by one call.

A Python loop whose length depends on data breaks every captured graph. `watched` compiles a method that
shows its local variables before and after each loop; `without_loop` one in which a loop is a single call,
along with what only the loop needed; `as_one_call` one that is that call. All keep the method's
signature, globals and closure.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any

# Names inside generated code; a method that uses them itself is not rewritten.
BEFORE, AFTER, CALL = "_s2o_before", "_s2o_after", "_s2o_call"


class NoSource(Exception):
    """A method cannot be rewritten; the message is the reason that users read."""


def definition(function: types.FunctionType) -> ast.FunctionDef:
    """The syntax tree of a method, without decorators and annotations.

    Raises:
        NoSource: its source is not there, or uses what cannot be compiled apart from its class.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NoSource(f"the source of {function.__qualname__} cannot be read ({type(error).__name__})") from None
    (found,) = tree.body[:1]
    if not isinstance(found, ast.FunctionDef):
        raise NoSource(f"{function.__qualname__} is not a plain method")
    for node in ast.walk(found):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name.startswith("__") and not name.endswith("__"):
            raise NoSource(f"{function.__qualname__} uses {name!r}, a name that Python changes inside a class")
        if name in (BEFORE, AFTER, CALL) or isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await)):
            raise NoSource(f"{function.__qualname__} is a generator or uses a reserved name")
    found.decorator_list, found.returns = [], None
    for argument in ast.walk(found.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return found


def loops(tree: ast.FunctionDef) -> list[ast.For]:
    """The outermost for-loops of a method, those of functions inside it left out, in order."""
    found: list[ast.For] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.For):
                found.append(child)
            elif not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
                visit(child)

    visit(tree)
    return found


def watched(function: types.FunctionType, before: Callable[..., None], after: Callable[..., None]) -> Any:
    """The method, calling `before(index, locals())` and `after(index, locals())` around its outermost loops."""
    tree = definition(function)
    for index, loop in enumerate(loops(tree)):
        _replace(tree, loop, [_show(BEFORE, index), loop, _show(AFTER, index)])
    return _compiled(function, tree, {BEFORE: before, AFTER: after})


def without_loop(
    function: types.FunctionType, index: int, call: Callable[..., Any], result: str, names: Sequence[str]
) -> Any:
    """The method with one loop replaced by ``result = call(self, result, *names)``.

    Assignments in front of the loop that nothing else reads go as well: what they compute, such as the
    experts that were hit, is what breaks a graph.
    """
    tree = definition(function)
    owner = tree.args.args[0].arg
    arguments = ", ".join((owner, result, *names))
    loop = loops(tree)[index]
    _refuse_effects(function, loop)
    _replace(tree, loop, ast.parse(f"{result} = {CALL}({arguments})").body)
    _drop_unread(tree)
    return _compiled(function, tree, {CALL: call})


def as_one_call(function: types.FunctionType, call: Callable[..., Any], names: Sequence[str]) -> Any:
    """The method as ``return call(self, *names)``."""
    tree = definition(function)
    _refuse_effects(function, tree)
    owner = tree.args.args[0].arg
    tree.body = ast.parse(f"return {CALL}({', '.join((owner, *names))})").body
    return _compiled(function, tree, {CALL: call})


def _refuse_effects(function: types.FunctionType, tree: ast.AST) -> None:
    """Raises NoSource where code that is to go does what no run may show.

    It sets attributes, which would stay unset, or acts by a threshold: only whether an expert has tokens may count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            raise NoSource(f"the loop in {function.__qualname__} also sets '{ast.unparse(node)}'")
        tests = [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While)) else []
        for part in (part for test in tests for part in ast.walk(test)):
            if isinstance(part, ast.Constant) and type(part.value) in (int, float) and part.value not in (0, 1):
                raise NoSource(f"the loop in {function.__qualname__} depends on '{ast.unparse(tests[0])}'")


def _show(name: str, index: int) -> ast.stmt:
    return ast.parse(f"{name}({index}, locals())").body[0]


def _replace(tree: ast.AST, old: ast.stmt, new: list[ast.stmt]) -> None:
    for node in ast.walk(tree):
        for _, block in ast.iter_fields(node):
            if isinstance(block, list) and old in block:
                at = block.index(old)
                block[at : at + 1] = [ast.copy_location(one, old) for one in new]
                return


def _drop_unread(tree: ast.FunctionDef) -> None:
    """Takes out assignments of torch expressions to names that nothing reads, until there are none."""
    while True:
        nodes = list(ast.walk(tree))
        read = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
        read |= {n.target.id for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
        if not _drop_from(tree, read):
            return


def _drop_from(tree: ast.AST, read: set[str]) -> bool:
    dropped = False
    for node in ast.walk(tree):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            kept = [one for one in block if not _unread(one, read)]
            dropped |= len(kept) != len(block)
            if not kept and field == "body" and block:
                kept = [ast.copy_location(ast.Pass(), block[0])]
                dropped |= not isinstance(block[0], ast.Pass)
            setattr(node, field, kept)
    return dropped


def _unread(statement: ast.stmt, read: set[str]) -> bool:
    if isinstance(statement, ast.With):  # of which nothing is left
        return all(isinstance(one, ast.Pass) for one in statement.body)
    if not isinstance(statement, ast.Assign):
        return False
    targets = [n for target in statement.targets for n in ast.walk(target) if not isinstance(n, (ast.Tuple, ast.Store))]
    named = all(isinstance(target, ast.Name) and target.id not in read for target in targets)
    return named and all(_computes(node) for node in ast.walk(statement.value) if isinstance(node, ast.Call))


def _computes(call: ast.Call) -> bool:
    """Whether a call is one of torch, or of a method that does not write in place, on something other than self."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr.endswith("_"):
        return isinstance(function, ast.Name) and function.id in ("len", "range", "int", "tuple", "list")
    root: ast.expr = function
    while isinstance(root, (ast.Attribute, ast.Call, ast.Subscript)):
        root = root.func if isinstance(root, ast.Call) else root.value
    return not (isinstance(root, ast.Name) and root.id in ("self", "super"))


def _compiled(function: types.FunctionType, tree: ast.FunctionDef, given: dict[str, Any]) -> Any:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        outer = {name: cell.cell_contents for name, cell in cells.items()} | given
    except ValueError:
        raise NoSource(f"{function.__qualname__} closes over a name that has no value yet") from None
    factory = ast.parse(f"def factory({', '.join(outer)}):\n    return None").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body = [tree, *ast.parse(f"return {tree.name}").body]
    module = ast.fix_missing_locations(ast.Module([factory], []))
    ast.increment_lineno(module, function.__code__.co_firstlineno - 1)
    made: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, made)
    return made["factory"](**outer)
