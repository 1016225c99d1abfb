"""The sandbox: verdicts of honest and of hostile programs, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import sandbox as sandbox_module
from formats.evalplus import read_row
from isolation import client, kernel
from isolation.client import ZYGOTE_CHARACTERS, Client, Server, imported
from isolation.messages import SHOWN
from sandbox import NOT_RUN, AssertTest, IoTest, Job, Limits, Sandbox, Verdict, outputs_match

SHORT = Limits(seconds=1.0, memory_bytes=256 << 20, output_bytes=1 << 16)

SEARCHES_ITS_MEMORY = """
import gc, sys
def f(x):
    frame, places = sys._getframe(), [o for o in gc.get_objects() if type(o) is dict]
    while frame:
        places += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    for place in places:
        for value in list(place.values()):
            if type(value) is int and value == 7200 + 3 or type(value) is str and str(7200 + 3) in value:
                return 7200 + 3
    return 0
"""


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("print(int(input()) + 1)", "passed"),
        ("import sys; sys.stdout.write(str(int(sys.stdin.buffer.read()) + 1))", "passed"),
        ("import threading; threading.Thread(target=lambda: print(42)).start()", "passed"),
        ("import sys; print(42); sys.exit()", "passed"),
        ("import atexit; atexit.register(print, 42)", "passed"),
        (
            "import sys\nsys.setrecursionlimit(10**6)\n"
            "def f(n): return n and 1 + f(n - 1)\nprint(f(10**5) - 99958)",
            "passed",
        ),
        ("print(41)", "wrong answer"),
        ("", "wrong answer"),
        ("import sys; sys.exit(0)", "wrong answer"),
        ("import os; os._exit(0)", "wrong answer"),
        ("print('passed')", "wrong answer"),
        (
            "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'42 passed')\n  except OSError: pass",
            "wrong answer",
        ),
        ("import os; os.fork(); print(21)", "wrong answer"),
        ("1 / 0", "exception"),
        ("print(42); raise SystemExit(1)", "exception"),
        ("import os, signal; print(42, flush=True); os.kill(os.getpid(), signal.SIGKILL)", "exception"),
        ("while True: pass", "timeout"),
        ("import time\nprint(42, flush=True)\ntime.sleep(60)", "timeout"),
        ("import os, time\nos.close(0); os.close(1); os.close(2)\ntime.sleep(60)", "timeout"),
        (
            "import signal, time\nfor s in (15, 2, 1): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
            "timeout",
        ),
        ("try:\n  while True: pass\nexcept BaseException: pass", "timeout"),
        ("x = 'a' * (1 << 30)", "out of memory"),
        (
            "import os, time\n"
            "for _ in range(4):\n  if os.fork() == 0: x = bytearray(150 << 20)\ntime.sleep(60)",
            "out of memory",
        ),
        ("while True: print('x' * 1000)", "too much output"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 1)", "exception"),
        ("open('big', 'wb').write(bytes(200 << 20))", "exception"),
    ],
)
def test_verdict_of_a_program(sandbox, program, verdict):
    limits = SHORT if verdict == "timeout" else replace(SHORT, seconds=10.0)
    ((result,),) = sandbox.run([Job(program, (IoTest("41\n", "42\n"),), limits)])
    assert result.verdict == verdict


@pytest.mark.parametrize(
    ("program", "test", "verdict"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", "passed"),
        ("def f(x): return x + 1", "assert candidate(1) == 2", "passed"),
        ("def f(x): x.append(3)", "a = [1]\nf(a)\nassert a == [1, 3]", "passed"),
        (
            "def f(x): return float('nan'), 1j, b'a', {1}, frozenset(), {2: None}",
            "assert f(0)[1:] == (1j, b'a', {1}, frozenset(), {2: None})",
            "passed",
        ),
        (
            "def f(x): raise ValueError('no')",
            "try:\n  f(1)\n  assert False\nexcept ValueError: pass",
            "passed",
        ),
        ("def f(x): return x", "assert f(1) == 2", "wrong answer"),
        (
            "class E:\n  def __eq__(self, other): return True\ndef f(x): return E()",
            "assert f(1) == 2",
            "exception",
        ),
        (
            "class E:\n  def __reduce__(self): return print, ('x',)\ndef f(x): return E()",
            "assert f(1) == 2",
            "exception",
        ),
        ("def f(x): raise AssertionError", "try:\n  f(1)\nexcept AssertionError: pass", "exception"),
        ("def f(x): return (i for i in range(9))", "assert list(f(1)) == [0]", "wrong answer"),
        ("def f(x):\n  while True: pass", "assert f(1) == 2", "timeout"),
        ("def f(x):\n  import os; os._exit(0)", "assert f(1) == 2", "exception"),
        ("def f(x): exit(0)", "assert f(1) == 2", "exception"),
        ("raise SystemExit", "assert f(1) == 2", "exception"),
        ("import os; os._exit(0)", "assert f(1) == 2", "exception"),
        ("x = 1", "assert f(1) == 2", "exception"),
        ("def f(x): return 'a' * (1 << 25)", "assert f(1) == 2", "wrong answer"),
        (
            "import sys\nsys.setrecursionlimit(10**6)\n"
            "def f(x):\n  a = []\n  for _ in range(10**4): a = [a]\n  return a",
            "assert f(1) == 2",
            "exception",
        ),
        (
            "import os\nfor fd in range(3, 64):\n"
            "  try: os.write(fd, b'\\0' * 8 + b'{\"verdict\": \"passed\"}')\n"
            "  except OSError: pass\ndef f(x): return 3",
            "assert f(1) == 2",
            "exception",
        ),
        (SEARCHES_ITS_MEMORY, "assert f(1) == 7203", "wrong answer"),
        ("def f(x): raise StopIteration", "assert all(map(lambda c: f(c) == 1, [1, 2]))", "exception"),
        (
            "class Bad(ValueError): pass\ndef f(x): raise Bad('no')",
            "try:\n  f(1)\n  assert False\nexcept ValueError as e: assert str(e) == 'no'",
            "passed",
        ),
    ],
)
def test_verdict_of_a_function(sandbox, program, test, verdict):
    limits = SHORT if verdict == "timeout" else replace(SHORT, seconds=10.0)
    ((result,),) = sandbox.run([Job(program, (AssertTest(test),), limits, entry_point="f")])
    assert result.verdict == verdict


@pytest.mark.parametrize(
    ("program", "plain"),
    [
        ("from collections import Counter\ndef f(x): return Counter('aab')", "{'a': 2, 'b': 1}"),
        ("from collections import defaultdict\ndef f(x): return defaultdict(list, a=[1])", "{'a': [1]}"),
        (
            "from collections import OrderedDict\ndef f(x): return [OrderedDict(b=1, a=2)]",
            "[{'a': 2, 'b': 1}]",
        ),
        ("from collections import namedtuple\ndef f(x): return namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("from enum import IntEnum\nE = IntEnum('E', 'a b')\ndef f(x): return {E.b: E.a}", "{2: 1}"),
        ("from enum import StrEnum\nclass E(StrEnum): a = 'b'\ndef f(x): return E.a", "'b'"),
        ("class F(float): pass\ndef f(x): return F('inf')", "float('inf')"),
        ("class B(bytes): pass\ndef f(x): return {B(b'a')}", "{b'a'}"),
        ("import re\ndef f(x): return re.match('(a)(b)?', 'acd')", "('a', 'a', None)"),
    ],
)
def test_what_is_of_a_subclass_of_a_plain_type_counts_as_that_type(sandbox, program, plain):
    tests = f"assert f(1) == {plain}", f"assert type(f(1)) is type({plain})", f"assert f(1) != {plain}"
    (results,) = sandbox.run([Job(program, tuple(map(AssertTest, tests)), entry_point="f")])
    assert [result.verdict for result in results] == ["passed", "passed", "wrong answer"], results[0]


LIES = """
def always(*_): return True
class Lies:
    __eq__ = __bool__ = __contains__ = always
    __ne__ = lambda *_: False
    __class__ = property(lambda self: type(RIGHT))
    __hash__ = lambda self: hash(RIGHT)
    __len__ = lambda self: len(RIGHT)
    __iter__ = lambda self: iter(RIGHT)
    items = lambda self: RIGHT.items()
    keys = lambda self: RIGHT.keys()
    __getitem__ = get = lambda self, key: RIGHT[key]
    __str__ = lambda self: str(RIGHT)
    __repr__ = lambda self: repr(RIGHT)
    hex = lambda self: RIGHT.hex()
    __int__ = __index__ = __float__ = __abs__ = __complex__ = __bytes__ = lambda self: RIGHT
class Meta(type):
    __eq__ = __instancecheck__ = __subclasscheck__ = always
    __hash__ = type.__hash__
    __mro__ = property(lambda self: (type(RIGHT), object))
class Liar(Lies, type(WRONG), metaclass=Meta): pass
def f(x): return [Liar(WRONG)]
"""


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("1", "2"),
        ("1.5", "2.5"),
        ("1j", "2j"),
        ("'ab'", "'cd'"),
        ("b'ab'", "b'cd'"),
        ("[1]", "[2]"),
        ("(1,)", "(2,)"),
        ("{1}", "{2}"),
        ("frozenset([1])", "frozenset([2])"),
        ("{1: 2}", "{1: 3}"),
    ],
)
def test_an_object_that_lies_about_itself_is_judged_by_its_plain_content(sandbox, wrong, right):
    program = f"RIGHT, WRONG = {right}, {wrong}\n{LIES}"
    tests = f"assert f(1) == [{right}]", f"assert f(1) == [{wrong}]"
    (results,) = sandbox.run([Job(program, tuple(map(AssertTest, tests)), entry_point="f")])
    assert [result.verdict for result in results] == ["wrong answer", "passed"], results


MATCH_RULE = """
def assertion(out, exp, atol):
    if isinstance(out, bool):
        assert out == exp
    else:
        assert exp == (out is not None)
"""
EQUALITY_RULE = "def assertion(out, exp, atol):\n    assert out == exp\n"
LOOP = "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion({name}(*inp), exp, 0)\n"


@pytest.mark.parametrize(
    ("code", "rule", "inputs", "results", "verdicts"),
    [
        (
            "from collections import Counter\ndef letters(s):\n    return Counter(s)\n",
            EQUALITY_RULE,
            ["aab", "", "b"],
            [{"a": 2, "b": 1}, {}, {"a": 1}],
            ["passed", "passed", "wrong answer"],
        ),
        (
            "import re\ndef has_vowel(s):\n    return re.search('[aeiou]', s)\n",
            MATCH_RULE,
            ["aab", "xyz", "x", "e"],
            [True, False, True, False],
            ["passed", "passed", "wrong answer", "wrong answer"],
        ),
    ],
)
def test_rows_of_mbpp_whose_functions_return_a_counter_or_a_match(
    sandbox, code, rule, inputs, results, verdicts
):
    name = code.partition("def ")[2].partition("(")[0]
    lists = f"inputs = {[[text] for text in inputs]}\nresults = {results}\n"
    row = {"task_id": 1, "code": code, "prompt": "Write a function.", "test_imports": []}
    row |= {"test_list": [f"assert {name}('aab')"], "test": rule + lists + LOOP.format(name=name)}
    problem = read_row(row)
    job = Job(code, problem.public_tests + problem.private_tests, entry_point=name, setup=problem.setup)
    assert [result.verdict for result in sandbox.run([job])[0]] == verdicts


def test_a_failed_assert_tells_call_got_and_expected(sandbox):
    job = Job("def f(x, y=0): return [x]", (AssertTest("assert f(1, y=2) == [2]"),), SHORT, entry_point="f")
    ((result,),) = sandbox.run([job])
    assert (result.call, result.got, result.expected) == ("f(1, y=2)", "[1]", "[2]")


def test_a_failed_assert_tells_nothing_of_an_if_before_it(sandbox):
    test = AssertTest("x = f(1)\nif x == [2]: raise ValueError\nassert not x")
    ((result,),) = sandbox.run([Job("def f(x): return [x]", (test,), SHORT, entry_point="f")])
    assert (result.verdict, result.got, result.expected) == ("wrong answer", "[1]", "")


def test_tracebacks_have_the_programs_own_lines(sandbox):
    job = Job("def g():\n    return [][1]\n\ng()\n", (IoTest("", ""),), SHORT)
    ((result,),) = sandbox.run([job])
    assert result.traceback == (
        'Traceback (most recent call last):\n  File "solution.py", line 4, in <module>\n    g()\n'
        '  File "solution.py", line 2, in g\n    return [][1]\nIndexError: list index out of range\n'
    )


def test_nothing_is_left_for_the_next_test(sandbox):
    writer = "import os, builtins\nopen('left', 'w').write('x')\nos.environ['LEFT'] = 'x'\nbuiltins.left = 1"
    reader = "import os, builtins\nprint(os.listdir('.'), 'LEFT' in os.environ, hasattr(builtins, 'left'))"
    jobs = [Job(writer, (IoTest("", ""),), SHORT)] * 4 + [
        Job(reader, (IoTest("", "[] False False"),), SHORT)
    ] * 4
    assert all(result.verdict == Verdict.PASSED for (result,) in sandbox.run(jobs))


def test_no_process_survives_its_test(sandbox):
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        open('/proc/self/comm', 'w').write('leftover-xyz')\n        time.sleep(100)\n"
        "    os._exit(0)\n"
        "time.sleep(0.3)\nprint(1)"
    )
    results = sandbox.run([Job(daemon, (IoTest("", "1"),), Limits(10.0))] * 2)
    assert all(result.verdict == Verdict.PASSED for (result,) in results)
    names = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            names.append(open(f"/proc/{pid}/comm").read().strip())
        except OSError:
            pass
    assert "leftover-xyz" not in names


def test_the_environment_of_the_caller_stays_out(sandbox):
    os.environ["SECRET"] = "x"
    job = Job("import os; print('SECRET' in os.environ)", (IoTest("", "False"),), SHORT)
    assert sandbox.run([job])[0][0].verdict == Verdict.PASSED


def test_results_are_in_order_and_final_scoring_stops_early(sandbox):
    tests = tuple(IoTest(f"{i}\n", f"{i if i != 3 else 0}\n") for i in range(6))
    everything, early = sandbox.run(
        [Job("print(input())", tests, SHORT), Job("print(input())", tests, SHORT, stop_at_first_failure=True)]
    )
    assert [r.verdict == Verdict.PASSED for r in everything] == [True, True, True, False, True, True]
    assert [r.verdict == Verdict.PASSED for r in early] == [True, True, True, False]


@pytest.mark.parametrize(
    ("got", "expected", "match"),
    [
        ("1 2\n", "1 2", True),
        ("1\n2", "1 2", True),
        ("YES", "yes", True),
        ("1.000001", "1", True),
        ("1.0001", "1", False),
        ("1e5", "100000", True),
        ("nan", "nan", True),
        ("nan", "1", False),
        ("inf", "infinity", False),
        ("1_0", "10", False),
        ("0x10", "16", False),
        ("", "", True),
        ("1", "1 1", False),
        ("a", "b", False),
    ],
)
def test_outputs_match_as_the_original_judge_has_it(got, expected, match):
    assert outputs_match(got, expected) is match


# After what many contestants start their programs with.
FAST_INPUT_AND_OUTPUT = """
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    newlines = 0
    def __init__(self, file):
        self._fd, self.buffer = file.fileno(), BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = b.count(b"\\n") + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)
class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush, self.writable = self.buffer.flush, self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
        self.readline = lambda: self.buffer.readline().decode("ascii")
sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\\r\\n")
print(int(input()) + int(input()))
"""


@pytest.mark.parametrize(
    ("program", "given", "expected"),
    [
        ("import sys; sys.stdout.write(input())", "no final newline", "no final newline"),
        ("import sys; print(sum(map(int, sys.stdin.read().split())))", "1\n2\n3", "6"),
        ("import sys; print(len(sys.stdin.buffer.read()))", "x" * 3_000_000, "3000000"),
        ("while True:\n  try: print(input()[::-1])\n  except EOFError: break", "ab\ncd", "ba dc"),
        ("for line in open(0): print(int(line) * 2)", "1\n2\n", "2 4"),
        (
            "import threading\nthreads = [threading.Thread(target=print, args=(i,)) for i in range(20)]\n"
            "for t in threads: t.start(); t.join()",
            "",
            " ".join(map(str, range(20))),
        ),
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
            "def depth(n): return n and 1 + depth(n - 1)\n"
            "t = threading.Thread(target=lambda: print(depth(10**5))); t.start(); t.join()",
            "",
            "100000",
        ),
        (
            "import subprocess; print(subprocess.run(['/bin/echo', 'x'], capture_output=True).stdout)",
            "",
            "b'x\\n'",
        ),
        ("open('a', 'w').write('x' * 10**6); print(len(open('a').read()))", "", "1000000"),
        (
            "import asyncio\nasync def f(): await asyncio.sleep(0); print('done')\nasyncio.run(f())",
            "",
            "done",
        ),
        ("import tempfile; print(tempfile.TemporaryFile().write(b'abc'))", "", "3"),
        ("import sys\nwith sys.stdin as s, sys.stdout as out: print(s.read(), file=out)", "a\nb", "a b"),
        ("import sys\nprint(input())\nsys.stdout = sys.stderr = None", "a", "a"),
        (FAST_INPUT_AND_OUTPUT, "2\n3\n", "5"),
        ("import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach()); print(42)", "", "42"),
        (
            "import codecs, sys\nsys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach()); print(42)",
            "",
            "42",
        ),
        ("w = open(1, 'w').write; w('42')", "", "42"),
        ("print(open('/dev/stdin').read(), file=open('/dev/stdout', 'w'))", "42", "42"),
        ("import io\nout = io.BufferedWriter(io.FileIO(1, 'w')); out.write(b'42')", "", "42"),
        (
            "from resource import *\nsetrlimit(RLIMIT_STACK, (RLIM_INFINITY, RLIM_INFINITY)); print(42)",
            "",
            "42",
        ),
        ("print(__builtins__.max(1, 42), __file__)", "", "42 solution.py"),
        ("import os\n" + "x = 1 is 1\n" * 3000 + "print(42)", "", "42"),  # says much while it is compiled
        ("print(__name__, __import__('sys').argv[1:])\nif __name__ == '__main__': exit()", "", "__main__ []"),
    ],
)
def test_honest_programs_pass_alone_and_in_a_zygote(sandbox, program, given, expected):
    long = f"{program}\n{'#' * ZYGOTE_CHARACTERS}"
    tests = (IoTest(given, expected),) * 3
    one, three = sandbox.run([Job(program, tests[:1]), Job(long, tests)])
    assert [result.verdict for result in one + three] == [Verdict.PASSED] * 4, one[0]


def test_numpy_works_with_one_thread(sandbox):
    pytest.importorskip("numpy")
    program = "import numpy as np, threading\n"
    program += "print(int(np.ones((200, 200)).dot(np.ones(200))[0]), threading.active_count())"
    results = sandbox.run([Job(program, (IoTest("", "200 1"),)), Job(program, (IoTest("", "200 1"),) * 5)])
    assert all(result.verdict == Verdict.PASSED for some in results for result in some), results[0]


def test_random_numbers_are_the_same_in_each_run_and_secrets_are_not(sandbox):
    program = "import random, uuid\nprint(random.random(), hash('words'), uuid.uuid4())"
    jobs = [Job(program, (IoTest("", "?"),) * count) for count in (5, 1, 1, 1)]
    with Sandbox(workers=1) as another:
        results = sandbox.run(jobs) + another.run(jobs)
    words = [result.stdout.split() for some in results for result in some]
    assert len({secret for *_, secret in words}) == 16
    assert len({(number, value) for number, value, _ in words}) == 1


def test_the_kernel_holds_the_memory_of_a_tree_where_control_groups_are_delegated(tmp_path, monkeypatch):
    """With our own watch out of the way: four children, each below the limit of a process."""
    shutil.copytree(Path(client.DIRECTORY) / "isolation", tmp_path / "isolation")
    watch, off = "WATCH_SECONDS = 0.05", "WATCH_SECONDS = 1e9"
    text = (tmp_path / "isolation" / "server.py").read_text()
    assert watch in text
    (tmp_path / "isolation" / "server.py").write_text(text.replace(watch, off))
    monkeypatch.setattr(client, "DIRECTORY", str(tmp_path))

    program = """
import os, time
if input() == "much":
    for _ in range(4):
        if os.fork() == 0:
            held = b"x" * (100 << 20)
            time.sleep(2)
            os._exit(0)
    for _ in range(4):
        os.wait()
print("done")
"""
    limits = Limits(seconds=30.0, memory_bytes=256 << 20)
    much, little = IoTest("much", "done"), IoTest("little", "done")
    others = set(Path("/sys/fs/cgroup").rglob("sandbox-*"))
    with Sandbox(workers=1) as unwatched:
        if unwatched.layers["control group"] != "on":
            pytest.skip(f"control group {unwatched.layers['control group']}")
        for tests in ((much, little, much, little), (much,), (little,), (much,), (little,)):
            (results,) = unwatched.run([Job(program, tests, limits)])
            expected = ["out of memory" if test == much else "passed" for test in tests]
            assert [result.verdict.value for result in results] == expected
        ours = set(Path("/sys/fs/cgroup").rglob("sandbox-*")) - others
        assert ours
    assert not ours & set(Path("/sys/fs/cgroup").rglob("sandbox-*"))


def test_a_thousand_results_are_the_same_one_by_one_and_on_all_workers(sandbox):
    programs = [
        "print(int(input()) % 7)",
        "print({'a', 'b', input()})",
        "1 / (int(input()) % 3)",
        "print(input()",
    ]
    patient = Limits(seconds=30.0)
    jobs = [Job(programs[i % 4], (IoTest(f"{i}\n", f"{i % 5}\n"),), patient) for i in range(1000)]

    def compared(results):
        return [(r.verdict, r.stdout, r.traceback, r.call, r.got, r.expected) for (r,) in results]

    with Sandbox(workers=1, overcommit=0) as one:
        assert compared(sandbox.run(jobs)) == compared([one.run([job])[0] for job in jobs])


def test_programs_that_sleep_do_not_hold_up_the_others():
    with Sandbox(workers=1) as one:
        sleeping = [one.submit(Job("import time; time.sleep(99)", (IoTest("", ""),), Limits(seconds=8.0)))]
        honest = one.submit(Job("print(1)", (IoTest("", "1"),)))
        assert honest.result()[0].verdict == Verdict.PASSED and not sleeping[0].done()


def test_quick_programs_get_places_beside_many_slow_ones_and_give_them_back():
    with Sandbox(workers=1, overcommit=4) as one:

        def started(slow):
            worker = Client(one._keeper, one._turn_slow, None)
            assert one._quick < one._workers + one._more  # else it would wait forever
            one._quick += 1
            if slow:
                one._turn_slow(worker)
            return worker

        running = [started(slow=True) for _ in range(3)]
        assert (one._quick, one._slow, one._more) == (0, 3, 0)
        # Each quick one that ends opens one, up to 1.5 for each slow one beyond the workers.
        for places in (0, 1, 2, 3, 3):
            assert one._more == places
            one._leave(started(slow=False))
        running.append(started(slow=True))
        assert (one._quick, one._slow, one._more) == (0, 4, 0)  # what turns slow closes them
        fifth = started(slow=True)
        assert (one._quick, one._slow, one._more) == (1, 4, 0)  # no more than these may be slow
        for worker in [fifth, *running]:
            one._leave(worker)
        assert (one._quick, one._slow, one._more) == (0, 0, 0)


def test_jobs_start_in_order_also_after_many_slow_ones():
    with Sandbox(workers=1) as one:
        slow = Job("import time; time.sleep(0.5)", (IoTest("", ""),))
        one.run([slow] * 5)  # there are threads now that have nothing to do
        ended, quick = [], Job("print(1)", (IoTest("", "1"),))
        futures = [one.submit(quick) for _ in range(200)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: ended.append(number))
        for future in futures:
            future.result()
    assert max(place - number for place, number in enumerate(ended)) < 50  # a few where the machine is busy


def test_each_server_has_a_session_of_its_own():
    """Otherwise a kernel that shares out cores by session gives all servers together one program's part."""
    with Sandbox(workers=1) as one:
        servers = [Server(one._keeper) for _ in range(2)]
        sessions = {
            os.getsid(process) for process in (one._keeper.process.pid, *(server.pid for server in servers))
        }
        for server in servers:
            server.channel.close()
        assert len(sessions) == 3


def test_a_long_program_is_looked_through_in_time_that_grows_with_its_length():
    def seconds(program):
        timings = []
        for _ in range(3):
            began = time.process_time()
            imported(program)
            timings.append(time.process_time() - began)
        return min(timings)

    for text in ("\n", " ", " \n", "import ", "from"):
        assert seconds(text * 80_000) < 10 * seconds(text * 20_000)


def test_a_cancelled_job_is_left_out():
    with Sandbox(workers=1, overcommit=0) as one:
        program = "import time; time.sleep(0.2); print(1)"
        first, second, third = (one.submit(Job(program, (IoTest("", "1"),))) for _ in range(3))
        assert second.cancel() and second.cancelled()
        assert first.result(30.0)[0].verdict == third.result(30.0)[0].verdict == Verdict.PASSED


def test_no_answer_of_an_earlier_test_is_read_after_an_error(monkeypatch):
    with Sandbox(workers=1) as one:
        monkeypatch.setattr(one, "_start_worker", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.run([Job("import time; time.sleep(0.2); print('stale')", (IoTest("", "stale"),))])
        monkeypatch.undo()
        assert one.run([Job("print(0)", (IoTest("", "0"),))])[0][0].stdout == "0\n"


def test_a_dead_keeper_is_no_verdict():
    """Else training would take it for a reward."""
    one = Sandbox(workers=1)
    one._keeper.process.kill()
    one._keeper.process.wait()
    with pytest.raises(OSError):
        one.run([Job("def f(): return 1", (AssertTest("assert f() == 1"),), entry_point="f")])
    one.close()
    for home in Path("/tmp").glob(f"sandbox-{one._keeper.process.pid}-*"):  # nobody else is left to do so
        shutil.rmtree(home)


def test_rare_modules_are_loaded_for_the_programs_that_name_them(sandbox):
    looks = "import sys\nprint('decimal' in sys.modules)"
    for ending, loaded in (("", "False"), ("  # decimal", "False"), ("\nfrom decimal import *", "True")):
        for tests in (1, 3):  # alone, in a zygote
            (results,) = sandbox.run([Job(looks + ending, (IoTest("", loaded),) * tests)])
            assert all(result.verdict == Verdict.PASSED for result in results)


def test_no_program_imports_what_lies_beside_the_sandbox(sandbox):
    here = Path(sandbox_module.__file__).resolve().parent
    program = f"import sys\nprint({str(here)!r} in sys.path + list(sys.path_importer_cache))"
    assert sandbox.run([Job(program, (IoTest("", "False"),))])[0][0].verdict == Verdict.PASSED
    for name in ("isolation", "sandbox", "asserts", "data"):
        first_line = "import decimal\n"  # with it, another kind of server runs the program
        for program in (f"import {name}", f"{first_line}import {name}"):
            ((result,),) = sandbox.run([Job(program, (IoTest("", ""),))])
            assert f"No module named '{name}'" in result.traceback


def test_a_program_finds_no_name_of_the_project(sandbox):
    """In what its process has: the modules, where it would look for more, and the main module."""
    here = Path(sandbox_module.__file__).resolve().parent
    names = {path.stem for path in here.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {"isolation", "sandbox", "data", "train"} <= names
    looks = (
        "import sys\n"
        f"names, here = {names!r}, {str(here)!r}\n"
        "found = [name for name in sys.modules if name.partition('.')[0] in names]\n"
        "found += [name for name in vars(sys.modules['__main__']) if name in names]\n"
        "paths = [*sys.path, *sys.path_importer_cache]\n"
        "found += [path for path in paths if path in (here, here + '/isolation')]\n"
    )
    for start in ("", "import decimal\n"):  # with it, another kind of server runs the program
        alone = Job(f"{start}{looks}print(found)", (IoTest("", "[]"),))
        test = AssertTest("assert f() == []")
        function = Job(f"{start}{looks}def f(): return found", (test,), entry_point="f")
        for job in (alone, function, replace(alone, tests=alone.tests * 3)):  # the last in a zygote
            (results,) = sandbox.run([job])
            assert all(result.verdict == Verdict.PASSED for result in results), results[0]


def test_a_dead_server_costs_one_test():
    with Sandbox(workers=1, overcommit=0) as one:
        hanging = one.submit(Job("import time; time.sleep(99)", (IoTest("", ""),)))
        time.sleep(0.5)
        keeper = one._keeper.process.pid
        for server in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            os.kill(int(server), signal.SIGKILL)
        assert hanging.result()[0].verdict == Verdict.EXCEPTION
        assert one.run([Job("print(1)", (IoTest("", "1"),))])[0][0].verdict == Verdict.PASSED


def test_a_server_that_is_lost_after_a_zygotes_last_result_adds_none(monkeypatch):
    send, ended = client.send, []
    with Sandbox(workers=1, overcommit=0) as one:
        keeper = one._keeper.process.pid

        def send_to_dead_servers(channel, message, *rest):
            if message.get("kind") == "end":
                ended.append(message)
                for server in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
                    os.kill(int(server), signal.SIGKILL)
            send(channel, message, *rest)

        monkeypatch.setattr(client, "send", send_to_dead_servers)
        job = Job(f"print(input())\n{'#' * ZYGOTE_CHARACTERS}", (IoTest("a", "a"),) * 3)
        for _ in range(2):
            assert [result.verdict for result in one.run([job])[0]] == [Verdict.PASSED] * 3
    assert len(ended) == 2


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("import numpy as np\ndef f(x): return np.int64(3)", "assert f(1) == 3"),
        (
            "import numpy as np\ndef f(x): return [np.int64(3), np.float32(0.5), np.bool_(True)]",
            "assert f(1) == [3, 0.5, True]",
        ),
        ("import numpy as np\ndef f(x): return np.array([[1, 2]])", "assert f(1) == [[1, 2]]"),
        (
            "import numpy as np\ndef f(x): return np.array([x, 2])",
            "import numpy as np\nassert np.array_equal(f(1), [1, 2]) and (f(1) == [1, 2]).all()",
        ),
        (
            "import numpy as np\ndef f(x): return x.sum()",
            "import numpy as np\nassert f(np.array([[1, 2]])) == 3",
        ),
        ("def f(x): return map(str, [1, 2])", "assert list(f(1)) == ['1', '2']"),
        ("def f(x): yield from (x, 2)", "assert list(f(1)) == [1, 2]"),
        ("def f(x): return iter([x]), reversed([x])", "a, b = f(1)\nassert [*a, *b] == [1, 1]"),
        ("import itertools\ndef f(x): return itertools.chain([x], [2])", "assert [*f(1)] == [1, 2]"),
        (
            "def f(x): return [zip([1], [2]), range(3), {1: 2}.values()]",
            "a, b, c = f(1)\nassert (list(a), b, list(c)) == ([(1, 2)], range(3), [2])",
        ),
        ("def f(x): return {1: 2}.keys(), {1: 2}.items()", "assert f(1) == ({1}, {(1, 2)})"),
        (
            "from collections import deque\ndef f(x): return deque([1, 2], 3)",
            "from collections import deque\nassert f(1) == deque([1, 2])",
        ),
        (
            "from fractions import Fraction\ndef f(x): return [x + Fraction(1, 3)]",
            "from fractions import Fraction\nassert f(Fraction(1, 3)) == [Fraction(2, 3)]",
        ),
        ("from decimal import Decimal\ndef f(x): return Decimal('1.50')", "assert f(1) == 1.5"),
        (
            "from datetime import *\ndef f(x): return x, datetime(2024, 1, 2, 3), timedelta(1, 2), time(1)",
            "from datetime import *\nd = date(2024, 1, 2)\n"
            "assert f(d) == (d, datetime(2024, 1, 2, 3), timedelta(1, 2), time(1))",
        ),
        ("def f(x): return bytearray(b'a\\xff')", "assert f(1) == b'a\\xff'"),
        ("def f(x): return 2**20000", "assert f(1) == 2**20000"),
        ("def f(x): return ['ab'] * 6_000_000", "assert len(f(1)) == 6_000_000"),
        (
            "def f(x): raise KeyError('word')",
            "try: f(1)\nexcept KeyError as e: assert str(e) == repr('word')",
        ),
    ],
)
def test_honest_values_come_to_the_judge_as_they_are(sandbox, program, test):
    if "numpy" in program:
        pytest.importorskip("numpy")
    tests = AssertTest(test), AssertTest("assert f(1) == 0")
    (results,) = sandbox.run([Job(program, tests, Limits(seconds=60.0), entry_point="f")])
    assert results[0].verdict == Verdict.PASSED != results[1].verdict, results


def test_a_long_result_needs_the_memory_that_it_needs_in_plain_python(sandbox):
    program = "def f(n): return ['x' * 1000] * n\n"  # 200 MB of text, of which each item is the same object
    peak = "import resource\nf(200_000)\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    plain = int(subprocess.check_output([sys.executable, "-c", program + peak]))
    test = AssertTest("x = f(200_000)\nassert len(x) == 200_000\nassert x[-1] == 'x' * 1000")
    ((result,),) = sandbox.run([Job(program, (test,), Limits(60.0, plain), "f")])
    assert result.verdict == "passed", result


def test_a_value_late_in_a_long_result_that_is_no_plain_data_is_told(sandbox):
    program = "def f(n): return [*range(n), print]"
    ((result,),) = sandbox.run([Job(program, (AssertTest("assert f(100_000) == []"),), entry_point="f")])
    assert result.verdict == "exception", result
    assert "builtin_function_or_method is not plain data" in result.traceback


@pytest.mark.parametrize("value", ["0", "[]", '"x"'])  # pieces of no list, without content, and of a text
def test_an_answer_without_an_end_is_no_verdict_of_passed(sandbox, monkeypatch, value):
    monkeypatch.setattr("isolation.client.JUDGE_BYTES", 1 << 24)
    program = (
        "import socket, struct\n"
        f"""m = b'{{"more": 1, "value": ' + (b'[%s]' % b', '.join([b'{value}'] * 4096)) + b'}}'\n"""
        "m = struct.pack('!Q', len(m)) + m\n"
        "def f(x):\n  s = socket.socket(fileno=3)\n  while True: s.sendall(m)"
    )
    ((result,),) = sandbox.run([Job(program, (AssertTest("assert f(1) == 2"),), Limits(20.0, 1 << 24), "f")])
    assert result.verdict == "out of memory", result


@pytest.mark.parametrize(
    "test",
    [
        "def check(c):\n  assert c(1) == 1",
        "def test_f():\n  assert f(1) == 1",
        "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(f(1), 1)",
        "f(1) == 1",
        "assert (f(1) == 1, 'no')",
        "f(1)\nassert True",
        "f(1)\nassert 1 == 1",
        "x = 3\nf(1)\nassert x == 3",
        "f(1)\nequal(1, 1)",
        "f(1)\nif not callable(f): raise AssertionError",
        "try: f(1)\nexcept ValueError: pass\nassert len('a') == 1",
        "x = [f(1)]\nassert len(x) == 1",
        "x = f(1)\nif x == 1: pass",
        "assert 1 == 1",
        "def f(x): return 1\nassert f(1) == 1",
        "def candidate(x): return 1\nassert candidate(1) == 1",
        "try:\n  assert f(1) == 2\nexcept AssertionError: pass",
        "import contextlib\nwith contextlib.suppress(Exception): assert f(1) == 2",
        "import sys\nf(1)\nsys.exit(0)",
        "x = f(1)\nassert x == x",
        "x = f(1)\ny = x\nassert not x != y",
        "x = f(1)\nassert x in [x]",
        "assert f(1) == f(1)",
        "x = f([1])\ny = f([1])\nassert x == y",
        "assert f(1) in [f(1)]",
        "y = str(f(1))\nassert y == str(f(1))",
    ],
)
def test_a_test_that_compares_no_answer_is_no_verdict_on_the_program(sandbox, test):
    for setup in ("", "assert 1 == 1"):
        setup += "\ndef equal(a, b):\n  assert a == b"
        with pytest.raises(ValueError, match="^mine: a test compares nothing with an answer"):
            sandbox.run([Job("def f(x): return 1", (AssertTest(test),), SHORT, "f", setup, name="mine")])


@pytest.mark.parametrize(
    "test",
    [
        "assert f(f(5)) == 5",
        "x = f(5)\ny = f(x)\nassert x == y",
        "assert f([2, 1]) == f([1, 2])",
        "x = f([2, 1])\nassert sorted(x) == x",
        "assert f(5) != f(6)",
        "assert f(f([5]) + [3]) == [3, 5]",
    ],
)
def test_a_property_of_answers_is_a_comparison(sandbox, test):
    right = "def f(x): return sorted(x) if type(x) is list else x"
    wrong = "calls = []\ndef f(x):\n  calls.append(x)\n  n = 1 if x == 6 else len(calls)\n"
    wrong += "  return [9 - n, 0] if type(x) is list else n"
    for program, verdict in ((right, "passed"), (wrong, "wrong answer")):
        ((result,),) = sandbox.run([Job(program, (AssertTest(test),), SHORT, "f")])
        assert result.verdict == verdict, result


@pytest.mark.parametrize("setup", ["import nothing_installed", "1 / 0", "def g(:", "raise SystemExit"])
@pytest.mark.parametrize("count", [1, 4])  # without and with a zygote
def test_a_set_up_that_fails_is_no_verdict_on_the_program(sandbox, setup, count):
    job = Job(
        "def f(x): return x", (AssertTest("assert f(1) == 1"),) * count, SHORT, "f", setup, name="mine/7"
    )
    with pytest.raises(ValueError, match="^mine/7: the set-up of the tests fails, whatever the program is: "):
        sandbox.run([job])
    row = replace(job, setup="", tests=(AssertTest("assert f(lambda: 1) == 1"),) * count)
    with pytest.raises(ValueError, match="^mine/7: a test calls f, but a value of type function is"):
        sandbox.run([row])
    good = Job("def f(x): return x", (AssertTest("assert f(1) == 1"),), SHORT, "f")
    assert sandbox.run([good])[0][0].verdict == Verdict.PASSED  # the worker goes on


@pytest.mark.parametrize(
    "test",
    [
        "def check(c):\n  assert c(1) == 1\ncheck(candidate)",
        "import unittest\nclass T(unittest.TestCase):\n"
        "  def test(self): self.assertEqual(f(1), 1)\nT('test').test()",
        "if f(1) != 1: raise AssertionError",
        "assert not f(1) - 1, 'no'",
        "x = f(1)\nfor y in [1]:\n  assert x == y",
        "equal(f(1), 1)",
        "equal(1, f(1))",
        "import solution\nassert solution.f(1) == 1",
        "from solution import f as g\nassert g(1) == 1",
        "r = []\ntry: r.append(f(1))\nexcept BaseException: pass\nassert 1 in r",
        "import math\nassert math.isclose(candidate(1), 1)",
        "assert f(1) is not None and f(1) != 2",
        "assert (lambda g: g(1))(f) == 1",
        "x = f(1)\nwhile x != 1: raise AssertionError",
        "for x, y in once:\n  z = f(x)\n  assert z == y",
        "while cases:\n  x, y = cases.pop()\n  assert abs(f(x) - y) < 1e-6",
        "if 'seen' not in globals():\n  seen = f(1)\n  assert seen == 1",
        "if __name__ == '__main__': assert not f(1) - 1",
        "import unittest\nclass T(unittest.TestCase):\n"
        "  def test(self): self.assertEqual(f(1), 1)\nunittest.main()",
        "import sys\nsys.exit(f(1) != 1)",
        "import os\nos.write(1, b'text')\nassert f(1) in (1, 3)",
    ],
)
def test_comparisons_of_all_forms_count(sandbox, test):
    setup = "def equal(a, b):\n  assert a == b\ncases = [(1, 1)]\nonce = iter(cases)"
    for program, verdict in (("def f(x): return 1", "passed"), ("def f(x): return 2", "wrong answer")):
        ((result,),) = sandbox.run([Job(program, (AssertTest(test),), SHORT, "f", setup)])
        assert result.verdict == verdict


@pytest.mark.parametrize(
    ("right", "wrong", "test"),
    [
        ("return None", "return 1", "assert f([1]) is None"),
        ("return 1", "return None", "assert f([1]) is not None"),
        ("return 1", "return 'a'", "assert not isinstance(f([1]), str)"),
        ("raise ValueError", "return 1", "try: f([1])\nexcept ValueError: pass\nelse: assert False"),
        ("return 1", "raise ValueError", "try: f([1]); y = 1\nexcept ValueError: y = 2\nassert y == 1"),
        (
            "raise KeyError('a')",
            "raise KeyError('b')",
            "try: f([1])\nexcept KeyError as e: assert 'a' in str(e)",
        ),
        ("return x", "x.append(2)", "y = [1]\nf(y)\nassert y == [1]"),
        ("x.append(2)", "return x", "y = [1]\nf(y)\nassert y == [1, 2]"),
        ("return x", "x.append(2)", "y = []\nf(y)\nassert y == []"),
        ("raise KeyError", "return 1", "import pytest\nwith pytest.raises(KeyError): f([1])"),
    ],
)
def test_what_a_call_does_is_compared_in_all_forms(sandbox, right, wrong, test):
    for body, passes in ((right, True), (wrong, False)):
        ((result,),) = sandbox.run([Job(f"def f(x): {body}", (AssertTest(test),), SHORT, "f")])
        assert (result.verdict == Verdict.PASSED) == passes, result


def test_a_test_that_would_wait_for_the_right_answer_ends(sandbox):
    for seconds in (1.0, 10.0):  # the program's time does not count what the judge does without it
        test = AssertTest("while not f(1) == 1: pass")
        ((result,),) = sandbox.run([Job("def f(x): return 1", (test,), replace(SHORT, seconds=seconds), "f")])
        assert result.verdict == Verdict.PASSED


def test_a_set_up_that_does_not_end_is_no_verdict_on_the_program(sandbox):
    setup = "import time\nwhile True:\n  try: time.sleep(9)\n  except Exception: pass"
    job = Job("def f(x): return x", (AssertTest("assert f(1) == 1"),) * 4, SHORT, "f", setup, name="mine/7")
    with pytest.raises(ValueError, match="^mine/7: the set-up of the tests .*: it does not end$"):
        sandbox.run([job])


def test_a_preamble_that_fails_is_no_verdict_on_the_program(sandbox):
    test, forged = AssertTest("assert f(1) == 1"), "raise NameError('as if from the preamble')"
    preamble = "from math import sqrt, wrong\n"
    for count in (1, 4):
        job = Job(f"{preamble}def f(x): return x", (test,) * count, SHORT, "f", "", preamble, name="mine/7")
        with pytest.raises(ValueError, match="^mine/7: its preamble fails, .*: ImportError: cannot import"):
            sandbox.run([job])
        job = replace(job, program=f"import math\n{forged}", preamble="import math\n")
        (results,) = sandbox.run([job])
        assert [result.verdict for result in results] == ["exception"] * count


def test_a_setup_has_no_more_rights_than_a_test(sandbox):
    setup = (
        "import math\ndef look():\n"
        "  try: return open('/proc/self/status').read().partition('CapEff:')[2].split()[0]\n"
        "  except OSError as error: return str(error)\n"
        "rights = look()"
    )
    tests = (AssertTest("assert f(1) == 1 and rights == look()"),) * 5
    (results,) = sandbox.run([Job("def f(x): return x", tests, SHORT, "f", setup)])
    assert {result.verdict for result in results} == {Verdict.PASSED}


@pytest.mark.parametrize("code", ["import os; os._exit(0)", "print(1); import os; os._exit(0)", "1 / 0", "("])
def test_a_judge_that_ends_is_no_verdict_of_passed_and_ends_no_run(sandbox, code):
    cases = [("", f"assert f(1) == 1\n{code}"), *[(code, "assert f(1) == 1")] * ("os" in code)]
    for setup, test in cases:  # a set-up that raises an error ends the job, see above
        (results,) = sandbox.run([Job("def f(x): return x", (AssertTest(test),) * 3, SHORT, "f", setup)])
        assert [result.verdict for result in results] == ["exception"] * 3


@pytest.mark.parametrize(
    ("program", "expected", "verdict"),
    [
        ("\ufeffprint(1)", "1", "passed"),
        (
            "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(1)'])",
            "1",
            "passed",
        ),
        ("import sys\nsys.stdout.write('ab\\n' * 700_000)", "ab\n" * 700_000, "passed"),
        ("import sys\nsys.stderr.write('x' * 900_000)\nprint('y' * 500_000)", "y" * 500_000, "passed"),
        ("import sys\nsys.stderr.write('x' * 1_100_000)\nprint(42)", "42", "too much output"),
        ("print('y' * 1_100_000)", "42", "too much output"),
        ("print(len(str(2**20000)), int('9' * 5000) % 10)", "6021 9", "passed"),
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
            "def depth(n): return n and 1 + depth(n - 1)\n"
            "t = threading.Thread(target=lambda: print(depth(10**5))); t.start(); t.join()",
            "100000",
            "passed",
        ),
        ("x = bytearray(b'x' * (200 << 20)); print(42)", "42", "out of memory"),
    ],
)
def test_limits_let_honest_programs_work(sandbox, program, expected, verdict):
    limits = Limits(memory_bytes=64 << 20)
    ((result,),) = sandbox.run([Job(program, (IoTest("", expected),), limits)])
    assert result.verdict == verdict


def test_the_bound_of_output_does_not_tell_the_length_of_what_is_expected(sandbox):
    program = (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "  for value in list(frame.f_locals.values()):\n"
        "    if type(value) is dict and 'output' in value: print(value['output'])\n"
        "  frame = frame.f_back"
    )
    jobs = [Job(program, (IoTest("", "x" * length),)) for length in (2, 3, 5000)]
    found = {result.stdout for (result,) in sandbox.run(jobs)}
    assert len(found) == 1 and found != {""}  # it does find the bound


def test_an_error_of_the_set_up_is_no_verdict(tmp_path, monkeypatch):
    """At the start it refuses to go on; later it is an error of the job, of which no reward is made."""
    shutil.copytree(Path(client.DIRECTORY) / "isolation", tmp_path / "isolation")
    text = (tmp_path / "isolation" / "layers.py").read_text()
    first_line = "    os.setsid()\n    if jail.group"
    assert first_line in text
    monkeypatch.setattr(client, "DIRECTORY", str(tmp_path))

    def fail_below(least):
        fails = f"    if memory_bytes < {least}:\n        raise OSError('no room')\n{first_line}"
        (tmp_path / "isolation" / "layers.py").write_text(text.replace(first_line, fails))

    fail_below(1 << 40)
    with pytest.raises(ValueError, match="ulimit"):
        Sandbox(workers=1)
    fail_below(300 << 20)
    with Sandbox(workers=1) as one:
        for job in (
            Job("", (IoTest("", ""),), SHORT),
            Job("x = 1", (AssertTest("assert f() == 1"),), SHORT, "f"),
        ):
            with pytest.raises(RuntimeError, match="set up"):
                one.run([job])
        assert one.run([Job("", (IoTest("", ""),))])[0][0].verdict == Verdict.PASSED


@pytest.mark.parametrize("limit", ["-v 1000000", "-f 1000", "-n 100"])
def test_a_lower_limit_of_the_caller_is_no_verdict(limit):
    script = (
        "from sandbox import *\nwith Sandbox(1) as s:\n"
        "  tests = (IoTest('1', '1'),) * 3\n"
        "  jobs = [Job('print(input())', tests[:1]), Job('import re\\nprint(input())', tests)]\n"
        "  print([r.verdict.value for some in s.run(jobs) for r in some])"
    )
    command = f'ulimit {limit} && exec {sys.executable} tests/as_another_user.py -c "$SCRIPT"'
    here, environment = Path(__file__).resolve().parent.parent, os.environ | {"SCRIPT": script}
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=here, env=environment)
    assert run.stdout.strip() == str(["passed"] * 4), run.stderr


def test_an_exception_that_a_test_expects_has_the_programs_message_and_type(sandbox):
    test = "try:\n  f(1)\n  assert False\nexcept (KeyError, OSError) as error:\n  assert 'word' in str(error)"
    programs = [
        "def f(x): raise KeyError('word')",
        "def f(x): raise OSError('word')",
        "def f(x): raise ValueError('word')",
    ]
    jobs = [Job(program, (AssertTest(test),), entry_point="f") for program in programs]
    verdicts = [result.verdict for (result,) in sandbox.run(jobs)]
    assert verdicts == [Verdict.PASSED, Verdict.PASSED, Verdict.EXCEPTION]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_all_this_holds_for_another_user():
    """Honest programs and attacks again as nobody; where namespaces are refused, what still must hold."""
    here = Path(__file__).resolve().parent
    tests = [str(here / "test_sandbox.py"), str(here / "test_attacks.py")]
    pytest_call = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # Not again what another user does not change: the comparison, the codec, the queue, the judge's clock.
    others = (
        "outputs_match lies_about subclass honest_values compared_in thousand places start_in_order sleep"
    )
    others += " does_not_end would_wait"
    most = ["-k", " and ".join(f"not {name}" for name in others.split())]
    chosen = ["-k", "harm or state or left or ends or without_an_answer"]
    runs = [
        subprocess.Popen(
            [sys.executable, str(here / "as_another_user.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=here.parent,
        )
        for arguments in ([*pytest_call, *most], ["--no-namespaces", *pytest_call, *chosen])
    ]
    printed = [run.communicate()[0] for run in runs]  # both have started: they run side by side
    assert [run.returncode for run in runs] == [0, 0], [text[-4000:] for text in printed]


def test_texts_in_a_result_are_cut_also_where_the_program_wrote_them(sandbox):
    raw = (
        "import json, os, socket, struct\ndef f(x):\n"
        "  m = {'error': 'ValueError', 'message': 'M' * 10**6, 'traceback': 'T' * 10**6}\n"
        "  m = json.dumps(m).encode()\n"
        "  socket.socket(fileno=3).sendall(struct.pack('!Q', len(m)) + m)\n  os._exit(0)"
    )
    long = "import os\nx = 1 1 " + "a" * 10**6
    (raised,), *errors = sandbox.run(
        [Job(raw, (AssertTest("f(1)"),), SHORT, "f"), Job(long, (IoTest("", ""),) * 3)]
    )
    for result in (raised, *errors[0]):
        assert result.verdict == Verdict.EXCEPTION and 0 < len(result.traceback) <= SHOWN


def test_a_judge_that_is_kept_busy_counts_as_a_timeout(sandbox, monkeypatch):
    monkeypatch.setattr("isolation.client.JUDGE_SECONDS", 0.1)
    program = (
        "import os, socket, struct\n"
        "items = ', '.join('{\"int\": \"%s\"}' % hex(i * (2**61 - 1)) for i in range(64, 1 << 18))\n"
        'm = (\'{"value": {"set": [\' + items + \']}, "given": 1}\').encode()\n'
        "def f(x): s = socket.socket(fileno=3); s.sendall(struct.pack('!Q', len(m)) + m); os._exit(0)"
    )
    (results,) = sandbox.run([Job(program, (AssertTest("assert f(1) == 2"),) * 5, Limits(seconds=1.5), "f")])
    assert [result.verdict for result in results[:3]] == [Verdict.TIMEOUT] * 3
    assert results[3:] == [NOT_RUN] * 2


def test_a_process_that_ends_while_its_memory_is_looked_at_has_none(monkeypatch):
    """A fork that shares 600 MB with its parent until it runs another program is not 600 MB more."""
    seen = []

    def read(_proc, pid, name):
        seen.append((pid, name))
        if pid == 1:
            return b"Pss: 600000 kB" if name == "smaps_rollup" else b"150000 150000"
        return b"150000 150000" if len(seen) < 3 else b""

    monkeypatch.setattr(kernel, "descendants", lambda _: [1, 2])
    monkeypatch.setattr(kernel, "read_proc", read)
    assert kernel.tree_bytes(0, 1 << 30) == 600000 * 1024


def test_after_three_timeouts_the_rest_is_not_run(sandbox):
    program = "n = int(input())\nwhile n % 2:\n    pass\nprint(n)"
    tests = tuple(IoTest(f"{n}\n", f"{n}\n") for n in (1, 2, 3, 4, 5, 6, 7))
    (results,) = sandbox.run([Job(program, tests, Limits(seconds=0.3))])
    verdicts = ["timeout", "passed"] * 2 + ["timeout"] * 3
    assert [result.verdict.value for result in results] == verdicts
    assert [result == NOT_RUN for result in results] == [False] * 5 + [True] * 2


WHERE = """
from sandbox import IoTest, Job, Sandbox
with Sandbox(1) as s:
    print(s.run([Job("import os; print(os.getcwd())", (IoTest("", ""),))])[0][0].stdout)
"""


def test_homes_are_where_tmpdir_says_and_nothing_is_left_there(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", WHERE], env=environment, capture_output=True, text=True)
    assert said.stdout.startswith(f"{tmp_path}/sandbox-"), said.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root can mount")
def test_a_read_only_tmp_is_no_obstacle(tmp_path):
    command = 'mount --bind /tmp /tmp && mount -o remount,ro,bind /tmp && exec "$0" -c "$1"'
    words = ["unshare", "-m", "sh", "-c", command, sys.executable, WHERE]
    said = subprocess.run(words, capture_output=True, text=True)
    if "mount" in said.stderr and not said.stdout:
        pytest.skip(f"cannot mount here: {said.stderr.strip()}")
    assert "/sandbox-" in said.stdout and not said.stdout.startswith("/tmp"), said.stderr


def test_a_carriage_return_is_the_programs_to_read_as_in_an_interpreter(sandbox):
    program = "import sys\nprint(repr(input()), repr(sys.stdin.read()))"
    given = "a\r\nb\rc\r\n"
    plain = subprocess.run([sys.executable, "-c", program], input=given.encode(), capture_output=True).stdout
    ((result,),) = sandbox.run([Job(program, (IoTest(given, plain.decode()),), SHORT)])
    assert result.verdict == Verdict.PASSED and result.stdout == plain.decode()
