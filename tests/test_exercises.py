"""The exercises: a check accepts what is right, however it is written, and names what is wrong."""

import contextlib
import io
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "exercises"))
import classroom  # noqa: E402

import data  # noqa: E402
import ppo  # noqa: E402
import rollout  # noqa: E402
from benchmarks import exercise_curves  # noqa: E402

PATHS = sorted((ROOT / "exercises").glob("e[0-9]_*.py"))
MODULES = {path.stem: import_module(path.stem) for path in PATHS}
COMPARED = {name: module for name, module in MODULES.items() if hasattr(module, "TASKS")}
PARTS = [(name, part) for name, module in COMPARED.items() for part in module.TASKS]
WRONG = [(*part, mistake) for part in PARTS for mistake in COMPARED[part[0]].TASKS[part[1]].wrong]
E4, E6, E8 = MODULES["e4_critic"], MODULES["e6_feedback"], MODULES["e8_grader"]


def check(exercise: str, **functions) -> str | None:
    """The check's answer, with our functions except for these."""
    ours = {name: task.ours for name, task in COMPARED[exercise].TASKS.items()}
    return COMPARED[exercise].check(**ours | functions)


@pytest.mark.parametrize("exercise", MODULES)
def test_a_stub_says_what_is_to_be_written(exercise):
    with pytest.raises(NotImplementedError, match="must return"):
        MODULES[exercise].check()


def test_the_command_answers_in_words_and_fails():
    done = subprocess.run([sys.executable, PATHS[6]], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(
        "Not written yet: n_at_k must return a probability"
    )


@pytest.mark.parametrize("exercise", COMPARED)
def test_ours_is_right(exercise):
    assert check(exercise) is None


@pytest.mark.parametrize(("exercise", "part", "mistake"), WRONG)
def test_each_wrong_answer_hears_its_own_sentence(exercise, part, mistake):
    message = check(exercise, **{part: COMPARED[exercise].TASKS[part].wrong[mistake]})
    assert message.startswith(f"{part} is wrong on the example")
    assert message.endswith("\n" + classroom.SENTENCES[exercise][mistake])


@pytest.mark.parametrize(("exercise", "part"), PARTS)
def test_the_small_examples_tell_all_answers_apart(exercise, part):
    task = COMPARED[exercise].TASKS[part]
    answers = {"ours": task.ours} | task.wrong
    seen = {n: [classroom.observed(task, f, a) for a in task.examples.values()] for n, f in answers.items()}
    for one in seen:
        for other in seen.keys() - {one}:
            alike = all(classroom.same(a, b) for a, b in zip(seen[one], seen[other], strict=True))
            assert not alike, (one, other)


def kl_in_a_loop(logprobs, reference_logprobs, turn_of_token, turns):
    kl = []
    for n in range(turns):
        p = [float(x) for x, turn in zip(logprobs, turn_of_token, strict=True) if turn == n]
        q = [float(x) for x, turn in zip(reference_logprobs, turn_of_token, strict=True) if turn == n]
        kl.append(np.log(np.exp(sum(p)) ** (1 / len(p)) / np.exp(sum(q)) ** (1 / len(q))))
    return kl


def returns_in_a_loop(episodes, kl, beta, gamma):
    returns, penalties = [], iter(kl.tolist())
    for episode in episodes:
        rewards = [(-0.2 if turn.code is None else 0) - beta * next(penalties) for turn in episode.turns]
        rewards[-1] += (1 if episode.solved else -1) + 0.2 * (episode.turns[-1].code is None)
        returns += [sum(r * gamma**i for i, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    return torch.tensor(returns)


def loss_with_where(logprobs, old, behaviour, A, turn, clip):
    with torch.no_grad():
        w = torch.minimum(torch.exp(logprobs - behaviour), torch.ones_like(old))
    ratio = torch.exp(logprobs - old) * w
    cut = torch.where(A > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
    return -(cut * A).sum() / len(A)


def value_loss_with_where(values, old, returns, clip):
    near = torch.maximum(torch.minimum(values, old + clip), old - clip)
    one, other = (values - returns).square(), (near - returns).square()
    return torch.where(one > other, one, other) / 2


def n_at_k_by_picking(N, f, c, n, k):
    """As a sum over the number of right rollouts among those that are drawn."""
    from math import comb

    chance = 0.0
    for right in range(c + 1):
        for wrong in range(f - c + 1):
            if right and right + wrong <= k and k - right - wrong <= N - f:
                ways = comb(c, right) * comb(f - c, wrong) * comb(N - f, k - right - wrong) / comb(N, k)
                m = min(n, right + wrong)
                chance += ways * (1 - comb(wrong, m) / comb(right + wrong, m))
    return chance


OTHERWISE = [
    ("e1_tokens", "trained_tokens", lambda e: np.concatenate([np.arange(t.start, t.end) for t in e.turns])),
    ("e2_returns", "turn_returns", returns_in_a_loop),
    ("e3_kl", "turn_kl", kl_in_a_loop),
    ("e4_critic", "value_positions", lambda e: torch.tensor([turn.start - 1 for turn in e.turns])),
    ("e4_critic", "value_loss", value_loss_with_where),
    ("e5_policy_loss", "policy_loss", loss_with_where),
    ("e7_n_at_k", "n_at_k", n_at_k_by_picking),
]


@pytest.mark.parametrize(("exercise", "part", "function"), OTHERWISE)
def test_a_right_answer_may_be_written_in_another_way(exercise, part, function):
    assert check(exercise, **{part: function}) is None


def changes_its_argument(logprobs, reference_logprobs, turn_of_token, turns):
    logprobs -= reference_logprobs
    return ppo.mean_per_turn(logprobs, turn_of_token, turns)


def right_on_the_small_example_only(logprobs, reference_logprobs, turn_of_token, turns):
    return torch.tensor([0.3, 0.3, -0.5])


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda *given: None, "None, is a `return` missing?"),
        (lambda *given: "0.3", "Give the result the right shape first"),
        (lambda *given: {"kl": 0.3}, "Its result is no array of numbers: TypeError"),
        (lambda logprobs, *given: logprobs[99], "It raised IndexError"),
        (lambda *given: ppo.turn_kl(*given) + 0.01, "none of the typical mistakes"),
        (
            lambda *given: ppo.turn_kl(*given)[:, None],
            "Your shape is (3, 1), but must be (3,).\nGive the result the right shape",
        ),
        (lambda *given: ppo.turn_kl(*given) * float("nan"), "none of the typical mistakes"),
        (changes_its_argument, "It changed one of its arguments"),
        (lambda *given: ppo.turn_kl(*given) + torch.rand(()), "two results for the same arguments"),
        (lambda *given: ppo.turn_kl(*given)[1:], "Yours has 2 numbers, the right one 3.\nThis is none"),
        (right_on_the_small_example_only, "turn_kl is wrong on the larger random example 0"),
    ],
)
def test_other_failures_are_told_in_words(function, sentence):
    assert sentence in check("e3_kl", turn_kl=function)


def test_what_is_right_already_is_told_where_something_is_missing():
    with pytest.raises(NotImplementedError, match=r"value_loss must .* \(value_positions is right\)"):
        E4.check(value_positions=E4.ours)


def test_a_mistake_on_one_example_only_is_told_as_such():
    def without_end_tokens(episode):  # of truncated responses too, that is a typical mistake
        return [n for turn in episode.turns for n in range(turn.start, turn.end - (not turn.truncated))]

    told = check("e1_tokens", trained_tokens=without_end_tokens)
    assert "the model would not learn when to end.\nSo it is on this example. On another" in told


def otherwise(problem, results, wrong="{1} is right, not {0}", wrong_call="{0}, should be {1}"):
    """Other words than ours, right all the same."""
    if results is None:
        return "I found no code that I can run."
    lines = []
    for test, result in zip(problem.public_tests, results, strict=True):
        failed = result.verdict == "wrong answer"
        if problem.entry_point:
            told = wrong_call.format(result.got[:99], result.expected[:99]) if failed else ""
            lines.append(f"{(result.call or test.code)[:99]}: {result.verdict}, {told}")
        elif result.verdict != "passed":
            told = wrong.format(result.stdout[:99], test.output[:99]) if failed else ""
            lines.append(f"{result.verdict} for {test.input[:99]} {told}")
        lines.append(result.traceback[:199] + result.traceback[-99:])
    return "\n".join(lines)


RIGHT_WORDS = [
    "expected {1}, got {0}",
    "expected output: {1}\nyour output: {0}",
    "got {0}, expected {1}",
    "{1} was expected but {0} was printed",
    "expected, got: {1}, {0}",
    "got, expected: {0}, {1}",
    "should return {1}, returned {0}",
    "returned `{0}` instead of `{1}`",
]
SWAPPED_WORDS = [
    "expected {0}",
    "must print {0}, not {1}",
    "should be {0} and not {1}",
    "got {1} where {0} is right",
]


def test_feedback_in_our_words_and_in_others_is_right():
    assert E6.check(data.feedback_message) is None
    assert E6.check(otherwise) is None


@pytest.mark.parametrize("words", RIGHT_WORDS)
def test_what_is_expected_and_what_came_out_may_be_said_in_many_ways(words):
    assert E6.check(lambda *given: otherwise(*given, words, words)) is None


@pytest.mark.parametrize("words", SWAPPED_WORDS)
def test_what_is_expected_and_what_came_out_may_not_be_swapped(words):
    sentence = classroom.SENTENCES["e6_feedback"]["swapped"]
    assert sentence in E6.check(lambda *given: otherwise(*given, words))
    assert sentence in E6.check(lambda *given: otherwise(*given, wrong_call=words))


@pytest.mark.parametrize("mistake", E6.WRONG)
def test_each_wrong_feedback_hears_its_own_sentence(mistake):
    assert E6.check(E6.WRONG[mistake]).endswith(classroom.SENTENCES["e6_feedback"][mistake])


@pytest.mark.parametrize(
    ("wrong", "mistake"),
    [
        (lambda *given: None, "is a `return` missing?"),
        (lambda problem, results: otherwise(problem, results or []), "raised ValueError"),
        (lambda problem, results: otherwise(problem, results).replace("code", ""), "no valid code"),
        (lambda problem, results: otherwise(problem, results).replace("time", ""), "word “time”"),
        (lambda problem, results: otherwise(problem, results).replace("ValueError", "")[:80], "missing"),
        (lambda problem, results: f"{otherwise(problem, results)}{results}", "would fill the context"),
        (lambda *given: data.feedback_message(*given)[:2000], "cut as a whole"),
        (lambda problem, results: f"{otherwise(problem, results)}{problem.correct_solutions}", "a solution"),
        (lambda *given: re.sub("(not|should be) ", "the output expected: ", otherwise(*given)), "swapped"),
        (lambda *given: re.sub("File.*", "", otherwise(*given)), "or a part of it"),
    ],
)
def test_other_wrong_feedback_is_told_in_words(wrong, mistake):
    assert classroom.SENTENCES["e6_feedback"].get(mistake, mistake) in E6.check(wrong)


FORGERIES = {
    "exit code": "import os\nos._exit(0)",
    "marker": "import sys\nprint(sys.orig_argv, file=sys.__stdout__, flush=True)",
    "comparison": "import sys\nprint(sys._getframe(1).f_globals['expected'])",
}


def believes_exit_code(program, tests, seconds):
    return E8.naive_grade(program, tests, "exit code")


def believes_marker(program, tests, seconds):
    return E8.naive_grade(program, tests, "marker")


def believes_comparison(program, tests, seconds):
    return E8.naive_grade(program, tests, "comparison")


def in_its_own_process(program, tests, seconds):
    for given, expected in tests:
        sys.stdin = io.StringIO(given)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {"__name__": "__main__"})
        if printed.getvalue().split() != expected.split():
            return False
    return True


def compares_outside(program, tests, seconds):
    for given, expected in tests:
        command = [sys.executable, "-I", "-S", "-c", program]
        try:
            done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        if done.stdout.split() != expected.encode().split():
            return False
    return True


def runs_the_first_test_only(program, tests, seconds):
    return compares_outside(program, tests[:1], seconds)


def reads_text_only(program, tests, seconds):
    for given, expected in tests:
        command = [sys.executable, "-I", "-S", "-c", program]
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        if done.stdout.split() != expected.split():
            return False
    return True


def test_forgeries_that_pass_and_a_grader_that_no_program_deceives():
    assert E8.check(FORGERIES.get, compares_outside) is None


def waits_for_ever(program, tests, seconds):
    return compares_outside(program, tests, None)


def on_a_busy_machine(program, tests, seconds):
    return compares_outside(f"import time; time.sleep(1.1)\n{program}", tests, seconds)


def test_a_busy_machine_changes_no_verdict(monkeypatch):
    monkeypatch.setattr(E8, "PROGRAMS", E8.PROGRAMS.partition("\n#### exit code")[0])  # the right ones
    assert E8.check(FORGERIES.get, on_a_busy_machine) is None


@pytest.mark.parametrize(
    ("grade", "mistake"),
    [
        (believes_exit_code, "exit code"),
        (believes_marker, "marker"),
        (believes_comparison, "comparison"),
        (in_its_own_process, "ended"),
        (waits_for_ever, "late"),
        (runs_the_first_test_only, "first test"),
    ],
)
def test_each_wrong_grader_hears_its_own_sentence(grade, mistake):
    assert E8.check(FORGERIES.get, grade).endswith(classroom.SENTENCES["e8_grader"][mistake])


def test_what_is_no_forgery_is_refused():
    honest = dict.fromkeys(FORGERIES, "print(sum(map(int, input().split())))")
    assert "solves the problem" in E8.check(honest.get, compares_outside)
    assert "does not pass naive_grade" in E8.check(dict.fromkeys(FORGERIES, "print(0)").get, compares_outside)
    same = dict.fromkeys(FORGERIES, FORGERIES["comparison"])
    assert "find three ways" in E8.check(same.get, compares_outside)
    copies = {belief: f"{program}  # for {belief}" for belief, program in same.items()}
    assert "find three ways" in E8.check(copies.get, compares_outside)


def test_a_forgery_may_wait_or_print_no_text_where_no_grader_runs_it(monkeypatch):
    monkeypatch.setattr(E8, "PROGRAMS", "")
    monkeypatch.setattr(E8.run, "__defaults__", (2,))
    graded = "hasattr(sys.modules['__main__'], 'expected')"
    waits = f"import sys\nwhile not {graded}: pass\n{FORGERIES['exit code']}"
    bytes_alone = f"import sys\n{graded} or sys.stdout.buffer.write(b'\\xff')\n{FORGERIES['marker']}"
    programs = FORGERIES | {"exit code": waits, "marker": bytes_alone}
    assert E8.check(programs.get, compares_outside) is None


def test_a_program_that_breaks_a_grader_is_told():
    message = E8.check(FORGERIES.get, reads_text_only)
    assert message.startswith("A program breaks your grader. It raised UnicodeDecodeError")


def test_the_last_line_says_where_the_solution_is():
    for path in PATHS:
        text = path.read_text()
        found = re.search(r"^# The solution: (.*) in (\w+\.py)", text.splitlines()[-1])
        for name in re.findall(r"\w+_\w+|collate", found[1]):
            assert re.search(rf"\b{name}\b", (ROOT / found[2]).read_text()), (path.name, name)


def test_the_exercises_stay_small():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "exercises").glob("*.py")}
    assert sum(lines.values()) < 1000, lines


@pytest.fixture
def unchanged():
    """Take back what the exercises install."""
    before = [(module, dict(vars(module))) for module in (ppo, rollout)]
    yield
    for module, names in before:
        vars(module).update(names)


def test_the_stored_curves_belong_to_todays_code(tmp_path, unchanged):
    stored = json.loads(exercise_curves.CURVES.read_text())
    today = exercise_curves.fingerprint(tmp_path / "today")
    assert stored["settings"] == exercise_curves.SETTINGS
    assert exercise_curves.same_code(stored["fingerprint"], today), (stored["fingerprint"], today)
    changed = today | {"kl": today["kl"] * 1.2}
    assert not exercise_curves.same_code(stored["fingerprint"], changed)
    for module in COMPARED.values():
        if hasattr(module, "install"):
            module.install(*[task.ours for task in module.TASKS.values()])
    E6.install(data.feedback_message)
    installed = exercise_curves.fingerprint(tmp_path / "installed")
    assert installed == pytest.approx(today, abs=2e-6)  # they round otherwise


def test_what_is_told_about_effects_is_what_is_stored():
    stored = json.loads(exercise_curves.CURVES.read_text())
    effects = exercise_curves.CURVES.with_name("effects.md").read_text()
    assert effects == exercise_curves.table(stored["runs"])
    known = {
        f"{name}: {mistake}" for name, mistakes in exercise_curves.RECORDED.items() for mistake in mistakes
    }
    assert stored["runs"].keys() <= known | {"ours", "open: group baseline", "open: fifth family"}
    for name in known:
        exercise, _, mistake = name.partition(": ")
        assert mistake in classroom.SENTENCES[exercise]
