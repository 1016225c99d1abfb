"""RLEF: train a language model to use execution feedback, with PPO.

Paper: Gehring et al., "Grounding Code LLMs in Execution Feedback with Reinforcement Learning", arXiv
2410.02089. `_train` below is the algorithm, from top to bottom: rollouts, log-probs and values, rewards and
advantages, updates, evaluation.

    python train.py                                     # the offline toy world, on a laptop's CPU
    torchrun --nproc_per_node=2 train.py                # the same on two processes, to the same weights
    torchrun --nproc_per_node=8 train.py --preset 8b    # 8 GPUs of 80 GB
    torchrun --nproc_per_node=2 train.py --rollout_ranks 1    # one process samples while the other trains
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --preset 8b
    python train.py --preset 8b --plan --ranks 8        # would it fit? needs no weights and no GPU
    python train.py --resume runs/toy                   # go on after a stop, on any number of ranks

Three networks start from the same checkpoint: the policy, the critic (its trunk), and the frozen initial
policy for the KL penalty. Where the paper runs sampling and training apart, asynchronously, here they take
turns in the same processes, so the policy that samples is the policy that is trained, and the behaviour ratio
stays near 1. With `--rollout_ranks N` they run apart here too: N ranks sample a batch while the others train
on the one before it, so what is trained on was sampled one update phase ago; the behaviour ratio corrects it.

A run's directory holds `config.json`, `metrics.jsonl` (one object an iteration), `dialogs.txt` (a decoded
episode now and then), `best/` (a Hugging Face directory: the best policy on the valid split), `checkpoints/`,
in the end `result.json` and, with matplotlib, `curves.png`; the nodes of a run share it. All chance in an
iteration is a function of seed and iteration, so a run that was stopped goes on as if it had not been.
SIGTERM and Ctrl-C stop it where nothing is lost, before or after an iteration's updates; torchrun kills what
has not ended 30 seconds later, so give it `--shutdown_timeout 3600` where an iteration takes longer.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
import ppo
import toy
from data import Problem
from distributed import as_forward, for_sampling, friendly_errors, gather, load_model, rank, ranks
from evaluate import dialog_statistics, record, summarise, table
from rollout import FEEDBACK, Episode, RolloutSettings, fitting, rollout, show, too_long
from sandbox import Sandbox
from sources import load_problems, select
from tools import plots
from tools.plan import GIB, report
from value_head import ValueModel


def option(default, text: str):
    """A field of Config whose explanation appears in --help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; each field is a flag of the command line. The defaults are the preset `toy`."""

    model: str = option(
        "", "Hugging Face directory or hub name; empty: the toy world's own model, built when missing"
    )
    problems: str = option("toy", "toy, code_contests, humaneval_plus, mbpp_plus, or a file of problems")
    train_split: str = option("train", "split that is trained on")
    valid_split: str = option(
        "valid", "split that chooses the best policy; empty: no evaluation while training"
    )
    test_split: str = option("test", "split of the table before and after; empty: no table")
    limit_problems: int = option(0, "use only the first so many problems of each split; 0: all")
    output: str = option("runs/toy", "directory of the run")
    chat_template: str = option("", "file with a chat template, for base models that have none")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "device of all networks")
    dtype: str = option("float32", "number type of the computation")
    bf16_state: bool = option(False, "weights and optimiser state in --dtype too, instead of fp32")
    cpu_offload: bool = option(False, "keep weights and optimiser state in main memory")
    gather_weights: bool = option(True, "sample with whole weights on every rank; else gather layer by layer")
    rollout_ranks: int = option(0, "so many of the ranks, the last ones, only sample; the others train")
    overlap: bool = option(
        True, "with rollout_ranks: sample while training, with weights one iteration old; else in turns"
    )
    attention: str = option("sdpa", "transformers' attention: sdpa, eager, flash_attention_2, ...")
    gguf_file: str = option("", "file of --model that holds its weights as GGUF")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    seed: int = option(0, "seed of everything random")
    iterations: int = option(20, "iterations, each a batch of rollouts and a pass of updates over it")
    batch_episodes: int = option(256, "rollouts an iteration (paper: 1024)")
    minibatch_episodes: int = option(64, "rollouts an update (paper: 256)")
    microbatch_tokens: int = option(16384, "tokens, padding included, of one forward and backward")
    logits_chunk: int = option(4096, "response tokens whose logits are in memory at once")
    turn_limit: int = option(3, "responses an episode may have")
    max_new_tokens: int = option(48, "tokens of a response")
    context: int = option(512, "tokens of a dialog")
    batch_rows: int = option(128, "dialogs that are sampled at once")
    temperature: float = option(1.0, "sampling temperature in training")
    feedback: str = option("true", "feedback in training: true, random or none (ablations)")
    examples: str = option("", "JSON file with a list of chat messages that precede every dialog (few-shot)")
    learning_rate: float = option(5e-4, "of the policy (paper: 2e-7)")
    value_learning_rate: float = option(5e-4, "of the critic (paper: 2e-7)")
    weight_decay: float = option(0.1, "AdamW, both networks")
    warmup_updates: int = option(10, "updates over which the learning rates rise linearly (paper: 50)")
    max_gradient_norm: float = option(1.0, "gradients are clipped to this norm, each network for itself")
    beta: float = option(0.05, "weight of the KL penalty")
    gamma: float = option(1.0, "discount of a turn")
    clip: float = option(0.2, "clip range of the ratio and of the value")
    product_kl: bool = option(False, "ablation: KL of the token products instead of their geometric mean")
    token_level_values: bool = option(False, "ablation: a value in front of every response token")
    evaluate_every: int = option(5, "iterations between evaluations on the valid split")
    evaluation_temperature: float = option(0.2, "temperature of evaluations")
    evaluation_top_p: float = option(0.95, "top-p of evaluations")
    evaluation_rollouts: int = option(1, "rollouts a problem in evaluations")
    show_every: int = option(10, "iterations between decoded dialogs in dialogs.txt")
    checkpoint_every: int = option(5, "iterations between checkpoints")
    keep_checkpoints: int = option(2, "checkpoints that are kept, the newest")
    resume: str = option("", "directory of a run to go on with, from its newest checkpoint")
    plan: bool = option(False, "print the memory that --ranks ranks would need, and end")
    ranks: int = option(8, "ranks of the plan")
    gpu_gib: float = option(79.0, "memory of a GPU of the plan, in GiB (an 80 GB H100 has 79)")


PAPER = dict(
    problems="code_contests",
    dtype="bfloat16",
    gradient_checkpointing=True,
    batch_episodes=1024,
    minibatch_episodes=256,
    logits_chunk=1024,
    max_new_tokens=1024,
    context=8192,
    learning_rate=2e-7,
    value_learning_rate=2e-7,
    warmup_updates=50,
    evaluate_every=200,  # iterations of 4 updates: the paper evaluates every 800 updates
    evaluation_rollouts=20,
    checkpoint_every=20,
)
PRESETS = {
    "toy": {},
    "8b": PAPER
    | dict(model="meta-llama/Llama-3.1-8B-Instruct", output="runs/8b", iterations=3000, batch_rows=24),
    "70b": PAPER
    | dict(model="meta-llama/Llama-3.1-70B-Instruct", output="runs/70b", iterations=2000, batch_rows=8)
    | dict(gather_weights=False, microbatch_tokens=8192),
}


# What a resumed run may change without becoming another run.
MAY_CHANGE = {
    "resume",
    "output",
    "iterations",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "show_every",
}


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """The command line as a Config: a preset, or the run to resume, then the flags that differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="a set of defaults (default: toy)")
    for entry in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if entry.type is bool else {"type": entry.type}
        text = f"{entry.metadata['help']} (default: {entry.default!r})".replace("%", "%%")
        parser.add_argument(f"--{entry.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(arguments))
    given = PRESETS[given.pop("preset") or "toy"] | given
    if "resume" in given:
        stored = json.loads((Path(given["resume"]) / "config.json").read_text())
        wrong = [
            f"{name} {stored.get(name, 'unknown')!r}, now {value!r}"
            for name, value in given.items()
            if name not in MAY_CHANGE and stored.get(name) != value
        ]
        wrong += [f"{name}, which is no setting" for name in stored if name not in asdict(Config())]
        if wrong:
            raise ValueError(f"{given['resume']} was started with {'; '.join(wrong)}")
        given = stored | given | {"output": given["resume"]}
    config = replace(Config(), **given)
    may_be_0 = ("limit_problems", "rollout_ranks", "seed", "iterations")
    for entry in fields(Config):
        value, least = getattr(config, entry.name), int(entry.name not in may_be_0)
        if entry.type is int and value < least:
            raise ValueError(f"{entry.name} is {value}, but must be at least {least}")
    if config.temperature <= 0:
        raise ValueError(f"temperature is {config.temperature}, but training needs one above 0")
    if config.feedback not in FEEDBACK:
        raise ValueError(f"feedback is {config.feedback!r}, but must be one of {', '.join(FEEDBACK)}")
    if not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        raise ValueError(f"dtype is {config.dtype!r}, which torch does not know")
    distributed.check_device(config.device)
    if not config.model and (config.plan or config.problems != "toy"):
        raise ValueError(
            f"{'a plan needs' if config.plan else config.problems + ' needs'} a --model: the toy world's own "
            "knows only the toy's problems"
        )
    if config.batch_episodes % config.minibatch_episodes:
        raise ValueError(
            f"batch_episodes {config.batch_episodes} is not a multiple of "
            f"minibatch_episodes {config.minibatch_episodes}"
        )
    if config.microbatch_tokens < config.context:
        raise ValueError(
            f"microbatch_tokens {config.microbatch_tokens} is less than context {config.context}: "
            "the longest dialog would not fit a micro-batch"
        )
    if config.plan and config.rollout_ranks:
        raise ValueError("plan knows only ranks that train: leave rollout_ranks out, and them out of ranks")
    return config


@dataclass
class Targets:
    """What the losses of one episode need, constant while updating: r response tokens, v values."""

    behaviour_logprobs: torch.Tensor  # (r,)
    old_logprobs: torch.Tensor  # (r,)
    advantages: torch.Tensor  # (r,)
    old_values: torch.Tensor  # (v,) v is the number of turns, or r with token-level values
    returns: torch.Tensor  # (v,)


def value_positions(batch: ppo.Batch, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns (v,) where the critic is read: before each turn, or (ablation) before each token."""
    if config.token_level_values:
        return batch.token_rows, batch.token_columns - 1
    return batch.turn_rows, batch.prompt_columns


@torch.no_grad()
def prepare(policy, reference, critic, episodes: list[Episode], config: Config) -> tuple[list[Targets], dict]:
    """Log-probs, values, rewards, returns and advantages of the whole batch, and their statistics.

    Each rank runs its share of the forward passes and tells the others; from there on all compute the same.
    """
    reading = config.temperature, config.logits_chunk
    mine = []
    for group in ppo.microbatches(episodes, config.microbatch_tokens, ranks())[rank() :: ranks()]:
        batch = ppo.collate([episodes[i] for i in group], config.device)
        logprobs, entropy = as_forward(ppo.response_logprobs, policy, batch, *reading)  # (R,), (R,)
        initial, _ = as_forward(ppo.response_logprobs, reference, batch, *reading)  # (R,)
        value = critic(batch.ids, *value_positions(batch, config))  # (v,)
        mine.append((group, [tensor.float().cpu() for tensor in (logprobs, initial, entropy, value)]))
    distributed.free_gathered(policy, reference, critic)
    sizes = [sum(turn.end - turn.start for turn in episode.turns) for episode in episodes]
    turns = [len(episode.turns) for episode in episodes]
    parts = sizes if config.token_level_values else turns
    pieces = [None] * len(episodes)
    for group, tensors in gather(mine):
        lengths = [[of[i] for i in group] for of in (sizes, sizes, sizes, parts)]
        split = [tensor.split(length) for tensor, length in zip(tensors, lengths, strict=True)]
        for i, *piece in zip(group, *split, strict=True):
            pieces[i] = piece
    old_logprobs, initial, entropies, old_values = map(torch.cat, zip(*pieces, strict=True))  # (R,) * 3, (v,)

    whole = ppo.collate(episodes, torch.device("cpu"))
    of_token, count = whole.turn_of_token, len(whole.turn_rows)  # (R,), N
    spoken = [turn.behaviour_logprobs for episode in episodes for turn in episode.turns]
    behaviour = torch.tensor([logprob for turn in spoken for logprob in turn])  # (R,)
    kl = ppo.turn_kl(old_logprobs, initial, of_token, count, config.product_kl)  # (N,)
    rewards = ppo.turn_rewards(episodes) - config.beta * kl  # (N,)
    returns = ppo.turn_returns(rewards, whole.turn_rows, config.gamma)  # (N,)
    if config.token_level_values:
        target = returns[of_token]  # (R,)
        advantages = ppo.normalise(target - old_values)  # (R,)
    else:
        target = returns  # (N,)
        advantages = ppo.normalise(returns - old_values)[of_token]  # (R,)
    of_tokens = [tensor.split(sizes) for tensor in (behaviour, old_logprobs, advantages)]
    of_values = [tensor.split(parts) for tensor in (old_values, target)]
    return [Targets(*piece) for piece in zip(*of_tokens, *of_values, strict=True)], {
        "reward": ppo.turn_rewards(episodes).sum().item() / len(episodes),
        "return": returns.mean().item(),
        "kl": ppo.mean_per_turn(old_logprobs - initial, of_token, count).mean().item(),
        "entropy": entropies.mean().item(),
        "explained_variance": ppo.explained_variance(old_values, target),
        "behaviour_ratio": (old_logprobs - behaviour).exp().mean().item(),
        "behaviour_gap": (old_logprobs - behaviour).abs().max().item(),
    }


def update(policy, critic, optimisers, schedules, episodes, targets: list[Targets], config: Config) -> dict:
    """One update of both networks on one minibatch; neither micro-batches nor ranks change the gradient.

    Raises: FloatingPointError if a loss or a gradient is not finite.
    """
    tokens = sum(len(target.old_logprobs) for target in targets)
    values_read = sum(len(target.returns) for target in targets)
    sums = dict.fromkeys(("policy_loss", "value_loss", "ratio", "clip_fraction", "approximate_kl"), 0.0)
    worst, reading = 0.0, (config.temperature, config.logits_chunk)
    for group in ppo.microbatches(episodes, config.microbatch_tokens, ranks())[rank() :: ranks()]:
        batch = ppo.collate([episodes[i] for i in group], config.device)
        behaviour, old, advantages, old_values, returns = (
            torch.cat([getattr(targets[i], entry.name) for i in group]).to(config.device)
            for entry in fields(Targets)
        )  # (R,), (R,), (R,), (v,), (v,)
        logprobs, _ = as_forward(ppo.response_logprobs, policy, batch, *reading)  # (R,)
        loss = ppo.policy_loss(logprobs, old, behaviour, advantages, config.clip).sum() / tokens
        loss.backward()
        values = critic(batch.ids, *value_positions(batch, config))  # (v,)
        error = ppo.value_loss(values, old_values, returns, config.clip).sum() / values_read
        error.backward()
        log_ratio = (logprobs - old).detach()  # (R,)
        ratio = log_ratio.exp()  # (R,)
        sums["policy_loss"] += loss.item()
        sums["value_loss"] += error.item()
        sums["ratio"] += ratio.sum().item() / tokens
        sums["clip_fraction"] += ((ratio - 1).abs() > config.clip).sum().item() / tokens
        sums["approximate_kl"] += (ratio - 1 - log_ratio).sum().item() / tokens
        worst = max(worst, (ratio - 1).abs().max().item())
        if not np.isfinite(sums["policy_loss"] + sums["value_loss"]):
            raise FloatingPointError(f"rank {rank()}: the losses are {loss.item()} and {error.item()}")
    sums = dict(zip(sums, distributed.total([*sums.values()]), strict=True))
    sums["ratio_worst"] = max(gather([worst]))
    sums["learning_rate"] = optimisers[0].param_groups[0]["lr"]
    networks = {"policy": policy, "value": critic}
    for (name, network), optimiser, schedule in zip(networks.items(), optimisers, schedules, strict=True):
        sums[f"{name}_gradient"] = distributed.clip_gradients(network, config.max_gradient_norm)
        if not np.isfinite(sums[f"{name}_gradient"]):
            raise FloatingPointError(f"rank {rank()}: the {name} gradient is {sums[f'{name}_gradient']}")
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return sums


def draw_problems(problems: Sequence[Problem], iteration: int, config: Config) -> list[Problem]:
    """The problems of an iteration: whole passes over the training set, each in an order of its own."""
    first = iteration * config.batch_episodes
    positions = range(first, first + config.batch_episodes)
    orders = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(len(problems))
        for epoch in {position // len(problems) for position in positions}
    }
    return [problems[int(orders[p // len(problems)][p % len(problems)])] for p in positions]


def sample(
    policy, tokenizer, problems, others, sandbox, settings, config: Config, seed: int, first_index: int = 0
) -> list[Episode]:
    """An episode for each entry of `problems`: each rank samples its share, then all know all.

    Episode i draws from the stream (seed, first_index + i), whatever the number of ranks. Random feedback
    comes from `others`.
    """
    mine, bar = distributed.share(len(problems)), rank() == 0
    place = seed, first_index + mine.start
    with for_sampling(policy, config.device, config.dtype, config.gather_weights) as sampler:
        episodes = rollout(sampler, tokenizer, problems[mine], sandbox, settings, *place, bar, others)
    # Tests can be large, and every rank has them.
    everyone = gather([replace(episode, problem=None) for episode in episodes])
    return [replace(episode, problem=problem) for episode, problem in zip(everyone, problems, strict=True)]


def probe(policy, tokenizer, problems, others, sandbox, settings: RolloutSettings, config: Config) -> dict:
    """Summaries with true and with random feedback, the paper's probe of grounding, and one good episode."""
    result, schedule = {}, list(problems) * config.evaluation_rollouts
    for kind in ("random", "true"):
        setting = replace(settings, feedback=kind)
        episodes = sample(policy, tokenizer, schedule, others, sandbox, setting, config, config.seed)
        result[kind] = summarise([record(episode) for episode in episodes], settings.turn_limit)
    shown = next((e for e in episodes if e.solved and len(e.turns) > 1), episodes[0])
    return result | {"episode": show(tokenizer, shown)}


def comparison(before: dict, after: dict) -> str:
    """Test problems before and after training."""

    def figures(result: dict) -> dict[str, float]:
        true, random = result["true"], result["random"]
        by_turn = {f"solved within turn {t}": share for t, share in enumerate(true["solved_by_turn"], 1)}
        by_group = {f"solved: {group or 'all'}": share for group, share in sorted(true["by_group"].items())}
        difference = {"true minus random": true["solved"] - random["solved"]}
        random = {"solved, random feedback": random["solved"]}
        return by_turn | random | difference | {"repeats after feedback": true["repeats"]} | by_group

    then, now = figures(before), figures(after)
    return table({name: {"before": f"{then[name]:.3f}", "after": f"{now[name]:.3f}"} for name in then})


def append(path: Path, text: str) -> int:
    """Write at the end of a file; returns its size."""
    with path.open("a") as file:
        file.write(text)
    return path.stat().st_size


def train(config: Config, stopped: Callable[[], bool] = lambda: False) -> dict | None:
    """Train a policy as `config` says; returns the probes on test problems before and after.

    None if `stopped()` became true on any rank that trains: then a checkpoint was saved, and `resume` goes on
    from there. None on ranks that only sample.
    """
    state_dtype = config.dtype if config.bf16_state else "float32"
    alone = state_dtype == config.dtype and not config.cpu_offload
    workers = distributed.sandbox_workers()
    with Sandbox(workers) as sandbox, distributed.process_group(config.device, alone) as device:
        return _train(replace(config, device=device), state_dtype, sandbox, stopped)


def sample_apart(policy, batch_of: Callable, first: int, ahead: list[Episode], config: Config) -> None:
    """All that a rank does that only samples: take the trained weights, sample the next batch, hand it over.

    `ahead` is batch `first` if it was sampled before the run was stopped: the weights that did it are gone.
    """

    def hand_over(episodes: list[Episode]) -> None:
        # Tests can be large, and have been run.
        lean = [replace(e, problem=Problem(e.problem.name, "", (), ())) for e in episodes]
        distributed.broadcast(lean, -config.rollout_ranks)

    if ahead:
        hand_over(ahead)
        first += 1
    while distributed.take_weights(policy):
        hand_over(batch_of(first, policy))
        first += 1


def _train(config: Config, state_dtype: str, sandbox: Sandbox, stopped: Callable[[], bool]) -> dict | None:
    """RLEF, on a rank that has joined the others; arguments and result as of `train`."""
    began = time.perf_counter()
    if sandbox.layers_off and rank() == 0:
        print(f"sandbox: {sandbox.layers_off}", file=sys.stderr)
    learners = ranks() - config.rollout_ranks
    if learners < 1:
        raise ValueError(f"rollout_ranks {config.rollout_ranks} leaves no rank of {ranks()} to train")
    if config.minibatch_episodes % learners:
        raise ValueError(
            f"minibatch_episodes {config.minibatch_episodes} does not divide by {learners} ranks that train"
        )
    run = Path(config.output)
    saved = distributed.checkpoints(run / "checkpoints")
    if not config.resume and (saved or (run / "result.json").exists()):
        raise ValueError(f"{run} holds a run: go on with --resume {run}, or give another --output")
    if not config.model:
        config = replace(config, model=str(run.parent / "toy-base"))
        if rank() == 0:
            run.mkdir(parents=True, exist_ok=True)  # before the work: it may be refused
            toy.ensure_base(Path(config.model), seed=0)
        distributed.barrier()
    tokenizer = distributed.load_tokenizer(config.model, config.chat_template, config.gguf_file)
    alike = {f.name for f in fields(RolloutSettings)} & asdict(config).keys()
    shared = {name: getattr(config, name) for name in alike}
    sampling = RolloutSettings(**shared)
    colder = {"temperature": config.evaluation_temperature, "top_p": config.evaluation_top_p}
    judging = replace(sampling, feedback="true", **colder)

    def split(name: str) -> Sequence[Problem]:
        problems = load_problems(config.problems, name) if name else []
        problems = problems[: config.limit_problems] if config.limit_problems else problems
        places = fitting(problems, tokenizer, sampling)
        if len(places) == len(problems):
            return problems
        told = too_long(problems, places, f"{name} problems", sampling)
        if not places:
            raise ValueError(told)
        if rank() == 0:
            print(f"left out: {told}", file=sys.stderr)
        return select(problems, places)

    training, valid, test = split(config.train_split), split(config.valid_split), split(config.test_split)
    if test and len(test) < 2:
        raise ValueError(
            "the table before and after needs two test problems, for random feedback comes from another"
        )
    if rank() == 0:
        if not config.resume:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)  # only what was not finished
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    loading = {name: getattr(config, name) for name in ("device", "dtype", "attention", "cpu_offload")}
    source = {"model": config.model, "gguf_file": config.gguf_file}
    progress = {"iteration": 0, "best": -1.0, "before": None, "metrics.jsonl": 0, "dialogs.txt": 0}
    newest = saved[-1] if config.resume and saved else None
    if newest:
        progress = json.loads((newest / "about.json").read_text())
    first = progress["iteration"]
    ahead = distributed.read_ahead(newest) if newest and first < config.iterations else []

    def batch_of(iteration: int, policy) -> list[Episode]:
        drawn, at = draw_problems(training, iteration, config), iteration * config.batch_episodes
        return sample(policy, tokenizer, drawn, training, sandbox, sampling, config, config.seed + 1, at)

    if distributed.split_teams(config.rollout_ranks):
        return sample_apart(load_model(**source, **loading), batch_of, first, ahead, config)
    training_too = {"gradient_checkpointing": config.gradient_checkpointing, "state_dtype": state_dtype}
    policy = load_model(**source, **loading, **training_too)
    reference = load_model(**source, **loading).requires_grad_(False)
    critic = load_model(**source, **loading, **training_too, wrap=ValueModel)
    optimisers = [
        torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=config.weight_decay)
        for network, rate in ((policy, config.learning_rate), (critic, config.value_learning_rate))
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / config.warmup_updates))
        for optimiser in optimisers
    ]
    trained = {
        "policy": (policy, optimisers[0], schedules[0]),
        "critic": (critic, optimisers[1], schedules[1]),
    }
    if newest:
        distributed.restore_checkpoint(newest, trained)
    seconds: dict[str, float] = progress.setdefault("seconds", {"start": time.perf_counter() - began})
    if rank() == 0:
        (run / "result.json").unlink(missing_ok=True)
        (run / "config.json").write_text(json.dumps(asdict(config) | {"resume": ""}, indent=1))
        for name in ("metrics.jsonl", "dialogs.txt"):
            append(run / name, "")
            os.truncate(run / name, progress[name])
    distributed.barrier()
    overlap = config.rollout_ranks > 0 and config.overlap

    def save() -> None:
        reached = progress["iteration"]
        if reached == 0:
            return  # nothing is lost, and DCP would count a step of optimisers that have made none
        sampled = rollouts(reached) if overlap and reached < config.iterations else []
        directory = run / "checkpoints" / f"{reached:06d}"
        distributed.save_checkpoint(directory, trained, progress, config.keep_checkpoints, sampled)

    @functools.lru_cache(maxsize=1)  # a checkpoint may want the next iteration's before that iteration does
    def rollouts(iteration: int) -> list[Episode]:
        if not config.rollout_ranks:
            return batch_of(iteration, policy)
        if not overlap:
            distributed.give_weights(policy, config.dtype)
        return distributed.broadcast(None, -config.rollout_ranks)

    if overlap and not ahead and first < config.iterations:
        distributed.give_weights(policy, config.dtype)
    if test and not progress["before"]:
        started = time.perf_counter()
        progress["before"] = probe(policy, tokenizer, test, training, sandbox, judging, config)
        seconds["probe"] = time.perf_counter() - started
    stop = False
    bar = tqdm(total=config.iterations, initial=first, desc="RLEF", unit="iteration", disable=rank() > 0)
    for iteration in range(first, config.iterations):
        clock = [time.perf_counter()]
        last = iteration + 1 == config.iterations
        episodes = rollouts(iteration)
        clock.append(time.perf_counter())
        if stop := any(gather([stopped()])):
            save()
            break
        if overlap and not last:
            distributed.give_weights(policy, config.dtype)  # for the next rollouts, which now begin
        targets, statistics = prepare(policy, reference, critic, episodes, config)
        clock.append(time.perf_counter())
        updates = []
        order = np.random.default_rng([config.seed, 1, iteration]).permutation(len(episodes))
        for chosen in order.reshape(-1, config.minibatch_episodes):
            part = [episodes[i] for i in chosen], [targets[i] for i in chosen]
            try:
                updates.append(update(policy, critic, optimisers, schedules, *part, config))
            except FloatingPointError as error:
                good = (distributed.checkpoints(run / "checkpoints") or ["none"])[-1]
                at = f"iteration {iteration + 1}, update {len(updates) + 1}"
                raise FloatingPointError(f"{at}, {error}; last good checkpoint: {good}") from error
        clock.append(time.perf_counter())
        dialogs = dialog_statistics([record(episode) for episode in episodes], config.turn_limit)
        entry = {"iteration": iteration + 1} | dialogs | statistics
        entry |= {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
        entry["ratio_worst"] = max(u["ratio_worst"] for u in updates)
        entry["first_ratio_worst"] = updates[0]["ratio_worst"]
        if valid and (last or (iteration + 1) % config.evaluate_every == 0):
            schedule = list(valid) * config.evaluation_rollouts
            judged = sample(policy, tokenizer, schedule, valid, sandbox, judging, config, config.seed)
            summary = summarise([record(episode) for episode in judged], config.turn_limit)
            entry["valid_solved"] = summary["solved"]
            if summary["solved"] > progress["best"]:
                progress["best"] = summary["solved"]
                distributed.export(policy, tokenizer, run / "best", config.dtype)
        clock.append(time.perf_counter())
        phases = ("rollout", "prepare", "update", "evaluate")
        entry["seconds"] = dict(zip(phases, np.diff(clock).tolist(), strict=True))
        # A part of "rollout", the mean over the ranks that sample.
        stood = sum(turn.sandbox_seconds for episode in episodes for turn in episode.turns)
        entry["seconds"]["waiting for tests"] = stood / (config.rollout_ranks or ranks())
        for phase, spent in entry["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        progress["iteration"] = iteration + 1
        if rank() == 0:
            progress["metrics.jsonl"] = append(run / "metrics.jsonl", json.dumps(entry) + "\n")
            if iteration % config.show_every == 0 or last:
                dialog = f"iteration {iteration + 1}\n{show(tokenizer, episodes[0])}\n\n"
                progress["dialogs.txt"] = append(run / "dialogs.txt", dialog)
        stop = any(gather([stopped()]))
        if last or stop or (iteration + 1) % config.checkpoint_every == 0:
            save()
        bar.set_postfix_str(
            f"solved {' '.join(f'{s:.2f}' for s in entry['solved_by_turn'])} "
            f"repeats {entry['repeats']:.2f} kl {entry['kl']:.3f} valid {max(progress['best'], 0):.2f}"
        )
        bar.update()
        if stop:
            break
    bar.close()
    if config.rollout_ranks:
        distributed.give_weights(None, config.dtype)
    if stop:
        if rank() == 0:
            print(f"stopped after iteration {progress['iteration']}: go on with --resume {run}")
        return None
    if not valid or progress["best"] < 0:
        distributed.export(policy, tokenizer, run / "best", config.dtype)
    before, after = progress["before"], None
    if test:
        started = time.perf_counter()
        policy = load_model(str(run / "best"), **loading)
        after = probe(policy, tokenizer, test, training, sandbox, judging, config)
        seconds["probe"] = seconds.get("probe", 0.0) + time.perf_counter() - started
    result = {"before": before, "after": after, "seconds": seconds}
    if rank() == 0:
        if test:
            print(comparison(before, after), after["episode"], sep="\n")
        if config.iterations:
            plots.curves(run)
        print("seconds: " + ", ".join(f"{phase} {spent:.0f}" for phase, spent in seconds.items()))
        (run / "result.json").write_text(json.dumps(result, indent=1))
    return result


def install_signal_handlers() -> Callable[[], bool]:
    """From now on SIGTERM and Ctrl-C only make the result true; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping as soon as nothing is lost by it; once more to stop now\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return lambda: bool(received)


if __name__ == "__main__":
    with friendly_errors("train.py"):
        config = parse_config()
        if config.plan:
            text, fits = report(config, config.ranks, config.gpu_gib * GIB)
            print(text)
            sys.exit(0 if fits else 2)
        train(config, install_signal_handlers())
