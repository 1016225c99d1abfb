"""Several ranks: the same gradient, metrics and weights as one; nobody hangs; nothing is lost when killed."""

import json
import math
import multiprocessing
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

from train import Config, train

# Ranks are forked from a server that has imported everything once.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "test_distributed"])


def _rank(target, rank: int, count: int, port: int, arguments: tuple) -> None:
    """What torchrun does for a rank."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    if count > 1:
        os.environ |= {k: str(v) for k, v in names.items()} | {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    target(*arguments)


def start_ranks(count: int, target, *arguments) -> list:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        PROCESSES.Process(target=_rank, args=(target, rank, count, port, arguments)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(count: int, target, *arguments) -> None:
    ranks = start_ranks(count, target, *arguments)
    for process in ranks:
        process.join(100)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * count


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer) -> Config:
    base = tmp_path_factory.mktemp("base")
    make_model(len(tokenizer), end=tokenizer.eos_token_id).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return Config(
        model=str(base),
        device="cpu",
        batch_episodes=16,
        minibatch_episodes=8,
        microbatch_tokens=1200,
        max_new_tokens=12,
        context=600,
        iterations=3,
        warmup_updates=1,
        limit_problems=8,
        evaluate_every=3,
        test_split="",
        checkpoint_every=1,
    )


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def one(config, tmp_path_factory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("runs") / "one"
    run_ranks(1, train, replace(config, output=str(run)))
    return run


def assert_same_run(run: Path, other: Path, tolerance: float) -> None:
    ours, theirs = metrics(run), metrics(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            if isinstance(a[name], float) and math.isnan(a[name]):
                assert math.isnan(b[name]), name
            else:
                assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), name
    ours, theirs = (load_file(path / "best" / "model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("gather_weights", [True, False])
def test_any_number_of_ranks_gives_the_same_metrics_and_weights(config, one, tmp_path, count, gather_weights):
    run_ranks(count, train, replace(config, output=str(tmp_path / "run"), gather_weights=gather_weights))
    assert_same_run(tmp_path / "run", one, 1e-5)
