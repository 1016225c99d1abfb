"""The judge of assert tests: a process that runs the test's code and never the program.

The function under test is a proxy here: it sends the arguments to the program's process and decodes the
answer. So a program cannot reach the code that judges it, nor the values that it expects.
"""

import ast
import builtins
import contextlib
import socket
import traceback

from isolation.messages import RPC_BYTES, SHOWN, cut, pack, receive, send, unpack


class CandidateError(Exception):
    """The function under test raised an exception; carries its traceback."""

    trace = ""


class CandidateLost(BaseException):
    """The program's process has ended, or its answer cannot be decoded."""


class Comparisons(ast.NodeTransformer):
    """Turns `assert left == right` into `_compare(left, right)`, which remembers both values."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        test = node.test
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)):
            return node
        call = ast.Call(ast.Name("_compare", ast.Load()), [test.left, test.comparators[0]], [])
        return ast.copy_location(ast.Expr(call), node)


class Proxy:
    """Calls the function under test in the program's process, and remembers what a failed test shows."""

    def __init__(self, entry_point: str, calls: socket.socket) -> None:
        self.entry_point, self.calls = entry_point, calls
        self.call = self.got = self.expected = ""  # the last call, as a result shows it
        self.lost = False  # a call had no answer

    def candidate(self, /, *arguments: object, **keywords: object) -> object:
        """The function under test, for the test's code."""
        listed = [*map(shown, arguments), *(f"{name}={shown(value)}" for name, value in keywords.items())]
        self.call = cut(f"{self.entry_point}({', '.join(listed)})", SHOWN)
        self.got = self.expected = ""
        request = {"given": pack((arguments, keywords))}  # a TypeError here is the test's own
        try:
            send(self.calls, request)
            reply, _ = receive(self.calls, RPC_BYTES)
            if "error" in reply:
                error = error_like(reply)
            else:
                value = unpack(reply["value"])
                after, named = unpack(reply["given"])
                for name in keywords:
                    after += (named[name],)
                for ours, theirs in zip([*arguments, *keywords.values()], after, strict=True):
                    if type(ours) is list is type(theirs):
                        ours[:] = theirs
                    elif type(ours) in (dict, set) and type(theirs) is type(ours):
                        ours.clear()
                        ours.update(theirs)
        except Exception as failure:
            self.lost = True
            raise CandidateLost from failure
        if "error" in reply:
            raise error
        self.got = shown(value)
        return value

    def compare(self, got: object, expected: object) -> None:
        """`assert got == expected`."""
        if not got == expected:
            self.got, self.expected = shown(got), shown(expected)
            raise AssertionError


def shown(value: object) -> str:
    """A value as a result shows it."""
    try:
        return cut(repr(value), SHOWN)
    except ValueError:  # an int of more digits than Python converts
        return f"<{type(value).__name__}, too long to show>"


def error_like(reply: dict) -> CandidateError:
    """The program's exception as a test may expect it: also of the builtin type of that name.

    Never an AssertionError, by which a test says that it has failed, nor a StopIteration, which would end a
    test's loop over calls as if all had passed.
    """
    known = getattr(builtins, str(reply["error"]), None)
    message, never = str(reply["message"])[:SHOWN], (AssertionError, StopIteration)
    error = CandidateError(message)
    if isinstance(known, type) and issubclass(known, Exception) and known not in never:
        with contextlib.suppress(TypeError):  # an ExceptionGroup needs more than a message
            error = type(known.__name__, (CandidateError, known), {"__init__": Exception.__init__})(message)
    error.trace = str(reply["traceback"])[-SHOWN:]
    return error


def judge(message: dict, calls: socket.socket) -> dict:
    """In the judge's child: run setup and test code. Returns the verdict and the values that a result shows.

    The verdict is empty if a call had no answer: then the caller decides by how the program ended.
    """
    proxy = Proxy(message["entry_point"], calls)
    trace = ""
    try:
        namespace = {"__name__": "judge", "_compare": proxy.compare}
        exec(message["setup"], namespace)
        namespace |= {"candidate": proxy.candidate, message["entry_point"]: proxy.candidate}
        tree = ast.fix_missing_locations(Comparisons().visit(ast.parse(message["code"])))
        exec(compile(tree, "test.py", "exec"), namespace)
        verdict = "passed"
    except AssertionError:
        verdict = "wrong answer"
    except CandidateError as error:
        verdict, trace = "out of memory" if isinstance(error, MemoryError) else "exception", error.trace
    except BaseException as error:  # the test's code could not work with the values that it got
        verdict, trace = "exception", "".join(traceback.format_exception_only(error))[-SHOWN:]
    return {
        "verdict": "" if proxy.lost else verdict,
        "traceback": trace,
        "call": proxy.call,
        "got": proxy.got,
        "expected": proxy.expected,
    }
