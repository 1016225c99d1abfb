"""PPO for whole responses: rewards, returns, advantages and both losses, as pure functions on tensors.

Paper: section 2.2. The whole objective, in the order in which it is computed. A dialog has turns t = 1..T;
the response of turn t has tokens i = 1..n; its prompt c_t is the dialog so far. pi is the policy in training,
pi_old the policy before the updates, pi_b the one that sampled, rho the initial policy, V the critic;
beta = 0.05, gamma = 1, and e = 0.2 is the clip range (config.py).

    r_t     last turn: +1 if all tests pass, else -1; before: -0.2 without valid code, else 0   turn_rewards
    KL_t    1/n sum_i (log pi_old - log rho), the log-ratio of geometric means over the tokens  turn_kl
    R_t     r_t - beta KL_t
    G_t     R_t + gamma G_t+1                                                                   turn_returns
    V_t     V_old(c_t), read at the last token of the prompt: it has not seen the response      value_head.py
    A_t     G_t - V_t, normalised to mean 0 and deviation 1 over all turns of the batch         advantages
    w_i     min(pi / pi_b, 1) with the current pi, but without gradient                         policy_ratio
    ratio_i w_i pi / pi_old                                                                     policy_ratio
    policy  -min(ratio_i A_t, clip(ratio_i, 1 - e, 1 + e) A_t), mean over all tokens            policy_loss
    value   1/2 max((V - G_t)^2, (clip(V, V_t - e, V_t + e) - G_t)^2), mean over all turns      value_loss

Every token of a response gets the advantage of its turn. KL_t is a mean: length is not penalised. w
corrects for tokens that other weights or kernels sampled: if pi_b is pi_old it is 1 at the first update, and
later below 1 for each token that has become less likely. Differs from common PPO code: no GAE.

After `collate` a quantity of the batch's R response tokens is a vector (R,), one of its N turns a vector
(N,); neither contains prompts or feedback. `python ppo.py` shows an example.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rollout import Episode, Turn
from sampling import group_by_length
from value_head import tail_logits, trunk_of


@dataclass
class Batch:
    """Some dialogs as tensors. R response tokens, N turns, in the order of the episodes."""

    ids: torch.Tensor  # (B, T) whole dialogs, padded at the right with 0
    token_rows: torch.Tensor  # (R,) which dialog a response token is in
    token_columns: torch.Tensor  # (R,) at which position of the dialog
    turn_of_token: torch.Tensor  # (R,) which turn it belongs to, 0..N-1
    turn_rows: torch.Tensor  # (N,) which dialog a turn is in
    prompt_columns: torch.Tensor  # (N,) position of the last token of its prompt


def collate(episodes: Sequence[Episode], device: torch.device) -> Batch:
    """Dialogs as tensors; the response tokens are exactly the sampled ids, the end token included."""
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


def microbatches(
    episodes: Sequence[Episode], token_budget: int, ranks: int = 1, device: str = "cpu"
) -> list[list[Episode]]:
    """The episodes in groups of similar length whose padded size is within the budget.

    All ranks must run the same number of forward passes, so the number of groups is a multiple of `ranks`;
    the number of episodes must be one too.
    """
    groups = group_by_length(episodes, lambda episode: len(episode.ids), token_budget, device)
    while len(groups) % ranks:
        largest = max(range(len(groups)), key=lambda g: len(groups[g]))
        middle = len(groups[largest]) // 2
        groups[largest : largest + 1] = groups[largest][:middle], groups[largest][middle:]
    return groups


# ---- log-probabilities -------------------------------------------------------------------------------------


def chunked_logprobs(
    hidden: torch.Tensor, head: Callable, targets: torch.Tensor, temperature: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of `targets` and entropies; the (R, V) logits never exist at once.

    Logits of `chunk` tokens are computed, used and dropped; the backward pass computes them again. They are
    in fp32, because the log-softmax of bf16 logits has an error of 0.03 per token.

    Args: hidden (R, D) before each target; head: D -> V; targets (R,); temperature of the sampling.
    Returns: log-probs (R,), entropies (R,); None instead of these where gradients are computed.
    """

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs = torch.log_softmax(head(hidden).float() / temperature, dim=-1)  # (chunk, V)
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]  # (chunk,)
        if torch.is_grad_enabled():
            return chosen, None
        return chosen, -(logprobs.exp() * logprobs).sum(-1)  # (chunk,), (chunk,)

    chunks = [*zip(hidden.split(chunk), targets.split(chunk), strict=True)]
    if len(chunks) == 1:
        computed = [of_chunk(hidden, targets)]
    else:
        computed = [checkpoint(of_chunk, *inputs, use_reentrant=False) for inputs in chunks]
    logprobs, entropies = zip(*computed, strict=True)
    return torch.cat(logprobs), None if entropies[0] is None else torch.cat(entropies)  # (R,), (R,)


def response_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs and entropies, (R,) each, of all response tokens, from one forward over the whole dialogs.

    Where gradients are computed, None instead of the entropies. Sampling divided the logits by `temperature`:
    training must do the same, or the ratio does not start at 1.
    """
    output = trunk_of(model)(batch.ids, use_cache=False)  # last_hidden_state (B, T, D)
    hidden = output.last_hidden_state[batch.token_rows, batch.token_columns - 1]  # (R, D)
    targets = batch.ids[batch.token_rows, batch.token_columns]  # (R,)
    return chunked_logprobs(hidden, partial(tail_logits, model, output), targets, temperature, chunk)


# ---- rewards, returns, advantages --------------------------------------------------------------------------


def mean_per_turn(values: torch.Tensor, turn_of_token: torch.Tensor, turns: int) -> torch.Tensor:
    """Mean of a per-token quantity (R,) over each turn, (N,)."""
    sums = values.new_zeros(turns).index_add(0, turn_of_token, values)  # (N,)
    return sums / torch.bincount(turn_of_token, minlength=turns)  # (N,)


def turn_kl(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    turn_of_token: torch.Tensor,
    turns: int,
    product=False,
) -> torch.Tensor:
    """KL estimate of each turn, (N,), from the log-probs (R,) of policy and initial policy (section 2.2).

    The log-ratio of the geometric means of the token probabilities: a mean over the tokens of the response.
    `product` (ablation): of their products, a sum, which grows with the length of the response.
    """
    log_ratio = logprobs - reference_logprobs  # (R,)
    if product:
        return log_ratio.new_zeros(turns).index_add(0, turn_of_token, log_ratio)  # (N,)
    return mean_per_turn(log_ratio, turn_of_token, turns)  # (N,)


def turn_rewards(episodes: Sequence[Episode]) -> torch.Tensor:
    """r_t of all turns, (N,), without the KL penalty.

    The last turn: +1 if all tests pass, else -1, also without valid code. Every earlier turn: -0.2 without
    valid code, else 0 (it never passes: passing the public tests would have ended the episode).
    """
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
    """Mean 0 and deviation 1 over all turns of the whole batch, (N,); 0 if they differ by rounding only."""
    deviation = advantages.std(correction=0)  # ()
    if deviation <= 1e-5 * advantages.abs().max():
        return torch.zeros_like(advantages)  # (N,)
    return (advantages - advantages.mean()) / (deviation + eps)  # (N,)


def advantages(returns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A_t of all turns, (N,), from G_t and V_old(c_t), (N,) each.

    The one place that decides what a return is compared with. Another baseline (the mean of the batch as in
    REINFORCE, the mean of a problem's rollouts as in GRPO) is an edit here.
    """
    return normalise(returns - values)  # (N,)


# ---- losses ------------------------------------------------------------------------------------------------


def policy_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor
) -> torch.Tensor:
    """pi / pi_old * min(pi / pi_b, 1) of each response token, (R,); the second factor has no gradient."""
    correction = (logprobs - behaviour_logprobs).exp().clamp(max=1).detach()  # (R,)
    return (logprobs - old_logprobs).exp() * correction  # (R,)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip: float = 0.2,
) -> torch.Tensor:
    """Clipped loss of each response token, (R,); all arguments (R,), only `logprobs` has a gradient.

    Not averaged: the caller divides the sum by the number of response tokens of the whole minibatch, on all
    ranks, so that neither micro-batches nor ranks change the gradient.
    """
    ratio = policy_ratio(logprobs, old_logprobs, behaviour_logprobs)  # (R,)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)  # (R,)


def is_clipped(ratio: torch.Tensor, advantages: torch.Tensor, clip: float = 0.2) -> torch.Tensor:
    """Which tokens `policy_loss` clips, bool (R,): those that get no gradient from it."""
    return ratio * advantages > ratio.clamp(1 - clip, 1 + clip) * advantages  # (R,)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float = 0.2
) -> torch.Tensor:
    """Clipped squared error of each value, (N,); the caller averages over the minibatch, on all ranks."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (N,)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)  # (N,)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float | None:
    """1 - Var(G - V) / Var(G), both (N,): 1 is perfect, 0 is a constant V; None where G is constant."""
    variance = returns.var(correction=0)  # ()
    return None if variance == 0 else float(1 - (returns - values).var(correction=0) / variance)


def worked_example() -> None:
    """The objective on one episode of two turns, number by number."""

    def show(name: str, numbers: torch.Tensor) -> torch.Tensor:
        print(f"{name:<36}" + "".join(f"{round(number, 3):>8}" for number in numbers.float().tolist()))
        return numbers

    print("An episode: the first response has no valid code, the second passes every test.")
    turns = [Turn(2, 4, []), Turn(6, 9, [], code="print(1)")]
    episode = Episode(None, list(range(9)), turns, public_passed=True, solved=True, truncated=False, index=0)
    batch = collate([episode], torch.device("cpu"))
    show("turn of each response token", batch.turn_of_token + 1)
    old = show("log pi_old = log pi_b", torch.tensor([-0.5, -0.1, -0.9, -0.2, -0.3]))  # (R,)
    initial = show("log rho", torch.tensor([-0.7, -0.1, -1.2, -0.2, -0.3]))  # (R,)
    rewards = show("r_t", turn_rewards([episode]))  # (N,)
    kl = show("KL_t", turn_kl(old, initial, batch.turn_of_token, len(turns)))  # (N,)
    penalised = show("R_t = r_t - 0.05 KL_t", rewards - 0.05 * kl)  # (N,)
    returns = show("G_t = R_t + G_t+1", turn_returns(penalised, batch.turn_rows))  # (N,)
    values = show("V_t", torch.tensor([0.6, -0.2]))  # (N,)
    normalised = show("A_t, normalised over the two turns", advantages(returns, values))  # (N,)
    token_advantages = normalised[batch.turn_of_token]  # (R,)
    new = show("log pi, after an update", old + torch.tensor([-0.3, 0.0, 0.3, 0.1, -0.1]))  # (R,)
    show("w_i = min(pi / pi_b, 1)", (new - old).exp().clamp(max=1))
    ratio = show("ratio_i = w_i pi / pi_old", policy_ratio(new, old, old))  # (R,)
    loss = show("policy loss", policy_loss(new, old, old, token_advantages))  # (R,)
    show("clipped (1) or not (0)", is_clipped(ratio, token_advantages))
    show("value loss, V as before", value_loss(values, values, returns))
    print(f"mean policy loss of the tokens: {loss.mean():.3f}")


if __name__ == "__main__":
    worked_example()
