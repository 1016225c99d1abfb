"""Exercise 3: the KL penalty of a turn.

The reward of a turn is R_t = r_t - beta KL_t. KL_t says how far the policy has moved from the initial one on
the tokens of this response: the log-ratio of the *geometric means* of their probabilities. How does it depend
on the length of a response?

Paper: section 2.2. Read first: the docstring of ppo.py. About 10 minutes.
Check: python exercises/e3_kl.py         Effect on learning: python exercises/e3_kl.py --effect
"""

import torch
from classroom import Task, checker, from_tree, main
from torch import Tensor


def turn_kl(logprobs: Tensor, reference_logprobs: Tensor, turn_of_token: Tensor, turns: int) -> Tensor:
    """KL_t of each turn, (N,).

    Args: logprobs (R,) under the policy and reference_logprobs (R,) under the initial policy, of all R
        response tokens; turn_of_token (R,) the turn, 0 to N - 1, of each token; turns: N. Every turn has
        a token.
    """
    raise NotImplementedError("turn_kl must return a tensor with one number for each turn")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

ours, mean = from_tree("ppo.py", "turn_kl", "mean_per_turn", torch=torch)


def sums(p, q, turn, n) -> Tensor:
    return p.new_zeros(n).index_add(0, turn, p - q)  # (N,)


WRONG = {  # each returns (N,)
    "product": sums,
    "one mean over the batch": lambda p, q, turn, n: (p - q).mean().expand(n),
    "sign": lambda p, q, turn, n: ours(q, p, turn, n),
    "never negative": lambda *given: ours(*given).clamp(min=0),
    "another estimator": lambda p, q, turn, n: mean((q - p).exp() - 1 - (q - p), turn, n),
    "masked tokens in the mean": lambda p, q, turn, n: sums(p, q, turn, n) / torch.bincount(turn).max(),
    "mean length": lambda p, q, turn, n: sums(p, q, turn, n) * n / len(p),
    "last token only": lambda p, q, turn, n: p.new_zeros(n).index_put((turn,), p - q) / turn.bincount(),
    "share of the batch": lambda p, q, turn, n: sums(p, q, turn, n) / len(p),
    "arithmetic means": lambda p, q, turn, n: (mean(p.exp(), turn, n) / mean(q.exp(), turn, n)).log(),
}
TURN = torch.tensor([0, 0, 1, 1, 1, 1, 2])  # (R,)
P, Q = torch.tensor([[-0.5, -0.1] * 3 + [-0.9], [-0.9, -0.3] * 3 + [-0.4]])  # (R,), (R,)
EXAMPLES = {"turns of two tokens, of four, and of one": (P, Q, TURN, 3)}


def larger(number: int) -> tuple:
    draw = torch.Generator().manual_seed(number)
    turn = torch.arange(7).repeat_interleave(torch.randint(1, 9, (7,), generator=draw))  # (R,)
    return *(-3 * torch.rand(2, len(turn), generator=draw)), turn, 7


TASKS = {"turn_kl": Task(ours, WRONG, EXAMPLES, larger)}
check = checker(TASKS, globals())


def install(turn_kl) -> dict:
    """Put the function in place of ours. Returns: the settings of train.py that it needs."""
    import ppo

    ppo.turn_kl = lambda p, q, turn_of_token, turns, product=False: turn_kl(p, q, turn_of_token, turns)
    return {}


if __name__ == "__main__":
    main(globals())

# The solution: turn_kl in ppo.py
