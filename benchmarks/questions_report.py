"""The table and the pictures of benchmarks/questions.py, from questions/results.jsonl.

Run alone: `python benchmarks/questions_report.py`.
"""

import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, pstdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoints import write_whole  # noqa: E402
from evaluate import n_at_k  # noqa: E402
from tools import plots  # noqa: E402

RESULTS = Path(__file__).with_name("questions")
RUNS = {  # question: its runs; "ours" belongs to all of them
    "feedback": (
        "verdict only",
        "without the expected output",
        "each field cut to half",
        "random with probability 0.25",
        "random with probability 0.5",
        "random with probability 0.75",
        "random with probability 1",
    ),
    "reward": (  # all from the start model that reads less
        "reads less",
        *(f"reads less, {n} of 6 tests public, rewarded by these only" for n in (1, 2, 3, 5)),
    ),
    "difficulty": ("10 programs a statement", "40 programs a statement"),
    "turn limit": ("turn limit 1", "turn limit 2", "turn limit 4", "turn limit 8"),
}
STARTS = ("start", "start that reads less")
LIMITS = (1, 2, 3, 4, 8)  # turn limits of the evaluation, for the question of that name
BY_LIMIT = ("start", "turn limit 1", "turn limit 2", "ours", "turn limit 4", "turn limit 8")
POLICIES = ("start", "turn limit 1", "ours")  # of the question of the budget
SAMPLES = {"a dialog of three turns": 0, "3 first answers": 3, "12 first answers": 12}
COSTS = {"tokens": "generated_tokens", "sandbox runs": "programs", "CPU seconds": "seconds"}
DRAWS = 12  # independent first answers to each test problem, for the question of the budget


def read_results() -> list[dict]:
    path = RESULTS / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def values(results: Sequence[dict], name: str, *keys: str | int) -> list:
    """A figure of each seed of a run, found by following `keys` from its result; without keys the results."""
    found = [result for result in results if result["run"] == name]
    for key in keys:
        found = [of[key] for of in found]
    return found


def cell(numbers: Sequence[float], digits: int = 3) -> str:
    spread = f" ±{pstdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}" if numbers else ""


def pass_at(result: dict, answers: int) -> float:
    """Share of the test problems of which at least one of so many independent first answers is right."""
    return mean(
        n_at_k(DRAWS, DRAWS, right, answers, answers) for right in result["draws"]["solved_of_problem"]
    )


def budget(result: dict, samples: int) -> tuple[float, ...]:
    """The share of test problems solved, and tokens, programs and seconds a problem, of a policy.

    Args: samples: so many independent first answers to each problem; 0: a dialog of at most three turns.
    """
    count = len(result["draws"]["solved_of_problem"])
    of, share = result["draws"] if samples else result["by_limit"]["3"], (samples or DRAWS) / DRAWS
    solved = pass_at(result, samples) if samples else of["solved"]
    return solved, *(share * of[name] / count for name in COSTS.values())


def table(results: Sequence[dict]) -> str:
    """The figures as Markdown: means over the seeds, and standard deviations."""
    columns = {
        "solved, feedback as in training": ("own", "solved"),
        "true feedback": ("true", "solved"),
        "random feedback": ("random", "solved"),
        "first answer": ("own", "solved_by_turn", 0),
        "first answer, told": ("own", "told_first"),
        "passes public tests": ("own", "public_passed"),
        "of these wrong": ("own", "false_positives"),
    }
    lines, measured = [], {result["run"] for result in results}
    for question, names in RUNS.items():
        if measured.isdisjoint(names):
            continue
        lines += [f"| {question} | " + " | ".join(columns) + " | seeds |", "|---" * (len(columns) + 2) + "|"]
        compared = STARTS[1:] if question == "reward" else ("start", "ours")
        for name in (name for name in (*compared, *names) if name in measured):
            cells = [cell(values(results, name, *keys)) for keys in columns.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(values(results, name))} |")
        lines.append("")
    if "ours" not in measured:
        return "\n".join(lines)
    lines += ["| trained with | " + " | ".join(f"evaluated with {n}" for n in LIMITS) + " |"]
    lines += ["|---" * (len(LIMITS) + 1) + "|"]
    for name in (name for name in BY_LIMIT if name in measured):
        cells = [cell(values(results, name, "by_limit", str(n), "solved")) for n in LIMITS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    head = ("budget", "samples of a problem", "solved", *(f"{what} a problem solved" for what in COSTS))
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, (words, samples) in product(POLICIES, SAMPLES.items()):
        if chosen := values(results, name):
            solved, *costs = zip(*(budget(result, samples) for result in chosen), strict=True)
            costs = [[cost / share for cost, share in zip(of, solved, strict=True)] for of in costs]
            cells = [cell(solved), *map(cell, costs, (0, 1, 3))]  # digits
            lines.append(f"| {name} | {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_curves(axis, results: Sequence[dict], name: str, key: str, colour: str, label: str) -> None:
    """A line of a measure of training: the mean of the seeds, in a band from the lowest to the highest."""
    columns = [*zip(*values(results, name, "training", key), strict=True)]
    places = range(1, len(columns) + 1)
    axis.plot(places, [mean(column) for column in columns], color=colour, label=label)
    axis.fill_between(places, [*map(min, columns)], [*map(max, columns)], color=colour, alpha=0.12)
    axis.set(xlabel="iteration", ylabel="share of training episodes", ylim=(-0.02, 1.02))


SIZE = {"figsize": (11, 4.2), "layout": "constrained"}


def draw_feedback(results: Sequence[dict]) -> None:
    figure, (left, right) = plots.pyplot.subplots(1, 2, **SIZE)
    names = ("ours", *RUNS["feedback"][:3])
    for place, name in enumerate(names):
        for shift, (kind, colour) in enumerate({"own": "C0", "true": "C1", "random": "C3"}.items()):
            numbers = values(results, name, kind, "solved")
            where = [len(names) - place - 0.25 * shift] * len(numbers)
            label = {"own": "feedback as in training", "true": "true", "random": "random"}[kind]
            left.barh(where[:1], [mean(numbers)], 0.23, color=colour, label=None if place else label)
            left.plot(numbers, where, "k.", markersize=3)
    left.set_yticks([n - 0.25 for n in range(len(names), 0, -1)], names)
    left.set(xlabel="test problems solved in three turns (dots: seeds)", xlim=(0, 1))
    left.legend(fontsize="small", title="evaluated with")
    ways = {0.0: "ours"} | {float(name.split()[-1]): name for name in RUNS["feedback"][3:]}
    for kind, label in {"own": "as often random in evaluation", "true": "true in evaluation"}.items():
        rows = [values(results, name, kind, "solved") for name in ways.values()]
        (line,) = right.plot([*ways], [mean(row) for row in rows], "o-", label=label)
        right.fill_between([*ways], [*map(min, rows)], [*map(max, rows)], color=line.get_color(), alpha=0.12)
    right.set(xlabel="share of random messages in training", ylim=(-0.02, 1.02))
    right.legend()
    figure.savefig(RESULTS / "feedback.png", dpi=100)


def draw_reward(results: Sequence[dict]) -> None:
    figure, axes = plots.pyplot.subplots(1, 5, figsize=(22, 4.2), layout="constrained")
    for axis, name in zip(axes, RUNS["reward"], strict=True):
        draw_curves(axis, results, name, "public_passed", "C3", "passes the public tests")
        draw_curves(axis, results, name, "solved", "C0", "passes all tests")
        axis.set_title(name.partition(", ")[2] or "rewarded by all tests")
    axes[0].legend(loc="lower right")
    figure.savefig(RESULTS / "reward.png", dpi=100)


def draw_difficulty(results: Sequence[dict]) -> None:
    """How many programs fit, and turn limits."""
    figure, (left, right) = plots.pyplot.subplots(1, 2, **SIZE)
    for name, colour in zip(("ours", *RUNS["difficulty"]), ("C0", "C1", "C2"), strict=True):
        label = "320 programs a statement" if name == "ours" else name
        draw_curves(left, results, name, "solved", colour, label)
    left.legend()
    for name in BY_LIMIT:
        rows = [values(results, name, "by_limit", str(n), "solved") for n in LIMITS]
        right.plot(LIMITS, [*map(mean, rows)], "o-", label="turn limit 3" if name == "ours" else name)
    right.set(xlabel="turn limit of the evaluation", ylabel="test problems solved", ylim=(-0.02, 1.02))
    right.legend(title="trained with", fontsize="small")
    figure.savefig(RESULTS / "difficulty.png", dpi=100)


def draw_budget(results: Sequence[dict]) -> None:
    """What a number of sampled tokens buys: longer dialogs, or more first answers."""
    figure, axis = plots.pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, colour in zip(POLICIES, ("C7", "C1", "C0"), strict=True):
        chosen = values(results, name)
        count = len(chosen[0]["draws"]["solved_of_problem"])
        label = {"turn limit 1": "single-turn RL", "ours": "RLEF"}.get(name, name)
        dialogs = [[result["by_limit"][str(n)] for result in chosen] for n in LIMITS]
        tokens = [mean(of["generated_tokens"] for of in same) / count for same in dialogs]
        solved = [mean(of["solved"] for of in same) for same in dialogs]
        axis.plot(tokens, solved, "o-", color=colour, label=f"{label}: dialogs of 1 to 8 turns")
        budgets = [[budget(result, n) for result in chosen] for n in range(1, DRAWS + 1)]
        points = [[mean(column) for column in zip(*same, strict=True)] for same in budgets]
        label = f"{label}: 1 to {DRAWS} first answers"
        axis.plot([p[1] for p in points], [p[0] for p in points], ".--", color=colour, label=label)
    axis.set(xlabel="sampled tokens a test problem", ylabel="test problems solved", ylim=(-0.02, 1.02))
    axis.legend(fontsize="small")
    figure.savefig(RESULTS / "budget.png", dpi=100)


def report(results: Sequence[dict]) -> None:
    """Write the table, and the pictures of the questions whose runs are all there."""
    write_whole(RESULTS / "table.md", table(results))
    measured = {result["run"] for result in results}
    drawn = {  # the function of each picture, and the runs that it needs
        "feedback": (draw_feedback, RUNS["feedback"]),
        "reward": (draw_reward, RUNS["reward"]),
        "difficulty": (draw_difficulty, RUNS["difficulty"] + BY_LIMIT),
        "budget": (draw_budget, POLICIES),
    }
    for question, (draw, needed) in drawn.items() if plots.installed("pictures") else ():
        if missing := {*needed} - measured:
            print(f"no picture of {question} yet: {', '.join(sorted(missing))} missing")
        else:
            draw(results)


if __name__ == "__main__":
    report(read_results())
