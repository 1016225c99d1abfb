"""Evaluation: sample rollouts of every problem, and compute the paper's measures.

    python evaluate.py --model runs/toy/best --problems toy --split test
    python evaluate.py --model DIR --feedback true random   # does the model read its feedback?
    python evaluate.py --model DIR --turn_limits 1 3 5 10   # figure 4, and single-turn, with as many samples
    python evaluate.py --compare RUN_A RUN_B                # paired differences, no model needed

Paper: n@k in section 3.1, behaviour in figures 3 and 4. A sample is one response: a rollout with turn limit L
counts as L samples, so n@k draws floor(k / L) rollouts. The directory of a run has `episodes.jsonl` (one
*record* per line; all measures are pure functions of records), `settings.json` (what was sampled),
`summary.json` and, with matplotlib, the pictures of `tools/plots.py`. Calling it again continues a run that
was stopped, with the same result (another --batch_rows changes rounding), because a rollout's noise depends
on (seed, index) only.

Differs: standard errors are over problems, and random feedback comes from problems of the same split. Not
here: several devices.
"""

import argparse
import csv
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise, product
from math import comb
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chat import Chat, read_examples
from checkpoints import write_whole
from data import first_message
from distributed import check_device, friendly_errors, load_config, load_model, load_tokenizer
from rollout import FEEDBACK, Episode, RolloutSettings, fitting, rollout, too_long
from sampling import check_architecture, check_logits, within_positions
from sandbox import Sandbox, Verdict
from sources import load_problems
from tools import plan, plots

PAPER = Path(__file__).parent / "benchmarks" / "paper.csv"
COMPARED = "public_passed solved recovered repeats chrf false_positives solved_per_1000_tokens".split()
OUTCOMES = ("no valid code", *(verdict.value for verdict in Verdict if verdict != Verdict.PASSED), "passed")


def n_at_k(rollouts: int, public_passed: int, solved: int, n: int, draws: int) -> float:
    """Probability that one of n submissions is right, in closed form (paper section 3.1).

    `draws` rollouts are drawn without replacement; n of those that pass the public tests are submitted, fewer
    if fewer pass. The number that pass is hypergeometric; each set of n passing rollouts is equally likely.
    """
    chance = 0.0
    for passing in range(max(0, draws - rollouts + public_passed), min(public_passed, draws) + 1):
        ways = comb(public_passed, passing) * comb(rollouts - public_passed, draws - passing)
        submitted = min(n, passing)
        none_right = comb(public_passed - solved, submitted) / comb(public_passed, submitted)
        chance += ways / comb(rollouts, draws) * (1 - none_right)
    return chance


def pass_at_k(rollouts: int, solved: int, k: int) -> float:
    """Probability that one of k rollouts, drawn without replacement, is right (Chen et al. 2021)."""
    return 1 - comb(rollouts - solved, k) / comb(rollouts, k)


def rollouts_drawn(measure: str, turn_limit: int, available: int) -> int:
    """How many rollouts of a problem "n@k" or "pass@k" draws. Raises: ValueError if not 1 to `available`."""
    match = re.fullmatch(r"([1-9]\d*|pass)@([1-9]\d*)", measure)
    if not match or (match[1] != "pass" and int(match[1]) > int(match[2])):
        raise ValueError(f"{measure!r} is not a measure: write n@k with n at most k, or pass@k")
    draws = int(match[2]) if match[1] == "pass" else int(match[2]) // turn_limit
    if not 1 <= draws <= available:
        needed = f"{draws} rollouts a problem" if draws else f"at least {turn_limit} samples"
        raise ValueError(f"{measure} at turn limit {turn_limit} needs {needed}, but has {available} rollouts")
    return draws


def problem_scores(records: Sequence[dict], measure: str, turn_limit: int) -> dict[str, float]:
    """Each problem's estimate of "n@k" or "pass@k"."""
    counts = defaultdict(Counter)
    for entry in records:
        counts[entry["problem"]].update(all=1, passed=entry["public_passed"], solved=entry["solved"])
    draws = rollouts_drawn(measure, turn_limit, min((c["all"] for c in counts.values()), default=0))
    if measure.startswith("pass"):
        return {name: pass_at_k(c["all"], c["solved"], draws) for name, c in counts.items()}
    n = int(measure.split("@")[0])
    return {name: n_at_k(c["all"], c["passed"], c["solved"], n, draws) for name, c in counts.items()}


def standard_error(scores: Sequence[float]) -> float:
    """Standard error of the mean over problems: what a bootstrap of the problems converges to."""
    return float(np.std(scores) / len(scores) ** 0.5)


def chrf(hypothesis: str, reference: str) -> float:
    """chrF (Popović 2015), 0 to 100: F-score (beta 2) of mean n-gram precision and recall, n = 1..6.

    White space is removed. Orders longer than either text are left out, which is sacrebleu's effective order.
    """
    sides = ["".join(hypothesis.split()), "".join(reference.split())]
    precisions, recalls = [], []
    for n in range(1, min(6, *map(len, sides)) + 1):
        ours, theirs = (Counter(side[i : i + n] for i in range(len(side) - n + 1)) for side in sides)
        precisions.append((ours & theirs).total() / ours.total())
        recalls.append((ours & theirs).total() / theirs.total())
    precision, recall = _mean(precisions), _mean(recalls)
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision else 0.0


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def record(episode: Episode) -> dict:
    """An episode as the dict in `episodes.jsonl`."""
    dialog = [{"role": "user", "content": first_message(episode.problem)}]
    for turn in episode.turns:
        dialog.append({"role": "assistant", "content": turn.text})
        dialog += [{"role": "user", "content": turn.feedback}] if turn.feedback else []
    of_turn = ("outcome", "code", "truncated", "sandbox_seconds")
    return {name: getattr(episode, name) for name in ("index", "public_passed", "solved", "truncated")} | {
        "problem": episode.problem.name,
        "group": episode.problem.group,
        "ids": len(episode.ids),
        "turns": [
            {name: getattr(t, name) for name in of_turn} | {"tokens": t.end - t.start} for t in episode.turns
        ],
        "dialog": dialog,
    }


def dialog_statistics(records: Sequence[dict], turn_limit: int) -> dict:
    """What training logs about the sampled dialogs: shares of the rollouts, or of the responses.

    `repeats` is the share of the responses after feedback that have the same text as the one before,
    `false_positives` the share not solved of the rollouts that pass the public tests.
    """
    turns = [turn for entry in records for turn in entry["turns"]]
    texts = [[message["content"] for message in entry["dialog"][1::2]] for entry in records]
    return {
        "solved": _mean(entry["solved"] for entry in records),
        "solved_by_turn": [
            _mean(entry["solved"] and len(entry["turns"]) <= limit for entry in records)
            for limit in range(1, turn_limit + 1)
        ],
        "public_passed": _mean(entry["public_passed"] for entry in records),
        "false_positives": _mean(not entry["solved"] for entry in records if entry["public_passed"]),
        "invalid_code": _mean(turn["code"] is None for turn in turns),
        "truncated_responses": _mean(turn["truncated"] for turn in turns),
        "truncated_dialogs": _mean(entry["truncated"] for entry in records),
        "repeats": _mean(before == after for dialog in texts for before, after in pairwise(dialog)),
        "response_tokens": _mean(turn["tokens"] for turn in turns),
    }


def summarise(records: Sequence[dict], turn_limit: int) -> dict:
    """All statistics of some rollouts, as plain JSON: `dialog_statistics` and more.

    `outcomes`, `transitions` (from one response to the next) and `chrf_histogram` (ten bins) are counts.
    `recovered` is the share solved of the rollouts whose first response failed.
    """
    turns = [turn for entry in records for turn in entry["turns"]]
    pairs = [pair for entry in records for pair in pairwise(entry["turns"])]
    by_turn = [[e["turns"][t] for e in records if t < len(e["turns"])] for t in range(turn_limit)]
    outcomes = [Counter(turn["outcome"] for turn in same_turn) for same_turn in by_turn]
    transitions = Counter((before["outcome"], after["outcome"]) for before, after in pairs)
    similarity = [chrf(b["code"], a["code"]) for a, b in pairs if a["code"] and b["code"]]
    tokens = sum(turn["tokens"] for turn in turns)
    groups = sorted({entry["group"] for entry in records})
    return dialog_statistics(records, turn_limit) | {
        "rollouts": len(records),
        "by_group": {group: _mean(e["solved"] for e in records if e["group"] == group) for group in groups},
        "outcomes": {f"turn {t}": {kind: of[kind] for kind in OUTCOMES} for t, of in enumerate(outcomes, 1)},
        "transitions": {a: {b: transitions[a, b] for b in OUTCOMES} for a in OUTCOMES[:-1]},
        "recovered": _mean(e["solved"] for e in records if e["turns"][0]["outcome"] != "passed"),
        "chrf": _mean(similarity),
        "chrf_histogram": np.histogram(similarity, bins=10, range=(0, 100))[0].tolist(),
        "response_tokens": [_mean(turn["tokens"] for turn in same_turn) for same_turn in by_turn],
        "generated_tokens": tokens,
        "prompt_tokens": sum(entry["ids"] for entry in records) - tokens,
        "sandbox_seconds": sum(turn["sandbox_seconds"] for turn in turns),
        "solved_per_1000_tokens": 1000 * sum(entry["solved"] for entry in records) / max(1, tokens),
    }


def read_run(directory: Path) -> tuple[dict, list[dict]]:
    """Settings and records of a run, without a last line that a crash has cut."""
    try:
        lines = (directory / "episodes.jsonl").read_text().split("\n")[:-1]
        settings = {**json.loads((directory / "settings.json").read_text())}
        return settings, [{**json.loads(line)} for line in lines]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{directory} is no run of evaluate.py that can be read: {error}") from error


def _sample(model, chat, problems, sandbox, settings, rollouts, about, directory, others) -> list[dict]:
    """Records of `rollouts` rollouts per problem; continues the run `about` if it is in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    path, records = directory / "episodes.jsonl", []
    if path.exists():
        old, records = read_run(directory)
        fixed = [key for key in about if key != "batch_rows"]  # where memory is short, fewer go on
        other = [f"{key} {old.get(key)!r}, now {about[key]!r}" for key in fixed if old.get(key) != about[key]]
        if records and other:
            raise ValueError(f"{directory} holds rollouts with {'; '.join(other)}: give another --output")
    schedule, chunk = list(problems) * rollouts, 2 * settings.batch_rows
    planned = {"episodes": max(len(schedule), len(records))}
    write_whole(directory / "settings.json", json.dumps(about | planned, indent=1))
    if len(records) < len(schedule):
        # Logits depend on the other rows of a batch by rounding, so an unfinished chunk is sampled again.
        records = records[: len(records) // chunk * chunk]
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in records))
    bar = tqdm(total=len(schedule), initial=len(records), desc=directory.name, unit="rollout")
    for start in range(len(records), len(schedule), chunk):
        batch = schedule[start : start + chunk]
        episodes = rollout(model, chat, batch, sandbox, settings, about["seed"], start, True, others)
        records += map(record, episodes)
        with path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in records[start:])
        bar.update(len(batch))
        bar.set_postfix_str(f"solved {_mean(entry['solved'] for entry in records):.3f}")
    bar.close()
    return records[: len(schedule)]


def sample_runs(args: argparse.Namespace) -> dict[str, tuple[dict, list[dict]]]:
    """Settings and records of a run for each feedback, turn limit and temperature in the flags."""
    check_device(args.device)
    if min(args.rollouts, *args.turn_limits) < 1:
        raise ValueError(
            f"--rollouts {args.rollouts} and --turn_limits {args.turn_limits} must be at least 1"
        )
    samples = args.rollouts * max(args.turn_limits)
    for measure, limit in product(args.report, args.turn_limits):
        rollouts_drawn(measure, limit, samples // limit)
    usual = {0.2 if measure.startswith("1@") or measure == "pass@1" else 1.0 for measure in args.report}
    variants = list(product(args.feedback, args.turn_limits, args.temperature or sorted(usual)))
    chat = Chat(load_tokenizer(args.model, args.chat_template), args.template_options)
    split = load_problems(args.problems, args.split, args.holdout)
    problems = list(split[: args.limit_problems or None])
    config = load_config(args.model)
    context = within_positions(config, args.context)
    check_architecture(config, context)
    model = load_model(args.model, args.device, args.dtype, args.attention)
    check_logits(model.requires_grad_(False), len(chat.tokenizer), context)
    args.batch_rows = plan.rows_that_fit(model, context, args.batch_rows)
    given = {name: getattr(args, name) for name in ("top_p", "batch_rows", "examples")}
    new = args.max_new_tokens or context // 8
    shared = RolloutSettings(max_new_tokens=new, context=context, **given)
    places = fitting(problems, chat, shared)
    if len(places) < len(problems):
        message = too_long(problems, places, "problems", shared)
        raise ValueError(f"{message}: raise --context or lower --max_new_tokens")
    weights = 0  # a checksum, so that a retrained model does not continue the run of the old one
    for parameter in model.parameters():
        weights = zlib.crc32(parameter.detach().cpu().flatten().view(torch.uint8).numpy(), weights)
    tests = zlib.crc32(repr((problems, read_examples(args.examples))).encode())
    flags = "model problems split limit_problems chat_template template_options seed".split()
    sampled = {flag: getattr(args, flag) for flag in flags} | {"weights": weights, "tests": tests}
    runs = {}
    with Sandbox() as sandbox:
        for feedback, limit, temperature in variants:
            settings = replace(shared, feedback=feedback, turn_limit=limit, temperature=temperature)
            about = sampled | asdict(settings)
            place = Path(args.output) / (plots.RUN_NAME.format(**about) if len(variants) > 1 else "")
            records = _sample(model, chat, problems, sandbox, settings, samples // limit, about, place, split)
            runs[plots.in_words(about)] = (about, records)
    return runs


def compare(runs: dict[str, tuple[dict, list]], measures: Sequence[str]) -> tuple[dict, dict]:
    """Summaries by name; rows of a table: runs, paired differences from the first, the paper's results."""
    summaries, rows, scores, first = {}, {}, {}, next(iter(runs))
    for name, (about, records) in runs.items():
        scores[name] = {m: problem_scores(records, m, about["turn_limit"]) for m in measures}
        estimates = {m: (_mean(s.values()), standard_error([*s.values()])) for m, s in scores[name].items()}
        summary = summarise(records, about["turn_limit"])
        summaries[name] = {"settings": about, "measures": estimates, **summary}
        rows[name] = {m: f"{value:.3f} ±{error:.3f}" for m, (value, error) in estimates.items()}
        rows[name] |= {key.replace("_", " "): f"{summary[key]:.3f}" for key in COMPARED}
    for name in list(runs)[1:]:
        shared = sorted(scores[name][measures[0]].keys() & scores[first][measures[0]].keys())
        if not shared:
            raise ValueError(f"{name} and {first} have no problem in common")
        gaps = {m: [scores[name][m][p] - scores[first][m][p] for p in shared] for m in measures}
        row = {m: f"{_mean(gap):+.3f} ±{standard_error(gap):.3f}" for m, gap in gaps.items()}
        rows[f"{name} less {first}, {len(shared)} problems"] = row
    return summaries, rows | paper_rows(runs[first][0]["problems"], runs[first][0]["split"])


def paper_rows(problems: str, split: str) -> dict[str, dict[str, str]]:
    """The paper's results on these problems (tables 1 to 3 and 4b) by model and measure."""
    # The name of a set, of its repository on the hub and of its files differ in "_", "-" and capitals.
    source, rows = re.sub("[^a-z]", "", problems.lower()), {}
    for results in csv.DictReader(PAPER.read_text().splitlines()):
        model = results.pop("model")
        for column, percent in results.items():
            name, measure, *only_split = column.split()
            if percent and name in source and only_split in ([], [split]):
                rows.setdefault(model, {})[measure] = f"{float(percent) / 100:.3f}"
    return rows


def table(rows: dict[str, dict]) -> str:
    """Rows of named cells as aligned text, without the rows and columns that are 0 or empty throughout."""
    rows = {name: row for name, row in rows.items() if any(row.values())}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns = [name for name in names if any(row.get(name) for row in rows.values())]
    lines = [[name, *(str(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    lines.insert(0, ["", *columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def before_and_after(before: dict, after: dict) -> str:
    """The table of a training run: `summarise` with "true" and "random" feedback, before and after."""
    rows: dict[str, dict] = defaultdict(dict)
    for when, result in {"before": before, "after": after}.items():
        true, random = result["true"], result["random"]
        figures = {f"solved within turn {t}": share for t, share in enumerate(true["solved_by_turn"], 1)}
        figures |= {"solved, random feedback": random["solved"]}
        figures |= {"true minus random": true["solved"] - random["solved"]}
        figures |= {"repeats after feedback": true["repeats"], "false positives": true["false_positives"]}
        figures |= {f"solved: {group or 'all'}": share for group, share in true["by_group"].items()}
        for name, figure in figures.items():
            rows[name][when] = f"{figure:.3f}"
    return table(rows)


def main() -> None:
    """The command line: sample runs, or read the runs to compare; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="runs/toy/best", help="Hugging Face directory or hub name")
    add("--problems", default="toy", help="toy, code_contests, humaneval_plus, mbpp_plus, or a file")
    add("--split", default="test")
    add("--holdout", type=float, default=0.0, help="that of the training run, for a file of problems")
    add("--compare", nargs="+", metavar="RUN", help="compare the runs in these directories, sample nothing")
    add("--output", default="runs/evaluation", help="directory of the run, or above several runs")
    add("--report", nargs="+", help="such as 1@3 10@100 pass@10 (default: 1@L of the longest turn limit L)")
    add("--rollouts", type=int, default=20, help="per problem at the longest turn limit; else equal samples")
    add("--turn_limits", type=int, nargs="+", default=[3], help="maximum number of responses in a rollout")
    add("--feedback", nargs="+", default=["true"], choices=FEEDBACK)
    add("--temperature", type=float, nargs="+", help="default: the paper's, 0.2 for 1@k and pass@1, else 1.0")
    add("--top_p", type=float, default=0.95)
    add("--max_new_tokens", type=int, default=0, help="per response (default: an eighth of the context)")
    add("--context", type=int, default=8192, help="tokens of a dialog, at most the model's own limit")
    add("--batch_rows", type=int, default=256, help="dialogs sampled at once, fewer where memory is short")
    add("--limit_problems", type=int, default=0, help="use the first problems only, this many")
    add("--examples", default="", help="JSON list of chat messages before every dialog (few-shot)")
    add("--chat_template", default="", help="file with a chat template, for models that have none")
    add("--template_options", default="", help="JSON object of options for the chat template")
    add("--dtype", default="auto", help="number type of the computation (default: the checkpoint's)")
    add("--attention", default="", help="transformers' attention, sdpa or eager (default: what it chooses)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.report = args.report or [f"1@{max(args.turn_limits)}"]
    runs = {name: read_run(Path(name)) for name in args.compare} if args.compare else sample_runs(args)
    if args.compare and len(runs) < len(args.compare):
        raise ValueError(f"--compare names a run twice: {' '.join(args.compare)}")
    for name, (about, records) in runs.items():
        if len(records) < about.get("episodes", 0):
            raise ValueError(f"{name} has {len(records)} of {about['episodes']} rollouts: finish it first")
    summaries, rows = compare(runs, args.report)
    for name, summary in summaries.items():
        groups = {group or "all": {"solved": f"{share:.3f}"} for group, share in summary["by_group"].items()}
        words = plots.in_words(summary["settings"])
        print(f"\n{name}" if name == words else f"\n{name}: {words}")
        print("\nresponses by turn (row) and outcome", table(summary["outcomes"]), sep="\n")
        print("\noutcome (row) and the next one (column)", table(summary["transitions"]), sep="\n")
        print("\nshare of rollouts solved, by group", table(groups), sep="\n")
    print("\n" + table(rows))
    Path(args.output).mkdir(parents=True, exist_ok=True)
    target = Path(args.output) / ("comparison.json" if args.compare else "summary.json")
    write_whole(target, json.dumps(summaries, indent=1))
    plots.evaluation(summaries, args.report, target.parent)


if __name__ == "__main__":
    with friendly_errors("evaluate.py"):
        main()
