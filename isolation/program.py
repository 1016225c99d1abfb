"""The process of a program: compile it, run it as `python solution.py` would, answer the judge's calls."""

import _thread
import ast
import atexit
import builtins
import contextlib
import io
import json
import linecache
import socket
import sys
import threading
import traceback
import types

from isolation.messages import RPC_BYTES, SHOWN, pack, receive, send, unpack

STREAM = io.IOBase.__mro__[1]  # an ordinary class: isinstance with the abstract one costs a child pages
NEVER_LOADED_EARLY = "antigravity idlelib lib2to3 site test this tkinter turtle turtledemo".split()


def compile_program(source: str) -> types.CodeType:
    """Compile a program as the file solution.py, with its lines at hand for tracebacks."""
    linecache.cache["solution.py"] = (len(source), None, source.splitlines(True), "solution.py")
    return compile(source, "solution.py", "exec", dont_inherit=True)


def load_early(source: str) -> None:
    """Import the standard modules that a program imports at its top, once for all of its tests."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    for name in sorted(names):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names | {"numpy"} and top not in NEVER_LOADED_EARLY:
            with contextlib.suppress(Exception):  # the program's own import will raise it again
                __import__(name)


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
            try:
                arguments, keywords = given = unpack(call["given"])
                value = getattr(module, entry_point)(*arguments, **keywords)
                reply = {"value": pack(value), "given": pack(given)}
                if len(json.dumps(reply)) > RPC_BYTES:
                    raise ValueError(f"the result is longer than {RPC_BYTES} bytes")
            except BaseException as error:
                last = traceback.format_exception_only(error)[-1].strip()
                message = last.partition(": ")[2][:SHOWN]
                shown = candidate_traceback(error)
                known = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
                reply = {"error": known.__name__, "message": message, "traceback": shown[-SHOWN:]}
            send(calls, reply)
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
        try:
            if stream is not None:
                stream.flush()
        except ValueError:  # closed, or detached by a stream that was flushed before it
            pass
