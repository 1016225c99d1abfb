"""RLEF on a small pretrained model and real problems: SmolLM2-135M-Instruct on MBPP+.

    python benchmarks/real_model.py MODEL PROBLEMS --device cuda

MODEL is a Hugging Face directory (docs/gguf.md says how it is made), PROBLEMS a folder with
train.jsonl.gz and valid.jsonl.gz, 238 and 40 problems. Two runs get about as many samples: RLEF with three
turns, and RL in a single turn. Before training and after it, each policy is evaluated on the 40 problems,
five rollouts each, with true, random and no feedback. What has ended is not repeated. The figures go to
`real_model.json` beside this file, and the table is printed as Markdown.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import main_run  # noqa: E402
from checkpoints import write_whole  # noqa: E402
from rollout import FEEDBACK  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
LENGTHS = ["--max_new_tokens", "160", "--context", "2048"]
SHARED = """--dtype bfloat16 --temperature 0.7 --learning_rate 2e-5 --value_learning_rate 5e-5
    --warmup_updates 4 --microbatch_tokens 16384 --test_split= --evaluate_every 3 --evaluation_rollouts 5
    --checkpoint_every 100 --show_every 100""".split()
RUNS = {  # the flags in which the runs differ
    "RLEF": "--turn_limit 3 --batch_episodes 384 --minibatch_episodes 128 --batch_rows 384",
    "single turn": "--turn_limit 1 --batch_episodes 1024 --minibatch_episodes 256 --batch_rows 512",
}
FIGURES = {  # row of the table: kind of feedback, and where a summary of evaluate.py has the figure
    "solved within turn 1": ("true", "solved_by_turn", 0),
    "solved within turn 2": ("true", "solved_by_turn", 1),
    "solved within turn 3": ("true", "solved_by_turn", 2),
    "solved within turn 3, random feedback": ("random", "solved_by_turn", 2),
    "solved within turn 3, no feedback": ("none", "solved_by_turn", 2),
    "1@3, true feedback": ("true", "measures", "1@3", 0),
    "its standard error over problems": ("true", "measures", "1@3", 1),
    "solved of those whose first answer failed": ("true", "recovered"),
    "no valid code": ("true", "invalid_code"),
    "cut at the length limit": ("true", "truncated_responses"),
    "repeats after feedback": ("true", "repeats"),
    "chrF between turns": ("true", "chrf"),
    "pass the public tests": ("true", "public_passed"),
    "of these wrong (false positives)": ("true", "false_positives"),
    "tokens of all responses": ("true", "generated_tokens"),
}


def evaluation(model: str, feedback: str, output: Path, options: argparse.Namespace) -> list[str]:
    """The command that evaluates a policy."""
    words = [sys.executable, "evaluate.py", "--model", model, "--problems", options.problems]
    words += ["--split", "valid"]
    words += ["--feedback", feedback, "--rollouts", "5", "--turn_limits", "3", "--report", "1@3", *LENGTHS]
    return [*words, "--dtype", "bfloat16", "--device", options.device, "--output", str(output)]


def run(commands: Sequence[tuple[list[str], Path]], jobs: int) -> None:
    """Run the commands whose file is not there yet, `jobs` at a time. Raises: CalledProcessError."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(subprocess.run, w, cwd=ROOT, check=True) for w, made in commands if not made.exists()
        ]
        for done in waiting:
            done.result()


def summaries(place: Path) -> dict[str, dict]:
    """The summaries of a policy by feedback. Args: place: the directory of its evaluations."""
    read = {kind: json.loads((place / kind / "summary.json").read_text()) for kind in FEEDBACK}
    return {kind: summary for kind, of_run in read.items() for summary in of_run.values()}


def curve(run: Path) -> list[dict]:
    """What a run logged of each iteration, without what belongs to single updates."""
    names = (
        "iteration solved_by_turn invalid_code truncated_responses repeats response_tokens false_positives kl"
    )
    names += " entropy first_ratio_worst behaviour_gap clip_fraction valid_solved seconds"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in names.split() if name in row} for row in rows]


def table(results: dict[str, dict]) -> str:
    """The figures of all policies as Markdown."""
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for name in FIGURES:
        values = [policy["figures"][name] for policy in results.values()]
        lines.append(
            f"| {name} | " + " | ".join(f"{v:.0f}" if v > 100 else f"{v:.3f}" for v in values) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("problems")
    add("--device", default="cuda")
    add("--iterations", default="8")
    add("--jobs", type=int, default=2, help="commands at a time; two need 80 GB")
    add("--output", type=Path, default=ROOT / "runs" / "real_model")
    options = parser.parse_args()
    runs, commands = {name: options.output / name.replace(" ", "-") for name in RUNS}, []
    for name, place in runs.items():
        words = [sys.executable, "train.py", "--model", options.model, "--problems", options.problems]
        words += ["--device", options.device, "--iterations", options.iterations, "--output", str(place)]
        commands.append(([*words, *SHARED, *LENGTHS, *RUNS[name].split()], place / "result.json"))
    places = {"before": options.output / "before"}
    for kind in FEEDBACK:
        place = places["before"] / kind
        commands.append((evaluation(options.model, kind, place, options), place / "summary.json"))
    run(commands, options.jobs)
    commands = []
    for name, trained in runs.items():
        places[name] = trained / "after"
        for kind in FEEDBACK:
            place = places[name] / kind
            commands.append((evaluation(str(trained / "best"), kind, place, options), place / "summary.json"))
    run(commands, options.jobs)
    results = {
        name: {"figures": main_run.figures(summaries(place), FIGURES)} for name, place in places.items()
    }
    for name, trained in runs.items():
        results[name]["curve"] = curve(trained)
    write_whole(RESULTS, json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
