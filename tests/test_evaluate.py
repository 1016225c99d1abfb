"""Estimators against simulation and enumeration, chrF against stored values, records, resumed runs."""

import json
from itertools import combinations

import numpy as np
import pytest

import evaluate
from data import Problem
from evaluate import (
    OUTCOMES,
    chrf,
    compare,
    n_at_k,
    pass_at_k,
    problem_scores,
    record,
    rollouts_drawn,
    standard_error,
    summarise,
    table,
)
from rollout import Episode, RolloutSettings, Turn
from sandbox import IoTest, TestResult, Verdict

# ---- estimators --------------------------------------------------------------------------------------------


def enumerated(rollouts: int, passed: int, solved: int, n: int, draws: int) -> float:
    """n@k by its definition: every draw, each set of submissions of it; rollouts 0..solved-1 are right."""
    chances = []
    for drawn in combinations(range(rollouts), draws):
        passing = [rollout for rollout in drawn if rollout < passed]
        choices = list(combinations(passing, min(n, len(passing))))
        chances.append(sum(any(r < solved for r in choice) for choice in choices) / len(choices))
    return sum(chances) / len(chances)


def test_n_at_k_equals_enumeration_of_every_draw_and_submission():
    for rollouts in range(1, 7):
        for passed in range(rollouts + 1):
            for solved in range(passed + 1):
                for draws in range(1, rollouts + 1):
                    for n in range(1, draws + 1):
                        case = (rollouts, passed, solved, n, draws)
                        assert n_at_k(*case) == pytest.approx(enumerated(*case), abs=1e-12), case


def test_n_at_k_agrees_with_direct_simulation_to_three_standard_errors():
    draw = np.random.default_rng(0)
    for _ in range(12):
        rollouts = int(draw.integers(5, 60))
        passed = int(draw.integers(1, rollouts + 1))
        solved = int(draw.integers(0, passed + 1))
        draws = int(draw.integers(1, rollouts + 1))
        n = int(draw.integers(1, draws + 1))
        hits = []
        for _ in range(1500):
            drawn = draw.permutation(rollouts)[:draws]
            hits.append(np.any(drawn[drawn < passed][:n] < solved))  # in random order: any n are the first n
        expected = n_at_k(rollouts, passed, solved, n, draws)
        error = max((expected * (1 - expected) / len(hits)) ** 0.5, 1e-9)
        assert abs(np.mean(hits) - expected) <= 3 * error, (rollouts, passed, solved, n, draws)


def test_pass_at_k_equals_enumeration_of_every_draw():
    for rollouts in range(1, 8):
        for solved in range(rollouts + 1):
            for k in range(1, rollouts + 1):
                draws = list(combinations(range(rollouts), k))
                hit = sum(min(draw) < solved for draw in draws) / len(draws)
                assert pass_at_k(rollouts, solved, k) == pytest.approx(hit, abs=1e-12)


def test_pass_at_k_is_unbiased_over_all_outcomes_of_the_rollouts():
    rollouts, k, chance = 6, 3, 0.3
    expectation = sum(
        pass_at_k(rollouts, sum(outcome), k)
        * chance ** sum(outcome)
        * (1 - chance) ** (rollouts - sum(outcome))
        for outcome in np.ndindex(*[2] * rollouts)
    )
    assert expectation == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_a_rollout_counts_as_as_many_samples_as_its_turn_limit():
    assert rollouts_drawn("1@3", 3, 20) == 1
    assert rollouts_drawn("10@100", 3, 200) == 33
    assert rollouts_drawn("10@100", 1, 200) == 100
    assert rollouts_drawn("pass@10", 3, 20) == 10


def test_too_few_rollouts_are_refused_with_the_number_that_is_needed():
    with pytest.raises(ValueError, match="10@100 at turn limit 3 needs 33 rollouts a problem.* 20"):
        rollouts_drawn("10@100", 3, 20)
    with pytest.raises(ValueError, match="1@3 at turn limit 5 needs at least 5 samples"):
        rollouts_drawn("1@3", 5, 20)


@pytest.mark.parametrize("measure", ["3@1", "0@3", "1@0", "best@3", "1@3x"])
def test_a_measure_that_is_none_is_refused(measure):
    with pytest.raises(ValueError, match="is not a measure"):
        rollouts_drawn(measure, 1, 20)


def test_the_error_of_a_mean_is_near_that_of_a_bootstrap_of_the_problems():
    scores = np.random.default_rng(1).random(200)
    picks = np.random.default_rng(0).integers(200, size=(1000, 200))
    assert standard_error(scores) == pytest.approx(scores[picks].mean(1).std(), rel=0.1)
    assert standard_error([0.5, 0.5, 0.5]) == 0


CHRF = [  # hypothesis, reference, sacrebleu 2.6.0's sentence_chrf(hypothesis, [reference]).score
    ("print(a + b)", "print(a - b)", 62.90343915343916),
    (
        "a, b = map(int, input().split())\nprint(max(a, b))\n",
        "a, b = map(int, input().split())\nprint(a * b)\n",
        88.43105866044367,
    ),
    ("ab", "abc", 63.636363636363626),  # too short for six orders
    ("", "abc", 0.0),
    ("abc", "", 0.0),
    ("abcdefg", "hijklmn", 0.0),
    ("for i in range(10):\n    print(i)", "for i in range(10):\n    print(i)", 100.0),
    ("aaaaaaaa", "aaab", 37.92947987851176),
    ("def f(x):\n\treturn x", "import sys\nprint(sys.stdin.read())", 5.265938794271795),
    ("naïve = 'ü'", "naive = 'u'", 28.835978835978832),
]


@pytest.mark.parametrize("hypothesis, reference, score", CHRF)
def test_chrf_agrees_with_the_scores_of_sacrebleu(hypothesis, reference, score):
    assert chrf(hypothesis, reference) == pytest.approx(score, abs=1e-6)


# ---- records -----------------------------------------------------------------------------------------------


def problem(name: str, group: str = "") -> Problem:
    return Problem(name, f"do {name}", (IoTest("1", "1"),), (IoTest("2", "2"),), group=group)


def episode(
    name: str, answers: list[tuple[str, str]], solved: bool, index: int = 0, group: str = ""
) -> Episode:
    """An episode of (outcome, code) answers; a response has 3 tokens, what stands before it 2."""
    turns = []
    for number, (outcome, code) in enumerate(answers, 1):
        invalid = outcome == "no valid code"
        turns.append(
            Turn(
                start=5 * number - 3,
                end=5 * number,
                behaviour_logprobs=[0.0] * 3,
                text=f"```python\n{code}```",
                code=None if invalid else code,
                results=None if invalid else [TestResult(Verdict(outcome))],
                feedback="again" if number < len(answers) else "",
                sandbox_seconds=0.5,
            )
        )
    passed = answers[-1][0] == "passed"
    return Episode(problem(name, group), list(range(5 * len(answers))), turns, passed, solved, False, index)


EPISODES = [
    episode("a", [("passed", "x = 1")], True, group="easy"),
    episode("a", [("passed", "x = 2")], False, group="easy"),  # a false positive
    episode(
        "b", [("wrong answer", "x = 1"), ("wrong answer", "x = 1"), ("passed", "y = 22")], True, group="hard"
    ),
    episode(
        "b", [("no valid code", "x ="), ("exception", "1 / 0"), ("timeout", "1 / 0")], False, group="hard"
    ),
]


def test_summary_of_hand_made_rollouts():
    records = json.loads(json.dumps([record(e) for e in EPISODES]))
    summary = summarise(records, turn_limit=3)
    assert summary["solved"] == 0.5
    assert summary["solved_by_turn"] == [0.25, 0.25, 0.5]
    assert summary["by_group"] == {"easy": 0.5, "hard": 0.5}
    assert summary["false_positives"] == pytest.approx(1 / 3)
    assert summary["recovered"] == 0.5
    assert summary["repeats"] == 0.5  # of four responses after feedback
    assert summary["generated_tokens"] == 24
    assert summary["prompt_tokens"] == 16
    assert summary["sandbox_seconds"] == 4.0
    assert summary["solved_per_1000_tokens"] == pytest.approx(2000 / 24)
    assert summary["response_tokens"] == [3, 3, 3]
    json.dumps(summary)


def test_outcomes_and_transitions_count_each_response_once():
    summary = summarise([record(e) for e in EPISODES], turn_limit=3)
    counts = {turn: {kind: n for kind, n in of.items() if n} for turn, of in summary["outcomes"].items()}
    assert counts == {
        "turn 1": {"no valid code": 1, "wrong answer": 1, "passed": 2},
        "turn 2": {"wrong answer": 1, "exception": 1},
        "turn 3": {"timeout": 1, "passed": 1},
    }
    moves = {(a, b): n for a, row in summary["transitions"].items() for b, n in row.items() if n}
    assert moves == {
        ("wrong answer", "wrong answer"): 1,
        ("wrong answer", "passed"): 1,
        ("no valid code", "exception"): 1,
        ("exception", "timeout"): 1,
    }
    assert set(OUTCOMES) == {"no valid code"} | {verdict.value for verdict in Verdict}


def test_chrf_of_a_run_compares_each_program_with_the_one_before_it():
    summary = summarise([record(e) for e in EPISODES], turn_limit=3)
    scores = [100.0, chrf("y = 22", "x = 1"), 100.0]  # no program, no pair
    assert summary["chrf"] == pytest.approx(sum(scores) / 3)
    assert sum(summary["chrf_histogram"]) == 3 and summary["chrf_histogram"][-1] == 2


def test_a_record_holds_the_dialog_as_messages():
    dialog = record(EPISODES[2])["dialog"]
    assert [message["role"] for message in dialog] == ["user", "assistant"] * 3
    assert dialog[0]["content"].startswith("do b") and dialog[2]["content"] == "again"
    assert dialog[1]["content"] == "```python\nx = 1```"


def test_scores_are_each_problems_own():
    records = [record(e) for e in EPISODES]
    assert problem_scores(records, "pass@1", 3) == {"a": 0.5, "b": 0.5}
    assert problem_scores(records, "1@6", 3) == {"a": 0.5, "b": 1.0}  # b: the only one that passes is right
    with pytest.raises(ValueError, match="needs 3 rollouts"):
        problem_scores(records, "1@9", 3)


# ---- runs --------------------------------------------------------------------------------------------------


def run(solved: dict[str, list[bool]], **about) -> tuple[dict, list[dict]]:
    answers = {True: [("passed", "x")], False: [("wrong answer", "x")]}
    episodes = [episode(name, answers[right], right) for name, of in solved.items() for right in of]
    return {"turn_limit": 1, "problems": "toy", "split": "test"} | about, [record(e) for e in episodes]


def test_differences_are_paired_by_problem():
    runs = {
        "old": run({"a": [True, False], "b": [False, False], "c": [True, True]}),
        "new": run({"a": [True, True], "b": [True, False], "d": [False, False]}),
    }
    summaries, rows = compare(runs, ["1@1"])
    assert summaries["old"]["measures"]["1@1"][0] == 0.5
    assert rows["new less old, 2 problems"]["1@1"] == "+0.500 ±0.000"  # the same gain on both: no spread


def test_runs_without_a_problem_in_common_are_refused():
    with pytest.raises(ValueError, match="new and old have no problem in common"):
        compare({"old": run({"a": [True]}), "new": run({"b": [True]})}, ["1@1"])


@pytest.mark.parametrize(
    "problems, split, expected",
    [
        ("code_contests", "valid", {"1@3": "0.172", "10@100": "0.298"}),
        ("code_contests", "test", {"1@3": "0.160", "10@100": "0.287"}),
        ("humaneval_plus", "test", {"1@3": "0.695"}),
        ("somewhere/HumanEvalPlus-OriginFmt.jsonl.gz", "test", {"1@3": "0.695"}),
        ("mbpp_plus", "test", {"1@3": "0.631"}),
        ("code_contests", "train", None),
        ("toy", "test", None),
    ],
)
def test_the_papers_numbers_stand_beside_runs_of_its_problems_only(problems, split, expected):
    _, rows = compare({"ours": run({"a": [True]}, problems=problems, split=split)}, ["1@1"])
    assert rows.get("paper, 8B, RLEF") == expected
    if expected is None:
        assert list(rows) == ["ours"]
    else:
        assert table(rows).splitlines()[0].split()[-len(expected) :] == list(expected)


ABOUT = {"seed": 5, "temperature": 0.2}
SETTINGS = RolloutSettings(turn_limit=1, batch_rows=2)  # chunks of 4 rollouts


def fake_rollout(
    model, tokenizer, problems, sandbox, settings, seed, first_index=0, progress=False, others=()
):
    """Episodes that depend on (seed, index) alone. `model` is a list: the indices that were sampled."""
    episodes = []
    for index, entry in enumerate(problems, first_index):
        model.append(index)
        right = bool(np.random.default_rng([seed, index]).integers(2))
        answer = ("passed", f"x = {index}") if right else ("wrong answer", "x")
        episodes.append(episode(entry.name, [answer], right, index))
    return episodes


def sample_into(directory, rollouts: int, about: dict = ABOUT) -> tuple[list[dict], list[int]]:
    sampled = []
    problems = [problem("a"), problem("b"), problem("c")]
    records = evaluate._sample(sampled, None, problems, None, SETTINGS, rollouts, about, directory, problems)
    return records, sampled


def test_resumed_rollouts_equal_uninterrupted_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", fake_rollout)
    whole, sampled = sample_into(tmp_path / "whole", 4)
    assert sampled == list(range(12))
    text = (tmp_path / "whole" / "episodes.jsonl").read_text()
    half = tmp_path / "half"
    half.mkdir()
    (half / "settings.json").write_text(json.dumps(ABOUT))
    (half / "episodes.jsonl").write_text(text[: text.index('"index": 6') + 30])  # cut within a line
    resumed, sampled = sample_into(half, 4)
    assert resumed == whole
    assert sampled == list(range(4, 12))  # whole chunks are kept, the unfinished one is sampled again
    assert [json.loads(line)["index"] for line in (half / "episodes.jsonl").open()] == list(range(12))
    assert sample_into(half, 4) == (whole, [])


def test_more_rollouts_extend_a_run_and_fewer_read_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", fake_rollout)
    whole, _ = sample_into(tmp_path / "whole", 8)
    sample_into(tmp_path / "part", 4)
    assert sample_into(tmp_path / "part", 8) == (whole, list(range(12, 24)))
    assert sample_into(tmp_path / "part", 2) == (whole[:6], [])


def test_settings_that_disagree_with_the_file_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", fake_rollout)
    sample_into(tmp_path, 2)
    with pytest.raises(ValueError, match="temperature 0.2, now 1.0") as refused:
        sample_into(tmp_path, 2, ABOUT | {"temperature": 1.0})
    assert "seed" not in str(refused.value)


def test_a_run_that_ran_out_of_memory_goes_on_with_fewer_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", fake_rollout)
    sample_into(tmp_path, 2, ABOUT | {"batch_rows": 2})
    _, sampled = sample_into(tmp_path, 4, ABOUT | {"batch_rows": 1})
    assert sampled == list(range(4, 12))
    assert json.loads((tmp_path / "settings.json").read_text())["batch_rows"] == 1


def test_settings_of_a_call_that_sampled_nothing_bind_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", fake_rollout)
    (tmp_path / "episodes.jsonl").write_text("")
    (tmp_path / "settings.json").write_text(json.dumps(ABOUT | {"temperature": 1.0}))
    assert len(sample_into(tmp_path, 2)[0]) == 6


@pytest.mark.parametrize(
    ("settings", "line"), [("[1]", "{}"), ("5", "{}"), ("null", "{}"), ("{}", "[]"), ("{}", "7")]
)
def test_json_of_another_kind_is_no_run(tmp_path, settings, line):
    (tmp_path / "settings.json").write_text(settings)
    (tmp_path / "episodes.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match="is no run of evaluate.py that can be read"):
        evaluate.read_run(tmp_path)


def test_an_unfinished_run_a_run_twice_and_what_is_no_run_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", fake_rollout)
    sample_into(tmp_path / "part", 4)
    text = (tmp_path / "part" / "episodes.jsonl").read_text()
    (tmp_path / "part" / "episodes.jsonl").write_text(text[: text.index('"index": 6') + 30])
    for flags, told in (
        (["part"], "has 6 of 12 rollouts"),
        (["part", "part"], "names a run twice"),
        (["none"], "is no run of evaluate.py"),
    ):
        monkeypatch.setattr(
            "sys.argv", ["evaluate.py", "--compare", *(str(tmp_path / name) for name in flags)]
        )
        with pytest.raises(ValueError, match=told):
            evaluate.main()


def test_bad_input_ends_with_one_sentence_before_the_model_is_read(monkeypatch):
    def no_model(*_):
        raise AssertionError("the model was read")

    monkeypatch.setattr(evaluate, "load_tokenizer", no_model)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--report", "10@100"])
    with pytest.raises(ValueError, match="needs 33 rollouts"):
        evaluate.main()
