"""The table of the main run: `python benchmarks/main_run.py [SEED ...]`, by default seeds 0, 1 and 2.

Each seed is `python train.py --seed SEED --output runs/toy-SEED`, one after the other; what is stored is not
repeated. The results go to `main_run.json` beside this file, and the table is printed as Markdown.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoints import write_whole  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
FIGURES = {  # row of the table: kind of feedback, and where `summarise` of evaluate.py has the figure
    "solved within turn 1": ("true", "solved_by_turn", 0),
    "solved within turn 2": ("true", "solved_by_turn", 1),
    "solved within turn 3": ("true", "solved_by_turn", 2),
    "solved within turn 3, random feedback": ("random", "solved_by_turn", 2),
    "responses after feedback that repeat the one before": ("true", "repeats"),
    "pass the public test": ("true", "public_passed"),
    "of these wrong (false positives)": ("true", "false_positives"),
    "solved: rule and frame met in RL": ("true", "by_group", "seen"),
    "solved: new combination of the two": ("true", "by_group", "new combination"),
    "solved: rule never met in RL": ("true", "by_group", "new rule"),
    "solved: told by the statement": ("true", "by_group", "told"),
}


def figures(result: dict, wanted: dict[str, tuple] = FIGURES) -> dict[str, float]:
    """The wanted figures of a policy. Args: result: its summaries by feedback, as in `result.json`."""
    found = {}
    for name, keys in wanted.items():
        value = result
        for key in keys:
            value = value[key]
        found[name] = round(value, 6)
    return found


def table(runs: dict[str, dict]) -> str:
    """The figures of all seeds as Markdown."""
    lines = [f"| | before | after, seeds {', '.join(runs)} | mean |", "|---|---|---|---|"]
    for name in FIGURES:
        before, after = ([run[when][name] for run in runs.values()] for when in ("before", "after"))
        cells = [f"{mean(before):.3f}", ", ".join(f"{value:.3f}" for value in after), f"{mean(after):.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in sys.argv[1:] or ("0", "1", "2"):
        output = ROOT / "runs" / f"toy-{seed}"
        if seed not in runs:
            if not (output / "result.json").exists():
                command = [sys.executable, "train.py", "--seed", seed, "--output", str(output)]
                subprocess.run(command, cwd=ROOT, check=True)
            result = json.loads((output / "result.json").read_text())
            runs[seed] = {when: figures(result[when]) for when in ("before", "after")}
            write_whole(RESULTS, json.dumps(dict(sorted(runs.items())), indent=1))
    print(table(dict(sorted(runs.items()))))
