"""Runs programs that nobody trusts, and says for each test what happened.

Paper: section 2.1 runs generated code on public tests for feedback and on private tests for the reward, and
says no more. Reinforcement learning finds every hole in its grader, so the rules here are:

* A verdict is made from captured output, in the caller's process. The program's process, and every process
  that it descends from, never held an expected output, test code, another program or another test's input:
  these pass by as descriptors of unread memory files. Exit codes, printed markers and silence never mean
  "passed".
* Assert-style tests run in a *judge* process that never runs the program. There the function under test is a
  proxy: it sends the arguments to the program's process and decodes the answer with a strict codec of plain
  data (no pickle). A call that got no answer is never "passed", whatever the test makes of it.
* A test costs a fork, not an interpreter. A *keeper*, a small standard-library process (never a fork of the
  process that imported torch), forks a *server* for each worker, and a server forks a child for each test.
  For a program with many tests it first forks a *zygote*, which compiles the program, loads the standard
  modules that it imports at its top, and serves its tests. No state passes from test to test.

Layers hold a child back, each probed when a server starts (`Sandbox.layers`): namespaces of its own (user,
network, ipc, pid, mount), where all is read-only but a private tmpfs, its home, emptied after each test, and
/proc shows the sandbox alone; a user without rights, another one for each server, where we are root; no
capabilities, no new privileges; Landlock (reads what is installed, writes its home, signals nobody outside,
no TCP); a seccomp filter (no sockets, ptrace, mounts, namespaces, keyrings, ...); limits of address space,
file size, open files, processes, stack; a clean environment, its own session. Memory is that of the whole
process tree: looked at 20 times a second, and held by the kernel where we may make a control group (version
2, with memory and pids) beside the caller's, as in a systemd user's scope. When a test ends, its tree is
killed: by one signal to the pid namespace, in a zygote by walks over /proc.

Not covered: holes in the kernel; memory-safety bugs of CPython's compiler, which reads a program with many
tests in its zygote, held by the namespaces alone; without a control group, what a tree allocates in 50 ms
and what waits in the queues of its sockets, up to 26 MB a process; what the time that others take tells,
and process numbers, which count on from test to test. A program may read all that is installed. The limit of
time is one of wall clock, and slow programs share the cores (`overcommit`), half of them where quick ones
wait: one that is honest may time out beside many that hang by computing. To stop slow ones, and their clocks,
while others wait makes that worse: in our trial few of ten that needed a quarter of their limit then passed,
for all went on at once. Where layers are off, more: an ordinary user whose kernel refuses user namespaces
*and* Landlock lends a program all that he may read and write.

Honest programs notice: 64 threads or processes and 128 open files at most, no shared memory without a file
(nor what multiprocessing makes of it), no chmod. In assert tests arguments and results are copies, of
plain types: `is` between them is always false, a change deep in an argument replaces it.

Run alone: `python sandbox.py` prints the layers and runs one program.
"""

import _thread
import ast
import atexit
import builtins
import contextlib
import ctypes
import gc
import io
import json
import linecache
import mmap
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn

if sys.argv[:2] != ["-c", "--keep"]:  # the keeper does without: what it loads makes each of its forks slower
    import collections
    import subprocess
    import sysconfig
    from concurrent.futures import Future

RPC_BYTES, RPC_DEPTH = 16 << 20, 200  # longest message between judge and program, deepest nesting of a value
SHOWN, STDOUT_SHOWN = 2000, 1 << 16  # characters of a value or a traceback, and of an output, in a result
FILE_BYTES = 64 << 20  # of all files of a program together
PROCESSES = 64  # and threads of one test
ZYGOTE_TESTS, ZYGOTE_CHARACTERS = 3, 10_000  # from which on to compile a program once pays
JUDGE_SECONDS = 5  # that a judge may take beyond the program's limit
MOST_TIMEOUTS = 3  # of a job: a program that hangs in a hundred tests must not hold a worker for all of them
SLOW_SECONDS = 0.05  # a test that takes longer no longer counts as one of the busy workers
WATCH_SECONDS = 0.05  # how often the memory of a process tree is looked at
# What most contests' programs import is there before they are forked. Modules that are rarer, or that bring
# libraries of C, each of which makes every fork slower, are there for programs that name them.
LOADED_EARLY = "bisect collections copy functools heapq itertools math random re string typing".split()
LOADED_WHERE_NAMED = """
argparse datetime decimal difflib fractions logging pathlib queue statistics subprocess tempfile textwrap
""".split()
STREAM = io.IOBase.__mro__[1]  # an ordinary class: to ask the abstract one costs a child pages
NEVER_LOADED_EARLY = "antigravity idlelib lib2to3 site test this tkinter turtle turtledemo".split()


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


NOT_RUN = TestResult(Verdict.TIMEOUT, traceback=f"not run: {MOST_TIMEOUTS} tests before it took too long")


@dataclass(frozen=True)
class Job:
    """A program and its tests. After MOST_TIMEOUTS of them have timed out the rest is NOT_RUN."""

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


def _send(
    channel: socket.socket, message: dict, descriptors: Sequence[int] = (), behind: Sequence[memoryview] = ()
) -> None:
    """Send a message and what stands `behind` it; descriptors go with it and are closed here."""
    data = json.dumps(message).encode()
    parts = [struct.pack("!Q", len(data)) + data, *behind]
    try:
        sent = socket.send_fds(channel, parts, list(descriptors))  # all at once: the other side wakes once
        for part in parts:
            if sent < len(part):
                channel.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _read(channel: socket.socket, length: int) -> bytes:
    """Exactly so many bytes. Raises EOFError where the other side has gone."""
    data = bytearray()
    while len(data) < length:
        piece = channel.recv(min(1 << 20, length - len(data)))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _receive(channel: socket.socket, limit: int = 1 << 30, most: int = 0) -> tuple[dict, list[int]]:
    """The next message, and the descriptors (`most` at most) that came with it.

    Raises EOFError where the other side has gone, ValueError where what it sent is no message or too long.
    """
    header, descriptors, _, _ = socket.recv_fds(channel, 8, most)
    if not header:
        raise EOFError
    (length,) = struct.unpack("!Q", header + _read(channel, 8 - len(header)))
    if length > limit:
        raise ValueError(f"a message of {length} bytes, more than {limit}")
    return json.loads(_read(channel, length)), descriptors


PLAIN = {  # how each type of plain data reads an instance; a subclass may say anything of itself
    int: int.__index__,
    float: float.__float__,
    complex: complex.__complex__,
    str: str.__str__,
    bytes: bytes.__bytes__,
    list: list.__iter__,
    tuple: tuple.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
    dict: dict.items,
}


def _pack(value: object, depth: int = 0) -> object:
    """Plain data as JSON; TypeError for all else.

    What is of a subclass (a Counter, a namedtuple, an IntEnum) goes as what its plain type has of it. A match
    goes as the tuple of its text and groups: MBPP+ has functions that may return one, as something true.
    """
    if value is None or type(value) is bool:
        return value
    if depth > RPC_DEPTH:
        raise TypeError(f"a value nested deeper than {RPC_DEPTH} levels")
    if type(value) is re.Match:
        value = (value[0], *value.groups())
    kind = type(value)
    if kind not in PLAIN:
        kind = next((plain for plain in PLAIN if issubclass(kind, plain)), None)
        if kind is None:
            raise TypeError(f"a value of type {type(value).__name__} is not plain data")
    value = PLAIN[kind](value)
    if kind in (str, float) or kind is int and abs(value) < 1 << 63:
        return value
    if kind is int:
        return {"int": hex(value)}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is dict:
        return {"dict": [[_pack(k, depth + 1), _pack(v, depth + 1)] for k, v in value]}
    return {kind.__name__: [_pack(item, depth + 1) for item in value]}


def _unpack(packed: object, depth: int = 0) -> object:
    """The inverse of `_pack`; raises some Exception for anything that `_pack` does not make."""
    if packed is None or type(packed) in (bool, str, int, float):
        return packed
    if depth > RPC_DEPTH or type(packed) is not dict:
        raise ValueError("not packed data")
    ((kind, content),) = packed.items()
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        real, imaginary = content
        return complex(float.fromhex(real), float.fromhex(imaginary))
    if kind == "bytes":
        return bytes.fromhex(content)
    if type(content) is not list:
        raise ValueError("not packed data")
    if kind == "dict":
        return {_unpack(key, depth + 1): _unpack(value, depth + 1) for key, value in content}
    make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return make(_unpack(item, depth + 1) for item in content)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}\n[cut]"


def _shown(value: object) -> str:
    try:
        return _cut(repr(value), SHOWN)
    except ValueError:  # an int of more digits than Python converts
        return f"<{type(value).__name__}, too long to show>"


def candidate_traceback(error: BaseException) -> str:
    """The traceback of an error, without the frames that are not the program's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "solution.py"]
    lines = [f'  File "solution.py", line {f.lineno}, in {f.name}\n    {f.line}\n' for f in frames[-20:]]
    head = ["Traceback (most recent call last):\n"] if lines else []
    return "".join([*head, *lines, *traceback.format_exception_only(error)])


# ---- the program's process ---------------------------------------------------------------------------------


def _compile(source: str) -> types.CodeType:
    linecache.cache["solution.py"] = (len(source), None, source.splitlines(True), "solution.py")
    return compile(source, "solution.py", "exec", dont_inherit=True)


def _run_program(program: str | types.CodeType, entry_point: str, calls: socket.socket | None) -> int:
    """In the child: run the program, then (assert tests) answer the judge's calls. Returns the exit code."""
    out = sys.stdout
    module = types.ModuleType("solution" if calls else "__main__")
    sys.modules[module.__name__] = module
    module.__builtins__, module.__file__ = builtins, "solution.py"  # as a script has them
    exit_code = 0
    try:
        code = _compile(program) if isinstance(program, str) else program
        exec(code, module.__dict__)
        while calls:
            try:
                call, _ = _receive(calls)
            except EOFError:  # the judge has what it wants
                out.flush()
                return 0
            try:
                arguments, keywords = given = _unpack(call["given"])
                value = getattr(module, entry_point)(*arguments, **keywords)
                reply = {"value": _pack(value), "given": _pack(given)}
                if len(json.dumps(reply)) > RPC_BYTES:
                    raise ValueError(f"the result is longer than {RPC_BYTES} bytes")
            except BaseException as error:
                last = traceback.format_exception_only(error)[-1].strip()
                message = last.partition(": ")[2][:SHOWN]
                shown = candidate_traceback(error)
                known = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
                reply = {"error": known.__name__, "message": message, "traceback": shown[-SHOWN:]}
            _send(calls, reply)
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if exit_code and not isinstance(stop.code, int):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException as error:
        exit_code = 1
        sys.stderr.write(candidate_traceback(error))
    try:
        if _thread._count() or threading._threading_atexits:
            threading._shutdown()  # a program ends when its threads have ended
        atexit._run_exitfuncs()
        streams = [sys.stdout, sys.stderr, out]
        for value in vars(module).values():  # a program may write through its own: w = open(1, "w").write
            owner = getattr(value, "__self__", value)
            if isinstance(owner, STREAM):
                streams.append(owner)
        for stream in streams:
            try:
                if stream is not None:
                    stream.flush()
            except ValueError:  # closed, or detached by what was flushed before it
                pass
    except BaseException:
        exit_code = exit_code or 1
    return exit_code & 255


# ---- the judge's process -----------------------------------------------------------------------------------


class _CandidateError(Exception):
    """The function under test raised; carries its traceback."""

    trace = ""


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


def _error_like(reply: dict) -> _CandidateError:
    """The program's exception as a test may expect it: also of the builtin type of that name.

    Never an AssertionError, which is how a test says that it has failed, nor a StopIteration, which would end
    a test's loop over calls as if all had passed.
    """
    known = getattr(builtins, str(reply["error"]), None)
    message, never = str(reply["message"])[:SHOWN], (AssertionError, StopIteration)
    error = _CandidateError(message)
    if isinstance(known, type) and issubclass(known, Exception) and known not in never:
        try:
            made = type(known.__name__, (_CandidateError, known), {"__init__": Exception.__init__})
            error = made(message)
        except TypeError:  # an ExceptionGroup needs more than a message
            pass
    error.trace = str(reply["traceback"])[-SHOWN:]
    return error


def _judge(message: dict, calls: socket.socket) -> dict:
    """In the judge's child: run setup and test code with a proxy for the function under test."""
    told = {"call": "", "got": "", "expected": ""}
    lost = False  # a test that catches everything must not hide that a call had no answer

    def candidate(*arguments, **keywords):
        nonlocal lost
        listed = [*map(_shown, arguments), *(f"{name}={_shown(value)}" for name, value in keywords.items())]
        told["call"] = _cut(f"{message['entry_point']}({', '.join(listed)})", SHOWN)
        told["got"] = told["expected"] = ""
        request = {"given": _pack((arguments, keywords))}  # a TypeError here is the test's own
        try:
            _send(calls, request)
            reply, _ = _receive(calls, RPC_BYTES)
            if "error" in reply:
                error = _error_like(reply)
            else:
                value = _unpack(reply["value"])
                after, named = _unpack(reply["given"])
                for name in keywords:
                    after += (named[name],)
                for ours, theirs in zip([*arguments, *keywords.values()], after, strict=True):
                    if type(ours) is list is type(theirs):
                        ours[:] = theirs
                    elif type(ours) in (dict, set) and type(theirs) is type(ours):
                        ours.clear()
                        ours.update(theirs)
        except Exception as failure:
            lost = True
            raise _CandidateLost from failure
        if "error" in reply:
            raise error
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
        said = {"verdict": Verdict.PASSED.value}
    except AssertionError:
        said = {"verdict": Verdict.WRONG_ANSWER.value}
    except _CandidateError as error:
        memory = isinstance(error, MemoryError)
        said = {"verdict": Verdict.OUT_OF_MEMORY.value if memory else Verdict.EXCEPTION.value}
        said["traceback"] = error.trace
    except BaseException as error:  # the test could not work with what it was given
        text = "".join(traceback.format_exception_only(error))
        said = {"verdict": Verdict.EXCEPTION.value, "traceback": text[-SHOWN:]}
    return (told | said) if not lost else (told | {"verdict": ""})


# ---- layers ------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_capset, _sigprocmask = _libc.capset, _libc.sigprocmask  # looked up once, not in each child
# What os.fork does beside (locks of threads, which there are none of here, and a new seed for random) touches
# two hundred pages, each of which the child would copy.
_fork = ctypes.PyDLL(None).fork
_machine = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)  # the column of what follows
SYSTEM_DIRECTORIES = ["bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "sbin", "sys", "usr"]
AUDIT_ARCHITECTURE = (0xC000003E, 0xC00000B7)
CLOSED_CALLS = """
ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 kcmp 312 272 pidfd_getfd 438 438
mount 165 40 pidfd_send_signal 424 424 process_madvise 440 440 process_mrelease 448 448 socket 41 198
connect 42 203 bind 49 200 umount2 166 39 pivot_root 155 41 chroot 161 51 open_tree 428 428 move_mount 429 429
fsopen 430 430 fsconfig 431 431 fsmount 432 432 fspick 433 433 mount_setattr 442 442 open_tree_attr 467 467
unshare 272 97 setns 308 268 add_key 248 217 request_key 249 218 keyctl 250 219 bpf 321 280
perf_event_open 298 241 userfaultfd 323 282 io_uring_setup 425 425 io_uring_enter 426 426
io_uring_register 427 427 memfd_create 319 279 memfd_secret 447 447 shmget 29 194 shmat 30 196 shmctl 31 195
semget 64 190 msgget 68 186 mq_open 240 180 init_module 175 105 finit_module 313 273 delete_module 176 106
kexec_load 246 104 kexec_file_load 320 294 reboot 169 142 acct 163 89 swapon 167 224 swapoff 168 225
quotactl 179 60 quotactl_fd 443 443 sethostname 170 161 setdomainname 171 162 settimeofday 164 170
clock_settime 227 112 adjtimex 159 171 clock_adjtime 305 266 name_to_handle_at 303 264
open_by_handle_at 304 265 syslog 103 116 personality 135 92 fanotify_init 300 262 vhangup 153 58 iopl 172 -1
ioperm 173 -1 setpriority 141 140 sched_setaffinity 203 122 sched_setparam 142 118 sched_setscheduler 144 119
sched_setattr 314 274 ioprio_set 251 30 migrate_pages 256 238 move_pages 279 239 chmod 90 -1 fchmod 91 52
fchmodat 268 53 fchmodat2 452 452 chown 92 -1 fchown 93 55 lchown 94 -1 fchownat 260 54 setxattr 188 5
lsetxattr 189 6 fsetxattr 190 7 setxattrat 463 463 removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16
utime 132 -1 utimes 235 -1 futimesat 261 -1 utimensat 280 88 vmsplice 278 75 io_setup 206 0
inotify_add_watch 254 27
"""
ALLOW, REFUSE, MISSING, ANY = 0x7FFF0000, 0x50001, 0x50026, 0xFFFFFFFF  # refuse: EPERM; missing: ENOSYS
CHECKED_CALLS = (  # number, argument, its bits looked at, value, what then, what else (None: other rules)
    ((435, 435), 0, 0, 0, MISSING, None),  # clone3 hides its flags in memory; the C library then uses clone
    ((56, 220), 0, 0x7E020080, 0, ALLOW, REFUSE),  # clone: no new namespaces
    ((302, 261), 0, ANY, 0, ALLOW, REFUSE),  # prlimit64: of oneself
    ((53, 199), 1, 15, 1, ALLOW, REFUSE),  # socketpair: streams; another kind could be connected elsewhere
    *(((72, 25), 1, ANY, command, REFUSE, None) for command in (8, 10, 15)),  # fcntl: signals by F_SETOWN
    # ioctl: typing, and signals as by F_SETOWN.
    *(((16, 29), 1, ANY, command, REFUSE, None) for command in (0x5412, 0x541C, 0x8901, 0x8902)),
    # Memory that would count as nobody's: what is shared without a file stays when nobody has its pages, huge
    # pages and those on disk are counted apart, and the queue of a socket can be made long.
    *(((9, 222), 3, flags, flags, REFUSE, None) for flags in (0x21, 0x40000)),  # mmap
    *(((28, 233), 2, ANY, advice, REFUSE, None) for advice in (20, 21)),  # madvise: COLD, PAGEOUT
    ((54, 208), 2, ANY, 7, REFUSE, None),  # setsockopt: SO_SNDBUF
)
SIGNAL_CALLS = ((62, 129), (234, 131), (200, 130), (129, 138), (297, 240))  # kill, ..., rt_tgsigqueueinfo
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NO_CAPABILITIES, NO_SIGNALS = (struct.pack("Ii", 0x20080522, 0), bytes(24)), bytes(128)
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38


@dataclass
class _Jail:
    """What a server has prepared for its children."""

    home: str  # working directory of programs
    proc: int  # descriptor of /proc: our own, or else the machine's
    layers: dict[str, str]  # name -> "on" or "off: reason"
    pid: int = 0  # of the server, as the caller sees it
    user: int | None = None  # whom programs run as, where that is not us
    processes: int = PROCESSES  # that the user may have
    ruleset: int | None = None  # of Landlock
    signals_confined: bool = False  # by a pid namespace or by Landlock
    group: int | None = None  # descriptor of the server's control group
    memory_held: int = 0  # what the group may take at present
    kernel_kills: int = 0  # how many processes of the group the kernel has killed for their memory
    rules: ctypes.Structure | None = None  # of seccomp, where they are the same for all children
    buffers: tuple[mmap.mmap, ...] = ()  # for captured output

    def on(self, layer: str) -> bool:
        return self.layers.get(layer) == "on"


def _system(result: int) -> int:
    """The result of a system call; raises OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _seccomp_filter(only_process: int | None) -> ctypes.Structure:
    """The filter of system calls, a program for the kernel's little machine.

    Args:
        only_process: signals may go to this process only; None: to all that the other layers let it see.
    """
    load, equal, greater, mask, give = 0x20, 0x15, 0x25, 0x54, 0x06
    number, architecture, arguments = (load, 0, 0, 0), (load, 0, 0, 4), 16
    code = [architecture, (equal, 1, 0, AUDIT_ARCHITECTURE[_machine]), (give, 0, 0, REFUSE)]
    code += [number, (greater, 0, 1, 0x3FFFFFFF), (give, 0, 0, REFUSE)]  # x32 would have other numbers
    checked = list(CHECKED_CALLS)
    if only_process is not None:
        checked += [(calls, 0, ANY, only_process, ALLOW, REFUSE) for calls in SIGNAL_CALLS]
    for calls, argument, bits, value, then, other in checked:
        last = number if other is None else (give, 0, 0, other)
        looked = [(load, 0, 0, arguments + 8 * argument), (mask, 0, 0, bits)]
        steps = [*looked, (equal, 0, 1, value), (give, 0, 0, then), last]
        code += [(equal, 0, len(steps), calls[_machine]), *steps]
    for call in map(int, CLOSED_CALLS.split()[1 + _machine :: 3]):
        if call >= 0:
            code += [(equal, 0, 1, call), (give, 0, 0, REFUSE)]
    code.append((give, 0, 0, ALLOW))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    return Program(len(code), b"".join(struct.pack("HBBI", *step) for step in code))


def _landlock(jail: _Jail, readable: Sequence[str]) -> None:
    """Make the ruleset that lets a program read what is installed and write its home."""
    version = _system(_libc.syscall(444, None, 0, 1))
    rights = (1 << (13 + (version > 1) + (version > 2))) - 1  # later ones: of devices, which nobody reaches
    fields = [rights, *[3] * (version > 3), *[3] * (version > 5)]  # TCP; abstract sockets and signals
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    jail.ruleset = _system(_libc.syscall(444, attributes, len(attributes), 0))
    jail.signals_confined |= version > 5
    read, file_rights = 0b1101, 0x4007  # execute, read files and directories; what a file can be given
    for path, wanted in [(jail.home, rights), ("/dev/null", 6), *((path, read) for path in readable)]:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            allowed = wanted & rights & (rights if os.path.isdir(path) else file_rights)
            _system(_libc.syscall(445, jail.ruleset, 1, struct.pack("=Qi", allowed, place), 0))
            os.close(place)


def _group_of(server: int) -> str:
    """The directory of a server's control group (version 2): beside the caller's, or below it at the top."""
    with open("/proc/self/mountinfo") as mounts, open("/proc/self/cgroup") as groups:
        tops = [words[4] for words in map(str.split, mounts) if words[words.index("-") + 1] == "cgroup2"]
        own = [line.strip()[3:] for line in groups if line.startswith("0::/")]
    if not tops or not own:
        raise OSError(0, "no control groups of version 2")
    return f"{tops[0]}{os.path.dirname(own[0]).rstrip('/')}/sandbox-{server}"


def _write(directory: int, name: str, text: str) -> None:
    with open(os.open(name, os.O_WRONLY, dir_fd=directory), "w") as file:
        file.write(text)


def _kernel_kills(jail: _Jail) -> int:
    """How many processes of the server's control group the kernel has killed for their memory so far."""
    with open(os.open("memory.events", os.O_RDONLY, dir_fd=jail.group), "rb", buffering=0) as events:
        return int(re.search(rb"oom_kill (\d+)", events.read(4096))[1])


def _isolate(home: str, readable: Sequence[str]) -> _Jail:
    """Put this server into what the kernel and the user allow; a pid namespace takes a fork on the way."""
    jail = _Jail(home, os.open("/proc", os.O_RDONLY), {})
    user, group = os.getuid(), os.getgid()

    def attempt(layer: str, action: Callable, *arguments: object) -> None:
        try:
            action(*arguments)
            jail.layers[layer] = "on"
        except OSError as error:
            jail.layers[layer] = f"off: {error.strerror}"

    def control_group() -> None:
        path = _group_of(os.getpid())
        above = os.open(os.path.dirname(path), os.O_RDONLY)
        with open(f"{os.path.dirname(path)}/cgroup.controllers") as controllers:
            if "memory" not in controllers.read():
                raise OSError(0, "no memory controller of version 2")
        _write(above, "cgroup.subtree_control", "+memory +pids")  # refused if it has processes itself
        os.makedirs(path, exist_ok=True)
        group = os.open(path, os.O_RDONLY)
        _write(group, "pids.max", str(PROCESSES + 2))  # with the server and a zygote
        if os.access("memory.swap.max", os.F_OK, dir_fd=group):
            _write(group, "memory.swap.max", "0")
        _write(group, "cgroup.procs", "0")
        jail.group = group

    def in_own_mounts() -> None:
        if not jail.on("mount namespace"):
            raise OSError(1, "it needs a mount namespace")

    def unshare(kind: int) -> None:
        _system(_libc.unshare(kind))

    def mount(kind: str, target: str, flags: int, options: str = "", source: str = "none") -> None:
        words = [word.encode() for word in (source, target, kind, options)]
        _system(_libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]))

    def user_namespace() -> None:
        unshare(NEW_USER)
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    def file_system() -> None:
        in_own_mounts()
        mount("", "/", 0x44000)  # private: what follows is seen by nobody else
        masked = [top.path for top in os.scandir("/") if top.is_dir(follow_symlinks=False)]
        masked = [top for top in masked if top[1:] not in SYSTEM_DIRECTORIES]
        inside = [path for path in readable if os.path.exists(path) and "/" + path.split("/")[1] in masked]
        held = {path: os.open(path, os.O_PATH) for path in inside}
        for top in masked:
            mount("tmpfs", top, 6, "size=1m,mode=755")
        for path, place in held.items():
            if not os.path.exists(path):  # it may be inside another
                os.makedirs(path)
                mount("", path, 0x5000, source=f"/proc/self/fd/{place}")
            os.close(place)
        os.makedirs(home)
        read_only_no_setuid = struct.pack("4Q", 3, 0, 0, 0)
        _system(_libc.syscall(442, -1, b"/", 0x8000, read_only_no_setuid, 32))  # all mounts
        mount("tmpfs", home, 6, f"size={FILE_BYTES},nr_inodes=16384,mode=777")

    def fresh_proc() -> None:
        in_own_mounts()
        mount("proc", "/proc", 14)

    def other_user() -> None:
        candidate = 20000 + jail.pid % 40000  # one for each server: the kernel counts processes by user
        os.setresgid(candidate, candidate, 0)
        os.setresuid(candidate, candidate, 0)
        try:
            open(os.__file__).close()  # an interpreter under /root may be out of its reach
        finally:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
        os.setgroups([])
        jail.user = candidate

    def seccomp() -> None:
        if _machine is None:
            raise OSError(0, f"no table of system calls for {os.uname().machine}")
        _system(_libc.syscall((317, 277)[_machine], 2, 0, struct.pack("I", 0x50000)))

    attempt("control group", control_group)
    if user:
        attempt("user namespace", user_namespace)
        if not jail.on("user namespace"):  # then the limit counts all that this user runs anywhere
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    if os.stat(f"/proc/{pid}").st_uid == user:
                        jail.processes += len(os.listdir(f"/proc/{pid}/task"))
                except OSError:
                    pass
    attempt("network namespace", unshare, NEW_NETWORK)
    attempt("ipc namespace", unshare, NEW_IPC)
    attempt("mount namespace", unshare, NEW_MOUNTS)
    attempt("pid namespace", unshare, NEW_PIDS)
    if jail.on("pid namespace"):
        if _fork():
            os._exit(0)  # the child is the namespace's first process; the keeper inherits it
        jail.signals_confined = True
    jail.pid = int(os.readlink("self", dir_fd=jail.proc))
    attempt("private file system", file_system)
    attempt("fresh /proc", fresh_proc)
    if jail.on("fresh /proc"):
        jail.proc = os.open("/proc", os.O_RDONLY)
    if not user:
        attempt("unprivileged user", other_user)
    attempt("no new privileges", lambda: _system(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    attempt("Landlock", _landlock, jail, [*readable, *["/proc"] * jail.on("fresh /proc")])
    attempt("seccomp filter", seccomp)
    if jail.signals_confined and jail.on("seccomp filter"):
        jail.rules = _seccomp_filter(None)
        if jail.on("private file system"):
            # Then the server has no use for what it closes: children inherit it.
            _system(_libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(jail.rules), 0, 0))
    os.chdir(home)
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # else a program of the same user could write our memory
    return jail


def _enter_child(jail: _Jail, message: dict, descriptors: Sequence[int]) -> None:
    """In the fresh child: take on every limit, and keep no descriptor but these, as 0, 1, 2 and perhaps 3."""
    os.setsid()
    if jail.group is not None and jail.user is not None:  # an ordinary user may not write this
        _write(jail.proc, "self/oom_score_adj", "1000")  # lest the kernel kill the server instead
    if jail.ruleset is not None:
        _system(_libc.syscall(446, jail.ruleset, 0))
    for target, source in enumerate(descriptors):
        os.dup2(source, target)  # the keeper keeps 0 to 7 taken: no source is overwritten before its turn
    os.closerange(len(descriptors), 1 << 20)
    _sigprocmask(signal.SIG_SETMASK, NO_SIGNALS, None)
    for what, most in (
        (resource.RLIMIT_AS, message["memory"] + FILE_BYTES),  # the interpreter's own share
        # None at all where it would fill the disk.
        (resource.RLIMIT_FSIZE, FILE_BYTES if jail.on("private file system") else 0),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, jail.processes),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (most, most))
    # Programs that recurse ask for more, or for no limit at all; the address space limits them anyway.
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (64 << 20 if most < 0 else min(64 << 20, most), most))
    if jail.user is not None:
        os.setresgid(jail.user, jail.user, jail.user)
        os.setresuid(jail.user, jail.user, jail.user)
    _system(_capset(*NO_CAPABILITIES))  # no capabilities, whoever we are
    if jail.on("seccomp filter") and not (jail.rules and jail.on("private file system")):
        rules = jail.rules or _seccomp_filter(os.getpid())
        _system(_libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(rules), 0, 0))


# ---- the server --------------------------------------------------------------------------------------------


def _about(jail: _Jail, pid: int | str, name: str) -> bytes:
    """The start of a file about a process; empty where the process has gone."""
    try:
        with open(os.open(f"{pid}/{name}", os.O_RDONLY, dir_fd=jail.proc), "rb", buffering=0) as file:
            return file.read(4096)
    except OSError:
        return b""


def _tree(jail: _Jail) -> list[int]:
    """Process ids below this process, as jail.proc has them."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir(jail.proc)):
        if stat := _about(jail, name, "stat"):
            children.setdefault(int(stat.rpartition(b")")[2].split()[1]), []).append(int(name))
    found = [int(os.readlink("self", dir_fd=jail.proc))]
    for pid in found:  # grows as we go
        found += children.get(pid, [])
    return found[1:]


def _tree_bytes(jail: _Jail, limit: int) -> int:
    """Memory of the process tree; what forks share counts once where it matters (to find out takes long)."""
    tree = _tree(jail)

    def resident(pid: int) -> int:
        return int((_about(jail, pid, "statm").split() or [0, 0])[1]) * mmap.PAGESIZE

    def proportional(pid: int) -> int:
        _, found, after = _about(jail, pid, "smaps_rollup").partition(b"Pss:")
        return int(after.split()[0]) * 1024 if found else resident(pid)  # perhaps it has just ended

    total = sum(map(resident, tree))
    return total if total <= limit else sum(map(proportional, tree))


def _kill_tree(jail: _Jail) -> None:
    """Kill and reap every process below this one: all orphans have become its children."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        if os.getpid() == 1:
            os.kill(-1, signal.SIGKILL)  # the whole pid namespace at once, which no fork can outrun
            os.waitpid(-1, 0)
            continue
        for process in _tree(jail):
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                pass


def _open_up(directory: str) -> None:
    try:
        os.chmod(directory, 0o700)
    except PermissionError:  # our own filter of system calls: then we have the capability to do without
        pass


def _empty(home: str) -> None:
    """Delete all files; pulls nested directories up instead of going down, because there may be thousands."""
    while entries := list(os.scandir(home)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            _open_up(entry.path)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    _open_up(inner.path)  # what we may not write we may not move
                os.rename(inner.path, f"{home}/{time.monotonic_ns()}")
            os.rmdir(entry.path)


def _live(
    jail: _Jail,
    message: dict,
    given: Sequence[int],
    outputs: Sequence[int],
    code: types.CodeType | None,
) -> NoReturn:
    """The life of a test's child, with the arguments of `_one_test`: it runs the program, or it judges."""
    exit_code = 1
    try:
        program = code or _contents(given[1])
        calls = [] if message["kind"] == "io" else given[-1:]
        _enter_child(jail, message, [given[0], *outputs, *calls])
        channel = socket.socket(fileno=3) if calls else None
        gc.enable()
        if message["kind"] == "judge":
            sys.stdout = sys.stderr = open(os.devnull, "w")
            os.write(1, json.dumps(_judge(json.loads(program), channel)).encode())
            exit_code = 0
        else:
            exit_code = _run_program(program, message["entry_point"], channel)
    finally:
        os._exit(exit_code)


def _one_test(
    channel: socket.socket, jail: _Jail, message: dict, given: list[int], code: types.CodeType | None
) -> dict:
    """Fork a child for one test, hold it to its limits, and report how it ended.

    Args:
        given: descriptors: standard input, the program (unless `code` has it), the channel of calls.
        code: the compiled program, in a zygote.
    Returns: the report. The captured output is in jail.buffers.
    """
    limit, calls = message["output"], [] if message["kind"] == "io" else given[-1:]
    if not jail.buffers or len(jail.buffers[0]) <= limit:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        jail.buffers = (mmap.mmap(-1, limit + 1, private), mmap.mmap(-1, limit + 1, private))
        for buffer in jail.buffers:
            buffer.madvise(mmap.MADV_DONTFORK)  # no later child may find what this one printed
    if jail.user is not None:
        _libc.setfsuid(jail.user)  # whoever may open /dev/stdout must own the pipe
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    if jail.user is not None:
        _libc.setfsuid(0)  # programs have another user only where we are root
    lengths, peak, ended, at_deadline = {out: 0, err: 0}, 0, "", "time"

    def capture(descriptor: int) -> int:
        room = memoryview(jail.buffers[descriptor == err])[lengths[descriptor] : limit + 1]
        count = os.readv(descriptor, [room])
        lengths[descriptor] += count
        return count

    # Before the fork, after which each page that is touched is copied.
    poller = select.poll()
    for descriptor in (out, err):
        poller.register(descriptor, select.POLLIN)
    for descriptor in (channel.fileno(), *calls * (message["kind"] == "assert")):
        poller.register(descriptor, select.POLLRDHUP)  # the caller or the judge has gone
    began = time.perf_counter()
    deadline, next_look = began + message["seconds"], began + WATCH_SECONDS
    pid = _fork()
    if pid == 0:
        _live(jail, message, given, (out_end, err_end), code)
    os.close(out_end)
    os.close(err_end)
    exited = os.pidfd_open(pid)
    poller.register(exited, select.POLLIN)
    while not ended:
        pause = min(next_look, deadline) - time.perf_counter()
        ready = {number for number, _ in poller.poll(max(0.0, pause) * 1000 + 0.5)}
        now = time.perf_counter()
        for descriptor in ready.intersection((out, err)):
            if not capture(descriptor):
                poller.unregister(descriptor)
        if sum(lengths.values()) > limit:
            ended = "output"
        elif exited in ready:
            break
        elif channel.fileno() in ready:
            ended = "gone"
        elif now >= deadline:
            ended = at_deadline
        elif calls and calls[0] in ready:  # nothing is left to wait for but what the program has printed
            poller.unregister(calls[0])
            deadline, at_deadline = min(deadline, now + 0.2), "judged"
        if now >= next_look and not ended:
            next_look = now + WATCH_SECONDS
            peak = max(peak, _tree_bytes(jail, message["memory"]))
            ended = "memory" if peak > message["memory"] else ""
    seconds = time.perf_counter() - began
    if ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    _kill_tree(jail)
    for descriptor in (out, err):  # what is left in the pipes; nobody can write any more
        while sum(lengths.values()) <= limit and capture(descriptor):
            pass
        os.close(descriptor)
    os.close(exited)
    _empty(jail.home)
    if jail.group is not None and (kills := _kernel_kills(jail)) > jail.kernel_kills:
        jail.kernel_kills, ended = kills, "memory"
    return {
        "ended": ended or ("output" if sum(lengths.values()) > limit else ""),
        "exit_code": os.waitstatus_to_exitcode(status),
        "out": lengths[out],
        "err": lengths[err],
        "seconds": seconds,
        "peak": max(peak, usage.ru_maxrss * 1024),
    }


def _load_early(source: str) -> None:
    """Import the standard modules that the program imports at its top, once for all of its tests."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    for name in sorted(names):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names | {"numpy"} and top not in NEVER_LOADED_EARLY:
            try:
                __import__(name)
            except Exception:  # the program's own import will say so
                pass


def _serve_program(channel: socket.socket, jail: _Jail, message: dict, program: int) -> None:
    """A zygote's life: compile the program within its limits, and serve its tests."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    code, reply = None, {"error": ""}
    jail.buffers = ()  # the server's were not forked
    try:
        source = _contents(program)
        resource.setrlimit(resource.RLIMIT_AS, (message["memory"] + FILE_BYTES, resource.RLIM_INFINITY))
        try:
            code = _compile(source)
            _load_early(source)
        except BaseException as error:
            verdict = Verdict.OUT_OF_MEMORY if isinstance(error, MemoryError) else Verdict.EXCEPTION
            reply = {"verdict": verdict.value, "error": candidate_traceback(error)}
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        gc.freeze()
        _send(channel, reply)
        _serve(channel, jail, code)
    finally:
        os._exit(0)


def _serve(channel: socket.socket, jail: _Jail, code: types.CodeType | None = None) -> None:
    """Run tests, or fork a zygote that does, until the caller has gone."""
    zygote = 0
    while True:
        try:
            message, given = _receive(channel, most=3)
        except EOFError:
            return
        if jail.group is not None and message.get("memory", jail.memory_held) != jail.memory_held:
            jail.memory_held = message["memory"]
            _write(jail.group, "memory.max", str(jail.memory_held + FILE_BYTES))  # with the server's share
        if message["kind"] == "zygote":
            zygote = _fork()
            if not zygote:
                channel.close()
                _serve_program(socket.socket(fileno=given[0]), jail, message, given[1])
        elif message["kind"] == "end":
            os.kill(zygote, signal.SIGKILL)
            _kill_tree(jail)
            _empty(jail.home)
            if jail.group is not None:
                jail.kernel_kills = _kernel_kills(jail)  # the zygote has told those that were its own
            _send(channel, {})
        else:
            report = _one_test(channel, jail, message, given, code)
            pairs = zip(jail.buffers, (report["out"], report["err"]), strict=True)
            _send(channel, report, behind=[memoryview(buffer)[:length] for buffer, length in pairs])
        for descriptor in given:
            os.close(descriptor)


def _look_like_a_program_s() -> None:
    """Give this process, for its forks to inherit, what a program finds in a fresh interpreter."""
    reader, pipe = os.pipe()  # a program's output is one: a stream looks once whether it can seek
    os.close(reader)  # else what the compiler says of one program fills it for all that follow
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    builtins.exit = builtins.quit = sys.exit  # the site module, which we do without, has them
    sys.argv = ["solution.py"]


def _keep() -> None:
    """The keeper's life: load what programs need, and fork a server for each channel that it is sent."""
    channel, site_packages = socket.socket(fileno=int(sys.argv[2])), sys.argv[3:-1]
    sys.path.remove(sys.argv[-1])  # no program shall import what lies beside this file, or know its name
    del sys.modules[__name__], sys.path_importer_cache[sys.argv[-1]]
    del sys.modules["__main__"].__dict__[__name__]
    os.setsid()
    # Ctrl-C is for the caller, whose end is ours. Blocked, not ignored: children need only an empty mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    while (spare := os.dup(0)) < 8:  # 0 to 7 stay taken, so that `_enter_child` can lay its own there
        pass
    os.close(spare)
    _look_like_a_program_s()
    sys.path += site_packages
    for name in LOADED_EARLY:
        __import__(name)
    random.seed(0)  # with PYTHONHASHSEED: a program ends the same way in each run
    readable = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    readable += ["/dev/random", "/dev/urandom", sys.base_prefix, *site_packages]
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a fork would copy every page that it looks at
    homes = f"/tmp/sandbox-{os.getpid()}-{time.time_ns()}"
    os.mkdir(homes, 0o711)
    servers = []
    try:
        while True:
            request, (descriptor,) = _receive(channel, most=1)
            home = f"{homes}/{time.time_ns()}"
            os.mkdir(home)
            os.chmod(home, 0o777)
            servers.append(_fork())
            if servers[-1] == 0:
                try:
                    channel.close()
                    os.setsid()  # where the kernel shares out cores by session, to each server its part
                    for name in request["modules"]:
                        __import__(name)
                    gc.collect()
                    gc.freeze()
                    jail = _isolate(home, readable)
                    os.environ |= {"HOME": home, "TMPDIR": home}
                    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                    theirs = socket.socket(fileno=descriptor)
                    _send(theirs, {"layers": jail.layers, "pid": jail.pid})
                    _serve(theirs, jail)
                finally:
                    os._exit(0)
            os.close(descriptor)
    except EOFError:
        pass
    finally:
        try:
            while os.wait():
                pass
        except ChildProcessError:
            _empty(homes)
            os.rmdir(homes)
        for server in servers:
            with contextlib.suppress(OSError):  # there may be none
                os.rmdir(_group_of(server))


# ---- the caller's side -------------------------------------------------------------------------------------


class _Server:
    """Our end of a server's channel."""

    def __init__(self, sandbox: "Sandbox", modules: Sequence[str]) -> None:
        self.channel, theirs = socket.socketpair()
        with sandbox._turn:
            _send(sandbox._keeper, {"modules": modules}, [theirs.detach()])
        hello, _ = _receive(self.channel)
        self.layers, self.pid = hello["layers"], hello["pid"]

    def kill(self) -> None:
        self.channel.close()
        # Its parent, the keeper, does not reap: the number is still its own.
        os.kill(self.pid, signal.SIGKILL)


def _memory_file(text: str) -> int:
    """A descriptor of a file in memory, to be read from its start."""
    descriptor = os.memfd_create("sandbox")
    os.pwrite(descriptor, text.encode("utf-8", "surrogatepass"), 0)
    return descriptor


def _contents(memory_file: int) -> str:
    return os.pread(memory_file, os.fstat(memory_file).st_size, 0).decode("utf-8", "surrogatepass")


class Sandbox:
    """Worker threads, each with a server. Thread-safe; use as a context manager.

    `layers` has "on" or "off: reason" for each layer of isolation.
    """

    def __init__(self, workers: int | None = None, overcommit: int = 5) -> None:
        """Start the keeper and a server.

        Args:
            workers: tests that run at once; by default one for each core.
            overcommit: a test that takes longer than `SLOW_SECONDS` is slow: it no longer counts as one of
                them, lest programs that hang hold up the others, up to `overcommit` times `workers` of them.
                All share the cores; so that the quick ones get their part, beside many slow ones more than
                `workers` of them run: at most 12 tests a worker in all (by default), each with its memory;
                fewer where the limit of open files is low, for each takes up to three.
        """
        self._keeper, theirs = socket.socketpair()
        paths = sysconfig.get_paths()
        # A module, not a script, is compiled once for good: a compiler would leave each fork its memory.
        directory, module = os.path.split(os.path.splitext(os.path.abspath(__file__))[0])
        keep = f"import sys; sys.path.append(sys.argv[-1]); import {module}; {module}._keep()"
        command = [sys.executable, "-PsS", "-c", keep, "--keep", str(theirs.fileno())]
        command += [*{paths["purelib"], paths["platlib"]}, directory]
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # sets of words are in the same order in each run
            "MALLOC_ARENA_MAX": "2",  # else each thread takes 64 MiB of address space
            "LD_BIND_NOW": "1",  # else each child looks up the same symbols anew
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, **silent)
        theirs.close()
        self._workers = workers or len(os.sched_getaffinity(0))
        self._most_slow, self._open = self._workers * overcommit, True
        self._quick = self._slow = 0  # tests that run
        self._more = 0  # quick ones that may run beyond `workers`
        self._turn = threading.Condition()
        self._jobs: collections.deque[tuple[Job, Future]] = collections.deque()
        self._most_threads = max(self._workers, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        first = _Server(self, [])
        self.layers: dict[str, str] = first.layers
        self._threads: list[threading.Thread] = []
        for server in [first, *[None] * (self._workers - 1)]:
            self._start_worker(server)

    @property
    def layers_off(self) -> str:
        """The layers that are off, with reasons, in one line; empty where all are on."""
        return "; ".join(f"{layer} {state}" for layer, state in self.layers.items() if state != "on")

    def submit(self, job: Job) -> "Future[list[TestResult]]":
        """Queue a job; returns at once."""
        future: Future[list[TestResult]] = Future()
        with self._turn:
            self._jobs.append((job, future))
            self._turn.notify()
        return future

    def run(self, jobs: Sequence[Job]) -> list[list[TestResult]]:
        """Run jobs on all workers; the results in order."""
        futures = [self.submit(job) for job in jobs]
        results = [future.result() for future in reversed(futures)]  # the last first: to wake once is enough
        return results[::-1]

    def close(self) -> None:
        """Finish what is queued and stop the servers."""
        with self._turn:
            self._open = False  # no more threads
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()
        self._keeper.close()
        self._process.wait()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _make_room(self) -> None:
        """Let those go on who wait, and see that there are workers for all places. To be called in turn."""
        with contextlib.suppress(RuntimeError):  # no more threads for us: go on with those there are
            places = min(self._workers + self._more + self._slow, self._most_threads)
            while self._open and len(self._threads) < places:
                self._start_worker()
        # A quick test that ends leaves its place and opens one; when all is over, all shall see it.
        self._turn.notify(2 if self._open else len(self._threads))

    def _start_worker(self, server: _Server | None = None) -> None:
        thread = threading.Thread(target=_Worker(self, server).work, daemon=True)
        thread.start()
        self._threads.append(thread)


class _Worker:
    """Takes jobs from the queue, one after the other."""

    def __init__(self, sandbox: Sandbox, server: _Server | None) -> None:
        self.sandbox = sandbox
        self.servers = {"programs": server} if server else {}  # for what -> server
        self.slow = False

    def work(self) -> None:
        """The worker's life, in a thread of its own."""
        while entry := self.next_job():
            job, future = entry
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(self.results(job))
            except BaseException as error:
                future.set_exception(error)
            finally:
                self.ends()
        for server in self.servers.values():
            server.channel.close()

    def server(self, purpose: str, modules: Sequence[str] = ()) -> _Server:
        """This worker's server for a purpose, started when it is first needed."""
        if purpose not in self.servers:
            self.servers[purpose] = _Server(self.sandbox, modules)
        return self.servers[purpose]

    def next_job(self) -> "tuple[Job, Future] | None":
        """Wait for a job and a place among the quick ones; nothing once the sandbox is closed.

        The job is taken when there is a place, lest one that waits is overtaken by those behind it.
        """
        sandbox = self.sandbox

        def may_go_on() -> bool:
            place = sandbox._quick < sandbox._workers + sandbox._more
            return place if sandbox._jobs else not sandbox._open

        with sandbox._turn:
            sandbox._turn.wait_for(may_go_on)
            if not sandbox._jobs:
                return None
            sandbox._quick += 1
            self.slow = False
            return sandbox._jobs.popleft()

    def is_slow(self) -> None:
        """Leave the place among the quick ones to another worker."""
        sandbox = self.sandbox
        if self.slow:
            return
        with sandbox._turn:
            sandbox._more = 0  # else programs that all are slow would be let in ever faster
            if sandbox._slow < sandbox._most_slow:
                self.slow = True
                sandbox._quick, sandbox._slow = sandbox._quick - 1, sandbox._slow + 1
                sandbox._make_room()

    def ends(self) -> None:
        """Give up the place. Beside many slow tests each quick one opens one more, by which all quick ones
        together have half of the cores or a little more, however many hang; each slow one alone has the less.
        """
        sandbox = self.sandbox
        with sandbox._turn:
            if self.slow:
                sandbox._slow -= 1
            else:
                sandbox._quick -= 1
                sandbox._more += 1
            sandbox._more = min(sandbox._more, max(0, sandbox._slow - sandbox._workers) * 3 // 2)
            sandbox._make_room()

    def results(self, job: Job) -> list[TestResult]:
        """Run a job's tests."""
        results: list[TestResult] = []
        stuck, imported, server_for = 0, _imported(job.program), ("programs", ())
        if not imported.isdisjoint(LOADED_WHERE_NAMED):
            server_for = ("programs that import more", LOADED_WHERE_NAMED)
        while len(results) < len(job.tests):
            if stuck == MOST_TIMEOUTS:
                return results + [NOT_RUN] * (len(job.tests) - len(results))
            server = self.server(*server_for)
            if job.entry_point:
                self.server("judges")
            try:
                for result in self.results_from(job, len(results), server.channel, bool(imported)):
                    results.append(result)
                    stuck += result.verdict == Verdict.TIMEOUT
                    if job.stop_at_first_failure and result.verdict != Verdict.PASSED:
                        return results
                    if stuck == MOST_TIMEOUTS:
                        break
            except BaseException as error:  # what a server may yet say is no answer to another test
                for ill in self.servers.values():
                    ill.kill()
                self.servers = {}
                if not isinstance(error, (OSError, EOFError)):
                    raise
                stuck += 1
                results.append(TestResult(Verdict.EXCEPTION, traceback="the program's server was lost"))
        return results

    def results_from(
        self, job: Job, first: int, server: socket.socket, imports: bool
    ) -> Iterator[TestResult]:
        """The results of the tests from number `first` on, in a zygote where that pays."""
        tests, limits = job.tests[first:], job.limits
        about = {"seconds": limits.seconds, "memory": limits.memory_bytes, "output": limits.output_bytes}
        about |= {"entry_point": job.entry_point}
        costly = imports or len(tests) * len(job.program) > ZYGOTE_CHARACTERS
        if not costly or len(tests) < ZYGOTE_TESTS:
            for test in tests:
                yield self.result(job, test, about, server, [_memory_file(job.program)])
            return
        channel, theirs = socket.socketpair()
        try:
            given = [theirs.detach(), _memory_file(job.program)]
            _send(server, about | {"kind": "zygote"}, given)
            try:
                ready = self.reply(channel, limits.seconds)
            except TimeoutError:
                ready = {"verdict": Verdict.TIMEOUT, "error": "the program does not compile within the limit"}
            except (OSError, EOFError):
                ready = {"verdict": Verdict.EXCEPTION, "error": "the compiler crashed"}
            for test in tests:
                if ready["error"]:
                    yield TestResult(Verdict(ready["verdict"]), traceback=ready["error"][-SHOWN:])
                else:
                    yield self.result(job, test, about, channel, [])
        finally:  # also where the reader of this generator stops early
            channel.close()
            _send(server, {"kind": "end"})
            self.reply(server, 10.0)

    def result(
        self, job: Job, test: IoTest | AssertTest, about: dict, channel: socket.socket, program: list[int]
    ) -> TestResult:
        """One test on a server or a zygote and, for an assert test, on the judge's server beside it."""
        said: dict = {}
        patience = job.limits.seconds + 20  # the servers keep the time; this is for one that is itself ill
        if isinstance(test, IoTest):
            _send(channel, about | {"kind": "io"}, [_memory_file(test.input), *program])
            return _result(test, self.reply(channel, patience), said)
        ours, theirs = socket.socketpair()
        _send(channel, about | {"kind": "assert"}, [_memory_file(""), *program, theirs.detach()])
        judging = json.dumps({"setup": job.setup, "code": test.code, "entry_point": job.entry_point})
        limits = {
            "kind": "judge",
            "seconds": job.limits.seconds + JUDGE_SECONDS,
            "memory": 1 << 32,
            "output": 1 << 20,
        }
        given = [_memory_file(""), _memory_file(judging), ours.detach()]
        judge = self.servers["judges"].channel
        _send(judge, about | limits, given)
        spoken = self.reply(judge, patience)
        if spoken["exit_code"] == 0 and not spoken["ended"]:
            said = json.loads(spoken["out"])
        elif spoken["ended"] == "time":  # what it was told kept it busy
            said = {"verdict": Verdict.TIMEOUT.value}
        return _result(test, self.reply(channel, patience), said)

    def reply(self, channel: socket.socket, seconds: float) -> dict:
        """The next reply, with the outputs that follow a report."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        while not poller.poll(1000 * min(SLOW_SECONDS, seconds)):
            self.is_slow()
            if time.monotonic() >= deadline:
                raise TimeoutError
        message, _ = _receive(channel)
        return message | {name: _read(channel, message[name]) for name in ("out", "err") if name in message}


def _imported(program: str) -> set[str]:
    """The words of a program's lines of imports: among them the modules that it names there."""
    lines = re.findall(r"^[ \t]*(?:import|from)\b.*", program, re.MULTILINE)
    return set(re.findall(r"\w+", " ".join(lines)))


def _result(test: IoTest | AssertTest, report: dict, said: dict) -> TestResult:
    """The verdict, from how the program ended and what the judge said (nothing where no judge spoke)."""
    out, err = (report[name].decode("utf-8", "replace") for name in ("out", "err"))
    error = err[max(0, err.rfind("Traceback (most recent call last)")) :][-SHOWN:]
    beyond = {"time": Verdict.TIMEOUT, "output": Verdict.TOO_MUCH_OUTPUT, "memory": Verdict.OUT_OF_MEMORY}
    if report["ended"] in beyond:
        verdict = beyond[report["ended"]]
    elif said.get("verdict"):
        verdict, error = Verdict(said["verdict"]), said.get("traceback", "")
    elif isinstance(test, IoTest) and report["exit_code"] == 0 and not report["ended"]:
        verdict, error = Verdict.PASSED if outputs_match(out, test.output) else Verdict.WRONG_ANSWER, ""
    else:
        verdict = Verdict.OUT_OF_MEMORY if error.rstrip().endswith("MemoryError") else Verdict.EXCEPTION
        error = error or f"the program ended with exit code {report['exit_code']}"
    told = {name: said.get(name, "") for name in ("call", "got", "expected")}
    told |= {"seconds": report["seconds"], "peak_memory_bytes": report["peak"]}
    return TestResult(verdict, _cut(out, STDOUT_SHOWN), error, **told)


if __name__ == "__main__":
    with Sandbox(workers=1) as executor:
        for layer, state in executor.layers.items():
            print(f"{layer:<22}{state}")
        print(executor.run([Job("print(int(input()) + 1)", (IoTest("41\n", "42\n"),))])[0][0])
