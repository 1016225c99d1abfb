"""Exercise 5: the policy loss.

Every token of a response gets the advantage of its turn. PPO multiplies it by ratio_i = w_i pi / pi_old, and
clips. w_i = min(pi / pi_b, 1), for what another policy pi_b sampled, is a weight: it has no gradient. Why is
there a gradient at all at the first update, when pi equals pi_old?

Paper: section 2.2. Read first: the docstring of ppo.py, then run `python ppo.py`. About 15 minutes.
Check: python exercises/e5_policy_loss.py         Effect: python exercises/e5_policy_loss.py --effect
"""

import torch
from classroom import Task, checker, from_tree, loss_and_gradient, main
from torch import Tensor


def policy_loss(
    new: Tensor, old: Tensor, behaviour: Tensor, advantages: Tensor, turn: Tensor, clip: float
) -> Tensor:
    """The mean over all response tokens of -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), one number.

    Args: new, old, behaviour: log-probs (R,) of pi (only these have a gradient), of pi_old and of pi_b;
        advantages (R,); turn (R,) the number of the turn of each token, 0 to N - 1.
    """
    raise NotImplementedError("policy_loss must return a tensor with one number, the mean over the tokens")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

loss, ratio, mean = from_tree("ppo.py", "policy_loss", "policy_ratio", "mean_per_turn", torch=torch)


def ours(new, old, behaviour, A, turn, clip) -> Tensor:
    return loss(new, old, behaviour, A, clip).mean()  # ()


def clipped(ratio, A, low, high) -> Tensor:
    return -torch.minimum(ratio * A, ratio.clamp(low, high) * A).mean()  # ()


def with_ratio(of):
    return lambda p, old, b, A, turn, e: clipped(of(p, old, b), A, 1 - e, 1 + e)  # ()


WRONG = {  # each returns ()
    "ratio always 1": lambda p, old, b, A, turn, e: ours(p, p.detach(), b, A, turn, e),
    "gradient through w": with_ratio(lambda p, old, b: (p - old).exp() * (p - b).exp().clamp(max=1)),
    "clip on one side": lambda p, old, b, A, turn, e: clipped(ratio(p, old, b), A, 0, 1 + e),
    "mean a sequence": lambda p, old, b, A, turn, e: mean(loss(p, old, b, A, e), turn, turn[-1] + 1).mean(),
    "sum of each turn": lambda p, old, b, A, turn, e: loss(p, old, b, A, e).sum() / (turn[-1] + 1),
    "no gradient": lambda p, old, b, A, turn, e: ours(p.detach(), old, b, A, turn, e),
    "larger of the two": lambda p, old, b, A, turn, e: ours(p, old, b, -A, turn, e) * -1,
    "minimum before A": lambda p, old, b, A, turn, e: -(ratio(p, old, b).clamp(max=1 + e) * A).mean(),
    "no clip": lambda p, old, b, A, turn, e: clipped(ratio(p, old, b), A, 0, 1e9),
    "clip without min": lambda p, old, b, A, turn, e: -(ratio(p, old, b).clamp(1 - e, 1 + e) * A).mean(),
    "without w": lambda p, old, b, A, turn, e: ours(p, old, p, A, turn, e),
    "w outside the clip": lambda p, old, b, A, turn, e: (ratio(p, p, b) * loss(p, old, p, A, e)).mean(),
    "w of pi_old": with_ratio(lambda p, old, b: ratio(p, old, p) * ratio(old, old, b)),
    "w not capped": with_ratio(lambda p, old, b: (p - old).exp() * (p - b).exp().detach()),
    "ratio to pi_b": with_ratio(lambda p, old, b: (p - b).exp()),
    "sign": lambda *given: -ours(*given),
    "sum": lambda p, *rest: ours(p, *rest) * len(p),
}
LOGPROBS = torch.tensor([[5, 10, 2, 9, 4, 16], [10, 6, 3, 5, 8, 12], [4, 7, 3, 5, 6, 15]]) / -10  # (3, R)
ADVANTAGES, TURN = torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5, -0.5]), torch.tensor([0, 1, 1, 2, 2, 2])  # (R,)
EXAMPLE = *LOGPROBS, ADVANTAGES, TURN, 0.2


def larger(number: int) -> tuple:
    draw = torch.Generator().manual_seed(number)
    turn = torch.arange(9).repeat_interleave(torch.randint(1, 9, (9,), generator=draw))  # (R,)
    old = -2 * torch.rand(len(turn), generator=draw)  # (R,)
    new, behaviour = old + 0.3 * torch.randn(2, len(turn), generator=draw)  # (R,), (R,)
    return new, old, behaviour, torch.randn(9, generator=draw)[turn], turn, 0.2


TASKS = {"policy_loss": Task(ours, WRONG, {"six tokens": EXAMPLE}, larger, loss_and_gradient)}
check = checker(TASKS, globals())


def install(policy_loss) -> dict:
    """Put the function in place of ours, whose results are summed and divided by the number of tokens."""
    import ppo

    response_logprobs, seen = ppo.response_logprobs, []

    def remembered(model, batch, *options):
        seen[:] = [batch.turn_of_token]
        return response_logprobs(model, batch, *options)  # (R,), (R,)

    def of_tokens(new, old, behaviour, advantages, clip):
        return policy_loss(new, old, behaviour, advantages, *seen, clip).expand(len(new))  # (R,)

    ppo.response_logprobs, ppo.policy_loss = remembered, of_tokens
    return {}


if __name__ == "__main__":
    main(globals())

# The solution: policy_ratio and policy_loss in ppo.py
