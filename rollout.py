"""The dialog: sample a response, run its code on the public tests, feed the outcome back, try again.

Paper: section 2.1 and figure 2. The last response is judged on *all* tests, public and private. The states:

    waiting for a seat --> prefilling --> decoding --> waiting for its tests --> finished
                               ^                                 |
                               +---- feedback: a test failed ----+

`Episode.ids` is only appended to, and sampled ids are never decoded and encoded again: what is trained on is
what was sampled. A `Turn` is a span of `ids`; nothing else marks what the model wrote.

A seat is a row of the key-value cache. When a response ends, its tests start, and the other dialogs go on
decoding. Every `TESTING_STEPS` decoding steps the results of those are read that have waited so long; where
half of the seated dialogs wait, the half of these that has waited longest is read already. This order depends
only on tokens, never on time, and each dialog has its own stream of random numbers (seed, index): the same
seed gives the same dialogs, whoever shares the batch.

Differs: with feedback "none" a dialog still ends when the public tests pass; in the paper's training without
feedback (appendix B.4) every dialog has all its turns. The paper does not say, so we chose: a response that
reaches the length limit is `truncated`, gets no end token, and is tested as it is; a dialog that would not
fit the context gets shorter feedback, or ends. Run alone: `python rollout.py MODEL_DIRECTORY [PROBLEMS]`.
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from chat import Chat, as_chat, extract_code, observation_ids, prompt_ids, read_examples, stop_ids
from data import RETRY_WITHOUT_FEEDBACK, Problem, feedback_message, first_message, make_job
from distributed import friendly_errors, load_model, load_tokenizer
from sampling import (
    RaggedCache,
    check_architecture,
    check_logits,
    decode,
    group_by_length,
    prefill,
    sample_tokens,
    within_positions,
)
from sandbox import Sandbox, TestResult, Verdict
from sources import first_messages, load_problems

FEEDBACK = ("true", "random", "none")
PREFILL_TOKENS = 8192  # of prompts and feedback, padding included, that go through the model at once
SMALL = 10_000_000  # parameters: one CPU thread runs such a model as fast as two, and tests need the others
TESTING_STEPS = 16  # decoding steps for which a dialog's tests may run while the others go on


@dataclass
class Turn:
    """One response and what came of it."""

    start: int  # ids[start:end] of the episode are the sampled tokens, the end token included
    end: int
    behaviour_logprobs: list[float]  # of each response token, under the distribution that it was sampled from
    text: str = ""
    code: str | None = None  # None: no fenced block, or it does not compile
    results: list[TestResult] | None = None  # on the public tests; None where there was no valid code
    truncated: bool = False  # cut at the length limit, no end token
    feedback: str = ""  # the user message that followed; empty at the last turn
    sandbox_seconds: float = 0.0  # how long sampling waited for this turn's tests

    @property
    def outcome(self) -> str:
        """ "passed", "no valid code", or the verdict of the first public test that failed."""
        if self.results is None:
            return "no valid code"
        return next((r.verdict.value for r in self.results if r.verdict != Verdict.PASSED), "passed")


@dataclass
class Episode:
    """A whole dialog: the interface between rollouts and the learner."""

    problem: Problem
    ids: list[int]
    turns: list[Turn]
    public_passed: bool  # the last response passes every public test
    solved: bool  # the last response passes every test, public and private
    truncated: bool  # ended early because the dialog would not fit the context
    index: int  # of its random stream
    private_verdicts: tuple[str, ...] = ()  # of the private tests that ran: none after the first that fails


@dataclass(frozen=True)
class RolloutSettings:
    """How dialogs are sampled."""

    turn_limit: int = 3
    max_new_tokens: int = 1024  # of a response
    context: int = 8192  # tokens of a dialog
    temperature: float = 1.0
    top_p: float = 1.0
    feedback: str = "true"  # or "random" (from other problems) or "none" (only "try again")
    batch_rows: int = 256  # dialogs in the cache at once
    examples: str = ""  # a JSON file of chat messages that precede every dialog (few-shot prompting)


def check_feedback(kind: str) -> None:
    """Raises: ValueError if there is no such kind of feedback."""
    if kind not in FEEDBACK:
        raise ValueError(f"feedback is {kind!r}, but must be one of {', '.join(FEEDBACK)}")


def fitting(problems: Sequence[Problem], chat, settings: RolloutSettings) -> list[int]:
    """Indices of the problems whose prompt leaves room for a response: `rollout` refuses the others."""
    chat, examples = as_chat(chat), read_examples(settings.examples)
    room = settings.context - settings.max_new_tokens
    frame = len(prompt_ids(chat, "?", examples)) + 8  # a text may take more tokens within a template
    return [
        index
        for index, message in enumerate(first_messages(problems))
        # A token stands for at least one byte, so only long messages have to be encoded.
        if frame + len(message.encode()) <= room or len(prompt_ids(chat, message, examples)) <= room
    ]


def too_long(problems: Sequence[Problem], kept: Sequence[int], kind: str, settings: RolloutSettings) -> str:
    """The message about the problems that do not fit. Args: kept: the indices of those that do."""
    count = f"{len(problems) - len(kept)} of {len(problems)} {kind}"
    limits = f"context {settings.context} less max_new_tokens {settings.max_new_tokens}"
    return f"{count} have a longer prompt than {limits}"


@dataclass(eq=False)
class _Dialog:
    """An unfinished episode and its running tests."""

    episode: Episode
    noise: Iterator[np.float64]  # a uniform random number for each token to sample
    picks: np.random.Generator  # chooses what random feedback is about
    row: int | None = None  # of the cache
    ended: int = 0  # the decoding step in which its response ended
    public: Future | None = None
    other: tuple[Problem, Future] | None = None  # random feedback: another problem, a wrong program's results
    private: Future | None = None


def _seat(cache: RaggedCache, groups: Sequence[Sequence[_Dialog]]) -> list[_Dialog]:
    """Give each group neighbouring rows; returns the dialogs by row. Those that are in place stay there."""
    order: list[_Dialog] = []
    for group in groups:
        places = range(len(order), len(order) + len(group))
        seated = {dialog.row: dialog for dialog in group if dialog.row in places}
        others = (dialog for dialog in group if dialog.row not in places)
        order += [seated.get(place) or next(others) for place in places]
    cache.rearrange([dialog.row for dialog in order])
    for row, dialog in enumerate(order):
        dialog.row = row
    return order


def _begin_turns(
    model, cache: RaggedCache, decoding: list[_Dialog], beginning: list[_Dialog], testing: Sequence[_Dialog]
) -> list[_Dialog]:
    """Seat all dialogs, those that begin a turn after those that decode; returns both, by row.

    The new tokens of the beginning ones are put into the cache, but the last of each: the next decoding step
    takes that one.
    """

    def new_tokens(dialog: _Dialog) -> int:
        return len(dialog.episode.ids) - (0 if dialog.row is None else cache.lengths[dialog.row])

    groups = []
    for at_first_turn in (True, False):  # apart, because attention is faster in empty rows
        members = [dialog for dialog in beginning if (dialog.row is None) == at_first_turn]
        groups += group_by_length(members, new_tokens, PREFILL_TOKENS, model.device.type)
    order = _seat(cache, [decoding, *groups, testing])
    for group in groups:
        group.sort(key=lambda dialog: dialog.row)
        new_ids = [dialog.episode.ids[cache.lengths[dialog.row] : -1] for dialog in group]
        prefill(model, cache, slice(group[0].row, group[-1].row + 1), new_ids)
    for dialog in beginning:
        end = len(dialog.episode.ids)
        dialog.episode.turns.append(Turn(end, end, []))
    return order[: len(decoding) + len(beginning)]


def _same(one: Problem, other: Problem) -> bool:
    """Whether two problems ask for the same program."""
    return (one.answer or one.name) == (other.answer or other.name)


def check_others(problems: Sequence[Problem]) -> None:
    """Raises: ValueError if random feedback cannot come from these problems."""
    if all(_same(problems[0], problem) for problem in problems):
        wanted = "it needs problems with two different answers"
        raise ValueError(f"random feedback comes from another problem: {wanted}")


def _start_tests(dialog: _Dialog, chat: Chat, sandbox: Sandbox, settings: RolloutSettings, others) -> None:
    """Read the code out of the response and start its public tests."""
    episode, turn, problem = dialog.episode, dialog.episode.turns[-1], dialog.episode.problem
    turn.text = chat.text(episode.ids[turn.start : turn.end])
    turn.code = extract_code(chat.final_answer(turn.text), problem.entry_point)
    dialog.public = turn.code and sandbox.submit(make_job(problem, turn.code, problem.public_tests))
    if settings.feedback == "random" and len(episode.turns) < settings.turn_limit:
        other = problem
        while _same(other, problem):
            other = others[int(dialog.picks.integers(len(others)))]
        wrong = other.incorrect_solutions or ("raise NotImplementedError",)
        code = wrong[int(dialog.picks.integers(len(wrong)))]
        dialog.other = (other, sandbox.submit(make_job(other, code, other.public_tests)))


def _read_results(dialog: _Dialog, chat: Chat, sandbox: Sandbox, settings: RolloutSettings) -> bool:
    """Wait for the public tests. Append the feedback and return True, or end the episode and return False."""
    episode, turn = dialog.episode, dialog.episode.turns[-1]
    began = time.perf_counter()
    turn.results = dialog.public.result() if dialog.public else None
    turn.sandbox_seconds = time.perf_counter() - began
    episode.public_passed = turn.outcome == "passed"
    if episode.public_passed:
        job = make_job(episode.problem, turn.code, episode.problem.private_tests, stop_at_first_failure=True)
        dialog.private = sandbox.submit(job)
    if episode.public_passed or len(episode.turns) == settings.turn_limit:
        return False
    problem, results = episode.problem, turn.results
    if settings.feedback == "random":
        problem, results = dialog.other[0], dialog.other[1].result()
    for cut in (2000, 500, 100):  # characters of a field, fewer if the dialog would not fit
        told = feedback_message(problem, results, cut=cut, asked=episode.problem)
        turn.feedback = RETRY_WITHOUT_FEEDBACK if settings.feedback == "none" else told
        new = observation_ids(chat, turn.feedback, None if turn.truncated else episode.ids[-1])
        if len(episode.ids) + len(new) + settings.max_new_tokens <= settings.context:
            episode.ids += new
            return True
    turn.feedback = ""
    episode.truncated = True
    return False


def _new_dialogs(
    problems: Sequence[Problem], chat: Chat, settings: RolloutSettings, seed: int, first_index: int
) -> list[_Dialog]:
    """Dialogs that have only a prompt so far. Raises: ValueError if a prompt does not fit the context."""
    examples, dialogs = read_examples(settings.examples), []
    for index, problem in enumerate(problems, first_index):
        ids = prompt_ids(chat, first_message(problem), examples)
        if len(ids) + settings.max_new_tokens > settings.context:
            raise ValueError(
                f"the prompt of {problem.name} has {len(ids)} tokens: with {settings.max_new_tokens} new "
                f"ones it does not fit a context of {settings.context}"
            )
        stream = np.random.default_rng([seed, index])
        noise = stream.random(settings.turn_limit * settings.max_new_tokens)
        dialogs.append(_Dialog(Episode(problem, ids, [], False, False, False, index), iter(noise), stream))
    return dialogs


def rollout(
    model,
    chat,
    problems: Sequence[Problem],
    sandbox: Sandbox,
    settings: RolloutSettings,
    seed: int,
    first_index: int = 0,
    progress: bool = False,
    feedback_problems: Sequence[Problem] = (),
) -> list[Episode]:
    """Sample one episode for each entry of `problems` (repeat a problem to get several), in their order.

    Args:
        model: a transformers causal LM; chat: its Chat, or its tokenizer with a chat template.
        seed, first_index: episode i draws its noise from the stream (seed, first_index + i).
        feedback_problems: where random feedback comes from; default `problems`.
    Raises: ValueError if a prompt and `max_new_tokens` do not fit the context, or for unknown feedback.
    """
    check_feedback(settings.feedback)
    others = feedback_problems or problems
    if settings.feedback == "random":
        check_others(others)
    chat = as_chat(chat)
    dialogs = _new_dialogs(problems, chat, settings, seed, first_index)
    ends, cache, step = stop_ids(chat), RaggedCache(settings.context), 0
    waiting, decoding, testing = deque(dialogs), [], deque()  # in order of their rows: decoding, then testing
    bar = tqdm(total=len(dialogs), desc="rollout", unit="dialog", disable=not progress, leave=False)
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    if model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    while waiting or decoding or testing:
        # testing -> prefilling, or finished: the longest waits, once they were long or few dialogs decode.
        due = 0
        if step % TESTING_STEPS == 0:  # together, because many short forwards take long
            due = sum(step - dialog.ended >= TESTING_STEPS for dialog in testing)
        if len(decoding) <= len(testing):
            due = (len(testing) + 1) // 2
        read = [testing.popleft() for _ in range(due)]
        beginning = [dialog for dialog in read if _read_results(dialog, chat, sandbox, settings)]
        bar.update(len(read) - len(beginning))
        # waiting for a seat -> prefilling
        free = settings.batch_rows - len(decoding) - len(beginning) - len(testing)
        beginning += [waiting.popleft() for _ in range(min(free, len(waiting)))]
        if read or beginning:  # prefilling -> decoding
            decoding = _begin_turns(model, cache, decoding, beginning, testing)
        if not decoding:
            continue
        step += 1
        logits = decode(model, cache, [dialog.episode.ids[-1] for dialog in decoding])  # (n, V)
        noise = logits.new_tensor([next(dialog.noise) for dialog in decoding], dtype=torch.float64)  # (n,)
        tokens, logprobs = sample_tokens(logits, noise, settings.temperature, settings.top_p)  # (n,), (n,)
        for dialog, token, logprob in zip(decoding, tokens.tolist(), logprobs.tolist(), strict=True):
            episode, turn = dialog.episode, dialog.episode.turns[-1]
            episode.ids.append(token)
            turn.end += 1
            turn.behaviour_logprobs.append(logprob)
            turn.truncated = token not in ends and turn.end - turn.start == settings.max_new_tokens
            if token in ends or turn.truncated:  # decoding -> testing
                _start_tests(dialog, chat, sandbox, settings, others)
                dialog.ended = step
        testing += [dialog for dialog in decoding if dialog.ended == step]
        decoding = [dialog for dialog in decoding if dialog.ended < step]
        decoding = _seat(cache, [decoding, testing])[: len(decoding)]
    for dialog in dialogs:
        if dialog.private:
            began = time.perf_counter()
            dialog.episode.private_verdicts = tuple(r.verdict.value for r in dialog.private.result())
            dialog.episode.solved = {*dialog.episode.private_verdicts} <= {Verdict.PASSED.value}
            dialog.episode.turns[-1].sandbox_seconds += time.perf_counter() - began
    bar.close()
    model.train(was_training)
    torch.set_num_threads(threads)
    return [dialog.episode for dialog in dialogs]


def show(tokenizer, episode: Episode) -> str:
    """An episode as a person reads it: every token of the dialog, and the verdict of each turn."""
    text = tokenizer.decode(episode.ids, skip_special_tokens=False)
    outcomes = ", ".join(f"turn {i}: {turn.outcome}" for i, turn in enumerate(episode.turns, 1))
    return f"{text}\n[{episode.problem.name}; {outcomes}; {'solved' if episode.solved else 'not solved'}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print one sampled dialog.")
    parser.add_argument("model", help="a Hugging Face directory or hub name")
    parser.add_argument("problems", nargs="?", default="toy", help="a problem set or file (default: toy)")
    parser.add_argument("--template_options", default="", help="JSON object of options for the chat template")
    arguments = parser.parse_args()
    with friendly_errors("rollout.py"), Sandbox() as sandbox:
        chat = Chat(load_tokenizer(arguments.model), arguments.template_options)
        model = load_model(arguments.model, dtype="auto")
        context = within_positions(model.config, RolloutSettings.context)
        settings = RolloutSettings(context=context, max_new_tokens=context // 8)
        check_architecture(model.config, context)
        check_logits(model, len(chat.tokenizer), context)
        first = list(load_problems(arguments.problems, "test")[:1])
        print(show(chat.tokenizer, rollout(model, chat, first, sandbox, settings, seed=0)[0]))
