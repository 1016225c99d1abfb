"""Rows of APPS and TACO: all of a row's tests are in `input_output`, a JSON text.

Paper: not in it; both sets are often trained on. The rows do not say which tests are public: ours are the
first ones as long as their input is in the statement, at least one, and never all. A row with one test is
left out, because a program could print the expected output that the feedback shows.

Without `fn_name` a test is standard input and output, each a text or a list of lines, compared by
`sandbox.outputs_match` (APPS's own judge is more lenient: it also accepts lines and words in another order).
With `fn_name` a test is a list of arguments and a result. As in APPS's judge, the result may be wrapped in a
list, and a tuple equals a list. The function may be a method of a `class Solution`.
"""

import hashlib
import re
import sys

from data import Problem
from formats import values
from sandbox import AssertTest, IoTest

sys.set_int_max_str_digits(0)  # some tests are integers of more than 4,300 digits

# Before each response: the names that judges of these sets import, and the function, if it is a method. The
# response defines it itself, or a class Solution, which is looked up when the function is called.
CALL = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from bisect import *
from typing import *
from builtins import *
def {name}(*arguments):
    return Solution().{name}(*arguments)
"""
# In the judge: the right side of ==, which shows the first result that it accepts.
EXPECTED = """\
import sys
from math import inf, nan
sys.set_int_max_str_digits(0)
def plain(value):
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
class Expected:
    def __init__(self, *accepted):
        self.accepted = accepted
    def __eq__(self, got):
        return any(plain(got) == value for value in self.accepted)
    def __repr__(self):
        return repr(self.accepted[0])
"""


def call_test(name: str, arguments: list, *accepted: object) -> AssertTest:
    """A test of one call, whose result must equal one of the accepted ones."""
    return AssertTest(f"assert {name}({', '.join(map(repr, arguments))}) == Expected({repr(accepted)[1:-1]})")


def function_columns(name: str, starter_code: str) -> dict[str, str]:
    """The fields of a Problem whose tests are made by `call_test`."""
    if not name.isidentifier():
        raise ValueError(f"the function's name is {name!r}, but must be a Python name")
    code = CALL.format(name=name)
    return {"entry_point": name, "signature": starter_code.strip(), "preamble": code, "setup": EXPECTED}


def _text(lines: object) -> str:
    """Standard input or output, which may be a list of lines."""
    return "\n".join(map(str, lines)) if isinstance(lines, list) else lines


def _call_tests(name: str, inputs: list, outputs: list) -> list[AssertTest]:
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("input_output has fn_name, so each of its inputs must be a list of arguments")
    wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
    tests = []
    for arguments, output in zip(inputs, outputs, strict=True):
        inner = output[:1] if isinstance(output, list) else []
        tests.append(call_test(name, arguments, *([*inner, output] if wrapped else [output, *inner])))
    return tests


def _amount(row: dict, column: str, unit: str) -> float:
    """TACO's limits are texts such as "2.0 seconds" or "256.0 megabytes"; 0 if there is none."""
    stated = values.text(row, column)
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) {unit}s?", stated)
    if stated and not match:
        raise ValueError(f'{column} is {stated!r}, but must be a text such as "2.0 {unit}s"')
    return float(match[1]) if match else 0


def read_row(row: dict) -> Problem:
    """The problem of a row of APPS or TACO. Raises: ValueError, one sentence."""
    statement, tests = values.text(row, "question"), values.from_json(row, "input_output", dict)
    inputs, outputs, name = (tests.get(part) or [] for part in ("inputs", "outputs", "fn_name"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError('input_output must have two lists of one length, "inputs" and "outputs"')
    about, public = {}, 1
    if name:
        about = function_columns(name, values.text(row, "starter_code"))
        made = _call_tests(name, inputs, outputs)
    else:
        inputs, outputs = ([*map(_text, side)] for side in (inputs, outputs))
        if not all(isinstance(side, str) for side in (*inputs, *outputs)):
            raise ValueError("input_output has an input or output that is neither a text nor a list of lines")
        made = [*map(IoTest, inputs, outputs)]
        shown = [" ".join(given.split()) in " ".join(statement.split()) for given in inputs]
        public = max(1, min([*shown, False].index(False), len(made) - 1))
    seconds, megabytes = _amount(row, "time_limit", "second"), _amount(row, "memory_limit", "megabyte")
    digest = hashlib.sha256(f"{statement}{row['input_output']}".encode()).hexdigest()[:12]
    return Problem(
        name=f"APPS/{row['problem_id']}" if "problem_id" in row else f"TACO/{digest}",
        statement=statement,
        public_tests=tuple(made[:public]),
        private_tests=tuple(made[public:]),
        limits=values.limits(seconds, megabytes * (1 << 20)),
        correct_solutions=values.texts(values.from_json(row, "solutions", list), "solutions"),
        group=f"difficulty {row['difficulty']}" if row.get("difficulty") else "",
        **about,
    )
