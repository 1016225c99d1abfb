"""Exercise 2: rewards and returns.

The last turn of a dialog gets +1 if every test passed, else -1. An earlier turn gets -0.2 if it has no valid
code, else 0. From each turn's reward the KL penalty is subtracted: R_t = r_t - beta KL_t. The return
G_t = R_t + gamma G_t+1 is what an action is worth. Which turn pays for whose KL?

Paper: section 2.2. Read first: `Turn`, `Episode` in rollout.py; the docstring of ppo.py. About 10 minutes.
Check: python exercises/e2_returns.py         Effect on learning: python exercises/e2_returns.py --effect
"""

from dataclasses import replace
from functools import partial

import torch
from classroom import Task, checker, episode, from_tree, main, random_episode
from torch import Tensor


def turn_returns(episodes: list, kl: Tensor, beta: float, gamma: float) -> Tensor:
    """G_t of all turns of all dialogs, (N,), in order.

    Args: episodes: each has `turns` (the `code` of a turn is None if it is not valid) and `solved` (every
        test passed); kl: KL_t of all turns, (N,).
    """
    raise NotImplementedError("turn_returns must return a tensor with one number for each turn")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

reward, summed = from_tree("ppo.py", "turn_rewards", "turn_returns", torch=torch)


def rows(episodes: list) -> Tensor:
    return torch.tensor([row for row, e in enumerate(episodes) for _ in e.turns])  # (N,)


def ours(episodes, kl, beta, gamma) -> Tensor:
    return summed(reward(episodes) - beta * kl, rows(episodes), gamma)  # (N,)


def rewarded(of_turn, es, kl, beta, gamma) -> Tensor:
    """Wrong returns. Args: of_turn: from a turn's right reward, 1 or -1 for its dialog, is it last, valid."""
    turns = [(2.0 * e.solved - 1, turn is e.turns[-1], bool(turn.code)) for e in es for turn in e.turns]
    r = [of_turn(right, *turn) for right, turn in zip(reward(es).tolist(), turns, strict=True)]
    return summed(torch.tensor(r) - beta * kl, rows(es), gamma)  # (N,)


WRONG = {  # each returns (N,)
    "leak over episodes": lambda es, kl, beta, gamma: summed(reward(es) - beta * kl, 0 * rows(es), gamma),
    "-0.2 on the last turn too": partial(rewarded, lambda r, all, last, ok: r - 0.2 * (last and not ok)),
    "-0.2 instead of -1": partial(rewarded, lambda r, all, last, ok: r if ok else -0.2),
    "0 for a failure": partial(rewarded, lambda r, all, last, ok: max(r, 0.0) if last else r),
    "reward on every turn": partial(rewarded, lambda r, all, last, ok: all if last or ok else r),
    "KL left out": lambda es, kl, beta, gamma: summed(reward(es), rows(es), gamma),
    "KL of its own turn only": lambda es, kl, beta, gamma: summed(reward(es), rows(es), gamma) - beta * kl,
    "KL begins anew": lambda es, kl, *rest: ours(es, torch.cat([kl[: len(e.turns)] for e in es]), *rest),
    "KL added": lambda es, kl, beta, gamma: ours(es, -kl, beta, gamma),
    "gamma left out": lambda es, kl, beta, gamma: ours(es, kl, beta, 1.0),
    "public tests only": lambda es, *rest: ours([replace(e, solved=e.public_passed) for e in es], *rest),
}
UNSOLVED, SOLVED = episode([(2, 4), (6, 8), (10, 12)], "nyn"), episode([(2, 4), (6, 8)], "ny", solved=True)
PUBLIC_ONLY = episode([(2, 4), (6, 8)], "yy", public_passed=True)
KL = torch.tensor([0.2, 0.0, 0.4, -0.6, 0.2])  # (N,)
EXAMPLES = {
    "not solved in three turns, then solved in two": ([UNSOLVED, SOLVED], KL, 0.5, 0.5),
    "public tests passed but a private one failed": ([PUBLIC_ONLY], KL[:2], 0.5, 1.0),
}


def larger(number: int) -> tuple:
    episodes = [random_episode(8 * number + i) for i in range(8)]
    kl = torch.randn(len(rows(episodes)), generator=torch.Generator().manual_seed(number))  # (N,)
    return episodes, kl, 0.3, 0.8


TASKS = {"turn_returns": Task(ours, WRONG, EXAMPLES, larger)}
check = checker(TASKS, globals())


def install(turn_returns) -> dict:
    """Put the function in place of `turn_returns` in ppo.py, which is given R_t = r_t - 0.05 KL_t."""
    import ppo

    rewards, seen = ppo.turn_rewards, []

    def remembered(episodes):
        seen[:] = episodes
        return rewards(episodes)  # (N,)

    def returns(penalised, turn_rows, gamma):
        return turn_returns([*seen], (rewards(seen) - penalised) / 0.05, 0.05, gamma)  # (N,)

    ppo.turn_rewards, ppo.turn_returns = remembered, returns
    return {}


if __name__ == "__main__":
    main(globals())

# The solution: turn_rewards and turn_returns in ppo.py, joined by `prepare` in train.py
