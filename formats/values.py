"""What the columns of a row may hold. A wrong value is refused when the row is read, with column and remedy.

Otherwise a limit that is a text, or a test that compares nothing, would give every program the same verdict.
"""

import ast
import json
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

from chat import names_of
from sandbox import AssertTest, Limits


def text(row: dict, column: str) -> str:
    """The text of a column; empty if there is none."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise ValueError(f"{column} is no text, but {value!r:.60}")
    return value or ""


def number(row: dict, column: str) -> float:
    """The number in a column; 0 if there is none."""
    value = 0 if row.get(column) is None else row[column]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{column} is {value!r:.60}, but must be a number: write it without quotes or unit")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{column} is {value!r:.60}, but must be a finite number and not negative")
    return value


def parse(code: str, what: str) -> ast.Module:
    """The syntax tree of code. Raises: ValueError for no Python or an import that is not installed."""
    try:
        tree = ast.parse(code)
        with warnings.catch_warnings(action="ignore"):
            compile(tree, what, "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no Python: {error}") from error
    for node in tree.body:
        wanted = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        wanted += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in (name.partition(".")[0] for name in wanted):
            if name not in ("solution", *sys.modules) and not find_spec(name):
                raise ValueError(f"{what} imports {name}, which is not installed: every program fails")
    return tree


def limits(seconds: float, memory_bytes: float) -> Limits:
    """The limits that a row states; 0 is not stated."""
    if 0 < seconds < 0.01:
        raise ValueError(f"time_limit is {seconds} seconds, but must be at least 0.01")
    if seconds > 100:
        raise ValueError(f"time_limit is {seconds} seconds: if they are milliseconds, write {seconds / 1000}")
    if memory_bytes and not 1 << 20 <= memory_bytes < 1 << 50:
        wanted = f"in bytes, at least {1 << 20} and less than {1 << 50}"
        raise ValueError(f"memory_limit_bytes is {memory_bytes}, but must be {wanted}")
    return Limits(seconds or Limits.seconds, int(memory_bytes) or Limits.memory_bytes)


def texts(values: object, column: str) -> tuple[str, ...]:
    """A list of texts."""
    if isinstance(values, str):
        raise ValueError(f"{column} is a text, but must be a list of texts: write the list itself")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{column} must be a list of texts, but something in it is no text")
    return tuple(values)


def from_json(row: dict, column: str, kind: type) -> object:
    """What the JSON text in a column says, which must be of this type; an empty text is an empty object."""
    stored = text(row, column)
    try:
        value = json.loads(stored) if stored else kind()
    except ValueError as error:
        raise ValueError(f"{column} must be JSON in a text: {error}") from error
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ValueError(f"{column} must be {wanted} in JSON, not {stored:.60}")
    return value


def assert_tests(
    codes: Sequence[str], entry_point: str, column: str, helpers: str = ""
) -> tuple[AssertTest, ...]:
    """Tests that call a function. Raises: ValueError for one that passes every program."""
    setup = parse(helpers, "setup, the tests' helpers,")
    shared = {entry_point, "candidate"} | names_of(helpers)[1]
    what = f"a test of {column}"
    for code in codes:
        tree = parse(code, what)
        nodes = list(ast.walk(tree))
        if any(isinstance(node, ast.Assert) and isinstance(node.msg, ast.Compare) for node in nodes):
            raise ValueError(f"{what} has a comparison as the message of an assert: {code!r:.80}")
        if not _compares(tree, entry_point, setup):
            raise ValueError(
                f"{what} compares no answer of the function {entry_point}, so that every program "
                f"passes: write assert {entry_point}(...) == ... instead of {code!r:.80}"
            )
        wanted = set() if "import *" in code + helpers else names_of(code)[0]
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "solution":
                wanted |= {alias.name for alias in node.names}
        if unknown := wanted - shared:
            raise ValueError(
                f"{what} uses {', '.join(sorted(unknown))}, which neither the test nor setup "
                f"defines, so that every program fails: {code!r:.80}"
            )
    return tuple(map(AssertTest, codes))


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Whether the part `except ...` of a test lets it pass although an assert has failed."""
    kinds = (
        {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else {"Exception"}
    )
    shows = all(isinstance(part, ast.Pass) or "print(" in ast.unparse(part) for part in handler.body)
    return shows and not kinds.isdisjoint({"AssertionError", "Exception", "BaseException"})


def _compares(test: ast.Module, entry_point: str, helpers: ast.Module) -> bool:
    """Whether a test names the function and executes an assert that can fail."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    defined = {node.name: node.body for node in helpers.body + test.body if isinstance(node, kinds)}
    methods = [part for node in test.body if isinstance(node, ast.ClassDef) for part in node.body]
    executed, named, found = list(test.body), set(), False
    while executed:
        node = executed.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Lambda():
                continue  # its body is executed only where its name is used
            case ast.Name(name):
                named.add(name)
                executed += defined.pop(name, [])
            case ast.Raise() | ast.Assert(ast.Constant(0 | None)):
                found = True
            case ast.Assert(ast.Tuple() | ast.List()):
                pass  # true, whatever is in it
            case ast.Assert(ast.Compare(left, _, rights)) if len({*map(ast.unparse, [left, *rights])}) == 1:
                pass  # a value is compared with itself
            case ast.Assert(value) if ast.unparse(value) not in (entry_point, "candidate"):
                found = found or any(isinstance(inner, ast.Name) for inner in ast.walk(value))
            case ast.Try(handlers=handlers) if any(map(_swallows, handlers)):
                named |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
                executed += node.orelse + node.finalbody
                continue
            case ast.Attribute(attr=name):  # of unittest.TestCase, numpy.testing, pytest, or solution.f
                named.add(name)
                executed += [n for part in methods * (name == "main") for n in getattr(part, "body", ())]
                found = found or name.startswith("assert") or name == "raises"
        executed += ast.iter_child_nodes(node)
    return found and not named.isdisjoint({entry_point, "candidate"})
