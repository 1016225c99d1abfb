"""PPO for whole responses: rewards, returns, advantages and both losses, as pure functions on tensors.

Paper: section 2.2. Three things differ from the PPO of other language-model code:

1. The reward, the return and the advantage belong to a *turn*. Every token of a response gets the one
   advantage of its turn: A_t = G_t - V(c_t), with G_t = sum over i >= t of R_i. No GAE, gamma 1.
2. The KL penalty of a turn compares the *geometric means* of the token probabilities, pi^(1/n) and
   rho^(1/n): the mean log-ratio rather than its sum. A long response is not punished for being long.
3. The ratio carries min(pi / pi_b, 1) as a constant factor, for rollouts that were sampled by other weights
   or kernels (pi_b, recorded while sampling) than those of the update's start (pi_old, recomputed by the
   same forward that is trained).

Shapes. B dialogs of up to T tokens are padded at the right: attention is causal, so padding changes nothing
and needs no mask. From there on there is no padding either: the R response tokens of a batch lie behind one
another, (R,), its N turns likewise, (N,), and `turn_of_token` (R,) says whose token is whose. There is no
response mask that could be off by one: prompts and feedback never enter these vectors. `collate` is the only
place that turns positions into indices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rollout import Episode


@dataclass
class Batch:
    """Some dialogs as tensors. R response tokens, N turns, in the order of the episodes."""

    ids: torch.Tensor  # (B, T) whole dialogs, padded at the right with 0
    token_rows: torch.Tensor  # (R,) which dialog a response token stands in
    token_columns: torch.Tensor  # (R,) where in it
    turn_of_token: torch.Tensor  # (R,) which turn it belongs to, 0..N-1
    turn_rows: torch.Tensor  # (N,) which dialog a turn stands in
    prompt_columns: torch.Tensor  # (N,) the last token of its prompt


def collate(episodes: Sequence[Episode], device: torch.device) -> Batch:
    """Dialogs to tensors; the response tokens are exactly the sampled ids, the end token included."""
    width = max(len(episode.ids) for episode in episodes)
    spans = [(row, turn.start, turn.end) for row, e in enumerate(episodes) for turn in e.turns]
    tokens = [(row, column, n) for n, (row, start, end) in enumerate(spans) for column in range(start, end)]
    rows, columns, turns = torch.tensor(tokens, device=device).T  # (R,) each
    return Batch(
        ids=torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in episodes], device=device),  # (B, T)
        token_rows=rows,
        token_columns=columns,
        turn_of_token=turns,
        turn_rows=torch.tensor([row for row, _, _ in spans], device=device),  # (N,)
        prompt_columns=torch.tensor([start - 1 for _, start, _ in spans], device=device),  # (N,)
    )


def microbatches(episodes: Sequence[Episode], token_budget: int, parts: int = 1) -> list[list[int]]:
    """Positions of the episodes in groups of similar length whose padded size is within the budget.

    Their number is a multiple of `parts`, as ranks must run equally many; that of the episodes must be too.
    """
    groups: list[list[int]] = []
    for position in sorted(range(len(episodes)), key=lambda i: -len(episodes[i].ids)):
        # The first of a group is its longest, and so tells its padded width.
        if groups and len(episodes[groups[-1][0]].ids) * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    while len(groups) % parts:
        at = max(range(len(groups)), key=lambda g: len(groups[g]))
        middle = len(groups[at]) // 2
        groups[at : at + 1] = groups[at][:middle], groups[at][middle:]
    return groups


# ---- log-probabilities -------------------------------------------------------------------------------------


def chunked_logprobs(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, temperature: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `targets` and entropies, without ever holding (R, V) floats.

    Logits of `chunk` tokens are made, used and dropped; the backward pass makes them again. In fp32: the
    log-softmax of bf16 logits errs by 0.03 a token.

    Args: hidden (R, D) in front of each target; head: D -> V; targets (R,); temperature that was sampled at.
    Returns: log-probs (R,), entropies (R,) without gradient.
    """

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.log_softmax(head(hidden).float() / temperature, dim=-1)  # (chunk, V)
        with torch.no_grad():
            entropies = -(logprobs.exp() * logprobs).sum(-1)  # (chunk,)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropies

    pieces = [
        checkpoint(of_chunk, *piece, use_reentrant=False)
        for piece in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)  # (R,), (R,)


def response_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, (R,) each, of all response tokens, from one forward over the whole dialogs.

    Sampling divided the logits by `temperature`, so training must too, or the ratio is not 1 at the start.
    """
    hidden = model.get_decoder()(batch.ids, use_cache=False).last_hidden_state  # (B, T, D)
    before = hidden[batch.token_rows, batch.token_columns - 1]  # (R, D)
    targets = batch.ids[batch.token_rows, batch.token_columns]  # (R,)
    return chunked_logprobs(before, model.get_output_embeddings(), targets, temperature, chunk)


# ---- rewards, returns, advantages --------------------------------------------------------------------------


def mean_per_turn(values: torch.Tensor, turn_of_token: torch.Tensor, turns: int) -> torch.Tensor:
    """Mean of a per-token quantity (R,) over each turn, (N,)."""
    sums = values.new_zeros(turns).index_add(0, turn_of_token, values)  # (N,)
    return sums / torch.bincount(turn_of_token, minlength=turns)


def turn_kl(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    turn_of_token: torch.Tensor,
    turns: int,
    product=False,
) -> torch.Tensor:
    """KL estimate of each turn, (N,), from the log-probs (R,) of policy and initial policy (section 2.2).

    Log-ratio of the geometric means of the token probabilities; `product`: of their products (ablation).
    """
    log_ratio = logprobs - reference_logprobs  # (R,)
    if product:
        return log_ratio.new_zeros(turns).index_add(0, turn_of_token, log_ratio)  # (N,)
    return mean_per_turn(log_ratio, turn_of_token, turns)


def turn_rewards(episodes: Sequence[Episode]) -> torch.Tensor:
    """r_t of all turns, (N,): +1 or -1 for the solution; before it -0.2 without valid code, else 0."""
    rewards = []
    for episode in episodes:
        rewards += [-0.2 if turn.code is None else 0.0 for turn in episode.turns[:-1]]
        rewards.append(1.0 if episode.solved else -1.0)
    return torch.tensor(rewards)  # (N,)


def turn_returns(rewards: torch.Tensor, turn_rows: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """G_t = R_t + gamma * G_{t+1} within each episode, (N,); its turns are neighbours in `turn_rows` (N,)."""
    returns = rewards.clone()  # (N,)
    for n in range(len(rewards) - 2, -1, -1):
        if turn_rows[n] == turn_rows[n + 1]:
            returns[n] += gamma * returns[n + 1]
    return returns


def normalise(advantages: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Zero mean and unit deviation over all turns of the whole batch, (N,)."""
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + eps)


# ---- losses ------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip: float = 0.2,
) -> torch.Tensor:
    """Clipped loss of each response token, (R,); all arguments (R,), only `logprobs` has a gradient.

    Not yet averaged: the caller divides the sum by the number of response tokens of the whole minibatch, on
    all ranks, so that neither micro-batches nor ranks change the gradient.
    """
    correction = (logprobs - behaviour_logprobs).exp().clamp(max=1).detach()  # (R,) min(pi / pi_b, 1)
    ratio = (logprobs - old_logprobs).exp() * correction  # (R,)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float = 0.2
) -> torch.Tensor:
    """Clipped squared error of each value, (N,); the caller averages over the minibatch, on all ranks."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (N,)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(G - V) / Var(G), both (N,): 1 is perfect, 0 knows the mean; nan where G is constant."""
    variance = returns.var(correction=0)
    return float("nan") if variance == 0 else float(1 - (returns - values).var(correction=0) / variance)
