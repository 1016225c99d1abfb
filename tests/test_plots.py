"""Pictures: made where matplotlib is, and left out with one line where it is not."""

import json

import pytest

from evaluate import compare
from tools import plots


def run(feedback: str, turn_limit: int, outcomes: list[list[str]]) -> tuple[dict, list[dict]]:
    """A run whose rollouts went as told; those that end with "passed" are solved."""
    settings = {
        "problems": "toy",
        "split": "test",
        "feedback": feedback,
        "turn_limit": turn_limit,
        "temperature": 0.2,
    }
    turn = {"truncated": False, "sandbox_seconds": 0.0, "tokens": 9}
    records = [
        {
            "problem": f"problem {number % 3}",
            "group": "",
            "index": number,
            "public_tests": 2,
            "public_passed": of[-1] == "passed",
            "solved": of[-1] == "passed",
            "truncated": False,
            "ids": 50,
            "wall_seconds": 0.1,
            "turns": [turn | {"outcome": kind, "code": f"print({i})"} for i, kind in enumerate(of)],
            "dialog": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}] * len(of),
        }
        for number, of in enumerate(outcomes)
    ]
    return settings, records


def summaries() -> dict[str, dict]:
    runs = {
        "a/true-2": run("true", 2, [["wrong answer", "passed"], ["passed"], ["exception", "timeout"]]),
        "a/random-2": run("random", 2, [["wrong answer", "no valid code"], ["passed"], ["exception"] * 2]),
        "a/true-1": run("true", 1, [["wrong answer"], ["passed"], ["exception"]] * 2),
    }
    return compare(runs, ["1@2"])[0]


def test_every_picture_of_an_evaluation_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plots.evaluation(summaries(), ["1@2"], tmp_path)
    names = {"solved_by_turn.png", "outcomes.png", "chrf.png", "turn_limits.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_curves_are_drawn_from_the_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    entry = {
        "solved_by_turn": [0.1, 0.2],
        "repeats": 0.5,
        "invalid_code": 0.1,
        "kl": 0.0,
        "explained_variance": 0.3,
        "reward": -0.5,
        "return": -0.6,
        "entropy": 1.0,
        "clip_fraction": 0.02,
    }
    lines = [json.dumps(entry | {"iteration": number}) for number in (1, 2)]
    lines[1] = json.dumps(entry | {"iteration": 2, "valid_solved": 0.4})
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    plots.curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "pyplot", None)
    plots.evaluation(summaries(), ["1@2"], tmp_path)
    plots.curves(tmp_path)
    message = "left out: matplotlib is not installed"
    assert capsys.readouterr().out == f"pictures {message}\ncurves.png {message}\n"
    assert not list(tmp_path.iterdir())


def test_runs_whose_paths_end_alike_are_both_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "installed", lambda what: True)
    for name in ("_solved_by_turn", "_outcomes", "_chrf"):
        monkeypatch.setattr(plots, name, lambda of, path: drawn.append(set(of)))
    one = summaries()["a/true-2"]
    plots.evaluation({"seed0/a/true": one, "seed1/a/true": one}, ["1@2"], tmp_path)
    assert drawn == [{"seed0/a/true", "seed1/a/true"}] * 3
