"""The caller's side of the machinery: start the keeper, ask it for servers, have tests run on them."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time

from isolation.messages import memory_file, read_bytes, receive, send

ZYGOTE_TESTS, ZYGOTE_CHARACTERS = 3, 10_000  # from these on it pays to compile a program once
JUDGE_BYTES = 1 << 32  # the memory of a judge, or twice the program's if that is more
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
        place = tempfile.gettempdir()  # TMPDIR, or /tmp if it can be written; OSError if nothing can
        command = [sys.executable, "-PsS", "-c", keep, str(theirs.fileno()), place]
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
        self.channel.close()
        self.process.wait()


class Server:
    """Our end of a server's channel."""

    def __init__(self, keeper: Keeper, modules: list[str] = ()) -> None:
        self.channel, theirs = socket.socketpair()
        with keeper.turn:
            send(keeper.channel, {"modules": modules}, [theirs.detach()])
        hello, _ = receive(self.channel)
        self.layers, self.pid = hello["layers"], hello["pid"]


class Client:
    """A worker's servers, and how they run tests."""

    def __init__(self, keeper: Keeper, when_slow, server: Server | None) -> None:
        self.keeper = keeper
        self.when_slow = when_slow  # called with this client while a reply takes longer than SLOW_SECONDS
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

    def server_for(self, job) -> Server:
        """The server for a job's program. It and the judges' are started when they are first needed."""
        rare = not imported(job.program).isdisjoint(LOADED_WHERE_NAMED)
        programs, modules = ("programs that import more", LOADED_WHERE_NAMED) if rare else ("programs", ())
        for purpose, wanted in ((programs, modules), *[("judges", ())] * bool(job.entry_point)):
            if purpose not in self.servers:
                self.servers[purpose] = Server(self.keeper, wanted)
        return self.servers[programs]

    def reports(self, job, first: int, server: Server):
        """Run a job's tests from number `first` on. Yields each with what `report` returns."""
        tests, limits = job.tests[first:], job.limits
        about = {"seconds": limits.seconds, "memory": limits.memory_bytes, "entry_point": job.entry_point}
        about["output"] = [limits.output_bytes] * 2
        judging = about | {"judges": True, "output": [1 << 20] * 2, "seconds": limits.seconds + JUDGE_SECONDS}
        judging["memory"] = max(JUDGE_BYTES, 2 * limits.memory_bytes)
        with contextlib.ExitStack() as places:
            programs = places.enter_context(self.place(server, job.program, about, len(tests)))
            judges = None, []
            if job.entry_point:
                place = self.place(self.servers["judges"], job.setup, judging, len(tests))
                judges = places.enter_context(place)
            for test in tests:
                yield test, *self.report(test, about, programs, judging, judges)

    @contextlib.contextmanager
    def place(self, server: Server, source: str, about: dict, tests: int):
        """Where tests run: the channel of a zygote of this source if that pays, else that of the server.

        Yields: the channel, and what each test must bring: nothing to a zygote, else the source.
        """
        imports = imported(source)
        if tests < ZYGOTE_TESTS or not imports and tests * len(source) <= ZYGOTE_CHARACTERS:
            yield server.channel, [source]
            return
        channel, theirs = socket.socketpair()
        try:
            start = about | {"kind": "zygote", "imports": [*imports]}
            send(server.channel, start, [theirs.detach(), memory_file(source)])
            self.reply(channel, about["seconds"])  # it has compiled the source
            yield channel, []
        finally:  # also if the reader of this generator stops early
            channel.close()
            try:
                send(server.channel, {"kind": "end"})
                self.reply(server.channel, 10.0)
            except (OSError, EOFError):  # the server is lost, but the results that it gave are whole
                self.kill_servers()

    def report(self, test, about: dict, programs: tuple, judging: dict, judges: tuple) -> tuple[dict, dict]:
        """One test in its places: a program's and, for an assert test, a judge's beside it.

        Returns: how the program ended, and what the judge says (nothing if there is none).
        """
        patience = about["seconds"] + 20  # the servers keep the time; this is for a server that fails to
        (channel, program), (judge, setup), judgement = programs, judges, {}
        if judge is None:
            # In steps: a program may find the bound, but not by it the length of what is expected.
            out, err = about["output"]
            outputs = [(1 + 4 * len(test.output) // out) * out, err]
            message = about | {"kind": "io", "output": outputs}
            send(channel, message, [*map(memory_file, [test.input, *program])])
            return self.reply(channel, patience), {}
        ours, theirs = socket.socketpair()
        send(channel, about | {"kind": "assert"}, [*map(memory_file, ["", *program]), theirs.detach()])
        given = [*map(memory_file, [test.code, *setup]), ours.detach()]
        send(judge, judging | {"kind": "judge"}, given)
        judged = self.reply(judge, patience)
        if judged["exit_code"] == 0 and not judged["ended"]:
            with contextlib.suppress(ValueError):  # the test's code has ended its process itself
                judgement = json.loads(judged["out"].rpartition(b"\n")[2])
        elif judged["ended"] in ("time", "memory"):  # the answers that it got were too much
            judgement = {"verdict": "timeout" if judged["ended"] == "time" else "out of memory"}
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
        if not message.get("set_up", True):  # no verdict on the program
            raise RuntimeError("a test's process could not be set up: is a limit (ulimit -a) low?")
        if "printed" in message:
            message["out"], message["err"] = (read_bytes(channel, length) for length in message["printed"])
        return message


def imported(program: str) -> set[str]:
    """The words of a program's lines of imports: among them the modules that it names there."""
    lines = re.findall(r"^[ \t]*(?:import|from)\b.*", program, re.MULTILINE)
    return set(re.findall(r"\w+", " ".join(lines)))
