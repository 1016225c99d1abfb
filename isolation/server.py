"""The keeper and its servers: the processes that fork a child for each test.

The *keeper* is a fresh interpreter, never a fork of the process that imported torch, and forks a *server* for
each channel that it is sent. A server forks a child for each test, holds it to its limits, and reports how it
ended. For a program with many tests it first forks a *zygote*, which compiles the program, imports the
standard modules that it names at its top, and serves its tests in the same way. Judges run like programs. No
state passes from test to test, and a program finds no module, path or name of this project.
"""

import builtins
import contextlib
import gc
import json
import mmap
import os
import random
import resource
import select
import signal
import socket
import sys
import time
from types import CodeType
from typing import NoReturn

from isolation.judge import judge
from isolation.kernel import PR_SET_CHILD_SUBREAPER, fork, libc
from isolation.layers import FILE_BYTES, Jail, enter_child, group_directory, isolate, kernel_kills, write_file
from isolation.messages import contents, receive, send
from isolation.processes import empty, kill_tree, tree_bytes
from isolation.program import candidate_traceback, compile_program, load_early, run_program

WATCH_SECONDS = 0.05  # how often the memory of a test's processes is looked at
# Most programs of contests import these, so they are there before the fork. Modules that are rarer, or that
# bring libraries of C, each of which makes every fork slower, are loaded for programs that name them.
LOADED_EARLY = "bisect collections copy functools heapq itertools math random re string typing".split()


class Capture:
    """What the processes of one test print: two pipes, and the jail's buffers into which they are read."""

    def __init__(self, jail: Jail, limit: int) -> None:
        if not jail.buffers or len(jail.buffers[0]) <= limit:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            jail.buffers = (mmap.mmap(-1, limit + 1, private), mmap.mmap(-1, limit + 1, private))
            for buffer in jail.buffers:
                buffer.madvise(mmap.MADV_DONTFORK)  # no later child may find what this one printed
        if jail.user is not None:
            libc.setfsuid(jail.user)  # a program that opens /dev/stdout must own the pipe
        (self.out, out_end), (self.err, err_end) = os.pipe(), os.pipe()
        if jail.user is not None:
            libc.setfsuid(0)  # programs have another user only where we are root
        self.ends = (out_end, err_end)  # of the program
        self.limit, self.lengths = limit, {self.out: 0, self.err: 0}
        self.buffers = dict(zip(self.lengths, jail.buffers, strict=True))

    def read(self, descriptor: int) -> int:
        """Read what there is, up to one byte more than the limit. Returns the number of bytes."""
        room = memoryview(self.buffers[descriptor])[self.lengths[descriptor] : self.limit + 1]
        count = os.readv(descriptor, [room])
        self.lengths[descriptor] += count
        return count

    def too_much(self) -> bool:
        return sum(self.lengths.values()) > self.limit

    def read_rest(self) -> None:
        """Read what is left in the pipes when nobody can write any more, and close them."""
        for descriptor in (self.out, self.err):
            while not self.too_much() and self.read(descriptor):
                pass
            os.close(descriptor)


def run_test(
    channel: socket.socket, jail: Jail, message: dict, given: list[int], code: CodeType | None
) -> dict:
    """Fork a child for one test, hold it to its limits, and report how it ended.

    Args:
        given: descriptors: standard input, the program (unless `code` has it), the channel of calls.
        code: the compiled program, in a zygote.
    Returns: the report. The captured output is in jail.buffers.
    """
    calls = [] if message["kind"] == "io" else given[-1:]
    # Before the fork, after which each page that is touched is copied.
    capture = Capture(jail, message["output"])
    peak, ended, at_deadline = 0, "", "time"
    poller = select.poll()
    for descriptor in (capture.out, capture.err):
        poller.register(descriptor, select.POLLIN)
    for descriptor in (channel.fileno(), *calls * (message["kind"] == "assert")):
        poller.register(descriptor, select.POLLRDHUP)  # the caller or the judge has gone
    began = time.perf_counter()
    deadline, next_look = began + message["seconds"], began + WATCH_SECONDS
    pid = fork()
    if pid == 0:
        live(jail, message, given, capture.ends, code)
    for end in capture.ends:
        os.close(end)
    exited = os.pidfd_open(pid)
    poller.register(exited, select.POLLIN)
    while not ended:
        pause = min(next_look, deadline) - time.perf_counter()
        ready = {number for number, _ in poller.poll(max(0.0, pause) * 1000 + 0.5)}
        now = time.perf_counter()
        for descriptor in ready.intersection(capture.lengths):
            if not capture.read(descriptor):
                poller.unregister(descriptor)
        if capture.too_much():
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
            peak = max(peak, tree_bytes(jail.proc, message["memory"]))
            ended = "memory" if peak > message["memory"] else ""
    seconds = time.perf_counter() - began
    if ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    kill_tree(jail.proc)
    capture.read_rest()
    os.close(exited)
    empty(jail.home)
    if jail.group is not None and (kills := kernel_kills(jail)) > jail.kernel_kills:
        jail.kernel_kills, ended = kills, "memory"
    return {
        "ended": ended or ("output" if capture.too_much() else ""),
        "exit_code": os.waitstatus_to_exitcode(status),
        "out": capture.lengths[capture.out],
        "err": capture.lengths[capture.err],
        "seconds": seconds,
        "peak": max(peak, usage.ru_maxrss * 1024),
    }


def live(
    jail: Jail, message: dict, given: list[int], outputs: tuple[int, int], code: CodeType | None
) -> NoReturn:
    """The life of a test's child, with the arguments of `run_test`: it runs the program, or it judges."""
    exit_code = 1
    try:
        program = code or contents(given[1])
        calls = [] if message["kind"] == "io" else given[-1:]
        enter_child(jail, message["memory"], [given[0], *outputs, *calls])
        channel = socket.socket(fileno=3) if calls else None
        gc.enable()
        if message["kind"] == "judge":
            sys.stdout = sys.stderr = open(os.devnull, "w")
            os.write(1, json.dumps(judge(json.loads(program), channel)).encode())
            exit_code = 0
        else:
            exit_code = run_program(program, message["entry_point"], channel)
    finally:
        os._exit(exit_code)


def serve_program(channel: socket.socket, jail: Jail, message: dict, program: int) -> NoReturn:
    """A zygote's life: compile the program within its limits, and serve its tests."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    code, reply = None, {}
    jail.buffers = ()  # the server's were not forked
    try:
        source = contents(program)
        resource.setrlimit(resource.RLIMIT_AS, (message["memory"] + FILE_BYTES, resource.RLIM_INFINITY))
        try:
            code = compile_program(source)
            load_early(source)
        except BaseException as error:
            verdict = "out of memory" if isinstance(error, MemoryError) else "exception"
            reply = {"verdict": verdict, "traceback": candidate_traceback(error)}
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        gc.freeze()
        send(channel, reply)
        serve(channel, jail, code)
    finally:
        os._exit(0)


def serve(channel: socket.socket, jail: Jail, code: CodeType | None = None) -> None:
    """Run tests, or fork a zygote that does, until the caller has gone."""
    zygote = 0
    while True:
        try:
            message, given = receive(channel, most_files=3)
        except EOFError:
            return
        if jail.group is not None and message.get("memory", jail.memory_held) != jail.memory_held:
            jail.memory_held = message["memory"]
            write_file(jail.group, "memory.max", str(jail.memory_held + FILE_BYTES))  # with our own share
        if message["kind"] == "zygote":
            zygote = fork()
            if not zygote:
                channel.close()
                serve_program(socket.socket(fileno=given[0]), jail, message, given[1])
        elif message["kind"] == "end":
            os.kill(zygote, signal.SIGKILL)
            kill_tree(jail.proc)
            empty(jail.home)
            if jail.group is not None:
                jail.kernel_kills = kernel_kills(jail)  # the zygote has reported its own
            send(channel, {})
        else:
            report = run_test(channel, jail, message, given, code)
            pairs = zip(jail.buffers, (report["out"], report["err"]), strict=True)
            send(channel, report, data=[memoryview(buffer)[:length] for buffer, length in pairs])
        for descriptor in given:
            os.close(descriptor)


def forget_project(directory: str) -> None:
    """Remove this project from what a program can find: modules, directories, its name in `__main__`."""
    package = __name__.partition(".")[0]
    sys.path.remove(directory)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    for path in (directory, os.path.join(directory, package)):
        del sys.path_importer_cache[path]
    del sys.modules["__main__"].__dict__[package]


def mimic_fresh_interpreter() -> None:
    """Give this process, for its forks to inherit, what a program finds in a fresh interpreter."""
    reader, pipe = os.pipe()  # a program's output is one: a stream looks once whether it can seek
    os.close(reader)  # else the compiler's warnings of one program fill it for all that follow
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    builtins.exit = builtins.quit = sys.exit  # the site module, which we do without, has them
    sys.argv = ["solution.py"]


def become_server(channel: socket.socket, home: str, readable: list[str], modules: list[str]) -> Jail:
    """In the fork: load what its programs need, enter the layers, and report to the caller which are on."""
    os.setsid()  # where the kernel shares out cores by session, to each server its part
    for name in modules:
        __import__(name)
    gc.collect()
    gc.freeze()
    jail = isolate(home, readable)
    os.environ |= {"HOME": home, "TMPDIR": home}
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    send(channel, {"layers": jail.layers, "pid": jail.pid})
    return jail


def keep() -> None:
    """The keeper's life: load what programs need, and fork servers until the caller has gone."""
    channel, site_packages, directory = socket.socket(fileno=int(sys.argv[1])), sys.argv[2:-1], sys.argv[-1]
    forget_project(directory)
    os.setsid()
    # Ctrl-C is for the caller; we end when it ends. Blocked, not ignored: children need only an empty mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    while (spare := os.dup(0)) < 8:  # 0 to 7 stay taken, so that `enter_child` can put its own there
        pass
    os.close(spare)
    mimic_fresh_interpreter()
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
            request, (descriptor,) = receive(channel, most_files=1)
            home = f"{homes}/{time.time_ns()}"
            os.mkdir(home)
            os.chmod(home, 0o777)
            servers.append(fork())
            if servers[-1] == 0:
                try:
                    channel.close()
                    channel = socket.socket(fileno=descriptor)
                    serve(channel, become_server(channel, home, readable, request["modules"]))
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
            empty(homes)
            os.rmdir(homes)
        for server in servers:
            with contextlib.suppress(OSError):  # there may be no group
                os.rmdir(group_directory(server))
