"""RLEF: train a language model to use execution feedback, with PPO.

Paper: Gehring et al., "Grounding Code LLMs in Execution Feedback with Reinforcement Learning", arXiv
2410.02089. `train` below is the algorithm, from top to bottom: rollouts, log-probs and values, rewards and
advantages, updates, evaluation.

    python train.py                                    # the offline toy world, on a laptop's CPU
    python train.py --preset 8b --model DIR --problems code_contests

Three networks start from the same checkpoint: the policy, the critic (its trunk), and the frozen initial
policy for the KL penalty. Where the paper runs sampling and training apart, asynchronously, here they take
turns in one process, so the policy that samples is the policy that is trained, and the behaviour ratio stays
near 1. Not here yet: several processes (FSDP2) and resuming a run; the 8b and 70b presets hold the paper's
numbers, but until then only what fits one device runs.

A run's directory holds `config.json`, `metrics.jsonl` (one object an iteration), `dialogs.txt` (a decoded
episode now and then), `best/` (a Hugging Face directory: the best policy on the valid split) and, with
matplotlib, `curves.png`.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy
from data import Problem, load_problems
from evaluate import evaluate
from ppo import (
    Batch,
    collate,
    explained_variance,
    mean_per_turn,
    normalise,
    policy_loss,
    response_logprobs,
    turn_kl,
    turn_returns,
    turn_rewards,
    value_loss,
)
from rollout import Episode, RolloutSettings, rollout, show
from sandbox import Sandbox
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
    dtype: str = option("float32", "type of the weights")
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
    batch_rows: int = option(256, "dialogs that are sampled at once")
    temperature: float = option(1.0, "sampling temperature in training")
    feedback: str = option("true", "feedback in training: true, random or none (ablations)")
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
)
PRESETS = {
    "toy": {},
    "8b": PAPER
    | dict(model="meta-llama/Llama-3.1-8B-Instruct", output="runs/8b", iterations=3000, batch_rows=64),
    "70b": PAPER
    | dict(model="meta-llama/Llama-3.1-70B-Instruct", output="runs/70b", iterations=2000, batch_rows=32),
}


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """The command line as a Config: a preset, then the flags that differ from it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="toy", help="a set of defaults (default: toy)")
    for entry in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if entry.type is bool else {"type": entry.type}
        text = f"{entry.metadata['help']} (default: {entry.default!r})".replace("%", "%%")
        parser.add_argument(f"--{entry.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(arguments))
    config = replace(Config(), **(PRESETS[given.pop("preset")] | given))
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
    return config


def load_model(config: Config):
    """A causal LM of the configuration, dropout off: with it on, the ratio would not start at 1."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.to(config.device)


def microbatches(episodes: Sequence[Episode], token_budget: int) -> list[list[int]]:
    """Positions of the episodes in groups of similar length whose padded size is within the budget."""
    groups: list[list[int]] = []
    for position in sorted(range(len(episodes)), key=lambda i: -len(episodes[i].ids)):
        # The first of a group is its longest, and so tells its padded width.
        if groups and len(episodes[groups[-1][0]].ids) * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


@dataclass
class Targets:
    """What the losses of one episode need: constants of the update phase.

    R response tokens, n turns, v values.
    """

    behaviour_logprobs: torch.Tensor  # (r,)
    old_logprobs: torch.Tensor  # (r,)
    advantages: torch.Tensor  # (r,)
    old_values: torch.Tensor  # (v,) v = n, or r with token-level values
    returns: torch.Tensor  # (v,)


def value_positions(batch: Batch, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns (v,) at which the critic is read: the last prompt token of each turn, or before each
    token.
    """
    if config.token_level_values:
        return batch.token_rows, batch.token_columns - 1
    return batch.turn_rows, batch.prompt_columns


@torch.no_grad()
def prepare(policy, reference, critic, episodes: list[Episode], config: Config) -> tuple[list[Targets], dict]:
    """Log-probs, values, rewards, returns and advantages of a batch of rollouts, and their statistics."""
    sizes = [sum(turn.end - turn.start for turn in episode.turns) for episode in episodes]
    old, initial, entropies, values = ([None] * len(episodes) for _ in range(4))
    for group in microbatches(episodes, config.microbatch_tokens):
        batch = collate([episodes[i] for i in group], config.device)
        logprobs, entropy = response_logprobs(
            policy, batch, config.temperature, config.logits_chunk
        )  # (R,), (R,)
        reference_logprobs, _ = response_logprobs(
            reference, batch, config.temperature, config.logits_chunk
        )  # (R,)
        value = critic(batch.ids, *value_positions(batch, config))  # (v,)
        tokens = [sizes[i] for i in group]
        turns = tokens if config.token_level_values else [len(episodes[i].turns) for i in group]
        for store, tensor, split in (
            (old, logprobs, tokens),
            (initial, reference_logprobs, tokens),
            (entropies, entropy, tokens),
            (values, value, turns),
        ):
            for i, piece in zip(group, tensor.float().cpu().split(split), strict=True):
                store[i] = piece

    whole = collate(episodes, torch.device("cpu"))
    of_token = whole.turn_of_token  # (R,)
    count = len(whole.turn_rows)
    old_logprobs, old_values = torch.cat(old), torch.cat(values)  # (R,), (v,)
    behaviour = torch.tensor(
        [p for e in episodes for turn in e.turns for p in turn.behaviour_logprobs]
    )  # (R,)
    kl = turn_kl(old_logprobs, torch.cat(initial), of_token, count, config.product_kl)  # (N,)
    rewards = turn_rewards(episodes) - config.beta * kl  # (N,)
    returns = turn_returns(rewards, whole.turn_rows, config.gamma)  # (N,)
    if config.token_level_values:
        target = returns[of_token]  # (R,)
        advantages = normalise(target - old_values)  # (R,)
    else:
        target = returns  # (N,)
        advantages = normalise(returns - old_values)[of_token]  # (R,)

    turns = [len(e.turns) for e in episodes]
    parts = sizes if config.token_level_values else turns
    pieces = zip(
        behaviour.split(sizes),
        old,
        advantages.split(sizes),
        old_values.split(parts),
        target.split(parts),
        strict=True,
    )
    statistics = {
        "reward": turn_rewards(episodes).sum().item() / len(episodes),
        "return": returns.mean().item(),
        "kl": mean_per_turn(old_logprobs - torch.cat(initial), of_token, count).mean().item(),
        "entropy": torch.cat(entropies).mean().item(),
        "explained_variance": explained_variance(old_values, target),
        "behaviour_ratio": (old_logprobs - behaviour).exp().mean().item(),
        "behaviour_gap": (old_logprobs - behaviour).abs().max().item(),
    }
    return [Targets(*piece) for piece in pieces], statistics


def update(policy, critic, optimisers, schedules, episodes, targets: list[Targets], config: Config) -> dict:
    """One update of both networks on one minibatch, cut into micro-batches that do not change the
    gradient.
    """
    tokens = sum(len(target.old_logprobs) for target in targets)
    values_read = sum(len(target.returns) for target in targets)
    sums = dict.fromkeys(("policy_loss", "value_loss", "ratio", "clip_fraction", "approximate_kl"), 0.0)
    worst = 0.0
    for group in microbatches(episodes, config.microbatch_tokens):
        batch = collate([episodes[i] for i in group], config.device)
        behaviour, old, advantages, old_values, returns = (
            torch.cat([getattr(targets[i], entry.name) for i in group]).to(config.device)
            for entry in fields(Targets)
        )  # (R,), (R,), (R,), (v,), (v,)
        logprobs, _ = response_logprobs(policy, batch, config.temperature, config.logits_chunk)  # (R,)
        loss = policy_loss(logprobs, old, behaviour, advantages, config.clip).sum() / tokens
        loss.backward()
        values = critic(batch.ids, *value_positions(batch, config))  # (v,)
        error = value_loss(values, old_values, returns, config.clip).sum() / values_read
        error.backward()
        log_ratio = (logprobs - old).detach()  # (R,)
        ratio = log_ratio.exp()  # (R,)
        sums["policy_loss"] += loss.item()
        sums["value_loss"] += error.item()
        sums["ratio"] += ratio.sum().item() / tokens
        sums["clip_fraction"] += ((ratio - 1).abs() > config.clip).sum().item() / tokens
        sums["approximate_kl"] += (ratio - 1 - log_ratio).sum().item() / tokens
        worst = max(worst, (ratio - 1).abs().max().item())
    norms = []
    for network, optimiser, schedule in zip((policy, critic), optimisers, schedules, strict=True):
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_gradient_norm).item())
        if not np.isfinite(norms[-1]):
            raise RuntimeError(f"the gradient's norm is {norms[-1]}: losses {sums}")
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return sums | {"ratio_worst": worst, "policy_gradient": norms[0], "value_gradient": norms[1]}


def rollout_statistics(episodes: list[Episode], turn_limit: int) -> dict:
    """What one sees of the sampled dialogs themselves."""
    turns = [turn for episode in episodes for turn in episode.turns]
    later = [pair for e in episodes for pair in zip(e.turns, e.turns[1:], strict=False)]
    return {
        "solved": sum(e.solved for e in episodes) / len(episodes),
        "solved_by_turn": [
            sum(e.solved and len(e.turns) <= limit for e in episodes) / len(episodes)
            for limit in range(1, turn_limit + 1)
        ],
        "invalid_code": sum(turn.code is None for turn in turns) / len(turns),
        "truncated_responses": sum(turn.truncated for turn in turns) / len(turns),
        "truncated_dialogs": sum(e.truncated for e in episodes) / len(episodes),
        "repeats": sum(a.text == b.text for a, b in later) / max(1, len(later)),
        "response_tokens": sum(turn.end - turn.start for turn in turns) / len(turns),
    }


def draw_problems(problems: Sequence[Problem], iteration: int, config: Config) -> list[Problem]:
    """The problems of an iteration: whole passes over the training set, each in an order of its own."""
    first = iteration * config.batch_episodes
    positions = range(first, first + config.batch_episodes)
    orders = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(len(problems))
        for epoch in {position // len(problems) for position in positions}
    }
    return [problems[int(orders[p // len(problems)][p % len(problems)])] for p in positions]


def save_policy(policy, tokenizer, directory: Path) -> None:
    """Write a Hugging Face directory beside `directory`, then rename: what stands there is always whole."""
    beside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(directory, ignore_errors=True)
    beside.rename(directory)


def probe(
    policy, tokenizer, problems, others, sandbox: Sandbox, settings: RolloutSettings, config: Config
) -> dict:
    """Solved with true and with random feedback, the paper's probe of grounding."""
    summaries = {}
    for kind in ("true", "random"):
        setting = replace(settings, feedback=kind)
        summaries[kind], summaries[f"{kind}_episodes"] = evaluate(
            policy, tokenizer, problems, sandbox, setting, config.evaluation_rollouts, config.seed, others
        )
    return summaries


def table(before: dict, after: dict) -> str:
    """Test problems before and after training."""
    rows = [f"{'test problems':<34}{'before':>8}{'after':>8}"]

    def line(name: str, read) -> None:
        rows.append(f"{name:<34}{read(before):>8.3f}{read(after):>8.3f}")

    for turn in range(len(before["true"]["solved_by_turn"])):
        line(
            f"solved within turn {turn + 1}, true feedback", lambda p, t=turn: p["true"]["solved_by_turn"][t]
        )
    line("solved, random feedback", lambda p: p["random"]["solved"])
    line("true minus random", lambda p: p["true"]["solved"] - p["random"]["solved"])
    line("repeats after feedback", lambda p: p["true"]["repeats"])
    for group in sorted(before["true"]["by_group"]):
        line(f"solved: {group or 'all'}", lambda p, g=group: p["true"]["by_group"][g])
    return "\n".join(rows)


def plot(run: Path) -> None:
    """Curves of a run's metrics.jsonl as curves.png, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("curves.png left out: matplotlib is not installed")
        return
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    iterations = [entry["iteration"] for entry in metrics]
    for turn in range(len(metrics[0]["solved_by_turn"])):
        curve = [entry["solved_by_turn"][turn] for entry in metrics]
        panels[0].plot(iterations, curve, label=f"within turn {turn + 1}")
    panels[0].set(xlabel="iteration", ylabel="share solved while sampling", ylim=(0, 1))
    panels[1].plot(iterations, [entry["repeats"] for entry in metrics], label="repeats its last response")
    panels[1].plot(iterations, [entry["invalid_code"] for entry in metrics], label="no valid code")
    panels[1].set(xlabel="iteration", ylabel="share of responses")
    panels[2].plot(
        iterations, [entry["kl"] for entry in metrics], label="KL to the initial policy (nats a token)"
    )
    panels[2].plot(iterations, [entry["explained_variance"] for entry in metrics], label="explained variance")
    panels[2].set(xlabel="iteration")
    for panel in panels:
        panel.legend()
    figure.savefig(run / "curves.png", dpi=120)
    pyplot.close(figure)


def train(config: Config) -> dict:
    """Train a policy as `config` says; returns the probes on test problems before and after."""
    began = time.perf_counter()
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    run = Path(config.output)
    run.mkdir(parents=True, exist_ok=True)
    if not config.model:
        config = replace(config, model=str(toy.ensure_base(run.parent / "toy-base", seed=0)))
    (run / "config.json").write_text(json.dumps(asdict(config), indent=1))

    def split(name: str) -> Sequence[Problem]:
        problems = load_problems(config.problems, name) if name else []
        return problems[: config.limit_problems] if config.limit_problems else problems

    training, valid, test = split(config.train_split), split(config.valid_split), split(config.test_split)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    if config.chat_template:
        tokenizer.chat_template = Path(config.chat_template).read_text()
    policy = load_model(config)
    reference = load_model(config).requires_grad_(False)
    critic = ValueModel(load_model(config)).to(config.device)
    optimisers = [
        torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=config.weight_decay)
        for network, rate in ((policy, config.learning_rate), (critic, config.value_learning_rate))
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / config.warmup_updates))
        for optimiser in optimisers
    ]
    sampling = RolloutSettings(
        config.turn_limit,
        config.max_new_tokens,
        config.context,
        config.temperature,
        feedback=config.feedback,
        batch_rows=config.batch_rows,
    )
    judging = replace(
        sampling, temperature=config.evaluation_temperature, top_p=config.evaluation_top_p, feedback="true"
    )
    seconds = {"start": time.perf_counter() - began}
    metrics_file = (run / "metrics.jsonl").open("w")
    dialogs_file = (run / "dialogs.txt").open("w")

    with Sandbox() as sandbox:
        before = probe(policy, tokenizer, test, training, sandbox, judging, config) if test else None
        if before:
            print(
                f"before: {before['true']['solved']:.3f} solved, "
                f"{before['random']['solved']:.3f} with random feedback"
            )
        seconds["probe"] = time.perf_counter() - began - seconds["start"]
        best = -1.0
        bar = tqdm(range(config.iterations), desc="RLEF", unit="iteration")
        for iteration in bar:
            clock = [time.perf_counter()]
            episodes = rollout(
                policy,
                tokenizer,
                draw_problems(training, iteration, config),
                sandbox,
                sampling,
                seed=config.seed + 1,
                first_index=iteration * config.batch_episodes,
                feedback_problems=training,
            )
            clock.append(time.perf_counter())
            targets, statistics = prepare(policy, reference, critic, episodes, config)
            clock.append(time.perf_counter())
            updates = []
            order = np.random.default_rng([config.seed, 1, iteration]).permutation(len(episodes))
            for start in range(0, len(order), config.minibatch_episodes):
                chosen = order[start : start + config.minibatch_episodes]
                updates.append(
                    update(
                        policy,
                        critic,
                        optimisers,
                        schedules,
                        [episodes[i] for i in chosen],
                        [targets[i] for i in chosen],
                        config,
                    )
                )
            clock.append(time.perf_counter())
            entry = (
                {"iteration": iteration + 1} | rollout_statistics(episodes, config.turn_limit) | statistics
            )
            entry |= {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
            entry |= {
                "first_ratio_worst": updates[0]["ratio_worst"],
                "learning_rate": schedules[0].get_last_lr()[0],
            }
            last = iteration + 1 == config.iterations
            if valid and (last or (iteration + 1) % config.evaluate_every == 0):
                summary, _ = evaluate(
                    policy, tokenizer, valid, sandbox, judging, config.evaluation_rollouts, config.seed
                )
                entry["valid_solved"] = summary["solved"]
                if summary["solved"] > best:
                    best = summary["solved"]
                    save_policy(policy, tokenizer, run / "best")
            clock.append(time.perf_counter())
            entry["seconds"] = dict(
                zip(("rollout", "prepare", "update", "evaluate"), np.diff(clock).tolist(), strict=True)
            )
            for phase, spent in entry["seconds"].items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
            metrics_file.write(json.dumps(entry) + "\n")
            metrics_file.flush()
            if iteration % config.show_every == 0 or last:
                dialogs_file.write(f"iteration {iteration + 1}\n{show(tokenizer, episodes[0])}\n\n")
                dialogs_file.flush()
            bar.set_postfix_str(
                f"solved {' '.join(f'{s:.2f}' for s in entry['solved_by_turn'])} "
                f"repeats {entry['repeats']:.2f} "
                f"kl {entry['kl']:.3f} valid {max(best, 0):.2f}"
            )
        if not valid:
            save_policy(policy, tokenizer, run / "best")
        metrics_file.close()
        dialogs_file.close()
        after = None
        if test:
            started = time.perf_counter()
            policy = load_model(replace(config, model=str(run / "best")))
            after = probe(policy, tokenizer, test, training, sandbox, judging, config)
            seconds["probe"] += time.perf_counter() - started
            print(table(before, after))
            episodes = after["true_episodes"]
            print(show(tokenizer, next((e for e in episodes if e.solved and len(e.turns) > 1), episodes[0])))
    if config.iterations:
        plot(run)
    print("seconds: " + ", ".join(f"{phase} {spent:.0f}" for phase, spent in seconds.items()))
    result = {"before": before, "after": after, "seconds": seconds}
    numbers = {
        name: {kind: value[kind] for kind in ("true", "random")} if value and name != "seconds" else value
        for name, value in result.items()
    }
    (run / "result.json").write_text(json.dumps(numbers, indent=1))
    return result


if __name__ == "__main__":
    try:
        train(parse_config())
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
