"""What a person reads of a run's `episodes.jsonl`: the page `episodes.html`, and the text `dialogs.txt`.

The page is one file that needs no network and opens from the disk. Its template is page.html, its data are
the episodes of the first, the middle and the last iteration that were kept, from `result.json` the same test
problems before and after training, and from `metrics.jsonl` the curve. Texts of models are hostile: the page
sets them as text, and the data have no `<`, so that no text can end the script element that holds them.

Run alone: `python -m tools.page RUN` writes the page of any training run, finished or not.
"""

import json
import sys
from pathlib import Path

from distributed import friendly_errors


def read(path: Path) -> list[dict]:
    """The whole lines of a JSON Lines file; NaN and infinity, which browsers cannot read, become null."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line, parse_constant=lambda _: None) for line in lines]


def write(run: Path) -> Path:
    """Write `episodes.html`. Raises: ValueError, one sentence, if it is no training run with episodes."""
    metrics, episodes = read(run / "metrics.jsonl"), read(run / "episodes.jsonl")
    if not metrics or not episodes:
        raise ValueError(f"{run} has no episodes of training: metrics.jsonl or episodes.jsonl is not there")
    iterations = sorted({episode["iteration"] for episode in episodes})
    shown = {iterations[0], iterations[len(iterations) // 2], iterations[-1]}
    result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else {}
    data = {
        "run": run.resolve().name,
        "curve": [{name: entry[name] for name in ("iteration", "solved_by_turn")} for entry in metrics],
        "episodes": [episode for episode in episodes if episode["iteration"] in shown],
        "test": {when: result.get(when) for when in ("before", "after")},
    }
    template, target = Path(__file__).with_suffix(".html").read_text(), run / "episodes.html"
    beside = target.with_suffix(".partial")
    beside.write_text(template.replace("DATA", json.dumps(data).replace("<", "\\u003c")))
    return beside.replace(target)


def as_text(record: dict) -> str:
    """A record for a person: the dialog, the numbers of each turn, its tokens with their ratios."""
    solved = "solved" if record["solved"] else "not solved"
    parts = [f"iteration {record['iteration']}, {record['problem']}, {solved}"]
    parts.append(f"user:\n{record['statement']}")
    for number, turn in enumerate(record["turns"], 1):
        tokens = zip(turn["tokens"]["text"], turn["tokens"]["ratio"], strict=True)
        ratios = "  ".join(f"{text!r} {ratio:.3f}" for text, ratio in tokens)
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in turn["numbers"].items())
        parts.append(f"assistant, turn {number}, {turn['outcome']}:\n{''.join(turn['tokens']['text'])}")
        parts.append(f"{numbers}\ntokens and their ratios: {ratios}")
        parts += [f"user:\n{turn['feedback']}"] if turn["feedback"] else []
    parts.append(f"private tests: {record['private']}")
    return "\n\n".join(parts) + "\n\n\n"


if __name__ == "__main__":
    with friendly_errors("tools.page"):
        if len(sys.argv) != 2:
            raise ValueError("give the directory of one training run: python -m tools.page RUN")
        print(write(Path(sys.argv[1])))
