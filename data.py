"""A problem: its statement and tests, and the words of the prompts and of the feedback.

Paper: section 2.1 and appendix B. A problem has *public* tests, whose results are fed back in the dialog, and
*private* tests, which judge the last response only. The paper's own prompts are longer; ours are the
constants below, which are easy to replace. Where problem sets come from is in `sources.py`.

Run alone: `python data.py SOURCE [SPLIT]` prints the size of a problem set and one first message.
"""

import ast
import re
import runpy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox import NOT_RUN, AssertTest, IoTest, Job, Limits, TestResult, Verdict

# ---- the words of the prompts: each sentence and each field is on a line of its own ------------------------

FIRST_PROMPT = "{statement}\n\n{format}"
FORMAT_TOKENS = (
    "Write a Python 3 program that reads standard input and writes standard output.\n"
    "Put the whole program into one ```python block.\n"
)
FORMAT_ASSERTS = (
    "Write this Python 3 function:\n{signature}\nPut the whole function into one ```python block.\n"
)
FORMAT_CLASS = FORMAT_ASSERTS.replace("function", "class")  # for a method

FEEDBACK_TOKENS = {  # one entry for each public test that failed
    Verdict.WRONG_ANSWER: (
        "Wrong answer.\nInput:\n{input}\nExpected output:\n{expected}\nYour output:\n{got}\n"
    ),
    Verdict.EXCEPTION: "Exception.\nInput:\n{input}\nTraceback:\n{traceback}\n",
    Verdict.TIMEOUT: "Timeout.\nInput:\n{input}\n",
    Verdict.OUT_OF_MEMORY: "Out of memory.\nInput:\n{input}\n",
    Verdict.TOO_MUCH_OUTPUT: "Too much output.\nInput:\n{input}\n",
}
FEEDBACK_ASSERTS = {  # one entry for each public test, also for those that passed
    Verdict.PASSED: "Passed.\nTest:\n{test}\n",
    Verdict.WRONG_ANSWER: "Wrong answer.\nTest:\n{test}\nAssertionError: {got} != {expected}\n",
    Verdict.EXCEPTION: "Exception.\nTest:\n{test}\nTraceback:\n{traceback}\n",
    Verdict.TIMEOUT: "Timeout.\nTest:\n{test}\n",
    Verdict.OUT_OF_MEMORY: "Out of memory.\nTest:\n{test}\n",
    Verdict.TOO_MUCH_OUTPUT: "Too much output.\nTest:\n{test}\n",
}
FEEDBACK_ASSERT_WITHOUT_VALUES = "Wrong answer.\nTest:\n{test}\n"  # when the compared values are unknown
MBPP_STATEMENT = "{prompt}\nThese tests must pass:\n{tests}"
FEEDBACK = "{entries}\n{closing}{format}"
NO_VALID_CODE = "Your answer has no valid Python code.\n"
PUBLIC_TESTS_PASSED = "The public tests passed, but the answer is wrong.\n"  # in random feedback only
CLOSING = "Try again.\n"
RETRY_WITHOUT_FEEDBACK = "Try again."  # the whole message of feedback mode "none"
CUT = "[{count} characters cut]"
TESTS_CUT = "[{count} tests cut]\n"


@dataclass(frozen=True)
class Problem:
    """One problem. Its tests are all `IoTest` (standard input and output) or all `AssertTest` (calls)."""

    name: str  # unique in its set
    statement: str  # the text of the first user message, without the format instruction
    public_tests: tuple[IoTest | AssertTest, ...]  # their results become feedback
    private_tests: tuple[IoTest | AssertTest, ...]  # judge the last response, together with the public ones
    limits: Limits = Limits()
    correct_solutions: tuple[str, ...] = ()
    incorrect_solutions: tuple[str, ...] = ()  # programs for random feedback
    preamble: str = ""  # code that is put before each response's code (HumanEval+: its prompt)
    entry_point: str = ""  # assert sets: the function under test
    signature: str = ""  # assert sets: the function as the prompt writes it; empty: its name
    setup: str = ""  # assert sets: trusted helper code of the judge
    group: str = ""  # such as a difficulty: evaluate.py reports each group too
    answer: str = ""  # random feedback never comes from a problem with the same answer; empty: the name

    @property
    def judging(self) -> str:
        """ "asserts" where tests call a function, else "tokens"."""
        return "asserts" if self.entry_point else "tokens"


def _format_instruction(problem: Problem) -> str:
    if problem.judging == "tokens":
        return FORMAT_TOKENS
    template = FORMAT_CLASS if problem.signature.startswith("class ") else FORMAT_ASSERTS
    return template.format(signature=problem.signature or problem.entry_point)


def first_message(problem: Problem, with_format: bool = True) -> str:
    """The first user message: the statement and the format instruction."""
    instruction = _format_instruction(problem) if with_format else ""
    return FIRST_PROMPT.format(statement=problem.statement.strip(), format=instruction).strip()


def _shorten(text: str, cut: int) -> str:
    """Replace the middle by a mark, because the start of an input and the end of a traceback matter most."""
    text = text.strip("\n")
    if len(text) <= cut:
        return text
    half = cut // 2
    return f"{text[:half]}\n{CUT.format(count=len(text) - 2 * half)}\n{text[-half:]}"


def feedback_entry(problem: Problem, test: IoTest | AssertTest, result: TestResult, cut: int) -> str:
    """The feedback on one test that failed; where tests are asserts, also on one that passed."""
    if isinstance(test, IoTest):
        fields = {"input": test.input, "expected": test.output, "got": result.stdout}
        template = FEEDBACK_TOKENS[result.verdict]
    else:
        call = result.call or test.code.removeprefix("assert ").partition(" == Expected(")[0]
        fields = {"test": call, "expected": result.expected, "got": result.got}
        template = FEEDBACK_ASSERTS[result.verdict]
        if result.verdict == Verdict.WRONG_ANSWER and not result.expected:
            template = FEEDBACK_ASSERT_WITHOUT_VALUES
    fields["traceback"] = re.sub(  # its line numbers count the preamble, but the model sees only its own code
        r'(File "solution.py", line )(\d+)',
        lambda m: f"{m[1]}{max(1, int(m[2]) - problem.preamble.count(chr(10)))}",
        result.traceback,
    )
    return template.format(**{name: _shorten(text, cut) for name, text in fields.items()})


def feedback_message(
    problem: Problem, results: Sequence[TestResult] | None, cut: int = 2000, asked: Problem | None = None
) -> str:
    """The user message after a response that did not pass.

    Args:
        results: one for each public test; None if the response has no valid code.
        cut: the maximum length in characters of a field (an input, an output, a traceback). If all entries
            together have more than ten times as many, tests are left out, passed ones first, and counted.
        asked: the problem of the dialog, if it is another one (random feedback).
    """
    entries = [NO_VALID_CODE]
    if results is not None:
        shown = {  # the entry of each test, by its number
            number: feedback_entry(problem, test, result, cut)
            for number, (test, result) in enumerate(zip(problem.public_tests, results, strict=True))
            if result != NOT_RUN and (problem.judging == "asserts" or result.verdict != Verdict.PASSED)
        }
        kept, length = [], 0
        for number in sorted(shown, key=lambda n: results[n].verdict == Verdict.PASSED):  # failed tests first
            length += len(shown[number])
            if kept and length > 10 * cut:
                break
            kept.append(number)
        entries = [shown[number] for number in sorted(kept)]
        if left_out := len(shown) - len(kept) + results.count(NOT_RUN):
            entries.append(TESTS_CUT.format(count=left_out))
        if all(result.verdict == Verdict.PASSED for result in results):
            entries.append(PUBLIC_TESTS_PASSED)
    instruction = _format_instruction(asked or problem)
    return FEEDBACK.format(entries="\n".join(entries), closing=CLOSING, format=instruction).strip()


def make_job(
    problem: Problem, code: str, tests: Sequence[IoTest | AssertTest], stop_at_first_failure: bool = False
) -> Job:
    """The sandbox's job that judges `code`, a response's program, on `tests` of `problem`."""
    lines, head = code.split("\n"), 0
    if problem.preamble and "__future__" in code:
        with warnings.catch_warnings(action="ignore"):
            imports = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
        head = max((node.end_lineno for node in imports if node.module == "__future__"), default=0)
    # Imports from __future__ must come first. The lines after them keep their numbers in a traceback.
    return Job(
        program="\n".join([*lines[:head], problem.preamble + "\n".join(lines[head:])]),
        tests=tuple(tests),
        limits=problem.limits,
        entry_point=problem.entry_point,
        setup=problem.setup,
        preamble=problem.preamble,
        stop_at_first_failure=stop_at_first_failure,
        name=problem.name,
    )


if __name__ == "__main__":
    runpy.run_module("sources", run_name="__main__")  # not imported, because it imports this module
