"""A problem: what the model is told, the tests that answer it, the words of the prompts, and where problems
come from.

Paper: section 2.1 and appendix B. A problem has *public* tests, whose outcomes are fed back in the dialog,
and *private* tests, which judge the last response only. The paper's own prompts are longer: ours stand below
as constants, to be swapped.

Run alone: `python data.py SOURCE [SPLIT]` counts a problem set's problems and tests and prints one first
message.
"""

import ast
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from sandbox import AssertTest, IoTest, Job, Limits, TestResult, Verdict

# ---- the words of the prompts: every sentence on a line of its own, every field between lines --------------

FIRST_PROMPT = "{statement}\n\n{format}"
FORMAT_TOKENS = (
    "Write a Python 3 program that reads standard input and writes standard output.\n"
    "Put the whole program into one ```python block.\n"
)
FORMAT_ASSERTS = (
    "Write this Python 3 function:\n{signature}\nPut the whole function into one ```python block.\n"
)

FEEDBACK_TOKENS = {  # one entry a public test that failed
    Verdict.WRONG_ANSWER: (
        "Wrong answer.\nInput:\n{input}\nExpected output:\n{expected}\nYour output:\n{got}\n"
    ),
    Verdict.EXCEPTION: "Exception.\nInput:\n{input}\nTraceback:\n{traceback}\n",
    Verdict.TIMEOUT: "Timeout.\nInput:\n{input}\n",
    Verdict.OUT_OF_MEMORY: "Out of memory.\nInput:\n{input}\n",
    Verdict.TOO_MUCH_OUTPUT: "Too much output.\nInput:\n{input}\n",
}
FEEDBACK_ASSERTS = {  # one entry a public test, passed ones too
    Verdict.PASSED: "Passed.\nTest:\n{test}\n",
    Verdict.WRONG_ANSWER: "Wrong answer.\nTest:\n{test}\nAssertionError: {got} != {expected}\n",
    Verdict.EXCEPTION: "Exception.\nTest:\n{test}\nTraceback:\n{traceback}\n",
    Verdict.TIMEOUT: "Timeout.\nTest:\n{test}\n",
    Verdict.OUT_OF_MEMORY: "Out of memory.\nTest:\n{test}\n",
    Verdict.TOO_MUCH_OUTPUT: "Too much output.\nTest:\n{test}\n",
}
FEEDBACK_ASSERT_UNTOLD = "Wrong answer.\nTest:\n{test}\n"  # the test does not tell the values it compared
FEEDBACK = "{entries}\n{closing}{format}"
NO_VALID_CODE = "Your answer has no valid Python code.\n"
PUBLIC_TESTS_PASSED = "The public tests passed, but the answer is wrong.\n"  # only random feedback gets here
CLOSING = "Try again.\n"
RETRY_WITHOUT_FEEDBACK = "Try again."  # the whole message of feedback mode "none"
CUT = "[{count} characters cut]"
TESTS_CUT = "[{count} tests cut]\n"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Tests are all `IoTest` (standard input and output) or all `AssertTest` (calls of a function).
    """

    name: str  # unique in its set
    statement: str  # what the user message states
    public_tests: tuple[IoTest | AssertTest, ...]  # their outcomes are fed back
    private_tests: tuple[IoTest | AssertTest, ...]  # judge the last response, together with the public ones
    limits: Limits = Limits()
    correct_solutions: tuple[str, ...] = ()
    incorrect_solutions: tuple[str, ...] = ()  # where random feedback comes from
    preamble: str = ""  # stands before each response's code (HumanEval+: its prompt)
    entry_point: str = ""  # assert sets: the function under test
    signature: str = ""  # assert sets: how the prompt spells the function; empty: its name
    setup: str = ""  # assert sets: trusted helper code of the judge
    group: str = ""  # what results are broken down by
    answer: str = ""  # random feedback is never drawn from a problem with the same answer; empty: the name

    @property
    def judging(self) -> str:
        """ "asserts" where tests call a function, else "tokens"."""
        return "asserts" if self.entry_point else "tokens"


def _format_instruction(problem: Problem) -> str:
    if problem.judging == "tokens":
        return FORMAT_TOKENS
    return FORMAT_ASSERTS.format(signature=problem.signature or problem.entry_point)


def first_message(problem: Problem, with_format: bool = True) -> str:
    """The first user message: the statement and, unless told otherwise, how the answer must look."""
    instruction = _format_instruction(problem) if with_format else ""
    return FIRST_PROMPT.format(statement=problem.statement.strip(), format=instruction).strip()


def _shorten(text: str, cut: int) -> str:
    """Cut the middle out, visibly: the head of an input and the last lines of a traceback matter most."""
    text = text.strip("\n")
    if len(text) <= cut:
        return text
    half = cut // 2
    return f"{text[:half]}\n{CUT.format(count=len(text) - 2 * half)}\n{text[-half:]}"


def _entry(problem: Problem, test: IoTest | AssertTest, result: TestResult, cut: int) -> str:
    """What feedback says about one test."""
    # A traceback counts the program's lines; the model knows only those behind the preamble.
    traceback = re.sub(
        r'(File "solution.py", line )(\d+)',
        lambda m: f"{m[1]}{max(1, int(m[2]) - problem.preamble.count(chr(10)))}",
        result.traceback,
    )
    if isinstance(test, IoTest):
        fields = {"input": test.input, "expected": test.output, "got": result.stdout}
        template = FEEDBACK_TOKENS[result.verdict]
    else:
        fields = {"test": result.call or test.code, "expected": result.expected, "got": result.got}
        template = FEEDBACK_ASSERTS[result.verdict]
        if result.verdict == Verdict.WRONG_ANSWER and not result.expected:
            template = FEEDBACK_ASSERT_UNTOLD
    fields["traceback"] = traceback
    return template.format(**{name: _shorten(text, cut) for name, text in fields.items()})


def feedback_message(problem: Problem, results: Sequence[TestResult] | None, cut: int = 2000) -> str:
    """The user message after a response that did not pass.

    Args:
        results: one for each public test; None where the response has no valid code.
        cut: characters that a field (an input, an output, a traceback) may have. All entries together may
        have ten
            times as many; then tests are left out, those that passed first, and their number is stated.
    """
    if results is None:
        entries = [NO_VALID_CODE]
    else:
        tests = zip(problem.public_tests, results, strict=True)
        shown = [
            (result.verdict == Verdict.PASSED, _entry(problem, test, result, cut))
            for test, result in tests
            if problem.judging == "asserts" or result.verdict != Verdict.PASSED
        ]
        kept, length = set(), 0
        for place in sorted(range(len(shown)), key=lambda place: (shown[place][0], place)):
            length += len(shown[place][1])
            if kept and length > 10 * cut:
                break
            kept.add(place)
        entries = [shown[place][1] for place in sorted(kept)]
        if len(kept) < len(shown):
            entries.append(TESTS_CUT.format(count=len(shown) - len(kept)))
        if all(result.verdict == Verdict.PASSED for result in results):
            entries.append(PUBLIC_TESTS_PASSED)
    instruction = _format_instruction(problem)
    return FEEDBACK.format(entries="\n".join(entries), closing=CLOSING, format=instruction).strip()


def make_job(
    problem: Problem,
    code: str,
    tests: Sequence[IoTest | AssertTest],
    stop_at_first_failure: bool = False,
) -> Job:
    """The sandbox's job that judges `code`, a response's program, on `tests` of `problem`."""
    return Job(
        program=problem.preamble + code,
        tests=tuple(tests),
        limits=problem.limits,
        entry_point=problem.entry_point,
        setup=problem.setup,
        stop_at_first_failure=stop_at_first_failure,
    )


# ---- where problems come from ------------------------------------------------------------------------------

# HumanEval+ compares floats with numpy. The judge has the standard library only, so its helper code gets
# this instead.
NUMPY_FOR_THE_JUDGE = """
class np:
    class ndarray: pass
    def allclose(got, expected, rtol, atol):
        if isinstance(expected, (list, tuple)):
            return len(got) == len(expected) and all(np.allclose(g, e, rtol, atol) for g, e in zip(got,
            expected))
        return got == expected or abs(got - expected) <= atol + rtol * abs(expected)
"""
HUMANEVAL_PUBLIC_TESTS = 8  # HumanEval's own tests come first; the hub's file does not say how many they are
PYTHON3 = 3  # CodeContests' number of the language


class Problems(Sequence):
    """Problems made of a table's rows when they are asked for: a large table stays on disk."""

    def __init__(self, rows: datasets.Dataset, make: Callable[[dict], Problem]) -> None:
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice) -> "Problem | Problems":
        if isinstance(place, slice):
            return Problems(self.rows.select(range(*place.indices(len(self)))), self.make)
        return self.make(self.rows[place])


def _from_humaneval_plus(row: dict) -> Problem:
    """A row of evalplus/humanevalplus.

    Its `check` loops over inputs and results: each round becomes a test.
    """
    source = row["test"]
    check = next(
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "check"
    )
    lists = {node.targets[0].id: node.value.elts for node in check.body if isinstance(node, ast.Assign)}
    (statement,) = next(node for node in check.body if isinstance(node, ast.For)).body
    called = isinstance(statement, ast.Expr) and ast.unparse(statement.value.func) == "assertion"
    expected = lists.get("results", [None] * len(lists["inputs"]))
    tests = []
    for given, result in zip(lists["inputs"], expected, strict=True):
        values = {"inp": ast.unparse(given), "exp": result and ast.unparse(result)}
        exact = (
            called
            and statement.value.args[2].value == 0
            and not re.search(r"\d\.|\de|inf|nan", values["exp"] or ".0")
        )
        if exact:  # then the helper compares with == alone, and an assert can tell both values
            code = f"assert candidate(*{values['inp']}) == {values['exp']}"
        else:
            code = re.sub(r"\b(inp|exp)\b", lambda m, v=values: v[m[1]], ast.unparse(statement))
        tests.append(AssertTest(code))
    head = source[: source.rindex("def check(")].replace("import numpy as np", "")
    return Problem(
        name=row["task_id"],
        statement=row["prompt"],
        public_tests=tuple(tests[:HUMANEVAL_PUBLIC_TESTS]),
        private_tests=tuple(tests[HUMANEVAL_PUBLIC_TESTS:]),
        correct_solutions=(row["canonical_solution"],),
        preamble=row["prompt"],
        entry_point=row["entry_point"],
        setup=NUMPY_FOR_THE_JUDGE + head,
    )


def _from_code_contests(row: dict) -> Problem:
    """A row of deepmind/code_contests: private and generated tests score; Python 3 solutions are kept."""

    def tests(name: str) -> tuple[IoTest, ...]:
        return tuple(IoTest(*pair) for pair in zip(row[name]["input"], row[name]["output"], strict=True))

    def solutions(name: str) -> tuple[str, ...]:
        pairs = zip(row[name]["language"], row[name]["solution"], strict=True)
        return tuple(text for language, text in pairs if language == PYTHON3)

    seconds = row["time_limit"] and row["time_limit"]["seconds"] + row["time_limit"].get("nanos", 0) / 1e9
    return Problem(
        name=row["name"],
        statement=row["description"],
        public_tests=tests("public_tests"),
        private_tests=tests("private_tests") + tests("generated_tests"),
        limits=Limits(seconds or Limits.seconds, row["memory_limit_bytes"] or Limits.memory_bytes),
        correct_solutions=solutions("solutions"),
        incorrect_solutions=solutions("incorrect_solutions"),
        group=f"difficulty {row['difficulty']}",
    )


SCHEMAS = {  # columns that tell a schema, and what makes a Problem of its rows
    ("task_id", "prompt", "canonical_solution", "entry_point", "test"): _from_humaneval_plus,
    (
        "name",
        "description",
        "public_tests",
        "private_tests",
        "generated_tests",
        "solutions",
    ): _from_code_contests,
}
HUB = {"humaneval_plus": "evalplus/humanevalplus", "code_contests": "deepmind/code_contests"}


def load_problems(source: str, split: str) -> Sequence[Problem]:
    """The problems of a split ("train", "valid" or "test").

    Args:
        source: "toy"; "humaneval_plus" or "code_contests" (from the hub); or a .jsonl, .jsonl.gz or .parquet
        file
            with the columns of one of these two, which serves for every split.
    Raises: ValueError for an unknown source, split or schema, and where no problem is left;
    FileNotFoundError.
    """
    if source == "toy":
        import toy  # here because toy.py builds its problems from this module's Problem and templates

        return toy.problems(split)
    if source in HUB:
        rows = datasets.load_dataset(HUB[source], split=split)
    elif Path(source).suffix in (".gz", ".jsonl", ".parquet"):
        if not Path(source).exists():
            raise FileNotFoundError(f"there is no problem file {source}")
        kind = "parquet" if source.endswith(".parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=source, split="train")
    else:
        raise ValueError(
            f"there is no problem set {source!r}: toy, {', '.join(HUB)}, or a .jsonl(.gz) or .parquet file"
        )
    make = next((make for columns, make in SCHEMAS.items() if set(columns) <= set(rows.column_names)), None)
    if make is None:
        wanted = " or ".join(", ".join(columns) for columns in SCHEMAS)
        raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}, but needs {wanted}")
    if make is _from_code_contests:
        # The paper drops what has no public or no private tests.
        scored = [
            bool(public["input"]) and bool(private["input"] or generated["input"])
            for public, private, generated in zip(
                rows["public_tests"], rows["private_tests"], rows["generated_tests"], strict=True
            )
        ]
        kept = [place for place, keep in enumerate(scored) if keep]
        dropped = len(scored) - len(kept)
        print(f"{source}: {dropped} of {len(scored)} problems have no public or no private tests")
        rows = rows.select(kept)
    if not len(rows):
        raise ValueError(f"{source} has no problem with public and private tests")
    return Problems(rows, make)


if __name__ == "__main__":
    problem_set = load_problems(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "test")
    count = sum(len(p.public_tests) + len(p.private_tests) for p in problem_set)
    print(f"{len(problem_set)} problems, {count} tests\n\n{first_message(problem_set[0])}")
