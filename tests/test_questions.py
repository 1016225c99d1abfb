"""The runs of benchmarks/questions.py: each changes what it says; tables are made of stored figures."""

import json
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest

import data
import ppo
import rollout
import toy
from benchmarks import ablations, main_run, questions, questions_report
from sandbox import TestResult, Verdict


def entered(stack: ExitStack, name: str) -> dict:
    settings, world, feedback = questions.changed(name)
    for change in (*world, *feedback):
        stack.enter_context(change)
    return settings


def test_the_table_is_made_of_the_stored_figures():
    stored = (questions_report.RESULTS / "table.md").read_text()
    assert stored == questions_report.table(questions_report.read_results())
    readme = (main_run.ROOT / "benchmarks" / "README.md").read_text()
    assert all(part in readme for part in stored.strip().split("\n\n"))


@pytest.mark.parametrize("public", [1, 2, 3, 5])
def test_a_problem_with_more_tests_has_them_on_different_inputs(public):
    with ExitStack() as stack:
        entered(stack, f"{public} of 6 tests public, rewarded by these only")
        for problem in toy.problems("valid")[:8]:
            assert (len(problem.public_tests), len(problem.private_tests)) == (public, 6 - public)
            tests = problem.public_tests + problem.private_tests
            assert len({test.input for test in tests}) == 6
            assert all(toy._output(problem.answer, test.input) == test.output for test in tests)


def test_fewer_programs_are_those_with_fewer_marks():
    family = toy.FAMILIES[0]
    for name, count in (("10 programs a statement", 10), ("40 programs a statement", 40)):
        with ExitStack() as stack:
            entered(stack, name)
            assert len(family.programs()) == count
            some = Counter(toy._programs_of(family, "any", n)[0].count("\n") for n in range(3, 9))
            assert len(some) == {10: 1, 40: 3}[count]


MESSAGES = {
    "verdict only": (["Wrong answer."], ["1 55", "EXPECTED", "GOT"]),
    "without the expected output": (["1 55", "GOT"], ["EXPECTED", "Expected"]),
    "each field cut to half": (["EXPE\n", "1 \n"], ["EXPECTED", "1 55"]),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_feedback_leaves_out_what_its_name_says(name):
    test = toy.IoTest("1 55", "EXPECTED")
    problem = SimpleNamespace(public_tests=(test,), preamble="", judging="tokens", entry_point="")
    with ExitStack() as stack:
        entered(stack, name)
        message = data.feedback_message(problem, [TestResult(Verdict.WRONG_ANSWER, stdout="GOT")])
    shown, hidden = MESSAGES[name]
    assert all(text in message for text in shown) and not any(text in message for text in hidden)


def test_feedback_is_random_as_often_as_asked(monkeypatch):
    kinds, settings = [], rollout.RolloutSettings()
    monkeypatch.setattr(rollout, "_start_tests", lambda *given: kinds.append(given[3].feedback))
    monkeypatch.setattr(rollout, "_read_results", lambda *given: kinds.append(given[3].feedback))
    dialog = SimpleNamespace(picks=np.random.default_rng(0))
    with ExitStack() as stack:
        entered(stack, "random with probability 0.25")
        rollout._start_tests(dialog, None, None, settings, ())
        for _ in range(1000):
            rollout._read_results(dialog, None, None, settings)
    assert kinds[0] == "random"  # another problem's tests are at hand
    assert 200 < kinds[1:].count("random") < 300


def test_public_rewards_believe_the_public_tests():
    turn = rollout.Turn(1, 2, [0.0], code="print()")
    passed = [
        rollout.Episode(None, [0, 1], [turn], public_passed=public, solved=False, truncated=False, index=0)
        for public in (True, False)
    ]
    with ExitStack() as stack:
        entered(stack, "1 of 6 tests public, rewarded by these only")
        assert ppo.turn_rewards(passed).tolist() == [1, -1]
    assert ppo.turn_rewards(passed).tolist() == [-1, -1]


def test_the_table_of_the_main_run_is_made_of_the_stored_figures():
    stored = json.loads(main_run.RESULTS.read_text())
    assert len(stored) >= 3
    assert main_run.table(stored) in (main_run.ROOT / "benchmarks" / "README.md").read_text()


def test_the_tables_of_the_ablations_are_made_of_the_stored_figures():
    results = json.loads((ablations.RESULTS / "results.json").read_text())
    assert ablations.table(results) == (ablations.RESULTS / "table.md").read_text()
    readme = (main_run.ROOT / "benchmarks" / "README.md").read_text()
    for condition in ablations.CONDITIONS:
        cells = []
        for key in ("repair true", "repair random", "single turn", "repeats", "false_positives"):
            values = [run[key] for run in results if run["condition"] == condition]
            cells.append(f"{np.mean(values):.3f} ±{np.std(values):.3f}")
        assert f"| {condition} | {' | '.join(cells)} |" in readme
