"""The paper's open questions, on the toy world: `python benchmarks/questions.py [--jobs 2] [--only TEXT]`.

Each of RUNS changes one thing, trains with three seeds, and evaluates the last policy on the test problems:

    feedback      how much of its message, or how often a true one, does the model need?
    reward        why are there private tests? Rewarded by 1, 2, 3 or 5 public tests of 6 only
    difficulty    how many programs fit a statement?
    turn limit    how many answers, in training and in evaluation?
    budget        one dialog of three turns, or independent first answers of as many tokens?

The runs are shorter than the main run (SETTINGS), with one process a run and one thread a process. After each
run its figures go to `questions/results.jsonl`: call this again after a stop, and it goes on. Then it writes
`questions/table.md` and, with matplotlib, pictures: so does questions_report.py alone.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from unittest.mock import patch

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import ppo  # noqa: E402
import rollout  # noqa: E402
import toy  # noqa: E402
import train as loop  # noqa: E402
from benchmarks.questions_report import (  # noqa: E402
    DRAWS,
    LIMITS,
    RESULTS,
    RUNS,
    STARTS,
    read_results,
    report,
)
from checkpoints import write_whole  # noqa: E402
from config import Config  # noqa: E402
from data import Problem  # noqa: E402
from distributed import load_model  # noqa: E402
from evaluate import record, summarise  # noqa: E402
from sandbox import IoTest, Sandbox, Verdict  # noqa: E402

SEEDS = (0, 1, 2)
SETTINGS = dict(iterations=16, batch_episodes=128, minibatch_episodes=32, warmup_updates=4, device="cpu")
SETTINGS |= dict(learning_rate=1e-3, value_learning_rate=1e-3, valid_split="", test_split="")
UNWATCHED = dict(checkpoint_every=1000, show_every=1000)
BASE = ROOT / "runs" / "toy-base"
# A start model whose answers after feedback are right less often, and then learn more slowly.
BASE_READS_LESS, READING, LONGER = ROOT / "runs" / "toy-base-reads-less", 0.12, 28


def public_rewards(episodes: Sequence[rollout.Episode]) -> torch.Tensor:
    """The rewards (N,) of somebody who has no private tests."""
    return ppo_rewards([replace(episode, solved=episode.public_passed) for episode in episodes])


ppo_rewards = ppo.turn_rewards


def verdict_only() -> dict[Verdict, str]:
    return {verdict: template.partition("\n")[0] + "\n" for verdict, template in data.FEEDBACK_TOKENS.items()}


def without_expected() -> dict[Verdict, str]:
    hidden = "Expected output:\n{expected}\n"
    return {verdict: template.replace(hidden, "") for verdict, template in data.FEEDBACK_TOKENS.items()}


def sometimes_random(probability: float):
    """While it is entered, each message of true feedback is about another problem with this probability."""
    start, read = rollout._start_tests, rollout._read_results

    def start_both(dialog, chat, sandbox, settings, others):
        start(dialog, chat, sandbox, replace(settings, feedback="random"), others)

    def read_one(dialog, chat, sandbox, settings):
        kind = "random" if dialog.picks.random() < probability else "true"
        return read(dialog, chat, sandbox, replace(settings, feedback=kind))

    return patch.multiple(rollout, _start_tests=start_both, _read_results=read_one)


def more_tests(public: int, private: int):
    """While it is entered, the toy's problems have so many tests."""
    made = toy.problems

    def problems(split: str) -> list[Problem]:
        return [with_tests(problem, split) for problem in made(split)]

    def with_tests(problem: Problem, split: str) -> Problem:
        family = next(family for family in toy.FAMILIES if problem.statement.startswith(family.statement))
        tests = [*problem.public_tests, *problem.private_tests]
        used = {test.input for test in tests}
        for text in toy.inputs(family, split):
            if len(tests) < public + private and text + "\n" not in used:
                tests.append(IoTest(text + "\n", toy._output(problem.answer, text)))
        return replace(problem, public_tests=tuple(tests[:public]), private_tests=tuple(tests[public:]))

    return patch.object(toy, "problems", problems)


def fewer_programs(marks: int):
    """While it is entered, a program has this number of possible marks before its output and after it."""
    chosen, kinds = toy._programs_of, 2 * marks + 1
    frames = [
        (b, a) for b, a in toy.FRAMES if {*b, *a} <= {*toy.FRAME_BEFORE[:marks], *toy.FRAME_AFTER[:marks]}
    ]

    def programs(family: toy.Family, group: str, lines: int) -> list[str]:
        return chosen(family, group, 3 + lines % kinds)

    return patch.multiple(toy, FRAMES=frames, _programs_of=programs)


def changed(name: str) -> tuple[dict, list, list]:
    """What a run changes: settings of train.py, the world and the reward, and the feedback.

    The last two are lists of context managers. All evaluations take place in the run's world, one of them
    with its feedback.
    """
    settings, world, feedback = {"model": str(toy.start_model(BASE))}, [], []
    words, _, number = name.rpartition(" ")
    if words == "turn limit":
        settings["turn_limit"] = int(number)
    if "reads less" in name:
        settings |= {"model": str(BASE_READS_LESS), "iterations": LONGER}
    if "rewarded by these only" in name:
        world.append(patch.object(ppo, "turn_rewards", public_rewards))
    if found := re.search(r"(\d) of 6 tests", name):
        world.append(more_tests(int(found[1]), 6 - int(found[1])))
    if "programs a statement" in name:
        world.append(fewer_programs({"10": 0, "40": 1}[name.split()[0]]))
    if words == "random with probability":
        feedback.append(sometimes_random(float(number)))
    if name == "verdict only":
        feedback.append(patch.object(data, "FEEDBACK_TOKENS", verdict_only()))
    if name == "without the expected output":
        feedback.append(patch.object(data, "FEEDBACK_TOKENS", without_expected()))
    if name == "each field cut to half":
        half = lambda text, cut: text.strip("\n")[: (len(text.strip("\n")) + 1) // 2]  # noqa: E731
        feedback.append(patch.object(data, "_shorten", half))
    return settings, world, feedback


def evaluated(model: Path, config: Config, seed: int, feedback: str, limit: int, rollouts: int = 1) -> dict:
    """Figures of a policy on the test problems, sampled as train.py's evaluations are."""
    chat, problems = config.chat(), toy.problems("test") * rollouts
    settings = replace(config.eval_sampling(feedback), turn_limit=limit)
    policy = load_model(str(model)).requires_grad_(False)
    began = time.process_time()
    with Sandbox(1) as sandbox:
        others = toy.problems("train")
        episodes = rollout.rollout(policy, chat, problems, sandbox, settings, seed, feedback_problems=others)
    records = [record(episode) for episode in episodes]
    summary = summarise(records, limit)
    kept = "solved solved_by_turn by_group public_passed false_positives repeats recovered generated_tokens"
    told = [entry for entry in records if entry["group"] == "told"]
    count = len(problems) // rollouts
    of_problem = [sum(entry["solved"] for entry in records[n::count]) for n in range(count)]
    return {key: summary[key] for key in kept.split()} | {
        "told_first": mean(entry["solved"] and len(entry["turns"]) == 1 for entry in told),
        "programs": sum(len(entry["turns"]) for entry in records),
        "seconds": round(time.process_time() - began, 1),
        "solved_of_problem": of_problem if rollouts > 1 else [],
    }


def run(name: str, seed: int, path: Path) -> None:
    """Train once and evaluate; the figures go to `path`."""
    torch.set_num_threads(1)
    began, (settings, world, feedback) = time.process_time(), changed(name)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
        for change in world:
            stack.enter_context(change)
        output = Path(directory) / "run"
        common = SETTINGS | UNWATCHED | {"seed": seed, "output": str(output)}
        config = Config(**common | settings)
        unseen = {"choose": lambda episodes: [], "page": SimpleNamespace(write=lambda path: None)}
        with ExitStack() as during, patch.multiple(loop, **unseen):
            for change in feedback:
                during.enter_context(change)
            loop.train(config)
            own = evaluated(output / "best", config, seed, "true", config.turn_limit)
        log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        kept = "solved solved_by_turn public_passed false_positives repeats kl response_tokens".split()
        result = {"run": name, "seed": seed, "training": {key: [entry[key] for entry in log] for key in kept}}
        result |= {"own": own}
        for kind in ("true", "random"):
            result[kind] = evaluated(output / "best", config, seed, kind, config.turn_limit)
        if name in ("ours", *RUNS["turn limit"]):
            result["by_limit"] = {n: evaluated(output / "best", config, seed, "true", n) for n in LIMITS}
        if name in ("ours", "turn limit 1"):
            result["draws"] = evaluated(output / "best", config, seed, "true", 1, DRAWS)
    result["cpu_seconds"] = round(time.process_time() - began)
    write_whole(path, json.dumps(result))


def run_start(name: str, path: Path) -> None:
    """The figures of a start model, which is not trained."""
    torch.set_num_threads(1)
    base = toy.start_model(BASE) if name == "start" else BASE_READS_LESS
    config = Config(model=str(base), device="cpu")
    kinds = {kind: evaluated(base, config, 0, kind, 3) for kind in ("true", "random")}
    limits = {n: evaluated(base, config, 0, "true", n) for n in LIMITS}
    draws = evaluated(base, config, 0, "true", 1, DRAWS)
    result = {"run": name, "seed": 0, "own": kinds["true"]} | kinds | {"by_limit": limits, "draws": draws}
    write_whole(path, json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", default="", help="do only runs whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="do only these seeds")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SEED", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, seed, path = given.one[0], int(given.one[1]), Path(given.one[2])
        return run_start(name, path) if name in STARTS else run(name, seed, path)
    RESULTS.mkdir(exist_ok=True)
    results = read_results()
    toy.start_model(BASE)
    with patch.object(toy, "warm_start_dialog", partial(toy.warm_start_dialog, reading=READING)):
        toy.ensure_base(BASE_READS_LESS)
    done = {(result["run"], result["seed"]) for result in results}
    names = ["ours", *(name for of in RUNS.values() for name in of)]
    todo = [*((name, 0) for name in STARTS), *((name, seed) for seed in given.seeds for name in names)]
    todo = [job for job in todo if job not in done and given.only in job[0]]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def trained(name: str, seed: int, directory: str) -> dict:
        path = Path(directory) / f"{name.replace(' ', '-')}-{seed}.json"
        command = [sys.executable, __file__, "--one", name, str(seed), str(path)]
        finished = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{name}, seed {seed}\n{finished.stderr[-3000:]}")
        return json.loads(path.read_text())

    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(given.jobs) as pool:
        futures = [pool.submit(trained, *job, directory) for job in todo]
        for future in tqdm(as_completed(futures), desc="questions", unit="run", total=len(futures)):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            results.append(future.result())
            results.sort(key=lambda result: (result["run"], result["seed"]))
            lines = [json.dumps(result) + "\n" for result in results]
            write_whole(RESULTS / "results.jsonl", "".join(lines))
            of = future.result()
            solved, seconds = of["own"]["solved"], of.get("cpu_seconds", 0)
            tqdm.write(f"{of['run']}, seed {of['seed']}: {solved:.3f} solved, {seconds} s of CPU")
    report(results)


if __name__ == "__main__":
    main()
