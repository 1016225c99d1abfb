"""Problem sets: every format loads, canonical solutions pass, wrong ones do not, and bad files are named."""

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

import data
import rollout as rollout_module
import sources
from data import feedback_message, first_message, make_job
from rollout import RolloutSettings, rollout
from sandbox import NOT_RUN, AssertTest, IoTest, Limits, TestResult, Verdict, outputs_match
from sources import Problems, first_messages, load_problems, select

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing that a test loads is taken from, or left in, the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def problems(name: str) -> dict[str, data.Problem]:
    return {problem.name: problem for problem in load_problems(str(FIXTURES / name), "test")}


def verdicts(sandbox, problem, code, tests=None) -> list[str]:
    tests = problem.public_tests + problem.private_tests if tests is None else tests
    return [result.verdict.value for result in sandbox.run([make_job(problem, code, tests)])[0]]


# ---- the judge of outputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "expected", "match"),
    [
        ("", "", True),
        ("\n \t", "", True),
        ("", "0", False),
        ("1 2 3", "1\n2\r\n3\n", True),
        ("1\v2", "1 2", True),
        ("12", "1 2", False),
        ("1\u00a02", "1 2", False),  # only ASCII separates words
        ("yes", "YES", True),
        ("É", "é", False),  # and only ASCII has no case
        ("Case #1: x", "case #1: X", True),
        ("1", "1.0", True),
        ("1.", "1", True),
        (".5", "0.5", True),
        ("+5", "5", True),
        ("+-5", "-5", False),
        ("-0", "0", True),
        ("007", "7", True),
        ("1e5", "100000", True),
        ("1E5", "100000.0", True),
        ("1e", "1", False),
        ("1.000009", "1", True),
        ("1.00002", "1", False),
        ("100000000.1", "100000000", False),  # the tolerance is absolute
        ("10000000000000001", "10000000000000000", True),  # as doubles they are the same
        ("0x10", "16", False),
        ("0x1p3", "8", False),
        ("dead", "DEAD", True),
        ("1e1", "10", True),
        ("0b11", "3", False),
        ("1_0", "10", False),
        ("1,000", "1000", False),
        ("1/2", "0.5", False),
        ("\u0661", "1", False),  # a digit, but no ASCII one
        ("nan", "NaN", True),
        ("nan", "1", False),
        ("nan", "-nan", False),
        ("inf", "infinity", False),  # their difference is no number
        ("inf", "INF", True),
        ("inf", "1e999", False),
        ("1e400", "1e400", True),
        ("true", "1", False),
        ("no yes", "yes no", False),
        ("1 " * 200000, "1.0 " * 200000, True),
        ("1 " * 200000 + "2", "1.0 " * 200000 + "3", False),
        ("9" * 100000, "9" * 100000 + ".0", False),  # both overflow
        ("\ud800", "\ud800", True),
    ],
)
def test_outputs_match_as_in_the_original_judge(got, expected, match):
    assert outputs_match(got, expected) is match
    assert outputs_match(expected, got) is match


# ---- formats -----------------------------------------------------------------------------------------------

FILES = [
    "code_contests.parquet",
    "humaneval_plus.jsonl",
    "mbpp_plus.jsonl",
    "evalplus_own.jsonl",
    "own.jsonl",
]


@pytest.mark.parametrize("name", FILES)
def test_solutions_pass_every_test_and_empty_ones_fail_every_problem(sandbox, name):
    for problem in problems(name).values():
        assert problem.public_tests and problem.private_tests
        assert set(verdicts(sandbox, problem, problem.correct_solutions[0])) == {"passed"}
        assert "passed" not in verdicts(sandbox, problem, f"def {problem.entry_point or 'f'}(*_): pass")


def test_code_contests_rows_are_read_whole(capsys):
    sums, half = problems("code_contests.parquet").values()
    assert sums.group == "rating 800 to 1199"
    assert capsys.readouterr().out.endswith("2 of 4 problems have no public or no private tests\n")
    assert sums.public_tests == (IoTest("1 2\n", "3\n"), IoTest("10 5\n", "15\n"))
    assert sums.private_tests == (IoTest("0 0", "0"), IoTest("7 8", "15"), IoTest("100 200", "300"))
    assert sums.limits == Limits(2.5, 256000000) and half.limits == Limits(1.0, Limits.memory_bytes)
    assert [len(sums.correct_solutions), len(sums.incorrect_solutions)] == [1, 1]  # Python 3 alone
    assert sums.incorrect_solutions[0].endswith("print(a - b)\n")
    assert sums.judging == "tokens" and sums.statement.startswith("Ada has")


def test_a_large_set_stays_on_disk(monkeypatch):
    made, (sums, _) = [], problems("code_contests.parquet").values()
    monkeypatch.setattr(
        sources, "FORMATS", [(sources.FORMATS[-1][0], lambda row: made.append(row["name"]) or sums)]
    )
    loaded = load_problems(str(FIXTURES / "code_contests.parquet"), "train")
    assert len(made) == 1 and isinstance(loaded, Problems) and len(loaded) == 2
    assert isinstance(loaded[1:], Problems) and len(loaded[1:]) == 1 and len(made) == 1


@pytest.mark.parametrize("only_split", [True, False])
def test_hub_names_load_with_datasets(monkeypatch, only_split, capsys):
    asked = []
    fixture = "mbpp_plus.jsonl" if only_split else "code_contests.parquet"
    kind = "json" if only_split else "parquet"
    rows = datasets.load_dataset(kind, data_files=str(FIXTURES / fixture), split="train")
    expected = list(problems(fixture).values())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows)
    loaded = load_problems("mbpp_plus" if only_split else "code_contests", "valid")
    assert asked == [("evalplus/mbppplus", "test") if only_split else ("deepmind/code_contests", "valid")]
    assert list(loaded) == expected


def test_a_folder_has_files_named_by_split(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(FIXTURES / "code_contests.parquet", tmp_path / "data" / "train-00000-of-00002-ab.parquet")
    rows = datasets.Dataset.from_parquet(str(FIXTURES / "code_contests.parquet"))
    rows = rows.map(lambda row: {"name": f"other {row['name']}"})
    rows.to_parquet(tmp_path / "data" / "train-00001-of-00002-ab.parquet")
    shutil.copy(FIXTURES / "own.jsonl", tmp_path / "test.jsonl")
    assert len(load_problems(str(tmp_path), "train")) == 4
    assert len(load_problems(str(tmp_path), "test")) == 2
    with pytest.raises(ValueError, match="holds no .* of valid"):
        load_problems(str(tmp_path), "valid")


def test_a_compressed_file_reads_as_the_plain_one(tmp_path):
    with gzip.open(tmp_path / "own.jsonl.gz", "wb") as file:
        file.write((FIXTURES / "own.jsonl").read_bytes() + b"\n")  # an empty line is none
    assert load_problems(str(tmp_path / "own.jsonl.gz"), "test") == list(problems("own.jsonl").values())


# ---- evalplus ----------------------------------------------------------------------------------------------


def test_base_tests_are_public_and_plus_tests_private():
    tests = {
        n: (len(p.public_tests), len(p.private_tests)) for n, p in problems("humaneval_plus.jsonl").items()
    }
    assert tests["HumanEval/2"] == (3, 2)  # HumanEval's own problem of this number has three tests
    assert tests["Other/1"] == (1, 1)  # a check of another shape is one test
    ours = problems("mbpp_plus.jsonl")
    assert (len(ours["Mbpp/9001"].public_tests), len(ours["Mbpp/9001"].private_tests)) == (2, 2)
    assert "math.isclose" in ours["Mbpp/9002"].statement and "set(common(" in ours["Mbpp/9001"].statement
    assert len(problems("evalplus_own.jsonl")["HumanEval/2"].public_tests) == 1  # base_input tells it


@pytest.mark.parametrize(
    ("file", "name", "code", "expected"),
    [
        ("mbpp_plus.jsonl", "Mbpp/9001", "def common(a, b): return list(set(b) & set(a)) * 2", "pppp"),
        ("mbpp_plus.jsonl", "Mbpp/9001", "def common(a, b): return a", "wwpp"),
        ("mbpp_plus.jsonl", "Mbpp/9001", "def common(a, b): return None", "wwww"),
        ("mbpp_plus.jsonl", "Mbpp/9002", "def area(r): return 3.14159265 * r * r", "pppp"),
        ("mbpp_plus.jsonl", "Mbpp/9002", "def area(r): return 3.1416 * r * r", "wwpw"),
        ("mbpp_plus.jsonl", "Mbpp/9002", "def area(r): return 314.1592653589793", "pwww"),
        ("mbpp_plus.jsonl", "Mbpp/9003", "def power(a, n): return a ** n + (n > 9)", "pwp"),
        ("mbpp_plus.jsonl", "Mbpp/9004", "def big(n): return 10 ** n + n - 2", "pw"),
        ("mbpp_plus.jsonl", "Mbpp/9005", "def signs(d): return {k: True for k in d}", "pw"),
        ("mbpp_plus.jsonl", "Mbpp/9006", "def first_sum(a, b): return a[0] + b", "ww"),
        (
            "humaneval_plus.jsonl",
            "HumanEval/2",
            "def mean(x): return sum(x) / max(1, len(x)) + 1e-9",
            "ppwpp",
        ),
        (
            "humaneval_plus.jsonl",
            "HumanEval/2",
            "def mean(x): return sum(x) / max(1, len(x)) + 1e-3",
            "wwwwp",
        ),
        ("humaneval_plus.jsonl", "HumanEval/500", "def join(a, b): return a + ', ' + b", "wwwwww"),
        ("evalplus_own.jsonl", "Mbpp/9001", "def common(a, b): return list(a)", "wpw"),
        ("evalplus_own.jsonl", "Mbpp/9008", "def size(z): return z.real", "ppw"),
    ],
)
def test_calls_are_compared_as_evalplus_does(sandbox, file, name, code, expected):
    assert "".join(verdict[0] for verdict in verdicts(sandbox, problems(file)[name], code)) == expected


@pytest.mark.parametrize("name", ["humaneval_plus.jsonl", "mbpp_plus.jsonl", "evalplus_own.jsonl"])
def test_a_wrong_value_in_a_row_of_evalplus_is_named_with_its_column(tmp_path, name):
    row = json.loads((FIXTURES / name).read_text().partition("\n")[0])
    unread = {"source_file", "contract"} | ({"test", "atol"} if "base_input" in row else set())
    for column in row.keys() - unread:
        wrong = [None, True, [None], {"a": 1}]
        wrong += [] if column in ("task_id", "prompt", "canonical_solution") else ["def"]
        for value in wrong:
            (tmp_path / "wrong.jsonl").write_text(json.dumps(row | {column: value}))
            with pytest.raises(ValueError, match=f"line 1, is not understood: .*{column}"):
                load_problems(str(tmp_path / "wrong.jsonl"), "test")


@pytest.mark.parametrize("column", ["canonical_solution", "test"])
def test_an_empty_text_in_a_row_of_evalplus_is_no_answer_and_no_test(tmp_path, column):
    """Without its solution a function that returns nothing would be right."""
    row = json.loads((FIXTURES / "humaneval_plus.jsonl").read_text().partition("\n")[0])
    (tmp_path / "empty.jsonl").write_text(json.dumps(row | {column: ""}))
    with pytest.raises(ValueError, match=f"line 1, is not understood: .*{column}"):
        load_problems(str(tmp_path / "empty.jsonl"), "test")


@pytest.mark.parametrize("name", ["HumanEval/2", "Mbpp/9001"])
def test_a_response_may_import_from_the_future_and_keeps_its_line_numbers(sandbox, name):
    problem = problems("humaneval_plus.jsonl" if "Human" in name else "mbpp_plus.jsonl")[name]
    head = (
        f'"An answer."\nfrom __future__ import (\n    annotations,\n)\n{problem.signature}\n    x: Unknown\n'
    )
    passing = head + {"HumanEval/2": "    return sum(numbers) / max(1, len(numbers))\n"}.get(
        name, "    return set(a) & set(b)\n"
    )
    assert set(verdicts(sandbox, problem, passing)) == {"passed"}
    job = make_job(problem, head + "    1 / 0\n", problem.public_tests)
    assert "line 7, in" in feedback_message(problem, sandbox.run([job])[0])


def test_the_reference_sees_arguments_that_no_candidate_has_changed(sandbox):
    problem = problems("mbpp_plus.jsonl")["Mbpp/9006"]
    hides = "def first_sum(a, b):\n    a[:] = [0]\n    return b"
    assert verdicts(sandbox, problem, hides) == ["wrong answer", "wrong answer"]


def shared(name: str) -> str:
    if (FIXTURES / name).exists():
        return str(FIXTURES / name)
    if not (SHARED / name).exists():
        pytest.skip(
            f"{name} is not beside this checkout: the real problem sets are not part of the repository"
        )
    return str(SHARED / name)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("HumanEvalPlus-OriginFmt.jsonl.gz", 164),
        ("HumanEvalPlus.jsonl.gz", 164),
        ("MbppPlus-OriginFmt-first12.jsonl.gz", 12),
        ("MbppPlus-first12.jsonl.gz", 12),
    ],
)
def test_canonical_solutions_of_the_real_sets_pass(sandbox, name, count):
    """Three base and three plus tests of a part: test_sandbox_humaneval.py runs all of them."""
    loaded = load_problems(shared(name), "test")
    assert len(loaded) == count
    some = [loaded[i] for i in range(0, count, max(1, count // 12))]
    jobs = [make_job(p, p.correct_solutions[0], p.public_tests[:3] + p.private_tests[-3:]) for p in some]
    for problem, results in zip(some, sandbox.run(jobs), strict=True):
        assert {result.verdict.value for result in results} == {"passed"}, problem.name


def test_the_longest_results_of_mbpp_plus_are_judged(sandbox, tmp_path):
    """Mbpp/255: lists of up to 128 million words, in little more memory than plain Python needs (1,087 MiB).

    Six of its 112 tests take two minutes: with ALL_TESTS=1.
    """
    with gzip.open(shared("MbppPlus-278.jsonl.gz"), "rt") as rows:
        row = next(row for row in rows if json.loads(row)["task_id"] == 255)
    (tmp_path / "row.jsonl").write_text(row)
    (problem,) = load_problems(str(tmp_path / "row.jsonl"), "test")
    problem = replace(problem, limits=Limits(240.0, 1120 << 20))
    tests = problem.public_tests + problem.private_tests
    assert len(tests) == 112
    if not os.environ.get("ALL_TESTS"):
        tests = [test for test in tests if not re.search(r", 7[67]\)", test.code)]
    (solution,) = problem.correct_solutions
    assert verdicts(sandbox, problem, solution, tests) == ["passed"] * len(tests)


def test_both_formats_of_humaneval_plus_have_the_same_tests():
    hub = load_problems(shared("HumanEvalPlus-OriginFmt.jsonl.gz"), "test")
    own = load_problems(shared("HumanEvalPlus.jsonl.gz"), "test")
    for a, b in zip(hub, own, strict=True):
        assert (len(a.public_tests), len(a.private_tests)) == (len(b.public_tests), len(b.private_tests)), (
            a.name
        )
        assert (a.name, a.statement, a.signature, a.preamble) == (
            b.name,
            b.statement,
            b.signature,
            b.preamble,
        )


def test_real_code_contests_problems_load_and_most_of_their_solutions_pass(sandbox):
    """Three problems have many right answers, of which the original judge takes one."""
    loaded = load_problems(shared("CodeContests-20.jsonl.gz"), "test")
    assert len(loaded) == 20 and all(p.limits == Limits() for p in loaded)
    passing = [set(verdicts(sandbox, p, p.correct_solutions[0])) == {"passed"} for p in loaded]
    assert sum(passing) >= 15


# ---- bad input ---------------------------------------------------------------------------------------------

GOOD = {"name": "a", "description": "d", "public_tests": [{"input": "1", "output": "1"}]}
GOOD["private_tests"] = GOOD["public_tests"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{'name'"], r"line 2, is not JSON"),
        ([GOOD, "[]"], r"line 2, is not understood"),
        (
            [{"name": "a", "description": "d", "public_tests": []}],
            "private_tests.* name, description, public_tests",
        ),
        ([GOOD, GOOD | {"public_tests": [{"input": "1"}]}], "line 2, .*a test of public_tests has no output"),
        ([GOOD | {"private_tests": {"input": ["1"], "output": []}}], "a test of private_tests has no output"),
        ([GOOD | {"entry_point": "f", "public_tests": ["assert f("]}], "line 1, is not understood"),
        ([GOOD | {"public_tests": []}], "no problem with public and private tests"),
        ([], "is empty"),
        (
            [{"task_id": 1, "prompt": "", "code": "x = 1", "test_list": [], "test_imports": [], "test": ""}],
            "define",
        ),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(ValueError, match=message) as error:
        load_problems(str(path), "train")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["data.py", "sources.py"])
def test_a_program_reports_bad_input_in_one_sentence(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "nowhere.jsonl"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    (sentence,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and sentence.startswith(f"{name}: nowhere.jsonl is neither a problem set")


def test_a_program_in_development_mode_reports_bad_input_with_a_traceback_too():
    command = [sys.executable, "-X", "dev", "-W", "ignore", str(ROOT / "data.py"), "nowhere.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Traceback ")
    assert done.stderr.splitlines()[-1].startswith("data.py: nowhere.jsonl is neither a problem set")


def test_code_contests_with_an_input_but_no_output_are_refused_at_once(tmp_path):
    rows = datasets.Dataset.from_parquet(str(FIXTURES / "code_contests.parquet")).to_list()
    rows[1]["generated_tests"]["output"].pop()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="generated_tests has no output.*9000_B"):
        load_problems(str(tmp_path / "bad.parquet"), "train")


def test_what_is_no_problem_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl is neither a problem set"):
        load_problems("nowhere.jsonl", "train")
    with pytest.raises(ValueError, match="there is no split 'dev', only train, valid, test"):
        load_problems(str(FIXTURES / "own.jsonl"), "dev")
    (tmp_path / "problems.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="problems.csv holds no .jsonl, .jsonl.gz or .parquet"):
        load_problems(str(tmp_path / "problems.csv"), "train")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="bad.parquet cannot be read"):
        load_problems(str(tmp_path / "bad.parquet"), "train")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="bad.jsonl.gz cannot be read"):
        load_problems(str(tmp_path / "bad.jsonl.gz"), "train")


# ---- what the model sees -----------------------------------------------------------------------------------

DIALOGS = {  # name: file, problem, responses
    "standard_input": (
        "own.jsonl",
        "sum",
        [
            "I add them.\n```python\na, b = map(int, input().split())\n"
            "print(a * b if a < 9 else '7' * 3000)\n```",
            "```python\na, b = map(int, input().split())\nif a == 1:\n    while True:\n        pass\n"
            "if a == 10:\n    x = bytearray(1 << 30)\nif a == 3:\n    b / 0\nprint(4)\n```",
            "```python\na, b = input(\n```",
            "```python\na, b = map(int, input().split())\nprint(a + b)\n```",
        ],
    ),
    "humaneval_plus": (
        "humaneval_plus.jsonl",
        "HumanEval/2",
        [
            "```python\ndef mean(numbers):\n    return sum(numbers) / len(numbers) + (len(numbers) > 2)\n```",
            "I cannot do that.",
            "```python\ndef mean(numbers):\n    return sum(numbers) / max(1, len(numbers))\n```",
        ],
    ),
    "mbpp_plus": (
        "mbpp_plus.jsonl",
        "Mbpp/9001",
        [
            "```python\ndef common(a, b):\n    return a\n```",
            "```python\nraise NotImplementedError\n```",
            "```python\ndef common(a, b):\n    return set(a) & set(b)\n```",
        ],
    ),
}


@pytest.mark.parametrize("name", DIALOGS)
def test_a_whole_dialog_reads_as_in_the_file(monkeypatch, model, tokenizer, sandbox, name):
    """To renew a file, delete it: this test writes what is missing, and fails."""
    file, problem, responses = DIALOGS[name]
    script = iter(tokenizer.encode("<|end|>".join(responses) + "<|end|>", add_special_tokens=False))
    monkeypatch.setattr(
        rollout_module, "sample_tokens", lambda logits, *_: (torch.tensor([next(script)]), torch.zeros(1))
    )
    settings = RolloutSettings(turn_limit=4, max_new_tokens=400, context=8192)
    (episode,) = rollout(model, tokenizer, [problems(file)[problem]], sandbox, settings, 0)
    assert episode.solved
    seen = (
        tokenizer.decode(episode.ids)
        .replace("<|end|>", "<|end|>\n")
        .replace("<|assistant|>", "<|assistant|>\n")
    )
    path = FIXTURES / f"dialog_{name}.txt"
    if not path.exists():
        path.write_text(seen)
        pytest.fail(f"{path.name} was missing and has been written: read it, then run again")
    assert seen == path.read_text()


def test_the_format_instruction_can_be_left_out():
    problem = problems("own.jsonl")["double"]
    assert first_message(problem, with_format=False) == problem.statement
    assert first_message(problem).endswith(data.FORMAT_ASSERTS.format(signature=problem.signature).strip())


def test_long_inputs_and_long_lists_of_tests_are_cut_visibly():
    tests = tuple(IoTest("7" * 10**6, "8" * 10**6) for _ in range(50))
    problem = data.Problem("long", "s", tests, tests)
    text = feedback_message(problem, [TestResult(Verdict.WRONG_ANSWER, stdout="9" * 10**6)] * 50, cut=500)
    assert "[999500 characters cut]" in text and "tests cut]" in text and len(text) < 500 * 15


def test_passed_asserts_are_left_out_before_failed_ones():
    tests = tuple(AssertTest(f"assert f({i}) == 0") for i in range(40))
    problem = data.Problem("long", "s", tests, tests, entry_point="f")
    results = [TestResult(Verdict.PASSED, call=f"f({i})") for i in range(39)]
    text = feedback_message(problem, [*results, TestResult(Verdict.TIMEOUT, call="f(39)")], cut=20)
    assert "Timeout.\nTest:\nf(39)\n" in text and "tests cut]" in text and text.count("Passed.") < 15


def test_feedback_counts_tests_that_were_not_run_and_says_nothing_else_of_them():
    problem, _ = problems("code_contests.parquet").values()
    message = feedback_message(problem, [TestResult(Verdict.TIMEOUT), NOT_RUN])
    assert message.count("Timeout.") == 1 and data.TESTS_CUT.format(count=1) in message


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            '{"name": "a", "description": 5, "public_tests": [], "private_tests": []}',
            "description is no text",
        ),
        (
            '{"name": "a", "description": "", "public_tests": [{"input": 1, "output": 2}], "private_tests": 0'
            "}",
            "public_tests has no output, or no input, or one that is no text",
        ),
        (
            '{"name": "a", "description": "d", "public_tests": [], "private_tests": [], "solutions": "x"}',
            "solutions is a text, but must be a list",
        ),
        ("[1, 2]", "it is no object"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, row, told):
    path = tmp_path / "own.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ValueError, match=told):
        load_problems(str(path), "test")


def test_two_problems_of_one_name_are_refused(tmp_path):
    tests = '[{"input": "1", "output": "2"}]'
    row = f'{{"name": "a", "description": "d", "public_tests": {tests}, "private_tests": {tests}}}\n'
    (tmp_path / "own.jsonl").write_text(row * 2)
    with pytest.raises(ValueError, match="2 problems of one name, a"):
        load_problems(str(tmp_path / "own.jsonl"), "test")


@pytest.mark.parametrize("name", ["code_contests.parquet", "own.jsonl"])
def test_first_messages_of_a_large_set_are_those_of_its_problems(monkeypatch, name):
    monkeypatch.setattr(sources, "SMALL", 0)
    rows = load_problems(str(FIXTURES / name), "train")
    assert isinstance(rows, Problems)
    assert list(first_messages(rows)) == [first_message(problem) for problem in rows]
    assert [problem.name for problem in select(rows, [1])] == [rows[1].name]
