"""What a test's child does: it runs the program or, for an assert test, another child judges it.

A program runs as by `python solution.py`. The *judge* of an assert test runs the test's code and never the
program: the function under test is a proxy there, which sends the arguments to the program's process and
decodes the answer. So a program cannot reach the code that judges it, nor the values that it expects.
"""

import _thread
import ast
import atexit
import builtins
import contextlib
import io
import json
import linecache
import os
import socket
import sys
import threading
import traceback
import types

from isolation.messages import RPC_BYTES, SHOWN, cut, pack, receive, send, unpack

STREAM = io.IOBase.__mro__[1]  # an ordinary class: isinstance with the abstract one costs a child pages


def compile_program(source: str) -> types.CodeType:
    """Compile a program as the file solution.py, with its lines at hand for tracebacks."""
    linecache.cache["solution.py"] = (len(source), None, source.splitlines(True), "solution.py")
    return compile(source, "solution.py", "exec", dont_inherit=True)


def candidate_traceback(error: BaseException) -> str:
    """The traceback of an error, without the frames that are not the program's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "solution.py"]
    lines = [f'  File "solution.py", line {f.lineno}, in {f.name}\n    {f.line}\n' for f in frames[-20:]]
    head = ["Traceback (most recent call last):\n"] if lines else []
    return "".join([*head, *lines, *traceback.format_exception_only(error)])


def run_program(program: str | types.CodeType, entry_point: str, calls: socket.socket | None) -> int:
    """Run the program, then (assert tests) answer the judge's calls. Returns the exit code."""
    out = sys.stdout
    module = types.ModuleType("solution" if calls else "__main__")
    sys.modules[module.__name__] = module
    module.__builtins__, module.__file__ = builtins, "solution.py"  # as a script has them
    exit_code = 0
    try:
        code = compile_program(program) if isinstance(program, str) else program
        exec(code, module.__dict__)
        while calls:
            try:
                call, _ = receive(calls)
            except EOFError:  # the judge has all it needs
                out.flush()
                return 0
            send(calls, answer(module, entry_point, call["given"]))
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if exit_code and not isinstance(stop.code, int):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException as error:
        exit_code = 1
        sys.stderr.write(candidate_traceback(error))
    try:
        finish(module, out)
    except BaseException:
        exit_code = exit_code or 1
    return exit_code & 255


def answer(module: types.ModuleType, entry_point: str, given: object) -> dict:
    """Call the function under test. Returns its value and the arguments as they are then, or its error."""
    try:
        arguments, keywords = unpack(given)
        value = getattr(module, entry_point)(*arguments, **keywords)
        reply = {"value": pack(value), "given": pack([*arguments, *keywords.values()])}
        if len(json.dumps(reply)) > RPC_BYTES:
            raise ValueError(f"the result is longer than {RPC_BYTES} bytes")
    except BaseException as error:
        last = traceback.format_exception_only(error)[-1].strip()
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
        reply = {"error": known.__name__, "message": last.partition(": ")[2][:SHOWN]}
        reply["traceback"] = candidate_traceback(error)[-SHOWN:]
    return reply


def finish(module: types.ModuleType, out: io.TextIOBase) -> None:
    """What an interpreter does at its end: wait for threads, run exit functions, flush streams."""
    if _thread._count() or threading._threading_atexits:
        threading._shutdown()
    atexit._run_exitfuncs()
    streams = [sys.stdout, sys.stderr, out]
    for value in vars(module).values():  # a program may have a stream of its own: w = open(1, "w").write
        owner = getattr(value, "__self__", value)
        if isinstance(owner, STREAM):
            streams.append(owner)
    for stream in streams:
        with contextlib.suppress(ValueError):  # closed, or detached by a stream that was flushed before it
            if stream is not None:
                stream.flush()


class CandidateError(Exception):
    """The function under test raised an exception; `trace` is its traceback."""


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

    def __init__(self, calls: socket.socket, entry_point: str) -> None:
        self.calls, self.entry_point = calls, entry_point
        self.call = self.got = self.expected = ""  # the last call, as a result shows it

    def candidate(self, /, *arguments: object, **keywords: object) -> object:
        """The function under test, for the test's code."""
        listed = [*map(shown, arguments), *(f"{name}={shown(value)}" for name, value in keywords.items())]
        self.call = cut(f"{self.entry_point}({', '.join(listed)})", SHOWN)
        self.got = self.expected = ""
        request = {"given": pack((arguments, keywords))}  # a TypeError here is the test's own
        error = None
        try:
            send(self.calls, request)
            reply, _ = receive(self.calls, RPC_BYTES)
            if "error" in reply:
                error = error_like(reply)
            else:
                value = unpack(reply["value"])
                after = unpack(reply["given"])
                for ours, theirs in zip([*arguments, *keywords.values()], after, strict=True):
                    if type(ours) is list is type(theirs):
                        ours[:] = theirs
                    elif type(ours) in (dict, set) and type(theirs) is type(ours):
                        ours.clear()
                        ours.update(theirs)
        except Exception:  # the program's process has ended, or its answer cannot be decoded
            self.end("")
        if error:
            raise error
        self.got = shown(value)
        return value

    def compare(self, got: object, expected: object) -> None:
        if not got == expected:
            self.got, self.expected = shown(got), shown(expected)
            raise AssertionError

    def end(self, verdict: str, trace: str = "") -> None:
        """Say the verdict, and end at once. It is empty if a call had no answer: then the caller decides."""
        says = {"verdict": verdict, "traceback": trace, "call": self.call}
        os.write(1, json.dumps(says | {"got": self.got, "expected": self.expected}).encode())
        os._exit(0)


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


def judge(calls: socket.socket, setup: str, code: str, entry_point: str) -> None:
    """In the judge's child: run setup and test code, say the verdict, and end."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    proxy = Proxy(calls, entry_point)
    try:
        namespace = {"__name__": "judge", "_compare": proxy.compare}
        exec(setup, namespace)
        namespace |= {"candidate": proxy.candidate, entry_point: proxy.candidate}
        tree = ast.fix_missing_locations(Comparisons().visit(ast.parse(code)))
        exec(compile(tree, "test.py", "exec"), namespace)
    except AssertionError:
        proxy.end("wrong answer")
    except CandidateError as error:
        proxy.end("out of memory" if isinstance(error, MemoryError) else "exception", error.trace)
    except BaseException as error:  # the test's code could not work with the values that it got
        proxy.end("exception", "".join(traceback.format_exception_only(error))[-SHOWN:])
    proxy.end("passed")
