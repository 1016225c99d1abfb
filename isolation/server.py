"""The keeper and its servers: the processes that fork a child for each test.

The *keeper* is a fresh interpreter and forks a *server* for each channel that it is sent. A server forks a
child for each test or, for a program with many tests, first a *zygote*, which compiles the program, imports
what it names at its top, and serves its tests in the same way. Judges run like programs. No state passes from
test to test, and a program finds no module, path or name of this project.
"""

import builtins
import contextlib
import gc
import mmap
import os
import random
import resource
import select
import signal
import socket
import sys
import time

from isolation.child import compile_program, compile_test, judge, run_program
from isolation.kernel import PR_SET_CHILD_SUBREAPER, check, clear, empty, fork, libc, tree_bytes
from isolation.layers import FILE_BYTES, Jail, enter_child, group_directory, isolate, kernel_kills, write_file
from isolation.messages import contents, receive, send

WATCH_SECONDS = 0.05  # how often the memory of a test's processes is looked at
# Most programs of contests import these, so they are there before the fork. Modules that are rarer, or that
# bring libraries of C, each of which makes every fork slower, are loaded for programs that name them.
LOADED_EARLY = "bisect collections copy functools heapq itertools math random re string typing".split()
NEVER_LOADED_EARLY = "antigravity idlelib lib2to3 site test this tkinter turtle turtledemo".split()


class Stream:
    """What the processes of a test write to one stream: a pipe, and a buffer into which it is read."""

    def __init__(self, limit: int, used: mmap.mmap | None) -> None:
        """Args: used: the buffer of the test before, which is taken again if it has the right size."""
        self.reader, self.writer = os.pipe()
        self.buffer = used
        if used is None or len(used) != limit + 1:
            self.buffer = mmap.mmap(-1, limit + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.buffer.madvise(mmap.MADV_DONTFORK)  # no later child finds what this one printed
        self.length, self.limit = 0, limit

    def read(self) -> int:
        """Read what there is, up to one byte more than the limit. Returns the number of bytes."""
        count = os.readv(self.reader, [memoryview(self.buffer)[self.length :]])
        self.length += count
        return count


def run_test(
    channel: socket.socket, jail: Jail, message: dict, given: list[int], code: object, buffers: list
) -> None:
    """Fork a child for one test, hold it to its limits, and report how it ended and what it printed.

    `given` are descriptors: standard input, the program unless a zygote has its `code`, the channel of calls.
    """
    calls = [] if message["kind"] == "io" else given[-1:]
    # Before the fork, after which each page that is touched is copied.
    libc.setfsuid(jail.user or 0)  # a program that opens /dev/stdout must own the pipe
    out, err = map(Stream, message["output"], buffers)
    libc.setfsuid(0)  # programs have another user only where we are root
    streams = {out.reader: out, err.reader: err}
    kills, peak, ended, at_deadline = kernel_kills(jail), 0, "", "time"
    poller = select.poll()
    for reader in streams:
        poller.register(reader, select.POLLIN)
    for descriptor in (channel.fileno(), *calls * (message["kind"] == "assert")):
        poller.register(descriptor, select.POLLRDHUP)  # the caller or the judge has gone
    began = time.perf_counter()
    deadline, next_look = began + message["seconds"], began + WATCH_SECONDS
    pid = check(fork())
    if pid == 0:
        live(jail, message, [given[0], out.writer, err.writer, *calls, jail.ready], code or given[1])
    for descriptor in (out.writer, err.writer):
        os.close(descriptor)
    exited = os.pidfd_open(pid)
    poller.register(exited, select.POLLIN)
    while not ended:
        pause = min(next_look, deadline) - time.perf_counter()
        ready = {number for number, _ in poller.poll(max(0.0, pause) * 1000 + 0.5)}
        now = time.perf_counter()
        for reader in ready.intersection(streams):
            if not streams[reader].read():
                poller.unregister(reader)
        if out.length > out.limit or err.length > err.limit:
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
    clear(jail.proc, jail.home)
    for stream in streams.values():
        while stream.read():  # what is left, now that nobody can write any more
            pass
    if kernel_kills(jail) > kills or usage.ru_maxrss * 1024 > message["memory"] + FILE_BYTES:
        ended = "memory"
    elif out.length > out.limit or err.length > err.limit:
        ended = ended or "output"
    for descriptor in (out.reader, err.reader, exited):
        os.close(descriptor)
    report = {
        "set_up": is_ready(jail) or bool(ended),
        "ended": ended,
        "exit_code": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "peak": max(peak, usage.ru_maxrss * 1024),
        "printed": [out.length, err.length],
    }
    send(channel, report, data=[memoryview(stream.buffer)[: stream.length] for stream in (out, err)])
    buffers[:] = out.buffer, err.buffer


def is_ready(jail: Jail) -> bool:
    """Whether a test's child has said that its set-up is done; for the next one it has not."""
    try:
        return bool(os.eventfd_read(jail.ready))
    except BlockingIOError:
        return False


def live(jail: Jail, message: dict, kept: list[int], given: object) -> None:
    """The life of a test's child. It keeps as 0, 1, 2: its streams, perhaps calls, how its set-up went."""
    exit_code, last = 1, len(kept) - 1
    try:
        program = contents(given) if isinstance(given, int) else given
        enter_child(jail, message["memory"], kept)
        os.eventfd_write(last, 1)
        os.close(last)
        calls = socket.socket(fileno=3) if last > 3 else None
        gc.enable()
        if message["kind"] == "judge":
            judge(program, contents(0), calls, message)
        exit_code = run_program(program, calls, message)
    finally:
        os._exit(exit_code)


def become_zygote(channel: socket.socket, jail: Jail, message: dict, program: int) -> None:
    """A zygote's life: compile a program or a judge's set-up within its limits, and serve tests."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        source = contents(program)
        before = resource.getrlimit(resource.RLIMIT_AS)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (message["memory"] + FILE_BYTES, before[1]))
            judges = message.get("judges")
            code = compile_test(source, message["entry_point"]) if judges else compile_program(source)
            known = sys.stdlib_module_names.union(() if judges else ("numpy",))  # a set-up may replace it
            for name in known.intersection(message["imports"]):
                if name not in NEVER_LOADED_EARLY:
                    with contextlib.suppress(Exception):  # the program's own import will raise it again
                        __import__(name)
        except BaseException:
            code = source  # each test will say what is wrong
        resource.setrlimit(resource.RLIMIT_AS, before)
        gc.freeze()
        send(channel, {})
        serve(channel, jail, code)
    finally:
        os._exit(0)


def serve(channel: socket.socket, jail: Jail, code: object = None) -> None:
    """Run tests, or fork a zygote that does, until the caller has gone."""
    zygote, buffers = 0, [None, None]
    while True:
        try:
            message, given = receive(channel, most_files=3)
        except EOFError:
            return
        if jail.group is not None and "memory" in message:
            write_file(jail.group, "memory.max", str(message["memory"] + FILE_BYTES))  # with our own share
        if message["kind"] == "zygote":
            zygote = check(fork())
            if not zygote:
                channel.close()
                become_zygote(socket.socket(fileno=given[0]), jail, message, given[1])
        elif message["kind"] == "end":
            os.kill(zygote, signal.SIGKILL)
            clear(jail.proc, jail.home)
            send(channel, {})
        else:
            run_test(channel, jail, message, given, code, buffers)
        for descriptor in given:
            os.close(descriptor)


def become_server(channel: socket.socket, home: str, readable: list[str], modules: list[str]) -> None:
    """A server's life: load what its programs need, enter the layers, say which are on, and serve."""
    os.setsid()  # where the kernel shares out cores by session, to each server its part
    for name in modules:
        __import__(name)
    gc.collect()
    gc.freeze()
    jail = isolate(home, readable)
    os.environ |= {"HOME": home, "TMPDIR": home}
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    send(channel, {"layers": jail.layers, "pid": jail.pid})
    serve(channel, jail)


def forget_project(directory: str) -> None:
    """Remove this project from what a program can find: modules, directories, its name in `__main__`."""
    sys.path.remove(directory)
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]
    for path in (directory, os.path.join(directory, __package__)):
        del sys.path_importer_cache[path]
    del sys.modules["__main__"].__dict__[__package__]


def mimic_fresh_interpreter() -> None:
    """Give this process, for its forks to inherit, what a program finds in a fresh interpreter."""
    reader, pipe = os.pipe()  # a program's output is one: a stream looks once whether it can seek
    os.close(reader)  # else the compiler's warnings of one program fill it for all that follow
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    # "\n" as in an interpreter on Linux, which leaves the "\r" of "\r\n" to the program.
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", newline="\n", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    builtins.exit = builtins.quit = sys.exit  # the site module, which we do without, has them
    sys.argv, sys.executable = ["solution.py"], os.path.realpath(sys.executable)  # a venv may be hidden


def keep() -> None:
    """The keeper's life: load what programs need, and fork servers until the caller has gone."""
    channel, place = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    site_packages, directory = sys.argv[3:-1], sys.argv[-1]
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
    sys.set_int_max_str_digits(0)  # the sets of problems are older than this limit
    readable = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    readable += ["/dev/random", "/dev/urandom", sys.base_prefix, *site_packages]
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a fork would copy every page that it looks at
    homes = f"{place}/sandbox-{os.getpid()}-{time.time_ns()}"
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
                    become_server(socket.socket(fileno=descriptor), home, readable, request["modules"])
                finally:
                    os._exit(0)
            os.close(descriptor)
    except EOFError:
        pass
    finally:
        with contextlib.suppress(ChildProcessError):
            while os.wait():
                pass
        empty(homes)
        os.rmdir(homes)
        for server in servers:
            with contextlib.suppress(OSError):  # there may be no group
                os.rmdir(group_directory(server))
