"""The curves that `--effect` of the exercises shows: `python benchmarks/exercise_curves.py [--jobs 2]`.

Trains the toy world with our functions and with the typical wrong answers that the exercises are about, three
seeds each, a process a run and one thread a process; and with the changes of two of the open exercises. It
writes `exercises/curves.json` after each run: the shares of training episodes solved by iteration, and a
fingerprint of the code. Call it again after a stop: what the same code has recorded is kept. After a change
that gives other numbers everything is recorded anew.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from unittest.mock import patch

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "exercises")]
import episodes  # noqa: E402
import ppo  # noqa: E402
import toy  # noqa: E402
import train as loop  # noqa: E402
from checkpoints import write_whole  # noqa: E402
from config import Config  # noqa: E402
from tools import plots  # noqa: E402

SEEDS, LAST = (0, 1, 2), 3  # the last iterations decide whether an effect is visible
# Shorter than the main run: two turns, half as many episodes, twice the learning rate.
SETTINGS = dict(iterations=8, batch_episodes=128, minibatch_episodes=32, turn_limit=2, warmup_updates=4)
SETTINGS |= dict(learning_rate=1e-3, value_learning_rate=1e-3, device="cpu")
UNWATCHED = dict(valid_split="", test_split="", checkpoint_every=1000, show_every=1000)
CURVES = ROOT / "exercises" / "curves.json"
BASE, BASE_OF_FIVE = ROOT / "runs" / "toy-base", ROOT / "runs" / "toy-base-5"
# Of each exercise the mistakes that have a stored curve. Two cannot differ from ours on the toy world, where
# no response is truncated and no test is an assert: "truncated given an end", "passed tests left out".
RECORDED = {
    "e1_tokens": ("feedback too", "end token lost", "off by one"),
    "e2_returns": (
        *("leak over episodes", "-0.2 on the last turn too", "reward on every turn", "KL left out"),
        "public tests only",
    ),
    "e3_kl": ("product", "one mean over the batch", "sign", "masked tokens in the mean"),
    "e4_critic": ("first token", "last token of the response", "a value a token", "unclipped"),
    "e5_policy_loss": ("ratio always 1", "gradient through w", "clip on one side", "mean a sequence"),
    "e6_feedback": ("tells private tests", "tells nothing", "another problem's"),
}
MEASURED = ("reward", "return", "kl", "entropy", "policy_loss", "value_loss", "response_tokens")
FIFTH = toy.Family(
    statement="Read three parts and print a text.",
    words=(("123",) * 2, ("456",) * 2, ("789",) * 2),
    separator="/",
    read='a, b, c = input().split("/")',
    rules=tuple(f"t = {x} + {y}" for x in "abc" for y in "abc") + ("t = c + b + a",),
    show="print(t)",
)


def group_baseline() -> dict:
    """Instead of the critic's values: the mean return of the eight rollouts of each problem."""
    drawn, rewards, names = episodes.draw_problems, ppo.turn_rewards, []

    def repeated(problems, iteration, config):
        return [problem for problem in drawn(problems, iteration, config)[::8] for _ in range(8)]

    def remembered(group):
        names.extend(e.problem.name for e in group for _ in e.turns)
        return rewards(group)  # (N,)

    def advantages(returns, values):
        groups, mine = defaultdict(list), names[-len(returns) :]  # before: those of earlier iterations
        for name, value in zip(mine, returns.tolist(), strict=True):
            groups[name].append(value)
        baseline = [sum(groups[name]) / len(groups[name]) for name in mine]
        return ppo.normalise(returns - torch.tensor(baseline))  # (N,)

    ppo.turn_rewards, ppo.advantages, episodes.draw_problems = remembered, advantages, repeated
    return {}


def changed(name: str) -> dict:
    """Make the change that a run is about. Returns: the settings that it needs."""
    exercise, _, mistake = name.partition(": ")
    if name == "ours":
        return {}
    if name == "open: group baseline":
        return group_baseline()
    if name == "open: fifth family":
        toy.FAMILIES += (FIFTH,)
        return {"model": str(BASE_OF_FIVE)}
    module = import_module(exercise)
    if exercise == "e6_feedback":
        return module.install(module.WRONG[mistake])
    return module.install(*[task.wrong.get(mistake, task.ours) for task in module.TASKS.values()])


Curves = dict[str, list[list[float]]]  # by name: a curve for each seed


def trained(changes: dict, seed: int, output: Path | None = None) -> list[float]:
    """Train the toy world; the shares of training episodes solved in each iteration.

    Args: changes: settings of train.py besides SETTINGS; output: the run's directory, if it is to be kept.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = output or Path(directory) / "run"
        settings = SETTINGS | UNWATCHED | {"seed": seed, "output": str(output)} | changes
        if "model" not in settings:  # another world has its own
            settings["model"] = str(toy.start_model(BASE))
        # A wrong function may leave no numbers to show an episode by: no page.
        unseen = {"choose": lambda episodes: [], "page": SimpleNamespace(write=lambda path: None)}
        try:
            with patch.multiple(loop, **unseen):
                loop.train(Config(**settings))
        except FloatingPointError as error:
            print(f"training broke down: {error}")
        return [json.loads(line)["solved"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def stored(exercise: str) -> Curves:
    """The recorded curves of "ours" and of the mistakes of an exercise."""
    runs = json.loads(CURVES.read_text())["runs"] if CURVES.exists() else {}
    chosen = {name.removeprefix(f"{exercise}: "): by_seed for name, by_seed in runs.items()}
    return {name: [*by_seed.values()] for name, by_seed in chosen.items() if ":" not in name}


def ends(curves: list[list[float]]) -> list[float]:
    """The mean over the last iterations, of each seed; 0 for a training that broke down."""
    return [mean(curve[-LAST:]) if len(curve) == SETTINGS["iterations"] else 0.0 for curve in curves]


def effect(wrong: list[list[float]], ours: list[list[float]]) -> str:
    """Whether a mistake has a visible effect: all its seeds end below all of ours, or all above."""
    if min(len(wrong), len(ours)) < len(SEEDS):
        return f"not known: it takes {len(SEEDS)} seeds"
    below, above = max(ends(wrong)) < min(ends(ours)), min(ends(wrong)) > max(ends(ours))
    return "visible" if below or above else "not visible"


def show_effect(exercise: str, changes: dict) -> None:
    """Train with a student's functions, which are installed; show the curve beside the stored ones."""
    known = stored(exercise)
    curves = {"yours": [trained(changes, seed=0)]} | known
    print("\nShare of training episodes solved by iteration, mean over the seeds:")
    for name, runs in curves.items():
        print(f"{name:<28}" + " ".join(f"{mean(column):.2f}" for column in zip(*runs, strict=False)))
    for name in known.keys() - {"ours"}:
        print(f"The effect of “{name}”: {effect(known[name], known['ours'])} (reasons: exercises/README.md).")
    draw(exercise, curves)


def table(runs: dict[str, dict[str, list[float]]]) -> str:
    """exercises/effects.md: what is stored, in words and numbers."""
    curves = {name: [*by_seed.values()] for name, by_seed in runs.items()}
    lines = [
        f"Share of training episodes solved, last {LAST} of {SETTINGS['iterations']} iterations, for each",
        "seed. Recorded by `python benchmarks/exercise_curves.py`.",
        "",
        "| exercise | mistake | seeds | effect |",
        "|---|---|---|---|",
    ]
    for name in sorted(curves, key=lambda name: (name != "ours", name)):
        exercise, _, mistake = name.rpartition(": ")
        cells = ", ".join(f"{end:.2f}" for end in ends(curves[name]))
        told = effect(curves[name], curves["ours"]) if exercise else ""
        if any(len(curve) < SETTINGS["iterations"] for curve in curves[name]):
            told += "; training broke down"
        lines.append(f"| {exercise} | {mistake} | {cells} | {told} |")
    return "\n".join(lines) + "\n"


def draw(exercise: str, curves: Curves) -> None:
    """`runs/EXERCISE.png`: means and the bands of the seeds, where matplotlib is installed."""
    path = ROOT / "runs" / f"{exercise}.png"
    if not plots.installed(path.name):
        return
    figure, axis = plots.pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, runs) in enumerate(curves.items()):
        rows = list(zip(*runs, strict=False))
        places, style = range(1, len(rows) + 1), "-" if number < 2 else "--"
        (line,) = axis.plot(places, [mean(row) for row in rows], style, label=name)
        axis.fill_between(places, [*map(min, rows)], [*map(max, rows)], color=line.get_color(), alpha=0.12)
    axis.set(xlabel="iteration", ylabel="share of training episodes solved", title="bands: the seeds")
    figure.legend(loc="outside right center")
    figure.savefig(path)
    print(f"picture: {path.relative_to(ROOT)}")


def record(name: str, seed: int, path: Path) -> None:
    """Train once, and write the shares solved by iteration, and the seconds of CPU time, to `path`."""
    torch.set_num_threads(1)
    began = time.process_time()
    solved = [round(share, 4) for share in trained(changed(name), seed)]
    write_whole(path, json.dumps({"solved": solved, "seconds": time.process_time() - began}))


def fingerprint(directory: Path) -> dict[str, float]:
    """What a short training of a tiny random model measures: another code gives other numbers."""
    from conftest import make_model

    tokenizer = toy.build_tokenizer()
    model = make_model(len(tokenizer), end=tokenizer.eos_token_id)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    short = dict(iterations=2, batch_episodes=8, minibatch_episodes=8, max_new_tokens=12, context=600)
    trained({"model": str(directory / "model")} | short, 0, directory / "run")
    last = json.loads((directory / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: round(last[name], 6) for name in MEASURED}


def same_code(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two fingerprints agree, but for what machines round differently."""
    near = [abs(one[name] - other.get(name, math.inf)) <= 1e-4 + 0.02 * abs(one[name]) for name in one]
    return one.keys() == other.keys() and all(near)


def write(about: dict, runs: dict[str, dict[str, list[float]]]) -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs)]
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
    write_whole(CURVES, f'{{{head},\n"runs": {{\n' + ",\n".join(lines) + "\n}}\n")
    write_whole(CURVES.with_name("effects.md"), table(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", default="", help="record only runs whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="record only these seeds")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SEED", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return record(given.one[0], int(given.one[1]), Path(given.one[2]))
    toy.start_model(BASE)
    with tempfile.TemporaryDirectory() as directory:
        about = {"settings": SETTINGS, "fingerprint": fingerprint(Path(directory))}
    runs = defaultdict(dict)
    if CURVES.exists():
        old = json.loads(CURVES.read_text())
        if old["settings"] == SETTINGS and same_code(old["fingerprint"], about["fingerprint"]):
            runs |= old["runs"]
        else:
            print(f"{CURVES.name} is of another code: all is recorded anew")
    names = ["ours", *(f"{exercise}: {mistake}" for exercise, of in RECORDED.items() for mistake in of)]
    names += ["open: group baseline", "open: fifth family"]
    chosen = [name for name in names if given.only in name or name == "ours"]  # all are compared with ours
    todo = [(name, seed) for seed in given.seeds for name in chosen if str(seed) not in runs[name]]
    if any(name == "open: fifth family" for name, _ in todo):
        four, toy.FAMILIES = toy.FAMILIES, (*toy.FAMILIES, FIFTH)
        toy.ensure_base(BASE_OF_FIVE)
        toy.FAMILIES = four
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def run(name: str, seed: int, directory: str) -> tuple[str, int, dict]:
        path = Path(directory) / f"{name.replace(' ', '-')}-{seed}.json"
        command = [sys.executable, __file__, "--one", name, str(seed), str(path)]
        done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed}\n{done.stderr[-3000:]}")
        return name, seed, json.loads(path.read_text())

    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(given.jobs) as pool:
        futures = [pool.submit(run, *job, directory) for job in todo]
        for future in tqdm(as_completed(futures), desc="curves", unit="run", total=len(futures)):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            name, seed, result = future.result()
            runs[name][str(seed)] = result["solved"]
            write(about, runs)
            tqdm.write(
                f"{name}, seed {seed}: {result['solved'][-1]:.2f} solved, {result['seconds']:.0f} s of CPU"
            )


if __name__ == "__main__":
    main()
