"""Kill a run at random moments, resume it, and compare it with one that was not interrupted.

    python benchmarks/kills.py [COUNT]

A tiny random model on the toy world, one process, a checkpoint after every iteration. Prints the checkpoints
that existed at each kill, and ends with exit code 1 if metrics, dialogs or weights differ in a single bit.
"""

import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
# In front of this file's own directory, which has a sandbox.py too.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import make_model  # noqa: E402

import toy  # noqa: E402
from config import Config  # noqa: E402
from train import train  # noqa: E402


def quietly(config: Config) -> None:
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open("/dev/null", "w")
    train(config)


def result_of(run: Path) -> tuple[list[str], bytes, dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    weights = load_file(run / "best" / "model.safetensors")
    return [re.sub(r'"seconds".*', "", line) for line in lines], (run / "dialogs.txt").read_bytes(), weights


def main(kills: int) -> int:
    place, draw = Path(tempfile.mkdtemp()), random.Random(0)
    tokenizer = toy.build_tokenizer()
    toy.problems("train"), toy.problems("valid")
    make_model(len(tokenizer), end=tokenizer.eos_token_id).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    config = Config(model=str(place / "base"), output=str(place / "whole"), device="cpu", iterations=12)
    config = replace(config, batch_episodes=16, minibatch_episodes=8, max_new_tokens=12, context=600)
    config = replace(config, limit_problems=8, evaluate_every=2, test_split="", checkpoint_every=1)
    processes = multiprocessing.get_context("fork")
    run = place / "killed"

    def start(output: Path) -> multiprocessing.Process:
        resume = str(output) if (output / "config.json").exists() else ""
        process = processes.Process(
            target=quietly, args=(replace(config, output=str(output), resume=resume),)
        )
        process.start()
        return process

    began = time.perf_counter()
    start(place / "whole").join()
    whole = time.perf_counter() - began
    theirs, done, same = result_of(place / "whole"), 0, True
    while done < kills:
        process = start(run)
        process.join(draw.uniform(0, 0.25 * whole))
        if process.exitcode is None:
            process.kill()
            process.join()
            done += 1
            kept = sorted(path.name for path in (run / "checkpoints").glob("*")) if run.exists() else []
            print(f"kill {done}: {', '.join(kept) or 'before the first checkpoint'}", flush=True)
        if process.exitcode == 0 or done == kills:  # finished: compare, then start another run
            start(run).join()
            ours = result_of(run)
            same &= ours[:2] == theirs[:2] and all(torch.equal(ours[2][n], theirs[2][n]) for n in theirs[2])
            print("bit-equal" if same else "NOT EQUAL", flush=True)
            shutil.rmtree(run)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
