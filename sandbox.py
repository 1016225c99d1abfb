"""Runs programs that nobody trusts, and says for each test what happened.

Paper: section 2.1 runs generated code on public tests for feedback and on private tests for the reward, and
says no more. RL finds every hole in its grader, so the rules here are:

* A verdict is made in this process, from captured output. The program's process holds no expected output, no
test
  code and no channel whose bytes are taken for a verdict. Exit codes, printed markers and silence never mean
  "passed".
* Assert-style tests run in a *judge* process that never runs the program. There the function under test is a
proxy: it
  sends the arguments to the program's process and decodes the answer with a codec of plain data (no pickle).
* A test costs a fork, not an interpreter: each worker has a server, a small standard-library process (never
a fork of the
  process that imported torch), that forks one child a test.

What holds a child back: wall clock, address space, the memory of its whole process tree, captured output,
file size, number of files and processes (rlimits), no new privileges, a session and a working directory of
its own, a clean environment, and after each test the death of every process that it started (the server is
their reaper). Where the kernel and the user allow it, also an unprivileged user, and mount, network and ipc
namespaces with a private tmpfs as working directory; `python sandbox.py` prints which of these layers are on.

Not covered: there is no pid namespace, Landlock or seccomp filter yet, so a program can read files that its
user may read, see other processes and use any system call; what it reads it can print, but not send. Do not
give it secrets.

Run alone: `python sandbox.py` prints the layers and runs one program.
"""

import ast
import atexit
import builtins
import ctypes
import json
import linecache
import os
import queue
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

NOBODY = 65534  # the unprivileged user of a program when we are root
RPC_BYTES = 16 << 20  # longest message between judge and program
RPC_DEPTH = 200  # deepest nesting of a value between them
SHOWN = 2000  # characters of a value in a result
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 38, 36


class Verdict(StrEnum):
    """What became of a test."""

    PASSED = "passed"
    WRONG_ANSWER = "wrong answer"
    EXCEPTION = "exception"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out of memory"
    TOO_MUCH_OUTPUT = "too much output"


@dataclass(frozen=True)
class Limits:
    """Limits of one test (the paper's defaults: 10 s of wall clock, 1 GB)."""

    seconds: float = 10.0  # wall clock
    memory_bytes: int = 1 << 30  # of the whole process tree
    output_bytes: int = 1 << 20  # standard output and error together


@dataclass(frozen=True)
class IoTest:
    """Standard input and the output that is expected, compared by `outputs_match`."""

    input: str
    output: str


@dataclass(frozen=True)
class AssertTest:
    """Statements that the judge runs; they call the function under test by its name or as `candidate`."""

    code: str


@dataclass(frozen=True)
class TestResult:
    """What happened to one test. Texts are cut at a stated length, visibly."""

    __test__ = False  # pytest: not a test class

    verdict: Verdict
    stdout: str = ""
    traceback: str = ""  # of the program, in its own line numbers, file "solution.py"
    call: str = ""  # assert tests, as far as they can be told: the call, the value got, the value expected
    got: str = ""
    expected: str = ""
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """A program and its tests."""

    program: str
    tests: tuple[IoTest | AssertTest, ...]
    limits: Limits = Limits()
    entry_point: str = ""  # assert tests: the function under test
    setup: str = ""  # assert tests: trusted code for the judge
    stop_at_first_failure: bool = False  # leave out the results after the first test that fails


def outputs_match(got: str, expected: str) -> bool:
    """CodeContests' own rule: as many words, each pair equal but for case, or numbers closer than 1e-5."""
    # As the original in C++: bytes, so that only ASCII is lower-cased, white space and digits.
    ours, theirs = (
        re.findall(rb"[^ \n\t\r\v]+", text.encode("utf-8", "surrogatepass").lower())
        for text in (got, expected)
    )
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a == b:
            continue
        try:
            # Python reads 1_0 as a number; the original does not.
            if b"_" in a + b or not abs(float(a) - float(b)) < 1e-5:
                return False
        except ValueError:
            return False
    return True


# ---- messages ----------------------------------------------------------------------------------------------


def _send(channel: socket.socket, message: dict, descriptors: Sequence[int] = ()) -> None:
    data = json.dumps(message).encode()
    socket.send_fds(channel, [struct.pack("!Q", len(data))], list(descriptors))
    channel.sendall(data)


def _receive(channel: socket.socket, limit: int = 1 << 40) -> tuple[dict | None, list[int]]:
    """The next message and the descriptors that came with it.

    None where the other side has gone or floods us.
    """
    header, descriptors, _, _ = socket.recv_fds(channel, 8, 1)
    while len(header) < 8:
        piece = channel.recv(8 - len(header))
        if not piece:
            return None, descriptors
        header += piece
    (length,) = struct.unpack("!Q", header)
    data = bytearray()
    while len(data) < length <= limit:
        piece = channel.recv(min(1 << 20, length - len(data)))
        if not piece:
            return None, descriptors
        data += piece
    return (json.loads(data) if length <= limit else None), descriptors


def _pack(value, depth: int = 0):
    """Plain data as JSON.

    Exact types only: a subclass could lie about what it is. Raises TypeError for all else.
    """
    if depth > RPC_DEPTH:
        raise TypeError(f"a value nested deeper than {RPC_DEPTH} levels")
    kind = type(value)
    if value is None or kind in (bool, str, float) or kind is int and abs(value) < 1 << 63:
        return value
    if kind is int:
        return {"int": hex(value)}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [_pack(item, depth + 1) for item in value]}
    if kind is dict:
        return {"dict": [[_pack(k, depth + 1), _pack(v, depth + 1)] for k, v in value.items()]}
    raise TypeError(f"a value of type {kind.__name__} is not plain data")


def _unpack(packed):
    """The inverse of `_pack`; raises for anything that `_pack` does not make."""
    if packed is None or isinstance(packed, (bool, str, int, float)):
        return packed
    ((kind, content),) = packed.items()
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {_unpack(k): _unpack(v) for k, v in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_unpack, content))


def candidate_traceback(error: BaseException) -> str:
    """The traceback of an error, without the frames that are not the program's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "solution.py"]
    lines = [f'  File "solution.py", line {f.lineno}, in {f.name}\n    {f.line}\n' for f in frames[-20:]]
    head = ["Traceback (most recent call last):\n"] if lines else []
    return "".join([*head, *lines, *traceback.format_exception_only(error)])


# ---- the program's process ---------------------------------------------------------------------------------


def _run_program(message: dict, rpc: socket.socket | None) -> int:
    """In the child: run the program, then (assert tests) answer the judge's calls. Returns the exit code."""
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    module = types.ModuleType("solution" if rpc else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["solution.py"]
    source, exit_code = message["program"], 0
    linecache.cache["solution.py"] = (len(source), None, source.splitlines(True), "solution.py")
    try:
        exec(compile(source, "solution.py", "exec"), module.__dict__)
        while rpc:
            call, _ = _receive(rpc)
            if call is None:
                break
            arguments, keywords = _unpack(call["arguments"]), _unpack(call["keywords"])
            try:
                value = getattr(module, message["entry_point"])(*arguments, **keywords)
                reply = {"value": _pack(value), "arguments": _pack(arguments)}
            except BaseException as error:
                reply = {"error": type(error).__name__, "traceback": candidate_traceback(error)[-SHOWN:]}
            _send(rpc, reply)
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.stderr.write(candidate_traceback(error))
        exit_code = 1
    try:
        threading._shutdown()  # a program ends when its threads have ended
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        exit_code = exit_code or 1
    return exit_code & 255


# ---- the judge's process -----------------------------------------------------------------------------------


class _CandidateError(Exception):
    """The function under test raised; carries its traceback."""


class _CandidateLost(BaseException):
    """The program's process has gone, or what it sent is no answer."""


class _Comparisons(ast.NodeTransformer):
    """Turns `assert left == right` into `_compare(left, right)`, which remembers both values."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        test = node.test
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)):
            return node
        call = ast.Call(ast.Name("_compare", ast.Load()), [test.left, test.comparators[0]], [])
        return ast.copy_location(ast.Expr(call), node)


def _shown(value: object) -> str:
    """The value as a result tells it."""
    try:
        return repr(value)[:SHOWN]
    except ValueError:  # an integer of more digits than Python likes to write
        return "a value too long to write"


def _judge(message: dict, rpc: socket.socket) -> dict:
    """In the judge's child: run setup and test code with a proxy for the function under test."""
    told = {"call": "", "got": "", "expected": ""}

    def candidate(*arguments, **keywords):
        listed = [*map(_shown, arguments), *(f"{name}={_shown(value)}" for name, value in keywords.items())]
        told["call"] = f"{message['entry_point']}({', '.join(listed)})"[:SHOWN]
        told["got"] = told["expected"] = ""
        try:
            _send(rpc, {"arguments": _pack(arguments), "keywords": _pack(keywords)})
            reply, _ = _receive(rpc, RPC_BYTES)
            if "error" in reply:
                text = str(reply["traceback"])
                known = getattr(builtins, str(reply["error"]), None)
                error = _CandidateError
                if isinstance(known, type) and issubclass(known, Exception) and known is not AssertionError:
                    error = type(known.__name__, (_CandidateError, known), {"__init__": Exception.__init__})
            else:
                value, after = _unpack(reply["value"]), _unpack(reply["arguments"])
                for ours, theirs in zip(arguments, after, strict=True):
                    if type(ours) is list is type(theirs):
                        ours[:] = theirs
                    elif type(ours) in (dict, set) and type(theirs) is type(ours):
                        ours.clear()
                        ours.update(theirs)
        except Exception as failure:
            raise _CandidateLost from failure
        if "error" in reply:
            raise error(text)
        told["got"] = _shown(value)
        return value

    def compare(got, expected):
        if not got == expected:
            told["got"], told["expected"] = _shown(got), _shown(expected)
            raise AssertionError

    try:
        namespace = {"__name__": "judge", "_compare": compare}
        exec(message["setup"], namespace)
        namespace |= {"candidate": candidate, message["entry_point"]: candidate}
        tree = ast.fix_missing_locations(_Comparisons().visit(ast.parse(message["code"])))
        exec(compile(tree, "test.py", "exec"), namespace)
        return {"verdict": Verdict.PASSED.value} | told
    except AssertionError:
        return {"verdict": Verdict.WRONG_ANSWER.value} | told
    except _CandidateError as error:
        return {"verdict": Verdict.EXCEPTION.value, "traceback": str(error)} | told
    except _CandidateLost:
        return {"verdict": ""} | told
    except BaseException as error:  # the test could not work with what it was given
        text = "".join(traceback.format_exception_only(error))
        return {"verdict": Verdict.EXCEPTION.value, "traceback": text[-SHOWN:]} | told


# ---- the server: one child a test --------------------------------------------------------------------------


def _descendants(root: int) -> list[int]:
    """Process ids below `root`."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(name))
    found, frontier = [], [root]
    while frontier:
        children = parents.get(frontier.pop(), [])
        found += children
        frontier += children
    return found


def _reap() -> None:
    """Kill every process below this server until none is left; orphans have become its own children."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            for process in _descendants(os.getpid()):
                try:
                    os.kill(process, signal.SIGKILL)
                except OSError:
                    pass


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _enter_child(message: dict, descriptors: list[int], home: str) -> socket.socket | None:
    """In the fresh child: descriptors 0, 1, 2 and perhaps the call channel, nothing else.

    Limits; another user.
    """
    os.setsid()
    for target, source in enumerate(descriptors):
        os.dup2(source, target)  # the server keeps 0 to 3 reserved: no source is overwritten before its turn
    os.closerange(len(descriptors), 1 << 16)
    for name in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(name, signal.SIG_DFL)
    os.chdir(home)
    os.environ.clear()
    os.environ.update(HOME=home, TMPDIR=home, PATH="/usr/bin:/bin", LANG="C.UTF-8", OMP_NUM_THREADS="1")
    memory = message["memory_bytes"]
    for what, soft in (
        (resource.RLIMIT_AS, memory + (64 << 20)),  # the interpreter's own share
        (resource.RLIMIT_FSIZE, 64 << 20),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_CPU, int(message["seconds"]) + 2),
    ):
        resource.setrlimit(what, (soft, soft))
    if os.getuid() == 0 and message["drop"]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return socket.socket(fileno=3) if len(descriptors) > 3 else None


def _one_test(message: dict, channel_descriptors: list[int], home: str) -> dict:
    """Fork a child for one test, hold it to its limits, and report how it ended."""
    stdin = os.memfd_create("stdin")
    with open(stdin, "wb", closefd=False) as file:
        file.write(message.get("input", "").encode("utf-8", "surrogateescape"))
    os.lseek(stdin, 0, os.SEEK_SET)
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        exit_code = 1
        try:
            rpc = _enter_child(message, [stdin, out_end, err_end, *channel_descriptors], home)
            if "code" in message:
                sys.stdout = sys.stderr = open(os.devnull, "w")
                os.write(1, json.dumps(_judge(message, rpc)).encode())
                exit_code = 0
            else:
                exit_code = _run_program(message, rpc)
        finally:
            os._exit(exit_code)
    for descriptor in (stdin, out_end, err_end, *channel_descriptors):
        os.close(descriptor)
    exited = os.pidfd_open(pid)
    poller = select.poll()
    for descriptor in (out, err, exited):
        poller.register(descriptor, select.POLLIN)
    deadline = began + message["seconds"]
    captured = {out: bytearray(), err: bytearray()}
    ended, running = "", True
    while running and not ended:
        wait = min(0.1, max(0.0, deadline - time.perf_counter()))
        ready = poller.poll(wait * 1000 + 1)
        for descriptor, _ in ready:
            if descriptor == exited:
                running = False
                continue
            piece = os.read(descriptor, 1 << 16)
            captured[descriptor] += piece
            if not piece:
                poller.unregister(descriptor)
        if sum(map(len, captured.values())) > message["output_bytes"]:
            ended = "output"
        elif running and time.perf_counter() >= deadline:
            ended = "time"
        elif not ready and sum(map(_resident_bytes, [pid, *_descendants(pid)])) > message["memory_bytes"]:
            ended = "memory"
    seconds = time.perf_counter() - began
    if ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    _reap()
    for descriptor in (out, err):  # what is left in the pipes; nobody can write any more
        while (piece := os.read(descriptor, 1 << 16)) and len(captured[descriptor]) <= message[
            "output_bytes"
        ]:
            captured[descriptor] += piece
        os.close(descriptor)
    os.close(exited)
    if sum(map(len, captured.values())) > message["output_bytes"]:
        ended = ended or "output"
    for entry in os.scandir(home):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)
    return {
        "ended": ended,
        "exit_code": os.waitstatus_to_exitcode(status),
        "out": captured[out][: message["output_bytes"]].decode("utf-8", "replace"),
        "err": captured[err][-16384:].decode("utf-8", "replace"),
        "seconds": seconds,
        "peak": usage.ru_maxrss * 1024,
    }


def _isolate(home: str) -> dict[str, str]:
    """Put this server into what namespaces the kernel allows; layer -> "on" or "off: reason"."""
    libc = ctypes.CDLL(None, use_errno=True)
    layers = {}

    def probe(name: str, failed: bool) -> bool:
        layers[name] = f"off: {os.strerror(ctypes.get_errno())}" if failed else "on"
        return not failed

    uid, gid = os.getuid(), os.getgid()
    if uid != 0 and probe("user namespace", libc.unshare(CLONE_NEWUSER) != 0):
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        except OSError as error:
            layers["user namespace"] = f"off: {error.strerror}"
    probe("network namespace", libc.unshare(CLONE_NEWNET) != 0)
    probe("ipc namespace", libc.unshare(CLONE_NEWIPC) != 0)
    if probe("mount namespace", libc.unshare(CLONE_NEWNS) != 0):
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        probe("private tmpfs", libc.mount(b"tmpfs", home.encode(), b"tmpfs", 0, b"size=64m,mode=777") != 0)
    layers["unprivileged user"] = "on" if uid == 0 else "off: only root can become another user"
    probe("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
    probe("reaper of orphans", libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0)
    return layers


def _serve(channel: socket.socket) -> None:
    """The server's life: report the layers, then one test after the other until the parent has gone."""
    for signal_name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_name, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is ours
    home = tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(home, 0o777)
    uid = os.getuid()
    while (spare := os.dup(0)) < 8:  # 0 to 7 stay taken, so that `_enter_child` can lay its own there
        pass
    os.close(spare)
    try:
        _send(channel, _isolate(home))
        while True:
            message, descriptors = _receive(channel)
            if message is None:
                break
            _send(channel, _one_test(message | {"drop": uid == 0}, descriptors, home))
    finally:
        shutil.rmtree(home, ignore_errors=True)


# ---- the parent --------------------------------------------------------------------------------------------


class _Server:
    """A server process and our end of its channel."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), "--serve", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        theirs.close()
        self.layers = self.reply()

    def reply(self) -> dict:
        message, _ = _receive(self.channel)
        if message is None:
            raise RuntimeError("a sandbox server has died")
        return message

    def close(self) -> None:
        self.channel.close()
        self.process.wait()


class Sandbox:
    """Worker threads, each with a server. Thread-safe; use as a context manager."""

    def __init__(self, workers: int | None = None) -> None:
        """Start `workers` servers, by default one for each core."""
        count = workers or len(os.sched_getaffinity(0))
        self._jobs: queue.SimpleQueue[tuple[Job, Future] | None] = queue.SimpleQueue()
        self._servers = [_Server() for _ in range(count)]
        self.layers: dict[str, str] = self._servers[0].layers
        self._threads = [threading.Thread(target=self._work, args=(s,), daemon=True) for s in self._servers]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> "Future[list[TestResult]]":
        """Queue a job; returns at once."""
        future: Future[list[TestResult]] = Future()
        self._jobs.put((job, future))
        return future

    def run(self, jobs: Sequence[Job]) -> list[list[TestResult]]:
        """Run jobs on all workers; the results in order."""
        return [future.result() for future in [self.submit(job) for job in jobs]]

    def close(self) -> None:
        """Finish what is queued and stop the servers."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _work(self, server: _Server) -> None:
        judge = None
        while (entry := self._jobs.get()) is not None:
            job, future = entry
            try:
                results = []
                for test in job.tests:
                    if isinstance(test, AssertTest):
                        judge = judge or _Server()
                    results.append(_run_test(job, test, server, judge))
                    if job.stop_at_first_failure and results[-1].verdict != Verdict.PASSED:
                        break
                future.set_result(results)
            except BaseException as error:
                future.set_exception(error)
        server.close()
        if judge:
            judge.close()


def _run_test(job: Job, test: IoTest | AssertTest, server: _Server, judge: _Server | None) -> TestResult:
    """One test on a server, and, for an assert test, on the judge's server beside it."""
    limits = job.limits
    message = {
        "program": job.program,
        "entry_point": job.entry_point,
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "output_bytes": limits.output_bytes,
    }
    said: dict = {}
    if isinstance(test, IoTest):
        _send(server.channel, message | {"input": test.input})
        report = server.reply()
    else:
        ours, theirs = socket.socketpair()
        _send(server.channel, message, [theirs.fileno()])
        theirs.close()
        judging = {"setup": job.setup, "code": test.code, "entry_point": job.entry_point}
        judging |= {"seconds": limits.seconds + 5, "memory_bytes": 1 << 32, "output_bytes": 1 << 26}
        _send(judge.channel, judging, [ours.fileno()])
        ours.close()
        verdict = judge.reply()
        said = (
            json.loads(verdict["out"])
            if verdict["exit_code"] == 0 and not verdict["ended"]
            else {"verdict": ""}
        )
        report = server.reply()

    error = report["err"][report["err"].rfind("Traceback (most recent call last)") :] if report["err"] else ""
    if said.get("verdict") or (not report["ended"] and report["exit_code"] == 0 and isinstance(test, IoTest)):
        if isinstance(test, IoTest):
            right = outputs_match(report["out"], test.output)
            verdict = Verdict.PASSED if right else Verdict.WRONG_ANSWER
        else:
            verdict = Verdict(said["verdict"])
            if said.get("traceback", "").rstrip().endswith("MemoryError"):
                verdict = Verdict.OUT_OF_MEMORY
        error = said.get("traceback", "")
    elif report["ended"] in ("time", "output"):
        verdict = Verdict.TIMEOUT if report["ended"] == "time" else Verdict.TOO_MUCH_OUTPUT
    elif report["ended"] == "memory" or error.rstrip().endswith("MemoryError"):
        verdict = Verdict.OUT_OF_MEMORY
    else:
        verdict = Verdict.EXCEPTION
        error = error or f"the program ended with exit code {report['exit_code']}"
    cut = report["out"] if len(report["out"]) <= 65536 else report["out"][:65536] + "\n[output cut]"
    return TestResult(
        verdict,
        stdout=cut,
        traceback=error,
        call=said.get("call", ""),
        got=said.get("got", ""),
        expected=said.get("expected", ""),
        seconds=report["seconds"],
        peak_memory_bytes=report["peak"],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(socket.socket(fileno=int(sys.argv[2])))
        sys.exit()
    with Sandbox(workers=1) as executor:
        for layer, state in executor.layers.items():
            print(f"{layer:<20}{state}")
        print(executor.run([Job("print(int(input()) + 1)", (IoTest("41\n", "42\n"),))])[0][0])
