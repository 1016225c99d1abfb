"""Exercise 8: break the grader, then mend it.

Reinforcement learning finds every hole in what rewards it. `naive_grade` runs a program and its tests in one
process, and believes what this process says. First forge a pass: write programs that do not solve the problem
(read integers, print their sum) and pass. Then write a grader whose verdict no program can make.

Paper: nothing on this. Read first: the docstring of sandbox.py. About 30 minutes.
Check: python exercises/e8_grader.py
"""

import ast
import secrets
import subprocess
import sys

from classroom import ROOT, SENTENCES, main, verdict_of

HARNESS = """
import contextlib, io, sys
for given, expected in {tests!r}:
    sys.stdin, out = io.StringIO(given), io.StringIO()
    with contextlib.redirect_stdout(out):
        exec({program!r}, {{"__name__": "__main__"}})
    assert out.getvalue().split() == expected.split()
print({secret})
"""


def run(program: str, given: str, seconds: float = 60) -> tuple[int, str]:
    """The exit code of a Python process, and what it printed; -1 and nothing if it takes too long."""
    command = [sys.executable, "-I", "-S", "-c", program]
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return -1, ""
    return done.returncode, done.stdout.decode(errors="replace")


def naive_grade(program: str, tests: list[tuple[str, str]], believes: str) -> bool:
    """Whether the program passes. Args: believes: "exit code", "marker" (a secret one) or "comparison"."""
    secret = secrets.token_hex(8)
    told = "sys.__stdin__.read()" if believes == "comparison" else repr(secret)  # read when all is compared
    harness = HARNESS.format(tests=tests, program=program, secret=told)
    code, printed = run(harness, secret)
    if believes == "exit code":
        return code == 0
    return secret in printed if believes == "marker" else printed == f"{secret}\n"


def forgery(believes: str) -> str:
    """The text of a program that passes `naive_grade(..., believes)` without solving the problem.

    Three different ones, for "exit code", for "marker" and for "comparison".
    """
    raise NotImplementedError("forgery must return the text of a program")


def grade(program: str, tests: list[tuple[str, str]], seconds: float) -> bool:
    """Whether the program prints only the output's words, for each (input, output) of `tests`.

    Args: seconds: how long it may take for each.
    """
    raise NotImplementedError("grade must return True or False")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

SAY = SENTENCES["e8_grader"]
TESTS = [("3 4 5\n", "12\n"), ("70123 1\n", "70124\n")]
BELIEFS = ("exit code", "marker", "comparison")
PROGRAMS = (ROOT / "exercises" / "forgeries.txt").read_text()  # reading it would spoil the exercise


def check(forgery=forgery, grade=grade) -> str | None:
    programs = {believes: forgery(believes) for believes in BELIEFS}
    for believes, program in programs.items():
        if not naive_grade(program, TESTS, believes):
            return f"This program does not pass naive_grade(..., {believes!r}):\n{program}"
        if run(program, "20 22\n")[1].split() == ["42"]:
            return f"This program for {believes!r} solves the problem, so it is no forgery:\n{program}"
    if len({ast.dump(ast.parse(program)) for program in programs.values()}) < len(BELIEFS):
        return "Two of the forgeries are the same program: find three ways."
    for word, _, program in (entry.partition("\n") for entry in PROGRAMS.split("\n#### ")[1:]):
        seconds = 0.5 if word == "late" else 60  # no busy machine makes a right program that slow
        verdict = verdict_of(grade, program, TESTS, seconds)
        if word == "right" and verdict is not True:
            return f"This program is right:\n{program}\n{verdict or 'Your grader says that it is not.'}"
        if word != "right" and verdict is not False:
            told = f"breaks your grader. {verdict}"
            return f"A program {f'gets past your grader. {SAY[word]}' if verdict is True else told}"
    return None


NO_EFFECT = "No effect on the toy world: none of the lines that its model knows attacks a grader."

if __name__ == "__main__":
    main(globals())

# The solution: outputs_match, result_of and run_job in sandbox.py
