"""Pictures of a training run and of evaluations. Needs matplotlib; without it one line says so.

Paper: figure 3 (what becomes of responses, turn by turn, and how much a response changes the one before) and
figure 4 (turn limits at an equal number of samples). `train.py` and `evaluate.py` call this; nothing here
computes anything: all numbers are those of `metrics.jsonl` and `summary.json`.

Run alone: `python -m tools.plots RUN`, a directory with either file, draws its pictures anew.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

COLOURS = {  # of what became of a response, from bad to good
    "no valid code": "#8c8c8c",
    "exception": "#8e63b5",
    "timeout": "#c98a2b",
    "out of memory": "#7a4a26",
    "too much output": "#c77cb5",
    "wrong answer": "#c8453c",
    "passed": "#3d8f52",
}


def installed(what: str) -> bool:
    """Whether pictures can be drawn; if not, a line says that `what` is left out."""
    if pyplot is None:
        print(f"{what} left out: matplotlib is not installed")
    return pyplot is not None


def _panels(count: int, width: float, height: float = 3.6) -> tuple:
    """A figure and `count` axes in a row, or in rows of three."""
    rows, columns = -(-count // 3), min(count, 3)
    size = (width * columns, height * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for unused in grid.flat[count:]:
        unused.set_axis_off()
    return figure, grid.flat[:count]


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def curves(run: Path) -> None:
    """`curves.png` of a training run's `metrics.jsonl`."""
    if not installed("curves.png"):
        return
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    turns = enumerate(zip(*(entry["solved_by_turn"] for entry in metrics), strict=True), 1)
    read = {name: [entry[name] for entry in metrics] for name in metrics[0]}
    panels = {
        "share of sampled episodes": {f"solved within turn {turn}": curve for turn, curve in turns},
        "share of responses": {name.replace("_", " "): read[name] for name in ("repeats", "invalid_code")},
        "KL, nats a token": {"to the initial policy": read["kl"]},
        "explained variance of returns": {"critic": read["explained_variance"]},
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, curve in lines.items():
            axis.plot([entry["iteration"] for entry in metrics], curve, label=name)
        axis.set(xlabel="iteration", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize="small")
    _save(figure, run / "curves.png")


def evaluation(summaries: dict[str, dict], measures: Sequence[str], directory: Path) -> None:
    """The pictures of evaluated runs side by side, from their summaries by name."""
    if not installed("pictures"):
        return
    short = ["/".join(Path(name).parts[-2:]) for name in summaries]
    if len(set(short)) == len(short):  # else they would hide each other
        summaries = dict(zip(short, summaries.values(), strict=True))
    _solved_by_turn(summaries, directory / "solved_by_turn.png")
    _outcomes(summaries, directory / "outcomes.png")
    longer = {name: summary for name, summary in summaries.items() if summary["settings"]["turn_limit"] > 1}
    if longer:
        _transitions(longer, directory / "transitions.png")
        _chrf(longer, directory / "chrf.png")
    if len({summary["settings"]["turn_limit"] for summary in summaries.values()}) > 1:
        turn_limits(summaries, measures, directory / "turn_limits.png")


def _solved_by_turn(summaries: dict[str, dict], path: Path) -> None:
    figure, (axis,) = _panels(1, 5.5)
    for name, summary in summaries.items():
        shares = summary["solved_by_turn"]
        dashed = "--" if summary["settings"]["feedback"] != "true" else "-"
        axis.plot(range(1, len(shares) + 1), shares, dashed, marker="o", label=name)
    axis.set(xlabel="turn", ylabel="share of rollouts solved by then", ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize="small")
    _save(figure, path)


def _outcomes(summaries: dict[str, dict], path: Path) -> None:
    """Figure 3: one bar a turn, as tall as many rollouts come to it."""
    figure, axes = _panels(len(summaries), 3.8)
    seen = [
        kind for kind in COLOURS if any(of[kind] for s in summaries.values() for of in s["outcomes"].values())
    ]
    for axis, (name, summary) in zip(axes, summaries.items(), strict=True):
        turns, bottom = list(summary["outcomes"].values()), [0.0] * len(summary["outcomes"])
        for kind in seen:
            shares = [of[kind] / summary["rollouts"] for of in turns]
            axis.bar(range(1, len(turns) + 1), shares, 0.7, bottom, color=COLOURS[kind], label=kind)
            bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
        axis.set(
            title=name,
            xlabel="turn",
            ylabel="share of rollouts",
            ylim=(0, 1),
            xticks=range(1, len(turns) + 1),
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, path)


def _transitions(summaries: dict[str, dict], path: Path) -> None:
    """What became of a response after one of another kind; rows sum to 1, numbers are counts."""
    figure, axes = _panels(len(summaries), 4.4, 4.2)
    for axis, (name, summary) in zip(axes, summaries.items(), strict=True):
        counts = summary["transitions"]
        rows = [kind for kind in COLOURS if sum(counts.get(kind, {}).values())]
        columns = [kind for kind in COLOURS if any(counts[row][kind] for row in rows)]
        shares = [[counts[row][column] / sum(counts[row].values()) for column in columns] for row in rows]
        axis.set_title(name)
        if not rows:
            axis.text(0.5, 0.5, "no second turns", ha="center")
            continue
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        axis.set(xlabel="next response", ylabel="response")
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                colour = "white" if shares[y][x] > 0.5 else "black"
                axis.text(x, y, counts[row][column], ha="center", va="center", color=colour)
    _save(figure, path)


def _chrf(summaries: dict[str, dict], path: Path) -> None:
    """Figure 3: how alike successive programs are."""
    figure, axes = _panels(len(summaries), 3.8)
    for axis, (name, summary) in zip(axes, summaries.items(), strict=True):
        histogram = summary["chrf_histogram"]
        shares = [count / max(1, sum(histogram)) for count in histogram]
        axis.bar(range(5, 100, 10), shares, 9)
        axis.set(title=name, xlabel="chrF of successive programs", ylabel="share of pairs", ylim=(0, 1.02))
    _save(figure, path)


def turn_limits(summaries: dict[str, dict], measures: Sequence[str], path: Path) -> None:
    """Figure 4: as many samples each, spent on more rollouts or on longer ones."""
    figure, (axis,) = _panels(1, 5.5)
    kinds = sorted({(s["settings"]["feedback"], s["settings"]["temperature"]) for s in summaries.values()})
    for feedback, temperature in kinds:
        same = [
            summary
            for summary in summaries.values()
            if (summary["settings"]["feedback"], summary["settings"]["temperature"])
            == (feedback, temperature)
        ]
        same.sort(key=lambda summary: summary["settings"]["turn_limit"])
        limits = [summary["settings"]["turn_limit"] for summary in same]
        for measure in measures:
            values, errors = zip(*(summary["measures"][measure] for summary in same), strict=True)
            label = f"{measure}, feedback {feedback}, temperature {temperature}"
            axis.errorbar(limits, values, errors, marker="o", capsize=3, label=label)
    axis.set(xlabel="turn limit", ylabel="solved, at as many samples", ylim=(0, 1.02), xticks=limits)
    axis.legend(fontsize="small")
    _save(figure, path)


if __name__ == "__main__":
    place = Path(*sys.argv[1:2])
    if not any((place / name).exists() for name in ("metrics.jsonl", "summary.json", "comparison.json")):
        sys.exit(f"plots.py: {place} is no run: it has no metrics.jsonl, summary.json or comparison.json")
    if (place / "metrics.jsonl").exists():
        curves(place)
    for told in filter(Path.exists, (place / "summary.json", place / "comparison.json")):
        stored = json.loads(told.read_text())
        evaluation(stored, list(next(iter(stored.values()))["measures"]), place)
