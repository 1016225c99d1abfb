"""A problem: what the model is told, the tests that answer it, the words of the prompts, and where problems
come from.

Paper: section 2.1 and appendix B. A problem has *public* tests, whose outcomes are fed back in the dialog,
and *private* tests, which judge the last response only. The paper's own prompts are longer: ours stand below
as constants, to be swapped.

Run alone: `python data.py SOURCE [SPLIT]` counts a problem set's problems and tests and prints one first
message.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

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


def load_problems(source: str, split: str) -> Sequence[Problem]:
    """The problems of a split ("train", "valid" or "test").

    Args: source: "toy".
    Raises: ValueError for an unknown source or split.
    """
    if source == "toy":
        import toy  # here because toy.py builds its problems from this module's Problem and templates

        return toy.problems(split)
    raise ValueError(f"there is no problem set {source!r}")
