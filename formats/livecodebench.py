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
    cases, kind = json.loads(packed), "functional" if name else "stdin"
    for case in cases:
        if not all(isinstance(case.get(part), str) for part in ("input", "output")):
            raise ValueError("a test has no input or output, or one that is no text")
        if case.get("testtype") != kind:
            raise ValueError(f"a test has testtype {case.get('testtype')!r}, but by metadata it is {kind!r}")
    if not name:
        return tuple(IoTest(case["input"], case["output"]) for case in cases)
    calls = [[*map(json.loads, filter(None, case["input"].split("\n")))] for case in cases]
    results = [json.loads(case["output"]) for case in cases]
    return tuple(call_test(name, *call) for call in zip(calls, results, strict=True))


def read_row(row: dict) -> Problem:
    """The problem of a row of LiveCodeBench. Raises: ValueError, one sentence."""
    name, tests = values.from_json(row, "metadata", dict).get("func_name", ""), {}
    for column in ("public_test_cases", "private_test_cases"):
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
        **(function_columns(name, values.text(row, "starter_code")) if name else {}),
    )
