"""The paper's comparisons in miniature, on the toy world: `python benchmarks/ablations.py`, under two hours.

Trains and evaluates each of CONDITIONS with three seeds in `runs/ablations`, two runs at a time with one
thread each. Call it again after a stop: finished runs are kept, unfinished ones continue from their
checkpoints. It writes, in `benchmarks/ablations/`:

    results.json     all figures of every run
    reference.jsonl  the metrics of each training run, one object per iteration
    table.md         means over the seeds, and their standard deviations
    *.png            with matplotlib; `--draw` only draws them from the files above

All conditions start from one warm-started model. As in the paper, the best policy on the valid split is
evaluated on the test split: temperature 0.2, top-p 0.95, 1@3 with a turn limit of three ("repair") and with
three independent first responses ("single turn"), with true, random and no feedback.

Differs from the paper's ablations: few-shot examples and SFT come from the start model's own solved rollouts
on the training set, and without feedback a dialog still ends when the public tests pass. README.md
in this directory has the results.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402
from checkpoints import write_whole  # noqa: E402
from evaluate import problem_scores, read_run, summarise  # noqa: E402
from tools import plots  # noqa: E402

RUNS, RESULTS = ROOT / "runs" / "ablations", ROOT / "benchmarks" / "ablations"
OWN, EXAMPLES = RUNS / "own", RUNS / "examples.json"
SEEDS = range(3)
FEW_SHOT = ["--examples", str(EXAMPLES), "--context", "768"]
CONDITIONS = {  # flags of train.py
    "RLEF": [],
    "no feedback in training": ["--feedback", "none"],
    "random feedback in training": ["--feedback", "random"],
    "token-level values": ["--token_level_values"],
    "single-turn RL": ["--turn_limit", "1"],
    "product KL": ["--product_kl"],
    "beta 0": ["--beta", "0"],
    "few-shot, then RLEF": FEW_SHOT,
    "start": None,  # not trained
    "few-shot": None,
    "SFT": None,
}
TRAINING = "--checkpoint_every 5 --keep_checkpoints 1 --show_every 10".split()
SWEPT = ("RLEF", "start")  # figure 4, with the first seed
MEASURES = {  # column of the table: key of results.json
    "repair": "repair true",
    "random feedback": "repair random",
    "only “try again”": "repair none",
    "single turn": "single turn",
    "recovered": "recovered",
    "repeats": "repeats",
    "false positives": "false_positives",
    "no valid code": "no_valid_code",
    "tokens a response": "response_tokens",
    "KL": "kl",
}


def call(*command: object) -> None:
    """Run one of the project's commands on one thread. Raises: RuntimeError with the end of its errors."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-3000:]}")


def start_model() -> Path:
    return toy.start_model(RUNS / "toy-base")


def prepare() -> None:
    """The start model's rollouts on the training set, and two solved ones as few-shot examples."""
    RUNS.mkdir(parents=True, exist_ok=True)
    if EXAMPLES.exists():
        return
    sampled = ["--rollouts", "4", "--temperature", "1", "--top_p", "1", "--report", "pass@1"]
    call("evaluate.py", "--model", start_model(), "--split", "train", *sampled, *length(512), "--output", OWN)
    solved = [entry for entry in read_run(OWN)[1] if entry["solved"]]
    groups = {entry["dialog"][0]["content"]: entry for entry in solved if len(entry["turns"]) == 2}
    chosen = [message for entry in list(groups.values())[:2] for message in entry["dialog"]]
    write_whole(EXAMPLES, json.dumps(chosen, indent=1))


def directory(condition: str, seed: int) -> Path:
    return RUNS / f"{condition.replace(', ', ' ').replace(' ', '-')}-{seed}"


def length(context: int) -> list[str]:
    return ["--max_new_tokens", "48", "--context", str(context)]


def train_and_evaluate(condition: str, seed: int) -> None:
    """Finish one run, whatever part of it is done already."""
    place = directory(condition, seed)
    model, flags = place / "best", CONDITIONS[condition]
    if flags is not None and not (place / "result.json").exists():
        if any((place / "checkpoints").glob("0*")):
            call("train.py", "--resume", place)
        else:
            same = ["--model", start_model(), "--seed", seed, "--test_split", "", "--output", place]
            call("train.py", *TRAINING, *same, *flags)
    if condition == "SFT" and not model.exists():
        rate = ["--learning_rate", "5e-4", "--seed", seed]
        call("-m", "benchmarks.sft", "--model", start_model(), "--episodes", OWN, *rate, "--output", model)
    model = start_model() if condition in ("start", "few-shot") else model
    shots = FEW_SHOT if condition.startswith("few-shot") else []
    same = ["--model", model, "--seed", seed]
    evaluations = {
        "repair": ["--feedback", "true", "random", "none", "--rollouts", "1", "--report", "1@3"],
        "single": ["--turn_limits", "1", "--rollouts", "3", "--report", "1@3"],
    }
    if condition in SWEPT and not seed:
        evaluations["sweep"] = ["--turn_limits", "1", "3", "5", "10", "--rollouts", "1", "--report", "1@10"]
    for name, flags in evaluations.items():
        if not (place / name / "summary.json").exists():
            context = length(1024 if name == "sweep" else 512)
            call("evaluate.py", *same, *flags, *context, *shots, "--output", place / name)


def figures(condition: str, seed: int) -> dict:
    """The figures of one run."""
    place = directory(condition, seed)
    result = {"condition": condition, "seed": seed}
    for feedback in ("none", "random", "true"):
        _, records = read_run(place / "repair" / f"{feedback}-3-0.2")
        result[f"repair {feedback}"] = float(np.mean([*problem_scores(records, "1@3", 3).values()]))
    result["single turn"] = float(
        np.mean([*problem_scores(read_run(place / "single")[1], "1@3", 1).values()])
    )
    summary = summarise(records, 3)  # true feedback: the last of the three
    kept = "rollouts solved_by_turn by_group recovered repeats false_positives outcomes chrf"
    kept += " chrf_histogram solved_per_1000_tokens truncated_responses"
    result |= {key: summary[key] for key in kept.split()}
    turns = [turn for entry in records for turn in entry["turns"]]
    result["no_valid_code"] = sum(turn["outcome"] == "no valid code" for turn in turns) / len(turns)
    result["response_tokens"] = sum(turn["tokens"] for turn in turns) / len(turns)
    if CONDITIONS[condition] is not None:
        last = (place / "metrics.jsonl").read_text().splitlines()[-1]
        result |= {key: json.loads(last)[key] for key in ("kl", "entropy", "explained_variance")}
    return result


def table(results: list[dict]) -> str:
    """Means over the seeds, and their standard deviation, as Markdown."""
    lines = ["| | " + " | ".join(MEASURES) + " |", "|" + "---|" * (len(MEASURES) + 1)]
    for condition in CONDITIONS:
        runs = [run for run in results if run["condition"] == condition]
        cells = []
        for key in MEASURES.values():
            values = [run[key] for run in runs if key in run]
            digits = 1 if key == "response_tokens" else 3
            spread = f" ±{np.std(values):.{digits}f}" if values else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw() -> None:
    """Draw the pictures from the committed files."""
    if not plots.installed("pictures"):
        return
    results = json.loads((RESULTS / "results.json").read_text())
    log = [json.loads(line) for line in (RESULTS / "reference.jsonl").read_text().splitlines()]
    colours = dict(zip(CONDITIONS, plots.pyplot.colormaps["tab10"].colors, strict=False))
    panels = {"solved": "share of training episodes solved", "repeats": "responses that repeat the last one"}
    panels |= {"kl": "KL to the start, nats a token"}
    figure, axes = plots.pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for condition in dict.fromkeys(entry["condition"] for entry in log):
            runs = [
                [e[key] for e in log if (e["condition"], e["seed"]) == (condition, seed)] for seed in SEEDS
            ]
            curves, places = np.array(runs), range(1, len(runs[0]) + 1)  # (seeds, iterations)
            axis.plot(places, curves.mean(0), color=colours[condition], label=condition)
            axis.fill_between(places, curves.min(0), curves.max(0), color=colours[condition], alpha=0.12)
        axis.set(xlabel="iteration", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle("Training (line: mean of three seeds; shade: from the lowest seed to the highest)")
    figure.savefig(RESULTS / "curves.png", dpi=100)

    figure, axis = plots.pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    bars = {"true": "true feedback", "random": "random feedback", "none": "only “try again”"}
    for number, (feedback, label) in enumerate(bars.items()):
        for place, condition in enumerate(CONDITIONS):
            values = [run[f"repair {feedback}"] for run in results if run["condition"] == condition]
            height = len(CONDITIONS) - place + 0.25 * (1 - number)
            named = label if not place else None
            axis.barh(height, np.mean(values), 0.24, color=f"C{number}", label=named)
            axis.plot(values, [height] * len(values), "k.", markersize=3)
    axis.set(xlabel="test problems solved in three turns (dots: seeds)", xlim=(0, 1))
    axis.set_yticks(range(len(CONDITIONS), 0, -1), CONDITIONS)
    axis.set_title("The same policies with three kinds of feedback")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(RESULTS / "repair.png", dpi=100)

    settings = {"turn_limit": 3, "feedback": "true", "temperature": 0.2}
    first = {run["condition"]: run | {"settings": settings} for run in results if not run["seed"]}
    plots.evaluation({name: first[name] for name in ("start", "SFT", "RLEF")}, [], RESULTS)
    swept = {}
    for name in SWEPT:
        for run in json.loads((RESULTS / f"sweep-{name}.json").read_text()).values():
            # turn_limits draws a curve for each kind of feedback; here we want one for each condition.
            run["settings"]["feedback"] = f"{name}: true"
            swept[f"{name} {run['settings']['turn_limit']}"] = run
    plots.turn_limits(swept, ["1@10"], RESULTS / "turn_limits.png")


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    prepare()
    jobs = [(condition, seed) for seed in SEEDS for condition in CONDITIONS]
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(train_and_evaluate, *job) for job in jobs]
        for future in tqdm(done, desc="ablations", unit="run"):
            future.result()
    results, lines = [figures(*job) for job in jobs], []
    for condition, seed in jobs:
        if CONDITIONS[condition] is not None:
            for line in (directory(condition, seed) / "metrics.jsonl").read_text().splitlines():
                lines.append(json.dumps({"condition": condition, "seed": seed} | json.loads(line)))
    write_whole(RESULTS / "results.json", json.dumps(results, indent=1))
    write_whole(RESULTS / "reference.jsonl", "\n".join(lines) + "\n")
    write_whole(RESULTS / "table.md", table(results))
    for name in SWEPT:
        summary = (directory(name, 0) / "sweep" / "summary.json").read_text()
        write_whole(RESULTS / f"sweep-{name}.json", summary.replace(f"{ROOT}/", ""))
    print(table(results))
    draw()


if __name__ == "__main__":
    draw() if sys.argv[1:] == ["--draw"] else main()
