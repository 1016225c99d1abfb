"""Several ranks: the same gradient, metrics and weights as one; nobody hangs; nothing is lost when killed."""

import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_model
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import toy
from checkpoints import check_replaceable, checkpoints, export
from config import Config
from distributed import load_model, load_tokenizer, process_group, rank, split_teams
from episodes import StopRequest, for_sampling
from rollout import RolloutSettings, rollout
from sandbox import Sandbox
from train import train

# Ranks are forked from a server that has imported this module, and made the toy world's problems, once.
TRAIN, VALID = toy.problems("train"), toy.problems("valid")
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = f"{HERE.parent}:{HERE}"
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_distributed"])


def _rank(target, rank: int, count: int, nodes: int, port: int, arguments: tuple) -> None:
    """What torchrun does for a rank."""
    local = count // nodes
    names = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": local}
    if count > 1:
        os.environ |= {k: str(v) for k, v in names.items()} | {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    target(*arguments)


def start_ranks(count: int, target, *arguments, nodes: int = 1) -> list:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        PROCESSES.Process(target=_rank, args=(target, rank, count, nodes, port, arguments))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(count: int, target, *arguments, nodes: int = 1) -> None:
    ranks = start_ranks(count, target, *arguments, nodes=nodes)
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
    ours, theirs = ((path / "episodes.jsonl").read_text().splitlines() for path in (run, other))
    assert len(ours) == len(theirs) >= 2
    for a, b in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        for turn, same in zip(a.pop("turns"), b.pop("turns"), strict=True):
            text, numbers = turn.pop("tokens"), turn.pop("numbers")
            assert text.pop("text") == (tokens := same.pop("tokens")).pop("text")
            assert numbers == pytest.approx(same.pop("numbers"), abs=2 * tolerance + 1e-5, rel=tolerance)
            assert text.keys() == tokens.keys()
            for name in text:
                assert text[name] == pytest.approx(tokens[name], abs=2 * tolerance + 1e-5), name
            assert turn == same
        assert a == b
    ours, theirs = (load_file(path / "best" / "model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("count", "nodes", "how"),
    [
        (2, 1, {"gradient_checkpointing": True}),
        (2, 2, {"cpu_offload": True}),
        (4, 2, {"gather_weights": False}),
    ],
)
def test_ranks_nodes_and_savings_of_memory_change_neither_metrics_nor_weights(
    config, one, tmp_path, count, nodes, how
):
    run_ranks(count, train, replace(config, output=str(tmp_path / "run"), **how), nodes=nodes)
    assert_same_run(tmp_path / "run", one, 1e-5)


def sample_long_and_short(model: str, gather_weights: bool, output: Path) -> None:
    """Rank 1 may say ten times as much as the others."""
    with process_group("cpu"), Sandbox(1) as sandbox:
        policy, tokenizer = load_model(model), load_tokenizer(model)
        settings = RolloutSettings(2, 30 if rank() == 1 else 3, 600, temperature=3.0)
        with for_sampling(policy, "cpu", "float32", gather_weights) as sampler:
            episodes = rollout(sampler, tokenizer, TRAIN[:3], sandbox, settings, seed=rank())
        (output / f"{rank()}.json").write_text(json.dumps([episode.ids for episode in episodes]))


def test_ranks_that_finish_early_wait_for_one_with_dialogs_ten_times_longer(config, tmp_path):
    sampled = []
    for gather_weights in (True, False):
        run_ranks(2, sample_long_and_short, config.model, gather_weights, tmp_path)
        sampled.append([json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)])
    assert sampled[0] == sampled[1]


def without_clock(run: Path) -> list[str]:
    return [re.sub(r'"seconds".*', "", line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_identical(run: Path, other: Path) -> None:
    assert without_clock(run) == without_clock(other)
    for name in ("dialogs.txt", "episodes.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
        assert (run / name).read_bytes()
    ours, theirs = (load_file(path / "best" / "model.safetensors") for path in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_again_and_again_ends_bit_equal_to_one_that_was_not(config, one, tmp_path):
    run, codes = tmp_path / "run", []
    # While the first checkpoint is written, when the second stands, while the last one is written.
    for moment in ("000001*", "000002", "000003*"):
        resume = str(run) if (run / "config.json").exists() else ""
        (process,) = start_ranks(1, train, replace(config, output=str(run), resume=resume))
        while process.is_alive() and not any((run / "checkpoints").glob(moment)):
            time.sleep(0.001)
        process.kill()
        process.join()
        codes.append(process.exitcode)
    assert codes[:2] == [-9, -9]
    run_ranks(1, train, replace(config, output=str(run), resume=str(run)))
    assert_identical(run, one)
    assert len(checkpoints(run / "checkpoints")) == config.keep_checkpoints


def train_until_a_signal(config: Config) -> None:
    assert train(config, StopRequest()) is None


@pytest.mark.parametrize(("number", "reached"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_saves_and_ends_well_and_nothing_is_lost(config, one, tmp_path, number, reached):
    run = replace(config, output=str(tmp_path / "run"), checkpoint_every=100)
    (process,) = start_ranks(1, train_until_a_signal, run)
    written = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not (written.exists() and (len(metrics(written.parent)) or not reached)):
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    assert reached <= len(checkpoints(tmp_path / "run" / "checkpoints")) <= 1
    run_ranks(1, train, replace(run, resume=run.output))
    assert_identical(tmp_path / "run", one)


def train_until_iteration(config: Config, last: int) -> None:
    metrics_file = Path(config.output) / "metrics.jsonl"
    result = train(
        config, lambda: metrics_file.exists() and f'"iteration": {last}' in metrics_file.read_text()
    )
    assert result is None


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(config, one, tmp_path, before, after):
    stopped = replace(config, output=str(tmp_path / "run"))
    run_ranks(before, train_until_iteration, stopped, 1)
    assert len(metrics(tmp_path / "run")) == 1
    run_ranks(after, train, replace(stopped, resume=stopped.output))
    assert_same_run(tmp_path / "run", one, 1e-5)


@pytest.mark.parametrize(("count", "samplers", "gather_weights"), [(2, 1, True), (4, 2, False)])
def test_ranks_that_only_sample_in_turns_with_training_change_nothing(
    config, one, tmp_path, count, samplers, gather_weights
):
    how = {"rollout_ranks": samplers, "overlap": False, "gather_weights": gather_weights}
    run_ranks(count, train, replace(config, output=str(tmp_path / "run"), **how))
    assert_same_run(tmp_path / "run", one, 1e-5)


@pytest.fixture(scope="module")
def overlapping(config, tmp_path_factory) -> Config:
    """The run of one rank that trains and one that samples meanwhile."""
    run = replace(config, output=str(tmp_path_factory.mktemp("runs") / "overlapping"), rollout_ranks=1)
    run_ranks(2, train, run)
    return run


def test_somebody_must_be_left_to_train(config, tmp_path):
    with pytest.raises(ValueError, match="1 ranks less rollout_ranks 1 leave 0 to train"):
        train(replace(config, output=str(tmp_path / "run"), rollout_ranks=1))


def test_rollouts_that_overlap_with_training_use_weights_one_iteration_old(
    config, one, overlapping, tmp_path
):
    still = replace(config, output=str(tmp_path / "still"), learning_rate=0.0)
    run_ranks(1, train, still)
    in_turns, untrained, ahead = metrics(one), metrics(tmp_path / "still"), metrics(Path(overlapping.output))
    of_weights = "repeats", "response_tokens", "invalid_code", "reward"
    for name in of_weights:
        assert ahead[0][name] == pytest.approx(in_turns[0][name])
        assert ahead[1][name] == pytest.approx(untrained[1][name])
    for new, old in ((in_turns[1], untrained[1]), (ahead[2], untrained[2])):
        assert any(new[name] != pytest.approx(old[name]) for name in of_weights)
    # What sampled is what is trained for one iteration, then no longer.
    assert ahead[0]["behaviour_gap"] < 1e-5
    assert min(entry["behaviour_gap"] for entry in ahead[1:]) > 1e-3
    assert max(entry["first_ratio_worst"] for entry in ahead) < 1e-5


def test_a_signal_to_all_ranks_stops_also_those_that_only_sample_without_loss(overlapping, tmp_path):
    run = replace(overlapping, output=str(tmp_path / "run"), checkpoint_every=100)
    ranks, written = start_ranks(2, train_until_a_signal, run), tmp_path / "run" / "metrics.jsonl"
    while ranks[0].is_alive() and not (written.exists() and metrics(written.parent)):
        time.sleep(0.001)
    for process in ranks:  # as torchrun does
        os.kill(process.pid, signal.SIGTERM)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    run_ranks(2, train, replace(run, resume=run.output))
    assert_identical(tmp_path / "run", Path(overlapping.output))


def test_a_killed_run_keeps_the_batch_that_was_sampled_ahead(overlapping, tmp_path):
    run = replace(overlapping, output=str(tmp_path / "run"))
    for moment in ("000001", "000002*"):
        resume = run.output if (tmp_path / "run" / "config.json").exists() else ""
        ranks = start_ranks(2, train, replace(run, resume=resume))
        while ranks[0].is_alive() and not any((tmp_path / "run" / "checkpoints").glob(moment)):
            time.sleep(0.001)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        assert ranks[0].exitcode == -9
    run_ranks(2, train, replace(run, resume=run.output))
    assert_identical(tmp_path / "run", Path(overlapping.output))


def fail_on_one_rank(how: str, output: Path) -> None:
    os.dup2(os.open(output / f"{os.environ['RANK']}.txt", os.O_CREAT | os.O_WRONLY), 2)
    with process_group("cpu"):
        if how == "apart":
            split_teams(1)
        dist.barrier()
        if dist.get_rank() == 1:
            raise RuntimeError("the lamp fell over")
        if how == "waiting":
            dist.barrier()
        time.sleep(600)


@pytest.mark.parametrize("how", ["waiting", "computing", "apart"])
def test_an_exception_on_one_rank_ends_all_and_is_shown(tmp_path, how):
    ranks = start_ranks(2, fail_on_one_rank, how, tmp_path)
    for process in ranks:
        process.join(60)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert None not in codes and 0 not in codes
    assert "the lamp fell over" in (tmp_path / "1.txt").read_text()


def write_large_model(directory: Path, tied: bool) -> int:
    """A checkpoint of many files; returns its bytes."""
    config = LlamaConfig(
        vocab_size=20_000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="20MB")
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def logits_and_memory(model: Path, output: Path) -> None:
    ids = torch.arange(8)[None]  # (B, T)
    with process_group("cpu"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        network = load_model(str(model))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        with torch.no_grad():
            logits = network(ids).logits  # (B, T, V)
        torch.save((logits, 1024 * grown), output / f"{rank()}.pt")


@pytest.mark.parametrize("tied", [True, False])
def test_no_rank_ever_holds_the_whole_model_and_its_logits_are_the_same(tmp_path, tied):
    size = write_large_model(tmp_path, tied)
    run_ranks(4, logits_and_memory, tmp_path, tmp_path)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(8)[None]).logits  # (B, T, V)
    for number in range(4):
        logits, grown = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert grown < 0.5 * size


def export_from_ranks(model: str, output: Path) -> None:
    with process_group("cpu"):
        export(load_model(model), load_tokenizer(model), output, "float32")


def test_the_export_of_sharded_weights_is_a_hugging_face_directory(config, tmp_path):
    run_ranks(2, export_from_ranks, config.model, tmp_path / "out")
    ours, theirs = (load_file(Path(d) / "model.safetensors") for d in (tmp_path / "out", config.model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert load_tokenizer(str(tmp_path / "out")).chat_template


def run_train_py(words: list[str], output: Path) -> None:
    os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY), 2)
    sys.argv = ["train.py", *words]
    runpy.run_path(str(HERE.parent / "train.py"), run_name="__main__")


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_prints_nothing_but_its_own_lines(config, tmp_path, count):
    row = {"description": "Add.", "public_tests": [{"input": "1 2", "output": "3"}]}
    private = [[{"input": f"1 {n}", "output": f"{n + 1}"}] for n in range(4)]
    rows = [row | {"name": f"p{n}", "private_tests": tests} for n, tests in enumerate(private)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--iterations 2 --batch_episodes 4 --minibatch_episodes 4 --max_new_tokens 12 --context 600"
    flags += f" --device cpu --model {config.model} --problems {tmp_path}/rows.jsonl --output {tmp_path}/run"
    printed = tmp_path / "stderr.txt"
    if count == 1:
        run_ranks(1, run_train_py, flags.split(), printed)
    else:  # torchrun and a fresh Python print nothing either
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py"]
        with printed.open("w") as file:
            ended = subprocess.run([*command, *flags.split()], stderr=file, cwd=HERE.parent)
        assert ended.returncode == 0, printed.read_text()
    lines = [line.strip(" \x1b[A") for line in re.split(r"[\r\n]+", printed.read_text())]
    ours = ("RLEF:", "rollout:", "sandbox:", "one file serves")
    assert any(line.startswith("RLEF:") for line in lines)
    assert [line for line in lines if line and not line.startswith(ours)] == []


def train_with_bad_weights(config: Config, output: Path) -> None:
    os.dup2(os.open(output / "stderr.txt", os.O_CREAT | os.O_WRONLY), 2)
    train(config)


def test_only_a_model_may_be_replaced_by_a_model(tmp_path):
    check_replaceable(tmp_path / "new" / "model")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "model.safetensors").touch()
    check_replaceable(tmp_path)
    with pytest.raises(ValueError, match="holds something that is no model"):
        check_replaceable(tmp_path.parent)
    with pytest.raises(OSError):
        check_replaceable(tmp_path / "model.safetensors" / "x")


def test_a_loss_that_is_not_finite_names_step_rank_and_last_good_checkpoint(config, tmp_path):
    run = replace(config, output=str(tmp_path / "run"), learning_rate=math.inf, valid_split="")
    (process,) = start_ranks(1, train_with_bad_weights, run, tmp_path)
    process.join(60)
    assert process.exitcode == 1
    message = (tmp_path / "stderr.txt").read_text()
    assert re.search(r"iteration 1, update 2, rank 0: .*nan.*last good checkpoint: none", message)


@pytest.mark.parametrize("count", [1, 2])
def test_bf16_samples_what_it_trains_on_and_keeps_its_state_in_fp32(config, tmp_path, count):
    how = {"dtype": "bfloat16", "gather_weights": count == 1, "iterations": 1}
    run = replace(config, output=str(tmp_path / "run"), valid_split="", **how)
    run_ranks(count, train, run)
    (entry,) = metrics(tmp_path / "run")
    assert entry["first_ratio_worst"] == 0  # the same micro-batches round the same way
    assert 0 < entry["behaviour_gap"] < 0.1
    metadata = HuggingFaceStorageReader(tmp_path / "run" / "checkpoints" / "000001").read_metadata()
    kept = metadata.state_dict_metadata["policy.network.model.norm.weight"].properties.dtype
    assert kept == torch.float32
    exported = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
