"""Rows of LiveCodeBench: tests in `public_test_cases` and `private_test_cases`, JSON texts.

Paper: not in it. Private tests may be packed: base64 of zlib of a pickle of the JSON text. A pickle can run
code when it is loaded, so it is never loaded: its text is read from the list of its opcodes, and a pickle of
anything else is refused.

Tests of type "stdin" are compared by `sandbox.outputs_match` (LiveCodeBench's judge is stricter: it compares
line by line, with capitals and exact numbers). Tests of type "functional" call a method of `class Solution`:
each line of their input is an argument in JSON, and as in its judge a tuple equals a list.
"""

import base64
import json
import pickletools
import zlib

from data import Problem
from formats import values
from formats.apps import call_test, function_columns
from sandbox import AssertTest, IoTest

PICKLE_BYTES = 1 << 30
SIDES = ("input", "output")
NO_VALUE = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}  # opcodes beside the text


def pickled_text(pickled: bytes) -> str:
    """The text in a pickle of one text, without unpickling."""
    found = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if "UNICODE" in opcode.name:
            found.append(argument)
        elif opcode.name not in NO_VALUE:
            raise ValueError(f"its pickle holds more than one text: {opcode.name}")
    if len(found) != 1:
        raise ValueError(f"its pickle holds {len(found)} texts instead of one")
    return found[0]


def _tests(packed: str, name: str) -> tuple[IoTest | AssertTest, ...]:
    """The tests of a column; `name` is the function's, for those of type "functional"."""
    if not packed.lstrip().startswith("["):
        unzipped = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), PICKLE_BYTES)
        packed = pickled_text(unzipped)
    tests, kind = [], "functional" if name else "stdin"
    for case in json.loads(packed):
        if not isinstance(case, dict) or not all(isinstance(case.get(part), str) for part in SIDES):
            raise ValueError("a test has no input or output, or one that is no text")
        if case.get("testtype") != kind:
            raise ValueError(f"a test has testtype {case.get('testtype')!r}, but by metadata it is {kind!r}")
        if not name:
            tests.append(IoTest(case["input"], case["output"]))
            continue
        try:
            arguments = [json.loads(line) for line in case["input"].split("\n") if line]
            tests.append(call_test(name, arguments, json.loads(case["output"])))
        except ValueError as error:
            raise ValueError(f"a test has a line of input or an output that is no JSON: {case}") from error
    return tuple(tests)


def read_row(row: dict) -> Problem:
    """The problem of a row of LiveCodeBench. Raises: ValueError, one sentence."""
    name, tests = values.from_json(row, "metadata", dict).get("func_name", ""), {}
    starter = values.text(row, "starter_code")
    if starter.strip() and not name:
        raise ValueError(
            "starter_code shows a function to write, but metadata has no func_name for its tests"
        )
    if not isinstance(row["question_id"], (str, int)):
        raise ValueError(f"question_id is {row['question_id']!r:.60}, but must be a text or a number")
    for column in ("public_test_cases", "private_test_cases"):
        if not row[column]:
            raise ValueError(f"{column} is empty")
        try:
            tests[column] = _tests(values.text(row, column), name)
        except (AttributeError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"{column} cannot be read as tests: {error}") from error
    return Problem(
        name=f"LiveCodeBench/{row['question_id']}",
        statement=values.text(row, "question_content"),
        public_tests=tests["public_test_cases"],
        private_tests=tests["private_test_cases"],
        group=f"difficulty {row['difficulty']}" if row.get("difficulty") else "",
        limits=values.limits(values.number(row, "time_limit"), values.number(row, "memory_limit_bytes")),
        **(function_columns(name, starter) if name else {}),
    )
