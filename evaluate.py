"""Evaluation: sample rollouts of every problem, and count what the paper counts.

Paper: sections 3 and 4. `evaluate` samples and returns a summary; `summarise` is a pure function of episode *records*, the plain
dicts that `record` makes of episodes.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from data import Problem, first_message
from rollout import Episode, RolloutSettings, rollout
from sandbox import Sandbox, Verdict

OUTCOMES = ("no valid code", *(verdict.value for verdict in Verdict if verdict != Verdict.PASSED), "passed")


def record(episode: Episode, wall_seconds: float = 0.0) -> dict:
    """An episode as the plain dict that is written to episodes.jsonl. Texts of responses stand in `dialog` only."""
    dialog = [{"role": "user", "content": first_message(episode.problem)}]
    for turn in episode.turns:
        dialog.append({"role": "assistant", "content": turn.text})
        if turn.feedback:
            dialog.append({"role": "user", "content": turn.feedback})
    generated = sum(turn.end - turn.start for turn in episode.turns)
    return {
        "index": episode.index,
        "problem": episode.problem.name,
        "group": episode.problem.group,
        "public_tests": len(episode.problem.public_tests),
        "public_passed": episode.public_passed,
        "solved": episode.solved,
        "truncated": episode.truncated,
        "generated_tokens": generated,
        "prompt_tokens": len(episode.ids) - generated,
        "sandbox_seconds": sum(turn.sandbox_seconds for turn in episode.turns),
        "wall_seconds": wall_seconds,
        "turns": [
            {
                "outcome": turn.outcome,
                "code": turn.code,
                "tokens": turn.end - turn.start,
                "truncated": turn.truncated,
            }
            for turn in episode.turns
        ],
        "dialog": dialog,
    }


def _share(count: float, total: float) -> float:
    return count / total if total else 0.0


def _solved_by(records: Sequence[dict], key: str) -> dict[str, float]:
    """Share of rollouts solved, for each value of a record's field."""
    solved = defaultdict(list)
    for entry in records:
        solved[str(entry[key])].append(entry["solved"])
    return {value: _share(sum(of), len(of)) for value, of in sorted(solved.items())}


def summarise(records: Sequence[dict], turn_limit: int) -> dict:
    """Everything that can be counted without drawing: shares of rollouts unless said otherwise; JSON throughout."""
    responses = [[m["content"] for m in entry["dialog"] if m["role"] == "assistant"] for entry in records]
    outcomes = [[turn["outcome"] for turn in entry["turns"]] for entry in records]
    turns = [turn for entry in records for turn in entry["turns"]]
    later = [pair for texts in responses for pair in zip(texts, texts[1:], strict=False)]
    passed = [entry for entry in records if entry["public_passed"]]
    by_turn = [Counter(o[turn] for o in outcomes if turn < len(o)) for turn in range(turn_limit)]
    return {
        "rollouts": len(records),
        "solved": _share(sum(entry["solved"] for entry in records), len(records)),
        "solved_by_turn": [
            _share(sum(e["solved"] and len(e["turns"]) <= limit for e in records), len(records))
            for limit in range(1, turn_limit + 1)
        ],
        "by_group": _solved_by(records, "group"),
        "by_public_tests": _solved_by(records, "public_tests"),
        "false_positives": _share(sum(not entry["solved"] for entry in passed), len(passed)),
        "outcomes_by_turn": [{kind: counts[kind] for kind in OUTCOMES} for counts in by_turn],
        "repeats": _share(sum(a == b for a, b in later), len(later)),
        "invalid_code": _share(sum(turn["code"] is None for turn in turns), len(turns)),
        "truncated_responses": _share(sum(turn["truncated"] for turn in turns), len(turns)),
        "truncated_dialogs": _share(sum(entry["truncated"] for entry in records), len(records)),
    }


def evaluate(
    model,
    tokenizer,
    problems: Sequence[Problem],
    sandbox: Sandbox,
    settings: RolloutSettings,
    rollouts_per_problem: int,
    seed: int,
    feedback_problems: Sequence[Problem] = (),
) -> tuple[dict, list[Episode]]:
    """Sample `rollouts_per_problem` episodes of each problem and summarise them.

    Returns: `summarise`'s dict, and the episodes: round by round, each round in the order of `problems`.
    """
    began = time.perf_counter()
    schedule = list(problems) * rollouts_per_problem
    episodes = rollout(
        model,
        tokenizer,
        schedule,
        sandbox,
        settings,
        seed,
        progress=True,
        feedback_problems=feedback_problems or problems,
    )
    share = (time.perf_counter() - began) / max(1, len(episodes))
    return summarise([record(episode, share) for episode in episodes], settings.turn_limit), episodes
