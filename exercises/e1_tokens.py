"""Exercise 1: whose tokens are trained?

A dialog is one list of token ids: prompt, response, feedback, response, and so on. The policy loss may only
see the tokens that the model sampled. Which ones are these, if a response was cut at the length limit?

Paper: section 2.2 (actions are responses). Read first: `Turn` and `Episode` in rollout.py. About 10 minutes.
Check: python exercises/e1_tokens.py         Effect on learning: python exercises/e1_tokens.py --effect
"""

import torch
from classroom import Task, checker, episode, from_tree, main, random_episode


def trained_tokens(episode) -> list[int]:
    """The positions, in the dialog's `ids`, of the tokens that the policy loss is about, from left to right.

    Args: episode: it has `ids` and `turns`; a turn has `start`, `end` and `truncated`.
    """
    raise NotImplementedError("trained_tokens must return a list of positions")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

_, collate = from_tree("ppo.py", "Batch", "collate", torch=torch)


def ours(episode) -> list[int]:
    return collate([episode], torch.device("cpu")).token_columns.tolist()


def spans(turns, start, end) -> list[int]:
    """Positions from `start` beyond each response's first token to `end` beyond its last."""
    return [position for t in turns for position in range(t.start + start, t.end + end(t))]


WRONG = {
    "feedback too": lambda e: list(range(e.turns[0].start, len(e.ids))),
    "end token lost": lambda e: spans(e.turns, 0, lambda turn: -1),
    "off by one": lambda e: spans(e.turns, -1, lambda turn: -1),
    "off by one, later": lambda e: spans(e.turns, 1, lambda turn: 1),
    "first token lost": lambda e: spans(e.turns, 1, lambda turn: 0),
    "end included": lambda e: spans(e.turns, 0, lambda turn: 1),
    "truncated given an end": lambda e: spans(e.turns, 0, lambda turn: int(turn.truncated)),
    "truncated without its last": lambda e: spans(e.turns, 0, lambda turn: -int(turn.truncated)),
    "without truncated": lambda e: spans(e.turns, 0, lambda turn: (turn.start - turn.end) * turn.truncated),
    "last response only": lambda e: spans(e.turns[-1:], 0, lambda turn: 0),
    "prompts too": lambda e: list(range(len(e.ids))),
    "ids": lambda e: [e.ids[position] for position in ours(e)],
}
EXAMPLES = {
    "two turns": (episode([(3, 6), (9, 11)]),),
    "two turns, the first response truncated": (episode([(2, 4), (7, 9)], truncated=[0]),),
}
TASKS = {"trained_tokens": Task(ours, WRONG, EXAMPLES, lambda number: (random_episode(number),))}
check = checker(TASKS, globals())


def install(trained_tokens) -> dict:
    """Let `collate` of ppo.py choose these tokens. Each counts for the last turn that has begun."""
    import ppo

    collate = ppo.collate

    def chosen(episodes, device):
        batch, tokens, first = collate(episodes, device), [], 0
        for row, e in enumerate(episodes):
            columns = [column for column in trained_tokens(e) if 0 < column < len(e.ids)]
            known = {t.start + i: logprob for t in e.turns for i, logprob in enumerate(t.behaviour_logprobs)}
            # What was not sampled has no recorded probability: there the factor w is 1.
            recorded = [known.get(column, float("-inf")) for column in columns]
            for turn in e.turns:
                turn.behaviour_logprobs, recorded = recorded, []
            begun = [sum(turn.start <= column for turn in e.turns) for column in columns]
            tokens += [(row, c, first + max(1, n) - 1) for c, n in zip(columns, begun, strict=True)]
            first += len(e.turns)
        batch.token_rows, batch.token_columns, batch.turn_of_token = torch.tensor(tokens, device=device).T
        return batch

    ppo.collate = chosen
    return {}


if __name__ == "__main__":
    main(globals())

# The solution: collate in ppo.py
