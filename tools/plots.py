"""Pictures of a training run and of evaluations. They need matplotlib; without it, one line says so.

Paper: figure 3 (results of the responses by turn, similarity of successive programs) and figure 4 (turn
limits with an equal number of samples). `train.py` and `evaluate.py` call this. Nothing is computed here: all
numbers are in `metrics.jsonl` and `summary.json`.

Run alone: `python -m tools.plots RUN` draws the pictures of a directory that has one of these files.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from distributed import friendly_errors

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

RUN_NAME = "{feedback}-{turn_limit}-{temperature}"  # the directory of each run of one evaluation
COLOURS = {  # of the results of a response, from bad to good
    "no valid code": "#8c8c8c",
    "exception": "#8e63b5",
    "timeout": "#c98a2b",
    "out of memory": "#7a4a26",
    "too much output": "#c77cb5",
    "wrong answer": "#c8453c",
    "passed": "#3d8f52",
}


def in_words(settings: dict) -> str:
    """The settings in which the runs of one evaluation differ."""
    kind = {"none": "no"}.get(settings["feedback"], settings["feedback"])
    turns = f"{settings['turn_limit']} turn{'s' if settings['turn_limit'] > 1 else ''}"
    return f"{kind} feedback, {turns}, temperature {settings['temperature']}"


def installed(what: str) -> bool:
    """Whether pictures can be drawn; if not, a line says that `what` is left out."""
    if pyplot is None:
        print(f"{what} left out: matplotlib is not installed")
    return pyplot is not None


def _panels(title: str, names: Sequence[str], width: float, height: float, in_a_row: int = 3) -> tuple:
    """A figure with a title, and one panel for each name."""
    rows, columns = -(-len(names) // in_a_row), min(len(names), in_a_row)
    size = (width * columns, height * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title)
    for name, axis in zip(names, grid.flat, strict=False):
        axis.set_title(name, fontsize="medium")
    for unused in grid.flat[len(names) :]:
        unused.set_axis_off()
    return figure, grid.flat[: len(names)]


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _legend_below(axis) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize="small", frameon=False)


def curves(run: Path) -> None:
    """`curves.png` of a training run's `metrics.jsonl`."""
    if not installed("curves.png"):
        return
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    limits = range(1, 1 + len(metrics[0]["solved_by_turn"]))
    for entry in metrics:
        entry |= {f"turn {n}": share for n, share in zip(limits, entry["solved_by_turn"], strict=True)}
    panels = {  # title, then label and name in the metrics of each line
        "Share of training episodes solved": {f"by turn {n}": f"turn {n}" for n in limits},
        "Share of validation problems solved": {"within all turns": "valid_solved"},
        "Reward": {"of an episode, without KL penalty": "reward", "return of a turn": "return"},
        "Share of responses": {
            "after feedback: the same text again": "repeats",
            "without valid code": "invalid_code",
        },
        "KL to the initial policy": {"nats per token": "kl"},
        "Entropy of the policy": {"nats per token": "entropy"},
        "Clip fraction": {"share of tokens without gradient": "clip_fraction"},
        "Explained variance of the returns": {"by the critic": "explained_variance"},
    }
    figure, axes = _panels(f"Training: {run.resolve().name}", list(panels), 3.75, 3.6, in_a_row=4)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, name in lines.items():
            known = [entry for entry in metrics if entry.get(name) is not None]
            places = [entry["iteration"] for entry in known]
            axis.plot(places, [entry[name] for entry in known], marker=".", label=label)
        if title.endswith("solved"):
            axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)
        _legend_below(axis)
    _save(figure, run / "curves.png")


def evaluation(summaries: dict[str, dict], measures: Sequence[str], directory: Path) -> None:
    """The pictures of evaluated runs side by side, from their summaries by name."""
    if not installed("pictures"):
        return
    short = ["/".join(Path(name).parts[-2:]) for name in summaries]
    if len(set(short)) == len(short):  # otherwise runs with the same label would hide each other
        summaries = dict(zip(short, summaries.values(), strict=True))
    labelled = {}
    for name, summary in summaries.items():
        words = in_words(summary["settings"])
        label = name.replace(RUN_NAME.format(**summary["settings"]), words)
        labelled[label.replace(words, words.replace(", ", "\n", 1))] = summary
    _solved_by_turn(labelled, directory / "solved_by_turn.png")
    _outcomes(labelled, directory / "outcomes.png")
    if several := {name: of for name, of in labelled.items() if of["settings"]["turn_limit"] > 1}:
        _chrf(several, directory / "chrf.png")
    if len({summary["settings"]["turn_limit"] for summary in summaries.values()}) > 1:
        turn_limits(summaries, measures, directory / "turn_limits.png")


def _solved_by_turn(summaries: dict[str, dict], path: Path) -> None:
    figure, (axis,) = _panels("Share of rollouts solved within a number of turns", [""], 5.5, 4.4)
    for name, summary in summaries.items():
        shares = summary["solved_by_turn"]
        style = "-" if summary["settings"]["feedback"] == "true" else "--"
        axis.plot(range(1, len(shares) + 1), shares, style, marker="o", label=name.replace("\n", ", "))
    axis.set(xlabel="turns", ylabel="share of rollouts", ylim=(-0.02, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)
    _legend_below(axis)
    _save(figure, path)


def _outcomes(summaries: dict[str, dict], path: Path) -> None:
    """Figure 3: one bar for each turn, as high as the share of rollouts that have this turn."""
    figure, axes = _panels("Results of the responses on the public tests", list(summaries), 3.8, 3.8)
    outcomes = [list(summary["outcomes"].values()) for summary in summaries.values()]
    seen = [kind for kind in COLOURS if any(turn[kind] for turns in outcomes for turn in turns)]
    for axis, turns, summary in zip(axes, outcomes, summaries.values(), strict=True):
        places, bottom = range(1, len(turns) + 1), [0.0] * len(turns)
        for kind in seen:
            shares = [turn[kind] / summary["rollouts"] for turn in turns]
            axis.bar(places, shares, 0.7, bottom, color=COLOURS[kind], label=kind)
            bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
        axis.set(xlabel="turn (white: rollouts that have ended)", ylabel="share of rollouts", ylim=(0, 1))
        axis.set_xticks(places)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, path)


def _chrf(summaries: dict[str, dict], path: Path) -> None:
    """Figure 3: the similarity of successive programs."""
    figure, axes = _panels("Similarity of successive programs", list(summaries), 3.8, 3.8)
    for axis, summary in zip(axes, summaries.values(), strict=True):
        histogram = summary["chrf_histogram"]
        axis.bar(range(5, 100, 10), [count / max(1, sum(histogram)) for count in histogram], 9)
        axis.set(xlabel="chrF (100: the same program)", ylabel="share of pairs", ylim=(0, 1.02))
    _save(figure, path)


def turn_limits(summaries: dict[str, dict], measures: Sequence[str], path: Path) -> None:
    """Figure 4: an equal number of samples, spent on more rollouts or on longer ones."""
    figure, (axis,) = _panels("Solved with an equal number of samples", [""], 5.5, 4.4)
    kinds: dict[tuple, list[dict]] = {}
    for summary in sorted(summaries.values(), key=lambda summary: summary["settings"]["turn_limit"]):
        kind = summary["settings"]["feedback"], summary["settings"]["temperature"]
        kinds.setdefault(kind, []).append(summary)
    for (feedback, temperature), runs in sorted(kinds.items()):
        limits = [summary["settings"]["turn_limit"] for summary in runs]
        for measure in measures:
            values, errors = zip(*(summary["measures"][measure] for summary in runs), strict=True)
            label = f"{measure}, {feedback} feedback, temperature {temperature}"
            axis.errorbar(limits, values, errors, marker="o", capsize=3, label=label)
    share = "share of problems (bars: standard error)"
    axis.set(xlabel="turn limit", ylabel=share, ylim=(-0.02, 1.02), xticks=limits)
    _legend_below(axis)
    _save(figure, path)


if __name__ == "__main__":
    with friendly_errors("tools.plots"):
        directory = Path(*sys.argv[1:2])
        stored = [directory / name for name in ("summary.json", "comparison.json")]
        if not any(map(Path.exists, (directory / "metrics.jsonl", *stored))):
            raise ValueError(
                f"{directory} is no run: it has no metrics.jsonl, summary.json or comparison.json"
            )
        if (directory / "metrics.jsonl").exists():
            curves(directory)
        for summaries in (json.loads(path.read_text()) for path in stored if path.exists()):
            evaluation(summaries, list(next(iter(summaries.values()))["measures"]), directory)
