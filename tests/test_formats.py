"""Rows of every kind: the published forms load and are judged as in their sets, what is wrong is named."""

import base64
import json
import pickle
import runpy
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from config import Config
from data import first_message, make_job
from episodes import load_splits
from formats import livecodebench
from formats.values import assert_tests
from sandbox import AssertTest, IoTest, Limits
from sources import TEST_COLUMNS, first_messages, load_problems

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(tmp_path, *rows, split="test", holdout=0.0):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(load_problems(str(path), split, holdout))


def verdicts(sandbox, problem, code) -> str:
    results = sandbox.run([make_job(problem, code, problem.public_tests + problem.private_tests)])[0]
    return "".join(result.verdict.value[0] for result in results)


PAIRS = [{"input": "1", "output": "1"}, {"input": "2", "output": "2"}]
OWN = {"name": "a", "description": "d", "public_tests": PAIRS[:1], "private_tests": PAIRS[1:]}
CALLS = OWN | {"entry_point": "f", "private_tests": ["assert f(2) == 4"]}
CALLS["public_tests"] = ["assert f(1) == 2"]

# ---- the values of a row -----------------------------------------------------------------------------------


def test_a_number_is_taken_as_a_number(tmp_path):
    (problem,) = load(tmp_path, OWN | {"memory_limit_bytes": 268435456.0, "time_limit": 2})
    assert problem.limits == Limits(2.0, 268435456) and type(problem.limits.memory_bytes) is int
    (problem,) = load(tmp_path, OWN | {"memory_limit_bytes": 0, "time_limit": None})
    assert problem.limits == Limits()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"memory_limit_bytes": float("nan")}, "memory_limit_bytes is nan, but must be a finite number"),
        ({"memory_limit_bytes": "268435456"}, "memory_limit_bytes is '268435456', but must be a number"),
        ({"memory_limit_bytes": 256}, "memory_limit_bytes is 256, but must be in bytes"),
        ({"memory_limit_bytes": True}, "memory_limit_bytes is True, but must be a number"),
        ({"time_limit": "2 seconds"}, "time_limit is '2 seconds', but must be a number.* without .* unit"),
        ({"time_limit": float("nan")}, "time_limit is nan"),
        ({"time_limit": float("inf")}, "time_limit is inf"),
        ({"time_limit": -1}, "time_limit is -1, but must be .* not negative"),
        ({"time_limit": {"seconds": "2"}}, "seconds is '2', but must be a number"),
        ({"time_limit": {"seconds": 2000, "nanos": 0}}, "time_limit is 2000.0 seconds: if they are milli"),
        ({"time_limit": {"minutes": 1}}, "time_limit is {'minutes': 1}, but must be a number"),
        ({"time_limit": False}, "time_limit is False, but must be a number"),
        ({"time_limit": ""}, "time_limit is '', but must be a number"),
        ({"time_limit": 0.001}, "time_limit is 0.001 seconds, but must be at least 0.01"),
        ({"memory_limit_bytes": 10**30}, "memory_limit_bytes is 10+, but must be in bytes, .* less than"),
        ({"solutions": {"solution": ["x"]}}, "solutions must be a list of texts"),
        ({"solutions": {"language": [3], "solution": []}}, "solutions must be a list of texts"),
        ({"preamble": "import ("}, "preamble is no Python"),
        ({"time_limit": 2000}, "time_limit is 2000 seconds: if they are milliseconds, write 2.0"),
        ({"cf_rating": "1500"}, "cf_rating is '1500', but must be a number: write it without quotes"),
        ({"public_tests": {"input": "12", "output": "34"}}, "public_tests is .* but must be a list such as"),
        ({"public_tests": json.dumps(PAIRS)}, "public_tests is .*, not a text with JSON"),
        ({"public_tests": ["assert f(1) == 2"]}, "public_tests is .* need the column entry_point"),
        ({"public_tests": 7}, "public_tests is 7, but must be a list"),
        ({"solutions": json.dumps(["x"])}, "solutions is a text, but must be a list of texts"),
        ({"solutions": [1]}, "solutions must be a list of texts"),
        ({"name": ""}, "name is no text, or empty"),
        ({"time_limit": 10**400}, "time_limit is 10+, but must be a finite number"),
        ({"time_limit": {"seconds": 1, "nanos": 10**400}}, "nanos is 10+, but must be a finite number"),
        ({"time_limit": {"seconds": 2000, "unit": "ms"}}, "time_limit is {.*}, but must be a number"),
        ({"setup": "import sys"}, "signature and setup are for .* asserts: these need column entry_point"),
        ({"signature": "def f(x):"}, "signature and setup are for .* asserts: these need column entry_point"),
        ({"timelimit": 2}, "column timelimit is not read: if time_limit is meant, rename it"),
        ({"incorect_solutions": ["x"]}, "column incorect_solutions is not read: if incorrect_solutions is"),
        ({"memory_limit": 256}, "column memory_limit is not read: if memory_limit_bytes is meant"),
        ({"solutions": {"language": ["py"], "solution": ["x"]}}, "solutions has language 'py', but Code"),
        ({"entry_point": "f g"}, "public_tests|entry_point"),
    ],
)
def test_a_wrong_value_is_named_with_file_line_and_column(tmp_path, changed, told):
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2, is not understood: .*{told}") as error:
        load(tmp_path, OWN, OWN | changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "test",
    [
        "def check(candidate):\n    assert candidate(1) == 2",
        "def test_f():\n    assert f(1) == 2",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        assert f(1) == 2",
        "f(1) == 2",
        'assert (f(1) == 2, "no")',
        "assert [f(1) == 2]",
        "assert f",
        "assert True",
        "assert 1 == 1",
        "x = f(1)",
        "assert g(1) == 2",
        "check(f)",
        "x = f(1)\nassert x == x",
        "assert f(1) == f(1)",
        "assert len(f(1)) <= len(f(1))",
        "try:\n    assert f(1) == 2\n    print('ok')\nexcept AssertionError:\n    print('fail')",
        "try:\n    assert f(1) == 2\nexcept:\n    pass",
    ],
)
def test_a_test_that_compares_nothing_is_refused(tmp_path, test):
    with pytest.raises(
        ValueError, match="line 1, .* a test of private_tests compares no answer of the function f"
    ):
        load(tmp_path, CALLS | {"private_tests": [test]})


@pytest.mark.parametrize(
    "test",
    [
        "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)",
        "assert f(1)",
        "assert not f(1), 'no'",
        "import math\nassert math.isclose(candidate(1), 2)",
        "for x in range(3):\n    assert f(x) == 2 * x",
        "x = f(1)\nassert x == 2",
        "if f(1) != 2:\n    raise AssertionError",
        "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
        "import unittest\nunittest.TestCase().assertEqual(f(1), 2)",
        "assert all(map(f, [1, 2]))",
        "import pytest\nwith pytest.raises(ValueError): f(1)",
        "same(f(1), 2)",
        "import solution\nassert solution.f(1) == 2",
        "assert f(2, 3) == f(3, 2)",
        "x = f(1)\nassert f(x) == x",
        "import unittest\nclass T(unittest.TestCase):\n def test(self): self.assertEqual(f(1), 2)\n"
        "unittest.main()",
        "try:\n    f(-1)\nexcept Exception:\n    pass\nelse:\n    assert False",
        "try:\n    assert f(1) == 2\nexcept AssertionError as e:\n    raise ValueError from e",
        "import asyncio\nasync def main():\n    assert f(1) == 2\nasyncio.run(main())",
    ],
)
def test_a_test_that_compares_in_another_form_is_taken(test):
    helpers = "def same(got, expected):\n    assert got == expected"
    assert assert_tests([test], "f", "public_tests", helpers) == (AssertTest(test),)


@pytest.mark.parametrize("column", ["setup", "preamble", "public_tests"])
@pytest.mark.parametrize("code", ["import math, nothing.here", "from nothing import here"])
def test_an_import_of_what_is_not_installed_is_named(tmp_path, column, code):
    guarded = f"try:\n {code}\nexcept ImportError: pass"
    bad, good = (
        {column: [f"{lines}\nassert f(1) == 2"] if column == "public_tests" else lines}
        for lines in (code, guarded)
    )
    load(tmp_path, CALLS | good)
    with pytest.raises(ValueError, match=f"{column}.* imports nothing, which is not installed"):
        load(tmp_path, CALLS | bad)


def test_setup_that_is_no_python_is_named(tmp_path):
    with pytest.raises(ValueError, match="setup, the tests' helpers, is no Python"):
        load(tmp_path, CALLS | {"setup": "def"})


def test_programs_may_be_listed_with_the_names_of_their_languages(tmp_path):
    programs = {"language": ["CPP", "PYTHON3"], "solution": ["int main() {}", "print(1)"]}
    assert load(tmp_path, OWN | {"solutions": programs})[0].correct_solutions == ("print(1)",)


def test_a_misspelt_entry_point_is_named(tmp_path):
    with pytest.raises(ValueError, match="entry_point 'f' is not in its signature"):  # not in the word "def"
        load(tmp_path, CALLS | {"signature": "def g(x):"})
    for solution in ("# g\ndef f(x): return x", "def f(g): return g", "def f(x): return x == g"):
        with pytest.raises(ValueError, match="entry_point 'g' is not in its signature and solutions"):
            load(tmp_path, CALLS | {"entry_point": "g", "solutions": [solution]})
    with pytest.raises(ValueError, match="entry_point 'g' is not in its signature and solutions"):
        load(tmp_path, CALLS | {"entry_point": "g", "solutions": ["def f(x):\n    return 2 * x\n"]})
    with pytest.raises(ValueError, match="compares no answer of the function g.*assert f"):
        load(tmp_path, CALLS | {"entry_point": "g"})


def test_a_class_is_no_function_under_test(tmp_path):
    stack = {"entry_point": "Stack", "public_tests": ["s = Stack()\nassert s.pop() == 1"]}
    stack |= {"private_tests": ["assert Stack().pop() == 1"]}
    for known in ({"signature": "class Stack:"}, {"solutions": ["class Stack:\n    def pop(self): pass"]}):
        with pytest.raises(ValueError, match="entry_point Stack is a class, but must be a function"):
            load(tmp_path, CALLS | stack | known)


@pytest.mark.parametrize(
    ("test", "unknown"),
    [
        ("assert math.isclose(f(1), 2)", "math"),  # the program may import it, but the test runs apart
        ("def check(candidate):\n    assert candidate(1) == two\ncheck(f)", "two"),
        ("from solution import f, Wrong\nassert f(1) == 2", "Wrong"),
    ],
)
def test_a_name_that_a_test_does_not_have_is_named(tmp_path, test, unknown):
    with pytest.raises(ValueError, match=f"private_tests uses {unknown}, which neither the test nor setup"):
        load(tmp_path, CALLS | {"preamble": "import math\ntwo = 2\n", "private_tests": [test]})
    for setup in ("import math\ntwo = 2", "from math import *"):
        if "solution" not in test and (setup.endswith("2") or unknown == "two"):
            load(tmp_path, CALLS | {"private_tests": [test], "setup": setup})


def test_a_comparison_behind_a_comma_is_named(tmp_path):
    with pytest.raises(ValueError, match="private_tests has a comparison as the message of an assert"):
        load(tmp_path, CALLS | {"private_tests": ["assert f(1) == 2, f(2) == 4"]})


@pytest.mark.parametrize("preamble", ["import math", "import math  # a comment", "import math\n"])
def test_a_preamble_needs_no_newline_at_its_end(tmp_path, sandbox, preamble):
    (problem,) = load(tmp_path, CALLS | {"preamble": preamble})
    assert verdicts(sandbox, problem, "def f(x): return math.floor(2 * x)") == "pp"
    (problem,) = load(tmp_path, OWN | {"preamble": preamble})
    assert verdicts(sandbox, problem, "print(math.floor(int(input())))") == "pp"


def test_a_function_under_test_may_be_a_method_of_class_solution(tmp_path, sandbox):
    (problem,) = load(
        tmp_path, CALLS | {"signature": "class Solution:\n    def f(self, x):", "preamble": "k = 2"}
    )
    assert verdicts(sandbox, problem, "class Solution:\n    def f(self, x):\n        return k * x") == "pp"
    assert verdicts(sandbox, problem, "class Solution:\n    def f(self, x):\n        return 2") == "pw"


def test_a_key_twice_is_refused_and_one_object_a_line_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OWN)[:-1] + ', "private_tests": []}')
    with pytest.raises(ValueError, match="line 1, is not JSON: 'private_tests' is there twice"):
        load_problems(str(path), "test")
    for text in (json.dumps(OWN, indent=1), json.dumps([OWN])):
        path.write_text(text)
        with pytest.raises(ValueError, match="line 1, .* each line must be one"):
            load_problems(str(path), "test")


def test_an_empty_statement_and_tests_with_objects_are_left_out_and_counted(tmp_path, capsys):
    node = {"signature": "def f(root: Optional[TreeNode]):", "name": "tree"}
    assert len(load(tmp_path, OWN, CALLS | node, OWN | {"name": "blank", "description": " "})) == 1
    objects, blank = capsys.readouterr().out.splitlines()
    assert objects.endswith(
        "tree left out: 1 of 3 problems take objects such as a TreeNode, which no column defines"
    )
    assert blank.endswith("blank left out: 1 of 3 problems have an empty statement")


def test_a_column_named_text_is_no_empty_line(tmp_path):
    rows = [OWN | {"text": text, "name": name} for text, name in (("", "a"), (None, "b"))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert len(load_problems(str(tmp_path / "rows.parquet"), "test")) == 2


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "bom.jsonl").write_text("\ufeff" + json.dumps(OWN), encoding="utf-8")
    assert len(load_problems(str(tmp_path / "bom.jsonl"), "test")) == 1


def test_problems_that_are_left_out_are_named_and_counted(tmp_path, capsys):
    files = OWN | {"name": "b", "input_file": "input.txt", "output_file": ""}
    assert len(load(tmp_path, OWN, OWN | {"name": "empty", "private_tests": []}, files)) == 1
    files, tests = capsys.readouterr().out.splitlines()
    assert files.endswith(
        "b left out: 1 of 3 problems read or write files instead of standard input and output"
    )
    assert tests.endswith("empty left out: 1 of 3 problems have no public or no private tests")


CODE_CONTESTS = OWN | {name: {"input": ["1"], "output": ["1"]} for name in TEST_COLUMNS}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"name": None}, "row 2: name is no text, or empty"),
        ({"description": None}, "the row of 'b', .* description is no text"),
        ({"time_limit": 2000.0}, "the row of 'b', .* if they are milliseconds"),
    ],
)
def test_a_wrong_value_in_code_contests_is_named_with_file_and_row(tmp_path, row, told):
    rows = [CODE_CONTESTS | {"time_limit": 2.0}, CODE_CONTESTS | {"name": "b"} | row]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=f"rows.parquet.* is not understood: .*{told}|rows.parquet, {told}"):
        list(first_messages(load_problems(str(tmp_path / "rows.parquet"), "train")))


def test_code_contests_without_an_output_or_with_a_name_twice_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    nothing = CODE_CONTESTS | {"name": "b", "public_tests": {"input": ["1"], "output": [None]}}
    datasets.Dataset.from_list([CODE_CONTESTS, nothing]).to_parquet(path)
    with pytest.raises(ValueError, match=r"a test of public_tests has no output: see \['b'\]"):
        load_problems(str(path), "train")
    nothing["public_tests"] = {"input": [None], "output": ["1"]}
    datasets.Dataset.from_list([CODE_CONTESTS, nothing]).to_parquet(path)
    with pytest.raises(ValueError, match=r"a test of public_tests has no input: see \['b'\]"):
        load_problems(str(path), "train")
    datasets.Dataset.from_list([CODE_CONTESTS, CODE_CONTESTS | {"name": "b"}, CODE_CONTESTS]).to_parquet(path)
    with pytest.raises(ValueError, match="rows.parquet has 2 problems of one name, a"):
        load_problems(str(path), "train")
    rows = [CODE_CONTESTS | {"source": site} for site in (1, 2, 2)]
    datasets.Dataset.from_list(rows[:2]).to_parquet(path)
    assert len(load_problems(str(path), "train")) == 2  # of two sites
    datasets.Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(ValueError, match="rows.parquet has 2 problems of one name"):
        load_problems(str(path), "train")


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "a\ud800"},
        {"description": "\udfff"},
        {"solutions": ["x = '\ud800'"]},
        {"private_tests": [{"input": "\ud800", "output": "1"}]},
    ],
)
def test_half_of_a_character_in_a_row_is_named(tmp_path, changed):
    with pytest.raises(ValueError, match=r"line 1, has '\\ud\w+', half of a character"):
        load(tmp_path, OWN | changed)
    (whole,) = load(tmp_path, OWN | {"description": "\U0001f600"})  # two halves in JSON
    assert whole.statement == "\U0001f600"


def test_parquet_with_generated_tests_in_other_forms_loads_or_is_refused(tmp_path):
    listed = CODE_CONTESTS | dict.fromkeys(TEST_COLUMNS, PAIRS)
    datasets.Dataset.from_list([listed]).to_parquet(tmp_path / "listed.parquet")
    (problem,) = load_problems(str(tmp_path / "listed.parquet"), "train")
    assert problem.private_tests == (IoTest("1", "1"), IoTest("2", "2")) * 2
    del listed["private_tests"]
    datasets.Dataset.from_list([listed]).to_parquet(tmp_path / "fewer.parquet")
    with pytest.raises(ValueError, match="fewer.parquet, row 1, .* no column private_tests"):
        load_problems(str(tmp_path / "fewer.parquet"), "train")


def test_code_contests_that_use_files_are_left_out(tmp_path, capsys):
    fixture = ROOT / "tests" / "data" / "code_contests.parquet"
    rows = datasets.Dataset.from_parquet(str(fixture)).to_list()
    rows = [row | {"input_file": "in.txt" if n == 0 else "", "output_file": ""} for n, row in enumerate(rows)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "files.parquet")
    (problem,) = load_problems(str(tmp_path / "files.parquet"), "train")
    assert problem.name.startswith("9000_B")
    assert f"{rows[0]['name']} left out: 1 of 4 problems read or write files" in capsys.readouterr().out


# ---- APPS and TACO -----------------------------------------------------------------------------------------

APPS = {
    "problem_id": 7,
    "question": "Add two numbers.\n\nInput\n1 2\nOutput\n3\n",
    "solutions": json.dumps(["print(sum(map(int, input().split())))"]),
    "input_output": json.dumps({"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]}),
    "difficulty": "interview",
    "url": "https://example.org/7",
    "starter_code": "",
}
METHOD = "class Solution:\n    def pairs(self, xs: List[int], k: int) -> List[List[int]]:\n        "
TACO = {
    "question": "Pair each number with k.",
    "starter_code": METHOD,
    "input_output": json.dumps(
        {"fn_name": "pairs", "inputs": [[[1, 2], 3], [[], 1]], "outputs": [[[[1, 3], [2, 3]]], [[]]]}
    ),
    "solutions": json.dumps([METHOD + "return [(x, k) for x in xs]"]),
    "difficulty": "EASY",
    "name": None,
    "time_limit": "2.0 seconds",
    "memory_limit": "256.0 megabytes",
}


def test_apps_rows_of_standard_input_load_as_they_are(tmp_path, sandbox):
    lines = {"inputs": [["1 2", ""], ["5 5"], "7 1"], "outputs": [["3"], ["10"], "8"]}
    whole, cut = load(
        tmp_path, APPS, APPS | {"problem_id": 8, "input_output": json.dumps(lines), "solutions": ""}
    )
    assert (whole.name, whole.group, whole.limits) == ("APPS/7", "difficulty interview", Limits())
    assert whole.public_tests == (IoTest("1 2\n", "3\n"),) and whole.private_tests == (
        IoTest("5 5\n", "10\n"),
    )
    assert cut.private_tests == (IoTest("5 5", "10"), IoTest("7 1", "8")) and not cut.correct_solutions
    for problem in (whole, cut):
        tests = len(problem.public_tests + problem.private_tests)
        assert verdicts(sandbox, problem, whole.correct_solutions[0]) == "p" * tests
        assert verdicts(sandbox, problem, "print(3)") == "p" + "w" * (tests - 1)


def test_taco_rows_with_a_method_are_called_in_the_sandbox(tmp_path, sandbox):
    (problem,) = load(tmp_path, TACO)
    assert problem.limits == Limits(2.0, 256 << 20) and problem.name.startswith("TACO/")
    assert "Write this Python 3 class:\nclass Solution:\n    def pairs(" in first_message(problem)
    assert verdicts(sandbox, problem, problem.correct_solutions[0]) == "pp"  # a tuple equals a list
    assert verdicts(sandbox, problem, "def pairs(xs, k):\n    return [[x, k] for x in xs]") == "pp"
    assert verdicts(sandbox, problem, METHOD + "return [[x, x] for x in xs]") == "wp"
    assert verdicts(sandbox, problem, METHOD + "return None") == "ww"
    assert verdicts(sandbox, problem, METHOD + "return object()") == "ee"
    assert verdicts(sandbox, problem, "x = 1") == "ee"
    assert verdicts(sandbox, problem, "raise SystemExit(0)") == "ee"


@pytest.mark.parametrize(
    ("outputs", "value", "expected"),
    [
        ([[3], [4]], "3", "pw"),  # each result wrapped in a list
        ([3, 4], "3", "pw"),  # not wrapped
        ([[3, 4], [5]], "[3, 4]", "pw"),
        ([[3, 4], [5]], "3", "ww"),  # some are not wrapped: so none is
        ([{"1": 2}, {"01": 1, "1": 2}], "{'1': 2}", "pw"),
        ([{"01": 1, "1": 2}, 0], "{'01': 1, '1': 2}", "pw"),
        ([["3"], ["4"]], "3", "ww"),
        ([[{"1": 2}], [{"3": 4}]], "{1: 2}", "pw"),  # JSON's keys are texts
        ([[True], [False]], "True", "pw"),
        ([[1.5], [2.5]], "1.5", "pw"),
    ],
)
def test_results_are_compared_as_in_apps(tmp_path, sandbox, outputs, value, expected):
    tests = {"fn_name": "f", "inputs": [[1], [2]], "outputs": outputs}
    (problem,) = load(tmp_path, APPS | {"input_output": json.dumps(tests), "solutions": "[]"})
    assert verdicts(sandbox, problem, f"def f(x):\n    return {value}") == expected


@pytest.mark.parametrize("name", ["any", "isinstance", "list", "print"])
def test_a_function_may_have_the_name_of_a_builtin_one(tmp_path, sandbox, name):
    tests = {"fn_name": name, "inputs": [[3], [4]], "outputs": [3, 4]}
    (problem,) = load(tmp_path, APPS | {"input_output": json.dumps(tests), "solutions": "[]"})
    assert verdicts(sandbox, problem, f"def {name}(x):\n    return x") == "pp"
    assert verdicts(sandbox, problem, f"def {name}(x):\n    return 3") == "pw"


def test_a_function_that_the_starter_code_does_not_show_is_asked_for_by_its_name(tmp_path, sandbox):
    (problem,) = load(tmp_path, TACO | {"starter_code": METHOD.replace("pairs", "couples")})
    assert first_message(problem).partition("Write this Python 3 function:\n")[2].startswith("pairs\n")
    assert verdicts(sandbox, problem, "def pairs(xs, k): return [(x, k) for x in xs]") == "pp"


def test_integers_of_many_digits_load(tmp_path, sandbox):
    nines, power = "9" * 5000, "1" + "0" * 5000
    tests = f'{{"fn_name": "f", "inputs": [[{nines}], [1]], "outputs": [{power}, 2]}}'
    (problem,) = load(tmp_path, APPS | {"input_output": tests, "solutions": "[]"})
    assert verdicts(sandbox, problem, "def f(x):\n    return x + 1") == "pp"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (APPS | {"input_output": "{'inputs'"}, "input_output must be JSON in a text"),
        (
            APPS | {"input_output": '{"inputs": ["1"], "outputs": []}'},
            "input_output must have two lists of one length",
        ),
        (
            APPS | {"input_output": '{"inputs": [1], "outputs": ["1"]}'},
            "input_output has an input or output that is",
        ),
        (APPS | {"input_output": "[1]"}, "input_output must be an object"),
        (
            APPS | {"input_output": '{"input": ["1"], "output": ["1"]}'},
            "input_output has input, output, but must",
        ),
        *[
            (APPS | {"input_output": json.dumps({"inputs": [given] * 2, "outputs": ["1", "1"]})}, told)
            for given in ([["1", "2"]], [None], {"x": 1}, [[1, 2], 3])
            for told in ["neither a text nor a list of lines: are these arguments of a function, and fn_name"]
        ],
        (
            APPS | {"input_output": '{"fn_name": ["f"], "inputs": [], "outputs": []}'},
            "function's name is \\['f",
        ),
        (
            APPS | {"input_output": '{"fn_name": "def", "inputs": [], "outputs": []}'},
            "function's name is 'def'",
        ),
        (
            APPS | {"input_output": '{"fn_name": "plain", "inputs": [], "outputs": []}'},
            "plain, which the judge",
        ),
        (APPS | {"solutions": "print(1)"}, "solutions must be JSON"),
        (
            APPS | {"input_output": '{"fn_name": "f", "inputs": ["1"], "outputs": [1]}'},
            "must be a list of arguments",
        ),
        (
            APPS | {"input_output": '{"fn_name": "f()", "inputs": [], "outputs": []}'},
            "the function's name is 'f\\(\\)'",
        ),
        (
            TACO | {"time_limit": "2 hours"},
            "time_limit is '2 hours', but must be a text such as '2.0 seconds'",
        ),
        (TACO | {"time_limit": 2.0}, "time_limit is 2.0, but must be a text such as '2.0 seconds'"),
    ],
)
def test_ambiguous_rows_of_apps_are_refused_with_column_and_remedy(tmp_path, row, told):
    with pytest.raises(ValueError, match=told):
        load(tmp_path, row)


def test_rows_of_apps_without_a_number_have_different_names(tmp_path):
    rows = [APPS | {"problem_id": None}, APPS | {"problem_id": None, "question": "Another one"}]
    assert len(load(tmp_path, *rows)) == 2


def test_one_test_is_not_public_and_private_at_once(tmp_path, capsys):
    one = APPS | {"input_output": '{"inputs": ["1"], "outputs": ["1"]}', "problem_id": 9}
    assert len(load(tmp_path, APPS, one)) == 1
    assert "APPS/9 left out: 1 of 2 problems have no public or no private tests" in capsys.readouterr().out


# ---- LiveCodeBench -----------------------------------------------------------------------------------------


def packed(cases: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def case(given: str, output: str, kind: str = "stdin") -> dict:
    return {"input": given, "output": output, "testtype": kind}


STDIN = {
    "question_title": "Sum",
    "question_content": "Add two numbers.",
    "platform": "atcoder",
    "question_id": "abc300_a",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([case("1 2\n", "3\n")]),
    "private_test_cases": packed([case("5 5\n", "10\n")]),
    "metadata": "{}",
}
FUNCTIONAL = STDIN | {
    "question_id": "3001",
    "starter_code": "class Solution:\n    def add(self, xs: List[int], name: str) -> str:\n        ",
    "public_test_cases": json.dumps([case('[1, 2]\n"a"', '"a3"', "functional")]),
    "private_test_cases": json.dumps([case('[]\n"b c"', '"b c0"', "functional")]),
    "metadata": '{"func_name": "add"}',
}


def test_livecodebench_rows_load_as_they_are(tmp_path, sandbox):
    numbers, texts = load(tmp_path, STDIN, FUNCTIONAL)
    assert numbers.name == "LiveCodeBench/abc300_a" and numbers.group == "difficulty easy"
    assert numbers.private_tests == (IoTest("5 5\n", "10\n"),)
    assert verdicts(sandbox, numbers, "print(sum(map(int, input().split())))") == "pp"
    assert verdicts(sandbox, numbers, "print(3)") == "pw"
    method = texts.signature + "\n        return name + str(sum(xs))"
    assert verdicts(sandbox, texts, method) == "pp"
    assert verdicts(sandbox, texts, method.replace("sum(xs)", "3")) == "pw"
    assert "class Solution:\n    def add(" in first_message(texts)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("value", [Hostile(), b"[]", ["[]"], {"a": "b"}, 7, None, ("a", "b")])
def test_nothing_but_a_text_is_read_from_a_pickle(tmp_path, value):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert livecodebench.pickled_text(pickle.dumps("[]é", protocol)) == "[]é"
        with pytest.raises(ValueError, match="its pickle holds"):
            livecodebench.pickled_text(pickle.dumps(value, protocol))
    hidden = base64.b64encode(zlib.compress(pickle.dumps(value))).decode()
    with pytest.raises(ValueError, match="private_test_cases cannot be read as tests"):
        load(tmp_path, STDIN | {"private_test_cases": hidden})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"private_test_cases": "no base64!"}, "private_test_cases cannot be read as tests"),
        ({"private_test_cases": packed([])[:-8]}, "private_test_cases cannot be read as tests"),
        (
            {"public_test_cases": '[{"input": "1"}]'},
            "public_test_cases cannot be read as tests: a test has no input or output",
        ),
        (
            {"metadata": '{"func_name": "add"}'},
            "public_test_cases cannot .*: a test has testtype 'stdin', but by metadata it is 'functional'",
        ),
        (
            {"public_test_cases": json.dumps([case("1", "1", "functional")])},
            "testtype 'functional', but by metadata it is 'stdin'",
        ),
        (
            {"starter_code": "class Solution:"},
            "starter_code shows a function.*, but metadata has no func_name",
        ),
        ({"metadata": '{"func_name": 7}'}, "testtype 'stdin'"),
        ({"private_test_cases": ""}, "private_test_cases is empty"),
        ({"private_test_cases": None}, "private_test_cases is empty"),
        ({"public_test_cases": '["1"]'}, "public_test_cases cannot .*: a test has no input or output"),
        (
            {
                "metadata": '{"func_name": "add"}',
                "public_test_cases": json.dumps([case("1", "True", "functional")]),
            },
            "a test has a line of input or an output that is no JSON: .*'True'",
        ),
        ({"question_id": None}, "question_id is None, but must be a text or a number"),
    ],
)
def test_ambiguous_rows_of_livecodebench_are_refused(tmp_path, changed, told):
    with pytest.raises(ValueError, match=told):
        load(tmp_path, STDIN | changed)


# ---- HumanEval ---------------------------------------------------------------------------------------------

HUMAN_EVAL = {
    "task_id": "HumanEval/900",
    "prompt": "import math\ndef half(x):\n    return x / 2\ndef f(x):\n    '''Two thirds.'''\n",
    "entry_point": "f",
    "canonical_solution": "    return 2 * x / 3\n",
    "test": "def check(candidate):\n    assert math.isclose(candidate(1), half(4 / 3))\n",
}


def test_original_rows_of_humaneval_may_use_what_their_prompt_defines(tmp_path, sandbox):
    for test in (HUMAN_EVAL["test"], "assert math.isclose(f(1), half(4 / 3))"):
        (problem,) = load(tmp_path, HUMAN_EVAL | {"test": test, "time_limit": 3})
        assert problem.limits.seconds == 3
        assert verdicts(sandbox, problem, "def f(x): return x / 1.5") == "pp"
        assert verdicts(sandbox, problem, "def f(x): return half(x)") == "ww"
    unindented = HUMAN_EVAL | {"canonical_solution": "return 2 * x / 3\n"}
    with pytest.raises(ValueError, match="prompt with canonical_solution is no Python: 'return' outside"):
        load(tmp_path, unindented)


# ---- what a careful person does with a set -----------------------------------------------------------------


def test_check_tells_which_solutions_are_not_what_they_should_be(tmp_path, monkeypatch, capsys):
    right, wrong = "print(input())", "print(1)"
    path = tmp_path / "rows.jsonl"
    rows = [
        OWN | {"name": "good", "solutions": [right], "incorrect_solutions": [wrong]},
        OWN | {"name": "fails", "solutions": [right, wrong]},
        OWN | {"name": "passed", "solutions": [right], "incorrect_solutions": [right]},
        CALLS | {"name": "gen", "solutions": ["def f(x): return f"]},
        OWN | {"name": "silent"},
        CALLS | {"name": "typo", "setup": "x = 1 / 0", "solutions": ["def f(x): return 2 * x"] * 2},
        CALLS
        | {
            "name": "given",
            "public_tests": ["assert f(abs) == 2"],
            "incorrect_solutions": ["def f(x): return 1"],
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["data.py", str(path), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    assert not ended.value.code
    *told, last = capsys.readouterr().out.splitlines()
    assert told == [
        "fails: its solution 2 fails test 2: wrong answer",
        "passed: its wrong solution 1 passes all tests",
        "gen: its solution 1 fails test 1: exception. TypeError: a value of type function is not plain data",
        "typo: the set-up of the tests fails, whatever the program is: ZeroDivisionError: division by zero",
        "given: a test calls f, but a value of type builtin_function_or_method is not plain data",
    ]
    assert last.startswith(
        "7 problems: 4 fail an own solution, 1 are passed by a wrong one, 1 have none; the slowest"
    )


def test_a_holdout_cuts_a_file_into_three_fixed_parts(tmp_path):
    rows = [OWN | {"name": f"problem {n}"} for n in range(200)]
    parts = {
        s: {p.name for p in load(tmp_path, *rows, split=s, holdout=0.2)} for s in ("train", "valid", "test")
    }
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 200
    assert 140 < len(parts["train"]) < 180 and all(len(parts[s]) > 8 for s in ("valid", "test"))
    more = [*rows[::-1], OWN | {"name": "one more"}]  # neither order nor additions move a problem
    assert {p.name for p in load(tmp_path, *more, split="train", holdout=0.2)} - {"one more"} == parts[
        "train"
    ]
    assert len(load(tmp_path, *rows, split="train")) == 200


def test_a_holdout_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holdout 0.1 of the 1 problems in .* leaves none for"):
        load(tmp_path, OWN, split="valid", holdout=0.1)
    with pytest.raises(ValueError, match="holdout 0.1 must be between 0 and 1, and toy a set without splits"):
        load_problems("toy", "train", 0.1)
    with pytest.raises(ValueError, match="holdout 1.5 must be between 0 and 1"):
        load(tmp_path, OWN, holdout=1.5)


def test_one_file_for_all_splits_is_told_and_a_holdout_ends_it(tmp_path, tokenizer, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(OWN | {"name": f"problem {n}"}) + "\n" for n in range(40)))
    config = Config(model="any", problems=str(path))
    train, valid, test = load_splits(config, tokenizer)
    assert train == valid == test
    told = f"{path} is train, valid and test at once; --holdout 0.1 keeps a tenth of it for the last two\n"
    assert capsys.readouterr().out == told
    parts = load_splits(replace(config, holdout=0.4), tokenizer)
    assert sum(map(len, parts)) == len({problem.name for part in parts for problem in part}) == 40
    assert capsys.readouterr().out == ""


def test_random_feedback_without_another_answer_is_refused_when_problems_are_loaded(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OWN) + "\n")
    config = Config(model="any", problems=str(path), valid_split="", test_split="")
    assert len(load_splits(config, tokenizer)[0]) == 1
    two = tmp_path / "two"
    two.mkdir()
    for split, names in (("train", "ab"), ("valid", "a")):
        rows = "".join(json.dumps(OWN | {"name": name}) + "\n" for name in names)
        (two / f"{split}.jsonl").write_text(rows)
    one_valid = {"problems": str(two), "valid_split": "valid", "feedback": "random"}
    # The table before and after has it too.
    for needs in ({"test_split": "test"}, {"feedback": "random"}, one_valid):
        with pytest.raises(ValueError, match="it needs problems with two different answers"):
            load_splits(replace(config, **needs), tokenizer)
