"""RLEF: train a language model to use execution feedback, with PPO.

Paper: Gehring et al., "Grounding Code LLMs in Execution Feedback with Reinforcement Learning", arXiv
2410.02089. `train` below is the algorithm, from top to bottom; the docstring of ppo.py states the objective.

    python train.py                                     # the offline toy world, on a laptop's CPU
    torchrun --nproc_per_node=2 train.py                # the same on two processes, with the same result
    torchrun --nproc_per_node=8 train.py --preset 8b    # 8 GPUs of 80 GB
    torchrun --nproc_per_node=2 train.py --rollout_ranks 1    # one process samples while the other trains
    python train.py --preset 8b --plan --ranks 8        # would it fit? needs no weights and no GPU
    python train.py --resume runs/toy                   # go on after a stop, on any number of ranks

Three networks start from the same checkpoint: the policy, the critic (its trunk), and the frozen initial
policy for the KL penalty. In the paper, sampling and training run asynchronously on separate GPUs. Here they
take turns, so that the policy that samples is the policy that is trained; episodes.py has the alternatives.

checkpoints.py describes the directory of a run; all nodes of a run must share it. Randomness in an iteration
depends only on the seed and the iteration's number, so a resumed run equals an uninterrupted one. SIGTERM and
Ctrl-C stop the run before or after an iteration's updates: no update is lost.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
import ppo
import toy
from checkpoints import RunDirectory, export, restore_checkpoint, timed, write_whole
from config import Config, parse_config
from data import Problem
from distributed import as_forward, gather, load_model, rank, ranks
from episodes import EpisodeSource, Sampler, StopRequest, load_splits, sample_for_learners
from evaluate import before_and_after, dialog_statistics, record, summarise
from rollout import Episode, show
from sampling import check_architecture, check_logits
from sandbox import Sandbox
from tools import page, plots
from tools.plan import GIB, report
from tools.records import EPISODES, choose, describe, logprobs_of, numbers_of
from value_head import ValueModel


def train(config: Config, stopped: Callable[[], bool] = lambda: False) -> dict | None:
    """Train a policy as `config` says; returns the results on the test problems before and after.

    If `stopped()` becomes true on any rank that trains, a checkpoint is saved for `--resume`, and the result
    is None. It is also None on ranks that only sample.
    """
    with set_up(config, stopped) as setup:
        if setup is None:
            return None
        config, run, source = setup.config, setup.run, setup.source
        (policy, critic, *_), progress = setup.trainable, run.progress
        trained = in_checkpoint(setup.trainable)
        if setup.test and not progress["before"]:
            with timed(run.seconds, "probe"):
                progress["before"] = probe(setup, policy)
        counted = {"total": config.iterations, "initial": progress["iteration"], "unit": "iteration"}
        bar = tqdm(desc="RLEF", disable=rank() > 0, **counted)
        for iteration in range(progress["iteration"], config.iterations):
            seconds: dict[str, float] = {}
            last = iteration + 1 == config.iterations
            # 1. Rollouts: dialogs on the next problems, sampled by pi_b; all tests judge the last response.
            with timed(seconds, "rollout"):
                episodes = source.take(iteration)
            if episodes is None:  # a stop was requested
                break
            # 2. Log-probs under pi_old and rho, values V; from them rewards, returns, advantages.
            with timed(seconds, "prepare"):
                minibatches = draw_minibatches(episodes, iteration, config)
                prepared, statistics = prepare(policy, setup.reference, critic, minibatches, config)
                shown = choose(episodes) if last or iteration % config.show_every == 0 else []
                before = logprobs_of(policy, shown, config)
            # 3. PPO: one pass over the batch, an update of policy and critic for each minibatch.
            with timed(seconds, "update"):
                statistics |= update_pass(setup, prepared, iteration)
                numbers = numbers_of(prepared, before, logprobs_of(policy, shown, config), config)
            # 4. The best policy on the valid split is kept.
            with timed(seconds, "evaluate"):
                if setup.valid and (last or (iteration + 1) % config.evaluate_every == 0):
                    statistics |= keep_best(setup, policy)
            # 5. Metrics, now and then some episodes with all their numbers, a checkpoint.
            sandbox_wait = sum(turn.sandbox_seconds for episode in episodes for turn in episode.turns)
            seconds["waiting for tests"] = sandbox_wait / (config.rollout_ranks or ranks())  # part of rollout
            dialog_metrics = dialog_statistics([record(episode) for episode in episodes], config.turn_limit)
            entry = {"iteration": iteration + 1} | dialog_metrics | statistics | {"seconds": seconds}
            run.log(entry, [describe(episode, setup.sampler.chat.tokenizer, numbers) for episode in shown])
            if last or (iteration + 1) % config.checkpoint_every == 0:
                run.save(trained, source.prefetch, config.keep_checkpoints)
            by_turn = " ".join(f"{share:.2f}" for share in entry["solved_by_turn"])
            status = f"solved by turn {by_turn}, repeats {entry['repeats']:.2f}, kl {entry['kl']:.3f}"
            bar.set_postfix_str(f"{status}, best valid {max(progress['best'], 0):.2f}")
            bar.update()
        bar.close()
        if not source.stop_requested():
            return finish(setup)
        run.save(trained, source.prefetch, config.keep_checkpoints)
        if rank() == 0:
            print(f"stopped after iteration {progress['iteration']}: go on with --resume {run.path}")


# ---- the steps of an iteration -----------------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Episodes that go through the networks together, in `prepare` and again in `update`, and their targets.

    R response tokens; v values: one per turn, or (ablation) one per token.
    """

    episodes: list[Episode]
    batch: ppo.Batch
    behaviour_logprobs: torch.Tensor  # (R,)
    initial_logprobs: torch.Tensor  # (R,)
    old_logprobs: torch.Tensor  # (R,)
    entropies: torch.Tensor  # (R,)
    rewards: torch.Tensor  # (N,) with the KL penalty
    old_values: torch.Tensor  # (v,)
    returns: torch.Tensor  # (v,)
    advantages: torch.Tensor | None = None  # (R,) set when those of the whole batch are known


def draw_minibatches(episodes: list[Episode], iteration: int, config: Config) -> list[list[list[Episode]]]:
    """Shuffle the episodes. Returns: for each update, the micro-batches of all ranks.

    `prepare` and `update` use the same grouping: in half precision another one rounds differently, and the
    ratio would not start at 1.
    """
    order = np.random.default_rng([config.seed, 1, iteration]).permutation(len(episodes))
    minibatches = ([episodes[i] for i in chosen] for chosen in order.reshape(-1, config.minibatch_episodes))
    return [ppo.microbatches(m, config.microbatch_tokens, ranks(), config.device) for m in minibatches]


def read_values(critic, batch: ppo.Batch, config: Config) -> torch.Tensor:
    """Values (v,) before each response or (ablation) before each response token."""
    if config.token_level_values:
        return critic(batch.ids, batch.token_rows, batch.token_columns - 1)
    return critic(batch.ids, batch.turn_rows, batch.prompt_columns)


@torch.no_grad()
def prepare(
    policy, reference, critic, minibatches: list[list[list[Episode]]], config: Config
) -> tuple[list[list[MicroBatch]], dict]:
    """Compute log-probs, values, rewards, returns and advantages, and their statistics over the whole batch.

    Returns: for each update the micro-batches of this rank; the statistics over all ranks.
    """
    prepared, measured = [], []
    for minibatch in minibatches:
        prepared.append([])
        for group in minibatch[rank() :: ranks()]:
            batch, options = ppo.collate(group, config.device), (config.temperature, config.logits_chunk)
            old, entropies = as_forward(ppo.response_logprobs, policy, batch, *options)  # (R,), (R,)
            initial, _ = as_forward(ppo.response_logprobs, reference, batch, *options)  # (R,)
            values = read_values(critic, batch, config)  # (v,)
            behaviour = [logprob for e in group for turn in e.turns for logprob in turn.behaviour_logprobs]
            behaviour = torch.tensor(behaviour, device=config.device)  # (R,)
            turns = batch.turn_of_token, len(batch.turn_rows)  # (R,), N
            kl = ppo.turn_kl(old, initial, *turns)  # (N,) what is logged
            penalty = ppo.turn_kl(old, initial, *turns, product=True) if config.product_kl else kl  # (N,)
            rewards = ppo.turn_rewards(group).to(config.device) - config.beta * penalty  # (N,)
            returns = ppo.turn_returns(rewards, batch.turn_rows, config.gamma)  # (N,)
            targets = returns[batch.turn_of_token] if config.token_level_values else returns  # (v,)
            logprobs = behaviour, initial, old  # (R,) each
            prepared[-1].append(MicroBatch(group, batch, *logprobs, entropies, rewards, values, targets))
            measured.append([v.cpu() for v in (returns, targets, values, kl, entropies, old - behaviour)])
    distributed.free_gathered(policy, reference, critic)

    measured = gather(measured)
    # (N,), (v,), (v,), (N,), (R,), (R,) of all ranks
    returns, targets, values, kl, entropies, gap = map(torch.cat, zip(*measured, strict=True))
    advantages = ppo.advantages(targets, values).split([len(vectors[1]) for vectors in measured])  # (v,) each
    microbatches = [microbatch for minibatch in prepared for microbatch in minibatch]
    first = len(microbatches) * rank()  # every rank has the same number
    for microbatch, advantage in zip(microbatches, advantages[first:], strict=False):
        advantage = advantage.to(config.device)  # (v,)
        by_token = config.token_level_values
        microbatch.advantages = advantage if by_token else advantage[microbatch.batch.turn_of_token]  # (R,)
    episodes = [episode for minibatch in minibatches for group in minibatch for episode in group]
    return prepared, {
        "reward": ppo.turn_rewards(episodes).sum().item() / len(episodes),
        "return": returns.mean().item(),
        "kl": kl.mean().item(),
        "entropy": entropies.mean().item(),
        "explained_variance": ppo.explained_variance(values, targets),
        "behaviour_ratio": gap.exp().mean().item(),
        "behaviour_gap": gap.abs().max().item(),
    }


def update(policy, critic, optimisers, schedules, microbatches: list[MicroBatch], config: Config) -> dict:
    """One update of both networks on one minibatch; the number of micro-batches or ranks does not change it.

    Args: microbatches: those of this rank. Returns: statistics over all ranks.
    Raises: FloatingPointError if a loss or a gradient is not finite.
    """
    counts = [sum(len(m.old_logprobs) for m in microbatches), sum(len(m.returns) for m in microbatches)]
    tokens, values_read = distributed.total(counts)
    names = ("policy_loss", "value_loss", "ratio", "clip_fraction", "approximate_kl")
    measured, worst = [], []
    for m in microbatches:
        options, earlier = (config.temperature, config.logits_chunk), (m.old_logprobs, m.behaviour_logprobs)
        logprobs, _ = as_forward(ppo.response_logprobs, policy, m.batch, *options)  # (R,)
        policy_loss = ppo.policy_loss(logprobs, *earlier, m.advantages, config.clip).sum() / tokens  # ()
        policy_loss.backward()
        values = read_values(critic, m.batch, config)  # (v,)
        value_loss = ppo.value_loss(values, m.old_values, m.returns, config.clip).sum() / values_read  # ()
        value_loss.backward()
        log_ratio = (logprobs - m.old_logprobs).detach()  # (R,)
        ratio = log_ratio.exp()  # (R,)
        clipped = ppo.is_clipped(ppo.policy_ratio(logprobs, *earlier), m.advantages, config.clip)  # (R,)
        # The last one estimates KL(pi_old, pi); unlike the mean of -log_ratio it is never negative.
        means = ratio.sum() / tokens, clipped.sum() / tokens, (ratio - 1 - log_ratio).sum() / tokens
        measured.append(torch.stack([policy_loss.detach(), value_loss.detach(), *means]))  # (5,)
        worst.append((ratio - 1).abs().max())  # () no .item() here: it would wait for the device
    sums = dict(zip(names, torch.stack(measured).sum(0).tolist(), strict=True))
    if not np.isfinite(sums["policy_loss"] + sums["value_loss"]):
        losses = f"{sums['policy_loss']} and {sums['value_loss']}"
        raise FloatingPointError(f"rank {rank()}: the losses are {losses}")
    sums = dict(zip(sums, distributed.total([*sums.values()]), strict=True))
    sums["learning_rate"] = optimisers[0].param_groups[0]["lr"]
    sums["ratio_worst"] = max(gather([torch.stack(worst).max().item()]))
    networks = (("policy", policy), ("value", critic))
    for (name, network), optimiser, schedule in zip(networks, optimisers, schedules, strict=True):
        norm = sums[f"{name}_gradient"] = distributed.clip_gradients(network, config.max_gradient_norm)
        if not np.isfinite(norm):
            raise FloatingPointError(f"rank {rank()}: the {name} gradient is {norm}")
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return sums


def update_pass(setup: "Setup", prepared: list[list[MicroBatch]], iteration: int) -> dict:
    """One update for each minibatch. Returns: the means of their statistics."""
    updates: list[dict] = []
    for microbatches in prepared:
        try:
            updates.append(update(*setup.trainable, microbatches, setup.config))
        except FloatingPointError as error:
            place = f"iteration {iteration + 1}, update {len(updates) + 1}"
            good = (setup.run.checkpoints() or ["none"])[-1]
            raise FloatingPointError(f"{place}, {error}; last good checkpoint: {good}") from error
    means = {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
    worst = [u["ratio_worst"] for u in updates]
    return means | {"ratio_worst": max(worst), "first_ratio_worst": worst[0]}


# ---- before the first iteration ----------------------------------------------------------------------------


@dataclass
class Setup:
    """What `train` works with."""

    config: Config
    run: RunDirectory
    sampler: Sampler
    source: EpisodeSource
    reference: torch.nn.Module  # the initial policy, frozen
    trainable: tuple  # policy, critic, list of both optimisers, list of both schedules
    valid: Sequence[Problem]
    test: Sequence[Problem]


def load_networks(config: Config) -> tuple[torch.nn.Module, tuple]:
    """Load three networks from the same checkpoint. Returns: `reference` and `trainable` of a Setup."""
    trained = {"gradient_checkpointing": config.gradient_checkpointing, "state_dtype": "float32"}
    policy = load_model(**config.loading(), **trained)
    reference = load_model(**config.loading()).requires_grad_(False)
    critic = load_model(**config.loading(), **trained, wrap=lambda model: ValueModel(model, config.seed))
    optimisers = [
        torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=config.weight_decay)
        for network, rate in ((policy, config.learning_rate), (critic, config.value_learning_rate))
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / config.warmup_updates))
        for optimiser in optimisers
    ]
    return reference, (policy, critic, optimisers, schedules)


def in_checkpoint(trainable: tuple) -> dict[str, tuple]:
    """Network, optimiser and schedule under each network's name, as checkpoints.py expects them."""
    policy, critic, optimisers, schedules = trainable
    return {"policy": (policy, optimisers[0], schedules[0]), "critic": (critic, optimisers[1], schedules[1])}


@contextlib.contextmanager
def set_up(config: Config, stopped: Callable[[], bool]) -> Iterator[Setup | None]:
    """Check the input, load what training needs. A rank that only samples does so here, then yields None."""
    began = time.perf_counter()
    unsharded = config.dtype == "float32" and not config.cpu_offload
    workers = distributed.sandbox_workers()
    with Sandbox(workers) as sandbox, distributed.process_group(config.device, unsharded) as device:
        config = replace(config, device=device)
        if sandbox.layers_off and rank() == 0:
            print(f"sandbox: {sandbox.layers_off}", file=sys.stderr)
        config.check_ranks(ranks())
        run = RunDirectory(Path(config.output), bool(config.resume))
        asked = config.model  # empty: the toy's, wherever the project lies
        if not asked:
            if rank() == 0:
                toy.start_model(run.path.parent / "toy-base")
            distributed.barrier()
            config = replace(config, model=str(toy.start_model(run.path.parent / "toy-base")))
        check_architecture(distributed.load_config(config.model), config.context)
        chat = config.chat()
        training, valid, test = load_splits(config, chat)
        sampler = Sampler(config, chat, sandbox, training)
        first = run.progress["iteration"]
        if rank() == 0:
            run.path.mkdir(parents=True, exist_ok=True)
        if distributed.split_teams(config.rollout_ranks):
            sample_for_learners(sampler, first + bool(run.prefetched), stopped)
            yield None
            return
        reference, trainable = load_networks(config)
        check_logits(trainable[0], len(chat.tokenizer), config.context)
        if run.newest:
            updates = first * config.batch_episodes // config.minibatch_episodes
            restore_checkpoint(run.newest, in_checkpoint(trainable), updates)
        run.seconds.setdefault("start", time.perf_counter() - began)
        source = EpisodeSource(sampler, trainable[0], first, run.prefetched, stopped)
        run.begin(asdict(config) | {"model": asked, "resume": ""}, bool(config.resume))
        yield Setup(config, run, sampler, source, reference, trainable, valid, test)
        source.close()


# ---- evaluation --------------------------------------------------------------------------------------------


def keep_best(setup: Setup, policy) -> dict:
    """Evaluate on the valid split; export the policy if it is the best so far."""
    config, run = setup.config, setup.run
    problems = list(setup.valid) * config.evaluation_rollouts
    episodes = setup.sampler.sample(policy, problems, config.eval_sampling(), config.seed, others=setup.valid)
    solved = sum(episode.solved for episode in episodes) / len(episodes)
    if solved > run.progress["best"]:
        run.progress["best"] = solved
        export(policy, setup.sampler.chat.tokenizer, run.path / "best", config.dtype)
    return {"valid_solved": solved}


def probe(setup: Setup, policy) -> dict:
    """Results on the test problems with random and with true feedback, and the text of one episode."""
    config, result = setup.config, {}
    problems, others = list(setup.test) * config.evaluation_rollouts, setup.sampler.training
    for kind in ("random", "true"):  # true last: its episodes are used below
        settings = config.eval_sampling(kind)
        episodes = setup.sampler.sample(policy, problems, settings, config.seed, others=others)
        result[kind] = summarise([record(episode) for episode in episodes], config.turn_limit)
    shown = next((e for e in episodes if e.solved and len(e.turns) > 1), episodes[0])
    tokenizer, step = setup.sampler.chat.tokenizer, -(-len(setup.test) // EPISODES)
    records = [describe(episode, tokenizer, {}) for episode in episodes[: len(setup.test) : step]]
    return result | {"episode": show(tokenizer, shown), "episodes": records}


def finish(setup: Setup) -> dict:
    """After the last iteration: probe the best policy, print the table, write `result.json`."""
    config, run, after = setup.config, setup.run, None
    if not setup.valid or run.progress["best"] < 0:
        export(setup.trainable[0], setup.sampler.chat.tokenizer, run.path / "best", config.dtype)
    if setup.test:
        with timed(run.seconds, "probe"):
            policy = load_model(**config.loading() | {"model": str(run.path / "best")})
            after = probe(setup, policy.requires_grad_(False))
    result = {"before": run.progress["before"], "after": after, "seconds": run.seconds}
    if rank() == 0:
        if setup.test:
            print(before_and_after(result["before"], after), after["episode"], sep="\n")
        if config.iterations:
            plots.curves(run.path)
        print("seconds: " + ", ".join(f"{phase} {spent:.0f}" for phase, spent in run.seconds.items()))
        write_whole(run.path / "result.json", json.dumps(result, indent=1))
        if config.iterations:
            page.write(run.path)
    return result


if __name__ == "__main__":
    with distributed.friendly_errors("train.py"):
        config = parse_config()
        if config.plan:
            text, fits = report(config, config.ranks, config.gpu_gib * GIB)
            print(text)
            sys.exit(0 if fits else 2)
        train(config, StopRequest())
