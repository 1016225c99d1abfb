"""Rows of your own files, and of CodeContests.

A file of your own is JSON (one object per line) or parquet. Each row is a problem. It must have the columns
    name, description
    public_tests, private_tests
        [{"input": "1 2\\n", "output": "3\\n"}, ...], or with entry_point ["assert f(1, 2) == 3", ...]
and may have
    generated_tests                    more private tests
    solutions, incorrect_solutions     lists of programs
    time_limit, memory_limit_bytes     limits of a test, in seconds and bytes; 0: not stated
    difficulty or cf_rating            results are also reported for each of their values
    entry_point                        for asserts: the function's name
    signature                          for asserts: as the prompt writes it, "def f(a, b):" or class Solution
    preamble, setup                    for asserts: code before each response, and code for the judge
CodeContests writes tests as {"input": [...], "output": [...]}, solutions as {"language": [...], "solution":
[...]} and time_limit as {"seconds": 2, "nanos": 0}; these forms are read too.
"""

import functools
import re
from difflib import get_close_matches

from data import Problem
from formats.apps import CALL
from formats.values import assert_tests, limits, number, parse, text, texts
from sandbox import AssertTest, IoTest

PYTHON3 = (3, "PYTHON3")  # CodeContests' number and name of the language
LANGUAGES = (0, 1, 2, 4, "UNKNOWN_LANGUAGE", "PYTHON", "CPP", "JAVA")  # the others
OF_ASSERTS = ("preamble", "entry_point", "signature", "setup")
COLUMNS = """name description public_tests private_tests generated_tests solutions incorrect_solutions
time_limit memory_limit_bytes difficulty cf_rating""".split()


@functools.cache
def _check_spelling(column: str) -> None:
    known = (*COLUMNS, *OF_ASSERTS)
    if column not in known and (alike := get_close_matches(column, known, 1, 0.8)):
        raise ValueError(f"column {column} is not read: if {alike[0]} is meant, rename it, else remove it")


def _tests(row: dict, column: str) -> tuple[IoTest | AssertTest, ...]:
    tests = row.get(column) or []
    if row.get("entry_point"):
        return assert_tests(texts(tests, column), row["entry_point"], column, text(row, "setup"))
    match tests:
        case {"input": [*inputs], "output": [*outputs]}:
            pass
        case [*rounds] if all(isinstance(test, dict) for test in rounds):
            inputs, outputs = ([test.get(side) for test in rounds] for side in ("input", "output"))
        case _:
            raise ValueError(
                f'{column} is {tests!r:.60}, but must be a list such as [{{"input": "1 2", "output": "3"}}], '
                "not a text with JSON; tests that are asserts need the column entry_point"
            )
    if len(inputs) != len(outputs) or not all(isinstance(side, str) for side in (*inputs, *outputs)):
        raise ValueError(f"a test of {column} has no output, or no input, or one that is no text")
    return tuple(map(IoTest, inputs, outputs))


def _solutions(row: dict, column: str) -> tuple[str, ...]:
    solutions = row.get(column) or []
    match solutions:
        case {"language": [*languages], "solution": [*programs]} if len(languages) == len(programs):
            if unknown := [name for name in languages if name not in (*PYTHON3, *LANGUAGES)]:
                raise ValueError(f"{column} has language {unknown[0]!r}, but CodeContests' is 3 or PYTHON3")
            solutions = [program for i, program in zip(languages, programs, strict=True) if i in PYTHON3]
    return texts(solutions, column)


def read_row(row: dict) -> Problem:
    """The problem of a row of CodeContests or of a file of your own. Raises: ValueError, one sentence."""
    for column in ("name", "description"):
        if not isinstance(row[column], str) or not row["name"]:
            raise ValueError(f"{column} is no text, or empty: {row[column]!r:.60}")
    for column in row:
        _check_spelling(column)
    about = {name: text(row, name) for name in OF_ASSERTS}
    if (about["signature"] or about["setup"]) and not about["entry_point"]:
        raise ValueError("signature and setup are for tests that are asserts: these need column entry_point")
    name, correct = about["entry_point"], _solutions(row, "solutions")
    defining = [about["signature"]] if about["signature"] else [about["preamble"] + code for code in correct]
    bound = rf"\b(def|class|as|import) +{name}\b|\b{name} *(:[^=\n]*)?=[^=]"
    named = not defining or any(re.search(bound, code) for code in defining)
    if name and not (name.isidentifier() and named):
        raise ValueError(f"entry_point {name!r} is not in its signature and solutions: is it misspelt?")
    if name and any(re.search(rf"^\s*class {name}\b", code, re.MULTILINE) for code in defining):
        raise ValueError(f"entry_point {name} is a class, but must be a function: tests get plain data only")
    group = f"difficulty {row['difficulty']}" if row.get("difficulty") is not None else ""
    if rating := int(number(row, "cf_rating")):  # on Codeforces; 0 if unknown
        group = f"rating {rating // 400 * 400} to {rating // 400 * 400 + 399}"
    match row.get("time_limit"):
        case {"seconds": _} as limit if limit.keys() <= {"seconds", "nanos"}:
            seconds = number(limit, "seconds") + number(limit, "nanos") / 1e9
        case _:
            seconds = number(row, "time_limit")
    parse(about["preamble"], "preamble")
    if about["preamble"] and not about["preamble"].endswith("\n"):
        about["preamble"] += "\n"
    if about["signature"].startswith("class "):  # a method of a class Solution
        about["preamble"] += CALL.format(name=name)
    return Problem(
        name=row["name"],
        statement=row["description"],
        public_tests=_tests(row, "public_tests"),
        private_tests=_tests(row, "private_tests") + _tests(row, "generated_tests"),
        limits=limits(seconds, number(row, "memory_limit_bytes")),
        correct_solutions=correct,
        incorrect_solutions=_solutions(row, "incorrect_solutions"),
        group=group,
        **about,
    )
