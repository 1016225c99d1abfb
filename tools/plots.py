"""Pictures of a training run and of evaluations. They need matplotlib; without it, one line says so.

Paper: figures 3 and 4. `python -m tools.plots RUN` draws the pictures of a directory that `train.py` or
`evaluate.py` has written: all numbers are in its `metrics.jsonl`, `summary.json` or `comparison.json`.
"""

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import itemgetter
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


@contextlib.contextmanager
def _panels(path: Path, title: str, names: Sequence[str], size=(3.8, 3.8), in_a_row=3) -> Iterator[list]:
    """One panel for each name, to draw in; the picture is then written to `path`."""
    rows, columns = -(-len(names) // in_a_row), min(len(names), in_a_row)
    figure = pyplot.figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    figure.suptitle(title)
    for place, name in enumerate(names, 1):
        figure.add_subplot(rows, columns, place).set_title(name, fontsize="medium")
    yield figure.axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _legend_below(axis) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize="small", frameon=False)


def curves(run: Path) -> None:
    """`curves.png` of a training run's `metrics.jsonl`."""
    if not installed("curves.png"):
        return
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in metrics:
        entry |= {f"turn {n}": share for n, share in enumerate(entry["solved_by_turn"], 1)}
    limits = range(1, 1 + len(metrics[0]["solved_by_turn"]))
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
    title = f"Training: {run.resolve().name}"
    with _panels(run / "curves.png", title, list(panels), (3.75, 3.6), in_a_row=4) as axes:
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


def evaluation(summaries: dict[str, dict], measures: Sequence[str], directory: Path) -> None:
    """The pictures of evaluated runs side by side, from their summaries by name."""
    if not installed("pictures"):
        return
    short = {"/".join(Path(name).parts[-2:]): summary for name, summary in summaries.items()}
    if len(short) < len(summaries):  # runs with the same label would hide each other
        short = summaries
    labelled = {}
    for name, summary in short.items():
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
    with _panels(path, "Share of rollouts solved within a number of turns", [""], (5.5, 4.4)) as (axis,):
        for name, summary in summaries.items():
            shares = summary["solved_by_turn"]
            style = "-" if summary["settings"]["feedback"] == "true" else "--"
            axis.plot(range(1, len(shares) + 1), shares, style, marker="o", label=name.replace("\n", ", "))
        axis.set(xlabel="turns", ylabel="share of rollouts", ylim=(-0.02, 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
        _legend_below(axis)


def _outcomes(summaries: dict[str, dict], path: Path) -> None:
    """Figure 3: one bar for each turn, as high as the share of rollouts that have this turn."""
    outcomes = [list(summary["outcomes"].values()) for summary in summaries.values()]
    seen = [kind for kind in COLOURS if any(turn[kind] for turns in outcomes for turn in turns)]
    with _panels(path, "Results of the responses on the public tests", list(summaries)) as axes:
        for axis, turns, summary in zip(axes, outcomes, summaries.values(), strict=True):
            places, bottom = range(1, len(turns) + 1), [0.0] * len(turns)
            for kind in seen:
                shares = [turn[kind] / summary["rollouts"] for turn in turns]
                axis.bar(places, shares, 0.7, bottom, color=COLOURS[kind], label=kind)
                bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
            axis.set(xlabel="turn (white: rollouts that have ended)", ylabel="share of rollouts", ylim=(0, 1))
            axis.set_xticks(places)
        handles = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(*handles, loc="outside lower center", ncols=4, fontsize="small")


def _chrf(summaries: dict[str, dict], path: Path) -> None:
    """Figure 3: the similarity of successive programs."""
    with _panels(path, "Similarity of successive programs", list(summaries)) as axes:
        for axis, summary in zip(axes, summaries.values(), strict=True):
            histogram = summary["chrf_histogram"]
            axis.bar(range(5, 100, 10), [count / max(1, sum(histogram)) for count in histogram], 9)
            axis.set(xlabel="chrF (100: the same program)", ylabel="share of pairs", ylim=(0, 1.02))


def turn_limits(summaries: dict[str, dict], measures: Sequence[str], path: Path) -> None:
    """Figure 4: an equal number of samples, spent on more rollouts or on longer ones."""
    in_order, kinds = itemgetter("feedback", "temperature", "turn_limit"), defaultdict(list)
    for summary in sorted(summaries.values(), key=lambda summary: in_order(summary["settings"])):
        kind = "{feedback} feedback, temperature {temperature}".format(**summary["settings"])
        kinds[kind].append(summary)
    with _panels(path, "Solved with an equal number of samples", [""], (5.5, 4.4)) as (axis,):
        for kind, runs in kinds.items():
            limits = [summary["settings"]["turn_limit"] for summary in runs]
            for measure in measures:
                values, errors = zip(*(summary["measures"][measure] for summary in runs), strict=True)
                axis.errorbar(limits, values, errors, marker="o", capsize=3, label=f"{measure}, {kind}")
        share = "share of problems (bars: standard error)"
        axis.set(xlabel="turn limit", ylabel=share, ylim=(-0.02, 1.02), xticks=limits)
        _legend_below(axis)


if __name__ == "__main__":
    with friendly_errors("tools.plots"):
        directory, names = Path(*sys.argv[1:2]), ("metrics.jsonl", "summary.json", "comparison.json")
        found = [name for name in names if (directory / name).exists()]
        if not found:
            raise ValueError(f"{directory} is no run: it has no {', '.join(names[:2])} or {names[2]}")
        for name in found:
            if name == "metrics.jsonl":
                curves(directory)
            else:
                summaries = json.loads((directory / name).read_text())
                evaluation(summaries, list(next(iter(summaries.values()))["measures"]), directory)
