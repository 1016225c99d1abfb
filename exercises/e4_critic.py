"""Exercise 4: the critic.

V(c_t) says what a turn is worth *before* the response: the return is compared with it. So it may see all of
the turn's prompt, the feedback included, and nothing of the response. A causal model's output at a position
depends on the tokens up to it, itself included. Where is the critic read, and what is its loss?

Paper: section 2.2. Read first: the docstrings of value_head.py and ppo.py. About 15 minutes.
Check: python exercises/e4_critic.py         Effect on learning: python exercises/e4_critic.py --effect
"""

import torch
from classroom import Task, checker, episode, from_tree, loss_and_gradient, main, random_episode
from torch import Tensor


def value_positions(episode) -> list[int]:
    """The position in the dialog's `ids` where the critic is read, for each turn.

    Args: episode: it has `ids` and `turns`; the response of a turn is ids[turn.start : turn.end].
    """
    raise NotImplementedError("value_positions must return a list with one position for each turn")


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """The loss of each value, (N,): half of the squared error, and no smaller than with the clipped value.

    The clipped value is at most `clip` away from the old one. Args: values V, old_values V_t, returns, (N,).
    """
    raise NotImplementedError("value_loss must return a tensor with one number for each value")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

_, collate = from_tree("ppo.py", "Batch", "collate", torch=torch)
loss = from_tree("ppo.py", "value_loss", torch=torch)


def ours(episode) -> list[int]:
    return collate([episode], torch.device("cpu")).prompt_columns.tolist()


def near(values, old, clip) -> Tensor:
    return old + (values - old).clamp(-clip, clip)  # (N,)


WRONG_POSITIONS = {
    "first token": lambda e: [0 for turn in e.turns],
    "last token of the response": lambda e: [turn.end - 1 for turn in e.turns],
    "after the response": lambda e: [turn.end for turn in e.turns],
    "a value a token": lambda e: [i - 1 for turn in e.turns for i in range(turn.start, turn.end)],
    "first token of the response": lambda e: [turn.start for turn in e.turns],
    "before the feedback": lambda e: [0, *(turn.end - 1 for turn in e.turns[:-1])],
}
WRONG_LOSS = {  # each returns (N,)
    "unclipped": lambda v, old, G, e: loss(v, v, G, e),
    "clipped value only": lambda v, old, G, e: 0.5 * (near(v, old, e) - G) ** 2,
    "smaller of the two": lambda v, old, G, e: 0.5 * torch.minimum((v - G) ** 2, (near(v, old, e) - G) ** 2),
    "no gradient": lambda v, *rest: loss(v.detach(), *rest),
    "factor": lambda v, old, G, e: 2 * loss(v, old, G, e),
    "clip around 0": lambda v, old, G, e: loss(v, 0 * old, G, e),
}
DIALOG = episode([(3, 6), (9, 11)])
NUMBERS = torch.tensor([[0.1, 0.8, -0.6, 0.5], [0.0, 0.1, -0.1, 0.1], [1.0, 1.0, 0.5, 0.2]])  # (3, N)


def larger(number: int) -> tuple:
    return *torch.randn(3, 40, generator=torch.Generator().manual_seed(number)), 0.3


TASKS = {
    "value_positions": Task(ours, WRONG_POSITIONS, {"two turns": (DIALOG,)}, lambda n: (random_episode(n),)),
    "value_loss": Task(loss, WRONG_LOSS, {"four turns": (*NUMBERS, 0.2)}, larger, loss_and_gradient),
}
check = checker(TASKS, globals())


def install(value_positions, value_loss) -> dict:
    """Put both in place of ours. A value for each token is a setting of train.py: the paper's ablation."""
    import ppo

    collate, by_token = ppo.collate, len(value_positions(DIALOG)) == 5

    def elsewhere(episodes, device):
        batch = collate(episodes, device)
        columns = [column for e in episodes for column in value_positions(e)]
        batch.prompt_columns = torch.tensor(columns, device=device)  # (N,)
        return batch

    ppo.collate, ppo.value_loss = collate if by_token else elsewhere, value_loss
    return {"token_level_values": by_token}


if __name__ == "__main__":
    main(globals())

# The solution: prompt_columns of `collate`, and value_loss, in ppo.py
