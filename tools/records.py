"""A few sampled episodes with every number of their turns and tokens: `episodes.jsonl`.

Paper: section 2.2 gives a turn its reward, value and advantage, and a token its ratio. Here one sees which
turn earned what, and which tokens the updates made more likely. The names are those of ppo.py:

    of a turn   r, KL, R, G, V, G - V, and A: G - V normalised over all turns of the batch. With the ablation
                `token_level_values` V and A are means over the tokens of the turn.
    of a token  log-prob and entropy under pi_old, KL (log pi_old - log rho), the advantage in the loss, and
                the ratio pi / pi_old after all updates of the iteration, without the factor w.

Both sides of the ratio come from a forward over these episodes alone: in half precision another grouping of
the dialogs rounds differently, and a ratio to the log-probs of `prepare` would show that too.
"""

from collections.abc import Sequence

import torch

import distributed
import ppo
from config import Config
from data import feedback_entry, first_message
from rollout import Episode
from sandbox import Verdict

AS_IT_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}  # how text is decoded
EPISODES, TESTS, CUT = 6, 20, 400  # the most: episodes an iteration, tests a turn, characters of a field


def choose(episodes: Sequence[Episode]) -> list[Episode]:
    """The first episode of each outcome: solved in 1, 2, ... turns, or how the last turn failed."""
    first: dict[tuple[bool, str], Episode] = {}
    for episode in episodes:
        outcome = str(len(episode.turns)) if episode.solved else episode.turns[-1].outcome
        first.setdefault((not episode.solved, outcome), episode)
    return [first[kind] for kind in sorted(first)][:EPISODES]


def turns_of(episodes: Sequence[Episode]) -> list[tuple[int, int]]:
    """The keys of all turns: the index of the episode, and which of its turns it is."""
    return [(episode.index, number) for episode in episodes for number in range(len(episode.turns))]


@torch.no_grad()
def logprobs_of(policy, episodes: Sequence[Episode], config: Config) -> dict[tuple[int, int], torch.Tensor]:
    """Log-probs (tokens,) of each turn by its key. Every rank computes all of them."""
    logprobs = {}
    for group in ppo.microbatches(episodes, config.microbatch_tokens):
        batch, options = ppo.collate(group, config.device), (config.temperature, config.logits_chunk)
        computed, _ = distributed.as_forward(ppo.response_logprobs, policy, batch, *options)  # (R,)
        lengths = torch.bincount(batch.turn_of_token).tolist()
        logprobs |= zip(turns_of(group), computed.cpu().split(lengths), strict=True)
    distributed.free_gathered(policy)
    return logprobs


def numbers_of(prepared, before: dict, after: dict, config: Config) -> dict[tuple[int, int], dict]:
    """The numbers of each turn and of its tokens, by the turn's key, on every rank.

    Args:
        prepared: the micro-batches of all updates, from `prepare` in train.py.
        before, after: `logprobs_of` the episodes that are wanted, before and after the updates.
    """
    found = []
    for m in (microbatch for microbatches in prepared for microbatch in microbatches):
        wanted = [(n, key) for n, key in enumerate(turns_of(m.episodes)) if key in before]
        if not wanted:
            continue
        of, turns = m.batch.turn_of_token, len(m.batch.turn_rows)  # (R,), N
        returns, values = m.returns, m.old_values  # (v,), (v,)
        if config.token_level_values:
            returns, values = (ppo.mean_per_turn(v, of, turns) for v in (returns, values))  # (N,), (N,)
        of_turn = {  # (N,) each
            "r": ppo.turn_rewards(m.episodes),
            "KL": ppo.turn_kl(m.old_logprobs, m.initial_logprobs, of, turns, config.product_kl),
            "R": m.rewards,
            "G": returns,
            "V": values,
            "G - V": returns - values,
            "A": ppo.mean_per_turn(m.advantages, of, turns),
        }
        of_token = {  # (R,) each
            "log-prob": m.old_logprobs,
            "entropy": m.entropies,
            "KL": m.old_logprobs - m.initial_logprobs,
            "advantage": m.advantages,
        }
        for n, key in wanted:
            numbers = {name: round(vector[n].item(), 5) for name, vector in of_turn.items()}
            tokens = {name: rounded(vector[of == n]) for name, vector in of_token.items()}
            tokens["ratio"] = rounded((after[key] - before[key]).exp())
            found.append((key, {"numbers": numbers, "tokens": tokens}))
    return dict(distributed.gather(found))


def rounded(vector: torch.Tensor) -> list[float]:
    return [round(number, 5) for number in vector.tolist()]


def private_tests(episode: Episode) -> str:
    """The verdicts of an episode's private tests, in words."""
    count, ran = len(episode.problem.private_tests), episode.private_verdicts
    if not episode.public_passed:
        return f"{count}, not run, because the public tests did not pass"
    if episode.solved:
        return f"{count} passed"
    return f"{len(ran) - 1} passed, number {len(ran)} {ran[-1]}, {count - len(ran)} not run"


def describe(episode: Episode, tokenizer, numbers: dict) -> dict:
    """An episode as plain JSON. Args: numbers: from `numbers_of`; empty where nothing was trained."""
    problem, turns = episode.problem, []
    for key, turn in zip(turns_of([episode]), episode.turns, strict=True):
        tests = []  # of each public test the verdict and, if it failed, the feedback
        for test, result in zip(problem.public_tests[:TESTS], turn.results or (), strict=False):
            failed = result.verdict != Verdict.PASSED
            tests.append([result.verdict.value, feedback_entry(problem, test, result, CUT) if failed else ""])
        known = numbers.get(key, {"tokens": {"log-prob as sampled": turn.behaviour_logprobs}})
        tokens = {"text": pieces(tokenizer, episode.ids[turn.start : turn.end])} | known["tokens"]
        about = {"outcome": turn.outcome, "tests": tests, "feedback": turn.feedback}
        turns.append(about | known | {"tokens": tokens})
    names = {"problem": problem.name, "statement": first_message(problem), "private": private_tests(episode)}
    return names | {"public_passed": episode.public_passed, "solved": episode.solved, "turns": turns}


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; of a character that several tokens spell, the last one has it."""
    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):  # decoded behind the token before it: alone, some lose their blank
        before, text = (tokenizer.decode(ids[start:to], **AS_IT_IS) for to in (read, end))
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(before) :] if whole else "")
        start, read = (read, end) if whole else (start, read)
    return texts
