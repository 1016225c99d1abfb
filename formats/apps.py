"""Rows of APPS and TACO: all of a row's tests are in `input_output`, a JSON text.

Paper: not in it; both sets are often trained on. The rows do not say which tests are public: ours are the
first ones as long as their input is in the statement, at least one, and never all. A row with one test is
left out, because a program could print the expected output that the feedback shows.

Without `fn_name` a test is standard input and output, each a text or a list of lines, compared by
`sandbox.outputs_match` (APPS's own judge is more lenient: it also accepts lines and words in another order).
With `fn_name` a test is a list of arguments and a result. As in APPS's judge, a tuple equals a list, and the
results may be wrapped in a list, but only if all are (there, also the first item of any list is right). The
function may be a method of a `class Solution`.
"""

import hashlib
import json
import keyword
import re
import sys

from data import Problem
from formats import values
from formats.evalplus import JUDGE_HELPERS
from sandbox import AssertTest, IoTest

sys.set_int_max_str_digits(100_000)  # some tests are integers of more than 4,300 digits

# Before each response: the names that the judges of these sets import, and the function, in case that it is a
# method: the response defines the function or a class Solution, which is looked up when it is called.
MODULES = "collections functools heapq itertools math bisect typing builtins".split()
CALL = "".join(f"import {name}\nfrom {name} import *\n" for name in MODULES)
CALL += """\
import copy, operator, random, re, string, sys
def {name}(*arguments):
    return Solution().{name}(*arguments)
"""
# For the judge: what `Expected` calls. It shows the first result that is accepted.
COMPARISON = """
def plain(value):
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
def assertion(got, *accepted):
    assert any(plain(got) == value for value in accepted)
"""


def call_test(name: str, arguments: list, *accepted: object) -> AssertTest:
    """A test of one call, whose result must equal one of the accepted ones."""
    return AssertTest(f"assert {name}({', '.join(map(repr, arguments))}) == Expected({repr(accepted)[1:-1]})")


def function_columns(name: str, starter_code: str) -> dict[str, str]:
    """The fields of a Problem whose tests are made by `call_test`."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"the function's name is {name!r}, but must be a Python name")
    code = {"preamble": CALL.format(name=name), "setup": JUDGE_HELPERS + COMPARISON}
    if re.search(rf"^(def|class) {name}\b", code["setup"], re.MULTILINE):
        raise ValueError(f"the function's name is {name}, which the judge uses itself: rename it")
    shown = starter_code.strip() if re.search(rf"\bdef +{name}\b", starter_code) else ""  # else its name
    return code | {"entry_point": name, "signature": shown}


def _text(lines: object) -> str:
    """Standard input or output, which may be a list of lines."""
    if isinstance(lines, list) and all(type(line) in (str, int, float) for line in lines):
        return "\n".join(map(str, lines))
    if not isinstance(lines, str):
        wanted = "a text nor a list of lines: are these arguments of a function, and fn_name is missing?"
        raise ValueError(f"input_output has an input or output that is neither {wanted} {lines!r:.60}")
    return lines


def _integer_keys(stored: dict) -> dict:
    """JSON's keys are texts: where all are integers they were integers, as APPS's judge assumes."""
    integers = [int(key) for key in stored if re.fullmatch("-?(0|[1-9][0-9]*)", key)]
    return dict(zip(integers, stored.values(), strict=True)) if len({*integers}) == len(stored) else stored


def _call_tests(name: str, inputs: list, outputs: list) -> list[AssertTest]:
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("input_output has fn_name, so each of its inputs must be a list of arguments")
    wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
    converted = json.loads(json.dumps([inputs, outputs]), object_hook=_integer_keys)
    tests = []
    for arguments, *both in zip(*converted, outputs, strict=True):
        others, forms = ([*output, output] if wrapped else [output] for output in both)
        tests.append(call_test(name, arguments, *(form for form in others if form not in forms), *forms))
    return tests


def _amount(row: dict, column: str, unit: str, example: str) -> float:
    """The number of a limit of TACO, the larger one of a range; 0 if there is none."""
    stated = row.get(column) or ""
    match = re.fullmatch(rf"(?:[\d.]+ *- *)?(\d+(?:\.\d+)?) *{unit}", str(stated))
    if stated and not match:
        raise ValueError(f"{column} is {stated!r}, but must be a text such as {example!r}")
    return float(match[1]) if match else 0


def read_row(row: dict) -> Problem:
    """The problem of a row of APPS or TACO. Raises: ValueError, one sentence."""
    statement, tests = values.text(row, "question"), values.from_json(row, "input_output", dict)
    inputs, outputs, name = (tests.get(part) or [] for part in ("inputs", "outputs", "fn_name"))
    if tests and not {"inputs", "outputs"} <= tests.keys():
        raise ValueError(f'input_output has {", ".join(tests)}, but must have "inputs" and "outputs"')
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError('input_output must have two lists of one length, "inputs" and "outputs"')
    about, public = {}, 1
    if name:
        about = function_columns(name, values.text(row, "starter_code"))
        made = _call_tests(name, inputs, outputs)
    else:
        made = [IoTest(_text(given), _text(output)) for given, output in zip(inputs, outputs, strict=True)]
        shown = [" ".join(test.input.split()) in " ".join(statement.split()) for test in made]
        public = max(1, min([*shown, False].index(False), len(made) - 1))
    seconds = _amount(row, "time_limit", "(s|sec|seconds?)", "2.0 seconds")
    megabytes = _amount(row, "memory_limit", "(MB|megabytes?)", "256.0 megabytes")
    digest = hashlib.sha256(f"{statement}{row['input_output']}".encode()).hexdigest()[:12]
    return Problem(
        name=f"APPS/{row['problem_id']}" if row.get("problem_id") is not None else f"TACO/{digest}",
        statement=statement,
        public_tests=tuple(made[:public]),
        private_tests=tuple(made[public:]),
        limits=values.limits(seconds, megabytes * (1 << 20)),
        correct_solutions=values.texts(values.from_json(row, "solutions", list), "solutions"),
        group=f"difficulty {row['difficulty']}" if row.get("difficulty") else "",
        **about,
    )
