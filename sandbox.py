"""Runs programs that nobody trusts, and says for each test what happened.

Paper: section 2.1 runs generated code on public tests for feedback and on private tests for the reward, and
says no more. Reinforcement learning finds every hole in its grader, so the rules here are:

* A verdict is made from captured output, in the caller's process. The program's process never held an
  expected output, test code, another program or another test's input. Exit codes, printed markers and silence
  never mean "passed".
* Assert-style tests run in a *judge*, a process that never runs the program: there the function under test is
  a proxy. A call that got no answer is never "passed", whatever the test's code makes of it.
* A test costs a fork of a small *server*, not an interpreter, and never a fork of a process that has torch.
* Layers hold a program back (`Sandbox.layers`). docs/sandbox.md says what each does, and what is not covered.

This file is what a user of the sandbox sees; `isolation/` is the machinery: client, server, layers, child.

Run alone: `python sandbox.py` prints the layers and runs one program. It needs Linux.
"""

import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

from isolation.client import Client, Keeper, Server
from isolation.messages import NO_VERDICT, SHOWN, cut

STDOUT_SHOWN = 1 << 16  # characters of an output in a result
MOST_TIMEOUTS = 3  # of a job: a program that hangs in a hundred tests must not hold a worker for all of them


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
    output_bytes: int = 1 << 20  # of standard error; of standard output as many as what is expected needs


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
    call: str = ""  # assert tests, as far as they are known: the call, the value got, the value expected
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
    preamble: str = ""  # the trusted code that the program begins with
    stop_at_first_failure: bool = False  # leave out the results after the first test that fails
    name: str = "a job"  # of its problem, for messages


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


def result_of(test: IoTest | AssertTest, report: dict, judged: dict) -> TestResult:
    """The verdict, from how the program ended and what the judge says (nothing if there is no judge)."""
    out, err = (report[name].decode("utf-8", "replace") for name in ("out", "err"))
    error = err[max(0, err.rfind("Traceback (most recent call last)")) :][-SHOWN:]
    beyond = {"time": Verdict.TIMEOUT, "output": Verdict.TOO_MUCH_OUTPUT, "memory": Verdict.OUT_OF_MEMORY}
    if report["ended"] in beyond:
        verdict = beyond[report["ended"]]
    elif judged.get("verdict"):
        verdict, error = Verdict(judged["verdict"]), judged.get("traceback", "")
    elif isinstance(test, IoTest) and report["exit_code"] == 0 and not report["ended"]:
        verdict, error = Verdict.PASSED if outputs_match(out, test.output) else Verdict.WRONG_ANSWER, ""
    else:
        verdict = Verdict.OUT_OF_MEMORY if error.rstrip().endswith("MemoryError") else Verdict.EXCEPTION
        error = error or f"the program ended with exit code {report['exit_code']}"
    values = [judged.get(name, "") for name in ("call", "got", "expected")]
    return TestResult(verdict, cut(out, STDOUT_SHOWN), error, *values, report["seconds"], report["peak"])


def run_job(client: Client, job: Job) -> list[TestResult]:
    """Run a job's tests on a worker's servers. Raises: ValueError if they are wrong, whatever the program."""
    results = run_tests(client, job)
    if job.preamble and results and results[0].verdict == Verdict.EXCEPTION:
        (alone,) = run_tests(client, Job(job.preamble, (IoTest("", ""),), job.limits))
        if alone.verdict == Verdict.EXCEPTION:
            told = alone.traceback.strip().rpartition("\n")[2]
            raise ValueError(f"{job.name}: its preamble fails, whatever the program is: {told}")
    return results


def run_tests(client: Client, job: Job) -> list[TestResult]:
    """Run a job's tests one after the other, however they or their servers end."""
    results: list[TestResult] = []
    stuck = 0
    while len(results) < len(job.tests):
        if stuck == MOST_TIMEOUTS:
            return results + [NOT_RUN] * (len(job.tests) - len(results))
        server = client.server_for(job)
        try:
            for test, report, judged in client.reports(job, len(results), server):
                if judged.get("verdict") == NO_VERDICT:
                    raise ValueError(f"{job.name}: {judged['traceback']}")
                results.append(result_of(test, report, judged))
                stuck += results[-1].verdict == Verdict.TIMEOUT
                if job.stop_at_first_failure and results[-1].verdict != Verdict.PASSED:
                    return results
                if stuck == MOST_TIMEOUTS:
                    break
        except BaseException as error:  # a late reply of these servers is no answer to another test
            client.kill_servers()
            if not isinstance(error, (OSError, EOFError)):
                raise
            stuck += 1
            verdict = Verdict.TIMEOUT if isinstance(error, TimeoutError) else Verdict.EXCEPTION
            results.append(TestResult(verdict, traceback="the program's server was lost"))
    return results


class Sandbox:
    """Worker threads, each with a server. Thread-safe; use as a context manager.

    `layers` has "on" or "off: reason" for each layer of isolation.
    """

    def __init__(self, workers: int | None = None, overcommit: int = 5) -> None:
        """Start the keeper and a server.

        Args:
            workers: tests that run at once; by default one for each core.
            overcommit: up to `overcommit` times `workers` tests may be slow (longer than `SLOW_SECONDS`).
                These run beside the others, each with its memory; docs/sandbox.md says what this means.
        """
        if not hasattr(os, "pidfd_open"):
            raise ValueError("the sandbox needs Linux 5.3 or newer; WSL2, Docker and Colab have it")
        self._keeper = Keeper()
        self._workers = workers or len(os.sched_getaffinity(0))
        self._most_slow, self._open = self._workers * overcommit, True
        self._quick = self._slow = 0  # tests that run
        self._more = 0  # quick ones that may run beyond `workers`
        self._turn = threading.Condition()
        self._jobs: deque[tuple[Job, Future]] = deque()
        self._most_threads = max(self._workers, os.sysconf("SC_OPEN_MAX") // 4)
        try:
            first = Server(self._keeper)
            (trial,) = run_job(Client(self._keeper, lambda _: None, first), Job("", (IoTest("", ""),)))
            if trial.verdict != Verdict.PASSED:
                raise RuntimeError(trial.traceback)
        except (OSError, EOFError, RuntimeError) as error:
            self._keeper.close()
            raise ValueError(f"the sandbox cannot start here, is a limit (ulimit -a) low? {error}") from error
        self.layers: dict[str, str] = first.layers
        self._threads: list[threading.Thread] = []
        for server in [first, *[None] * (self._workers - 1)]:
            self._start_worker(server)

    @property
    def layers_off(self) -> str:
        """The layers that are off, with reasons, in one line; empty if all are on."""
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
        """Finish the queued jobs and stop the servers."""
        with self._turn:
            self._open = False  # no more threads
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()
        self._keeper.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _start_worker(self, server: Server | None = None) -> None:
        client = Client(self._keeper, self._turn_slow, server)
        thread = threading.Thread(target=self._work, args=(client,), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self, client: Client) -> None:
        """A worker's life, in a thread of its own: take jobs from the queue, one after the other."""
        while True:
            with self._turn:
                # A job is taken only when there is a place for it, so that jobs start in order.
                while self._quick >= self._workers + self._more if self._jobs else self._open:
                    self._turn.wait()
                if not self._jobs:
                    break
                self._quick += 1
                job, future = self._jobs.popleft()
            client.slow = False
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(run_job(client, job))
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._leave(client)
        client.close()

    def _turn_slow(self, client: Client) -> None:
        """A worker's test is slow: it leaves its place among the quick ones, if one more may be slow."""
        if client.slow:
            return
        with self._turn:
            self._more = 0  # else programs that are all slow would be let in ever faster
            if self._slow < self._most_slow:
                client.slow = True
                self._quick, self._slow = self._quick - 1, self._slow + 1
                self._make_room()

    def _leave(self, client: Client) -> None:
        """A worker's job has ended.

        Beside many slow tests each quick one that ends opens one more place. So all quick ones together have
        half of the cores or a little more, however many tests hang; each slow one has less.
        """
        with self._turn:
            if client.slow:
                self._slow -= 1
            else:
                self._quick -= 1
                self._more += 1
            self._more = min(self._more, max(0, self._slow - self._workers) * 3 // 2)
            self._make_room()

    def _make_room(self) -> None:
        """Wake workers that wait for a place, and start workers for new places. Called with `_turn` held."""
        with contextlib.suppress(RuntimeError):  # the system gives us no more threads: go on with these
            places = min(self._workers + self._more + self._slow, self._most_threads)
            while self._open and len(self._threads) < places:
                self._start_worker()
        # A quick test that ends leaves its place and opens one; at the end all workers wake to see it.
        self._turn.notify(2 if self._open else len(self._threads))


if __name__ == "__main__":
    with Sandbox(workers=1) as executor:
        for layer, state in executor.layers.items():
            print(f"{layer:<22}{state}")
        print(executor.run([Job("print(int(input()) + 1)", (IoTest("41\n", "42\n"),))])[0][0])
