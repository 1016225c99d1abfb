"""The caller's side of the machinery: start the keeper, ask it for servers, have tests run on them.

`sandbox.py` makes a verdict of what comes back. The keeper never loads this module.
"""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from isolation.messages import memory_file, read_bytes, receive, send

ZYGOTE_TESTS, ZYGOTE_CHARACTERS = 3, 10_000  # from these on it pays to compile a program once
JUDGE_SECONDS = 5  # that a judge may take beyond the program's limit
SLOW_SECONDS = 0.05  # a test that takes longer no longer counts as one of the busy workers
LOADED_WHERE_NAMED = """
argparse datetime decimal difflib fractions logging pathlib queue statistics subprocess tempfile textwrap
""".split()
DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where the keeper finds this package


class Keeper:
    """The keeper's process, as its caller sees it."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.turn = threading.Lock()  # requests come from many threads
        paths = sysconfig.get_paths()
        # A module, not a script, is compiled once for good: a compiler would leave each fork its memory.
        keep = "import sys; sys.path.append(sys.argv[-1]); import isolation.server; isolation.server.keep()"
        command = [sys.executable, "-PsS", "-c", keep, str(theirs.fileno())]
        command += [*{paths["purelib"], paths["platlib"]}, DIRECTORY]
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
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, **silent)
        theirs.close()

    def close(self) -> None:
        """Let the keeper end with its servers, and wait for it."""
        self.channel.close()
        self.process.wait()


class Server:
    """Our end of a server's channel."""

    def __init__(self, keeper: Keeper, modules: Sequence[str] = ()) -> None:
        self.channel, theirs = socket.socketpair()
        with keeper.turn:
            send(keeper.channel, {"modules": modules}, [theirs.detach()])
        hello, _ = receive(self.channel)
        self.layers, self.pid = hello["layers"], hello["pid"]


class Client:
    """A worker's servers, and how they run tests.

    Args:
        when_slow: called with this client again and again while a reply takes longer than SLOW_SECONDS.
    """

    def __init__(self, keeper: Keeper, when_slow: Callable[["Client"], None], server: Server | None) -> None:
        self.keeper, self.when_slow = keeper, when_slow
        self.slow = False  # the test that runs counts as slow
        self.servers = {"programs": server} if server else {}  # for what -> server

    def kill_servers(self) -> None:
        for server in self.servers.values():
            server.channel.close()
            os.kill(server.pid, signal.SIGKILL)  # the keeper does not reap it: the number is still its own
        self.servers = {}

    def close(self) -> None:
        for server in self.servers.values():
            server.channel.close()

    def server_for(self, job, imports: set[str]) -> Server:
        """The server for a job's program. It and the judges' are started when they are first needed."""
        modules = [] if imports.isdisjoint(LOADED_WHERE_NAMED) else LOADED_WHERE_NAMED
        programs = "programs that import more" if modules else "programs"
        for purpose, wanted in ((programs, modules), *[("judges", [])] * bool(job.entry_point)):
            if purpose not in self.servers:
                self.servers[purpose] = Server(self.keeper, wanted)
        return self.servers[programs]

    def reports(self, job, first: int, server: Server, imports: bool) -> Iterator[tuple]:
        """Run the tests of a `sandbox.Job` from number `first` on, in a zygote if that pays.

        Yields for each test: the test, how the program ended, what the judge says. If a zygote could not
        compile the program, the second is None, and the third has the verdict.
        """
        tests, limits = job.tests[first:], job.limits
        about = {"seconds": limits.seconds, "memory": limits.memory_bytes, "output": limits.output_bytes}
        about |= {"entry_point": job.entry_point}
        costly = imports or len(tests) * len(job.program) > ZYGOTE_CHARACTERS
        if not costly or len(tests) < ZYGOTE_TESTS:
            for test in tests:
                yield test, *self.report(job, test, about, server.channel, [memory_file(job.program)])
            return
        channel, theirs = socket.socketpair()
        try:
            send(server.channel, about | {"kind": "zygote"}, [theirs.detach(), memory_file(job.program)])
            try:
                failed = self.reply(channel, limits.seconds)
            except TimeoutError:
                failed = {"verdict": "timeout", "traceback": "the program does not compile within the limit"}
            except (OSError, EOFError):
                failed = {"verdict": "exception", "traceback": "the compiler crashed"}
            for test in tests:
                yield test, *((None, failed) if failed else self.report(job, test, about, channel, []))
        finally:  # also if the reader of this generator stops early
            channel.close()
            send(server.channel, {"kind": "end"})
            self.reply(server.channel, 10.0)

    def report(self, job, test, about: dict, channel: socket.socket, program: list[int]) -> tuple[dict, dict]:
        """One test on a server or a zygote and, for an assert test, on the judge's server beside it.

        Returns: how the program ended, and what the judge says (nothing if there is none).
        """
        patience = job.limits.seconds + 20  # the servers keep the time; this is for a server that fails to
        if hasattr(test, "input"):
            send(channel, about | {"kind": "io"}, [memory_file(test.input), *program])
            return self.reply(channel, patience), {}
        ours, theirs = socket.socketpair()
        send(channel, about | {"kind": "assert"}, [memory_file(""), *program, theirs.detach()])
        judging = json.dumps({"setup": job.setup, "code": test.code, "entry_point": job.entry_point})
        limits = {"seconds": job.limits.seconds + JUDGE_SECONDS, "memory": 1 << 32, "output": 1 << 20}
        judge, judgement = self.servers["judges"].channel, {}
        given = [memory_file(""), memory_file(judging), ours.detach()]
        send(judge, about | limits | {"kind": "judge"}, given)
        judged = self.reply(judge, patience)
        if judged["exit_code"] == 0 and not judged["ended"]:
            judgement = json.loads(judged["out"])
        elif judged["ended"] == "time":  # the answers that it got kept it busy
            judgement = {"verdict": "timeout"}
        return self.reply(channel, patience), judgement

    def reply(self, channel: socket.socket, seconds: float) -> dict:
        """The next reply, with the outputs that follow a report."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        while not poller.poll(1000 * min(SLOW_SECONDS, seconds)):
            self.when_slow(self)
            if time.monotonic() >= deadline:
                raise TimeoutError
        message, _ = receive(channel)
        outputs = [name for name in ("out", "err") if name in message]
        return message | {name: read_bytes(channel, message[name]) for name in outputs}


def imported(program: str) -> set[str]:
    """The words of a program's lines of imports: among them the modules that it names there."""
    lines = re.findall(r"^[ \t]*(?:import|from)\b.*", program, re.MULTILINE)
    return set(re.findall(r"\w+", " ".join(lines)))
