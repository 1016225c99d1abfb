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

from isolation.messages import SHOWN, cut, pack, receive, send, unpack

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


def run_program(program: str | types.CodeType, calls: socket.socket | None, about: dict) -> int:
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
            send(calls, answer(module, call["given"], about["entry_point"], about["longest"]))
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


def answer(module: types.ModuleType, given: object, entry_point: str, longest: int) -> dict:
    """Call the function under test. Returns its value and the arguments as they are then, or its error."""
    try:
        arguments, keywords = unpack(given)
        value = getattr(module, entry_point)(*arguments, **keywords)
        reply = {"value": pack(value), "given": pack([*arguments, *keywords.values()])}
        if len(json.dumps(reply)) > longest:
            raise ValueError(f"the result is longer than {longest} bytes")
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
    # A program may have a stream of its own: w = open(1, "w").write
    owners = [getattr(value, "__self__", value) for value in vars(module).values()]
    for stream in [sys.stdout, sys.stderr, out, *(owner for owner in owners if isinstance(owner, STREAM))]:
        try:
            if stream is not None:
                stream.flush()
        except ValueError:  # closed, or detached by a stream that was flushed before it
            pass


class CandidateError(Exception):
    """The function under test raised an exception; `trace` is its traceback."""


class Comparisons(ast.NodeTransformer):
    """Marks where a test compares: its asserts, its ifs that raise, its calls of functions named assert..."""

    def visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, ast.expr):  # a test may have very long lists
            self.generic_visit(node)
        raises = isinstance(node, ast.If) and any(isinstance(step, ast.Raise) for step in node.body)
        if raises or isinstance(node, ast.Assert) and not isinstance(node.test, (ast.Tuple, ast.Constant)):
            values = [node.test]
            match node:
                case ast.Assert(ast.Compare(left, [ast.Eq()], [right])):
                    values = [left, right]  # which a failed test shows
            node.test = ast.Call(ast.Name("_compare", ast.Load()), values, [])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1].startswith("assert"):
            return ast.Call(ast.Name("_compare", ast.Load()), [node], [])
        return node


class Proxy:
    """Calls the function under test in the program's process, and remembers what a failed test shows."""

    def __init__(self, calls: socket.socket, entry_point: str, longest: int) -> None:
        self.calls, self.entry_point, self.longest = calls, entry_point, longest
        self.answered = self.compared = False  # the test has got an answer, and compared something since
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
            reply, _ = receive(self.calls, self.longest)
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
        self.answered = True
        if error:
            self.compared = True  # by the test's `except`, else it fails
            raise error
        self.got = shown(value)
        return value

    def compare(self, got: object, *expected: object) -> object:
        """The value of `got == expected`, or of `got` alone; what a failed test shows is remembered."""
        self.compared |= self.answered
        same = got == expected[0] if expected else got
        if expected and not same:
            self.got, self.expected = shown(got), shown(expected[0])
        return same

    def end(self, verdict: str, trace: str = "") -> None:
        """Say the verdict, and end at once. It is empty if a call had no answer: then the caller decides."""
        says = {"verdict": verdict, "traceback": trace, "call": self.call}
        os.write(1, json.dumps(says | {"got": self.got, "expected": self.expected}).encode())
        os._exit(0)


def shown(value: object) -> str:
    """A value as a result shows it."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(2 * SHOWN)  # more would take long
    try:
        return cut(repr(value), SHOWN)
    except ValueError:
        return f"<{type(value).__name__}, too long to show>"
    finally:
        sys.set_int_max_str_digits(digits)


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
            plain = {
                name: getattr(Exception, name) for name in ("__init__", "__str__")
            }  # KeyError's own quotes
            error = type(known.__name__, (CandidateError, known), plain)(message)
    error.trace = str(reply["traceback"])[-SHOWN:]
    return error


def judge(calls: socket.socket, about: dict) -> None:
    """In the judge's child: run setup and test code, say the verdict, and end."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    proxy = Proxy(calls, about["entry_point"], about["longest"])
    try:
        namespace = {"__name__": "judge", "_compare": proxy.compare}
        for text in ("setup", "code"):
            tree = ast.fix_missing_locations(Comparisons().visit(ast.parse(about[text])))
            exec(compile(tree, "test.py", "exec"), namespace)
            namespace |= {"candidate": proxy.candidate, about["entry_point"]: proxy.candidate}
    except AssertionError:
        proxy.end("wrong answer")
    except CandidateError as error:
        proxy.end("out of memory" if isinstance(error, MemoryError) else "exception", error.trace)
    except BaseException as error:  # the test's code could not work with the values that it got
        proxy.end("exception", "".join(traceback.format_exception_only(error))[-SHOWN:])
    if not proxy.compared:
        proxy.end("exception", "the test compares nothing with an answer of the program")
    proxy.end("passed")
