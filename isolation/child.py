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
import copy
import io
import json
import linecache
import os
import signal
import socket
import sys
import threading
import traceback
import types

from isolation.messages import NO_VERDICT, PIECE, SHOWN, cut, pack, receive, send

CHANGED = (list, dict, set)  # arguments whose changes by a call a test sees
STREAM = io.IOBase.__mro__[1]  # an ordinary class: isinstance with the abstract one costs a child pages


def compile_program(source: str) -> types.CodeType:
    """Compile a program as the file solution.py, with its lines at hand for tracebacks."""
    linecache.cache["solution.py"] = (len(source), None, source.splitlines(True), "solution.py")
    return compile(source.removeprefix("\ufeff"), "solution.py", "exec", dont_inherit=True)


def compile_test(source: str, entry_point: str) -> types.CodeType:
    """Compile trusted code. Where it asserts that two values are equal, it calls `_compare`."""
    tree = ast.parse(source)
    nodes = [tree]
    for node in nodes:  # grows as we go; not by expressions, because a test may have very long lists
        for _, part in ast.iter_fields(node):
            nodes += [step for step in part if not isinstance(step, ast.expr)] if type(part) is list else []
        match node:
            case ast.Assert(ast.Compare(left, [ast.Eq()], [right])):
                line = {"lineno": node.lineno, "col_offset": 0}
                answer = isinstance(left, ast.Call) and ast.unparse(left.func) in ("candidate", entry_point)
                values = [left, right, ast.Constant(answer, **line)]
                node.test = ast.Call(ast.Name("_compare", ast.Load(), **line), values, [], **line)
    return compile(tree, "test.py", "exec")


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
                call, _ = receive(calls, unpacks=True)
            except EOFError:  # the judge has all it needs
                out.flush()
                return 0
            send(calls, answer(module, call, calls))
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


def answer(module: types.ModuleType, call: dict, calls: socket.socket) -> dict:
    """Call the function under test. Returns its value and the arguments as they are then, or its error.

    A long list is sent before, in pieces, because packed it takes much more memory.
    """
    try:
        arguments, keywords = call["given"]
        value = getattr(module, call["name"])(*arguments, **keywords)
        if type(value) is list and len(value) > PIECE:
            for start in range(0, len(value), PIECE):
                send(calls, {"value": pack(value[start : start + PIECE]), "more": True})
            value = []
        return {"value": pack(value), "given": pack([*arguments, *keywords.values()])}
    except BaseException as error:
        last = traceback.format_exception_only(error)[-1].strip()
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
        reply = {"error": known.__name__, "message": last.partition(": ")[2][:SHOWN]}
        return reply | {"traceback": candidate_traceback(error)[-SHOWN:]}


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
            own = ("__init__", "__str__")  # KeyError has others, with quotes
            plain = {name: getattr(Exception, name) for name in own}
            error = type(known.__name__, (CandidateError, known), plain)(message)
    error.trace = str(reply["traceback"])[-SHOWN:]
    return error


class Other:
    """An answer that is equal to everything, or only to itself."""

    def __init__(self, equal: bool) -> None:
        self.equal = equal

    def __eq__(self, other: object) -> bool:
        return self.equal or other is self


# A test that passes with each of these as the answer to all of its calls compares no answer.
RAISED = "Exception ValueError TypeError KeyError IndexError ZeroDivisionError".split()
OTHERS = [Other(False), Other(True), None, 0, 0.5, "", [], (), {}, set()]
OTHERS += [error_like({"error": name, "message": "other", "traceback": ""}) for name in RAISED]


class OtherFunction:
    """Stands for the function under test: equal calls get one answer, and their arguments are changed."""

    def __init__(self, answer: object) -> None:
        self.answer, self.answers = answer, {}

    def __call__(self, /, *arguments: object, **keywords: object) -> object:
        given, call = [*arguments, *keywords.values()], repr((arguments, keywords))
        change(given, [type(value)({object(): 0}) if type(value) in CHANGED else value for value in given])
        if isinstance(self.answer, CandidateError):
            raise self.answer
        return self.answers.setdefault(call, copy.copy(self.answer))


class Judge:
    """Runs a test's code. The function under test is a proxy that calls it in the program's process."""

    def __init__(self, calls: socket.socket, about: dict) -> None:
        self.calls, self.entry_point = calls, about["entry_point"]
        self.answered = 0  # calls
        self.compared = False  # an answer was equal to what was expected
        self.others = [*OTHERS]
        self.call = self.got = self.expected = ""  # the last call, as a result shows it

    def prepare(self, setup: types.CodeType) -> None:
        """Begin a script by running the set-up."""
        self.script = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.modules["solution"] = types.ModuleType("solution")  # a test may import it
        self.script._compare = self.compare
        exec(setup, vars(self.script))

    def run(self, test: types.CodeType, function: object) -> None:
        """Go on with the test; this is the function under test."""
        setattr(sys.modules["solution"], self.entry_point, function)
        scope = vars(self.script)
        if hasattr(builtins, self.entry_point):  # the set-up's own functions need the builtin one
            scope = dict(scope)
        scope.update(dict.fromkeys(("candidate", self.entry_point), function))
        try:
            exec(test, scope)
        except SystemExit as stop:
            if stop.code:
                raise

    def compare(self, got: object, expected: object, answer: bool) -> bool:
        """The value of `got == expected`; what a failed test shows is remembered."""
        same = got == expected
        # Without a call a test has defined such a function itself; with more, both sides may be answers.
        self.compared |= bool(answer and same and self.answered == 1)
        if not same:
            self.got, self.expected = shown(got), shown(expected)
        return same

    def passes_with_others(self, setup: types.CodeType, test: types.CodeType) -> bool:
        """Whether a test, which has passed, also passes with all other answers."""
        self.calls.shutdown(socket.SHUT_RDWR)  # the program has done its part, and its time is limited
        signal.signal(signal.SIGALRM, lambda *_: self.end("passed"))  # it may wait for the right answer
        for other in self.others:  # each with the set-up, because a test may use up its cases
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            try:
                again = copy.copy(self)
                again.prepare(setup)
                again.run(test, OtherFunction(other))
            except BaseException as error:
                if error is not other:
                    return False
        return True

    def candidate(self, /, *arguments: object, **keywords: object) -> object:
        """The function under test, for the test's code."""
        listed = [*map(shown, arguments), *(f"{name}={shown(value)}" for name, value in keywords.items())]
        self.call = cut(f"{self.entry_point}({', '.join(listed)})", SHOWN)
        self.got = self.expected = ""
        try:
            given, error = pack((arguments, keywords)), None
        except TypeError as refused:  # the test's own, but for what has come from the program
            if not self.answered:
                self.end(NO_VERDICT, f"a test calls {self.entry_point}, but {refused}")
            raise
        self.answered += 1
        try:
            send(self.calls, {"name": self.entry_point, "given": given})
            reply, pieces = receive(self.calls, unpacks=True)[0], []
            while "more" in reply:
                pieces += reply["value"]
                reply, _ = receive(self.calls, unpacks=True)
            if "error" in reply:
                error = error_like(reply)
                self.others.append(error_like(reply | {"message": "other"}))
            else:
                value = pieces or reply["value"]
                change([*arguments, *keywords.values()], reply["given"])
        except Exception:  # the program's process has ended, or its answer cannot be decoded
            self.end("")
        if error:
            raise error
        self.got = shown(value)
        return value

    def end(self, verdict: str, trace: str = "") -> None:
        """Say the verdict, and end at once. It is empty if a call had no answer: then the caller decides."""
        says = {"verdict": verdict, "traceback": trace, "call": self.call}
        os.write(1, b"\n" + json.dumps(says | {"got": self.got, "expected": self.expected}).encode())
        os._exit(0)


def change(arguments: list, changed: list) -> None:
    """Give the lists, dicts and sets among a test's arguments the content that they have after the call."""
    for ours, theirs in zip(arguments, changed, strict=True):
        if type(ours) in CHANGED and type(theirs) is type(ours):
            ours.clear()
            (ours.extend if type(ours) is list else ours.update)(theirs)


def shown(value: object) -> str:
    """A value as a result shows it: as much of a long one as is shown anyway."""
    value = value[:SHOWN] if type(value) in (str, bytes, list, tuple) else value
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(2 * SHOWN)  # more would take long
    try:
        return cut(repr(value), SHOWN)
    except ValueError:
        return f"<{type(value).__name__}, too long to show>"
    finally:
        sys.set_int_max_str_digits(digits)


def judge(setup: str | types.CodeType, test: str, calls: socket.socket, about: dict) -> None:
    """In the judge's child: run a test's code, say the verdict, and end."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    judge, fails = Judge(calls, about), "the set-up of the tests fails, whatever the program is:"
    signal.signal(signal.SIGALRM, lambda *_: judge.end(NO_VERDICT, f"{fails} it does not end"))
    signal.setitimer(signal.ITIMER_REAL, about["seconds"] / 2)
    try:
        setup = compile_test(setup, judge.entry_point) if isinstance(setup, str) else setup
        judge.prepare(setup)
    except BaseException as error:
        told = traceback.format_exception_only(error)[-1].strip()
        judge.end(NO_VERDICT, f"{fails} {told}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        test = compile_test(test, judge.entry_point)
        judge.run(test, judge.candidate)
        if not judge.compared and judge.passes_with_others(setup, test):
            judge.end(NO_VERDICT, "a test compares nothing with an answer of the program: all would pass")
        judge.end("passed")
    except (AssertionError, SystemExit):
        judge.end("wrong answer")
    except CandidateError as error:
        judge.end("out of memory" if isinstance(error, MemoryError) else "exception", error.trace)
    except BaseException as error:  # the test's code could not work with the values that it got
        judge.end("exception", "".join(traceback.format_exception_only(error))[-SHOWN:])
