"""The dialog: sample a response, run its code on the public tests, feed the outcome back, try again.

Paper: section 2.1 ("iterative code synthesis") and figure 2. An episode is a chat. The user states a
problem, the model answers with a program in a fenced block, the program runs on the *public* tests; if one
fails, a user message says how, and the model answers again with the whole dialog in its context, up to
`turn_limit` times. The last response is the solution and is judged on *all* tests.

Tokens in, tokens out. `Episode.ids` is only ever appended to: sampled ids stay as sampled and are never
decoded and encoded again, so that what is trained on is what was sampled, to the id. A `Turn` is a span of
`ids`; nothing else marks what the model wrote. `Episode` is the only thing that rollouts and the learner
share.

Sampling is written by hand around one key-value cache (`RaggedCache`) because `generate` can neither keep a
dialog's cache for its next turn nor let a finished row leave. Seats 0..active-1 of the cache decode, the
seats behind them wait for the sandbox. A row that ends its turn swaps its seat with the last decoding one,
its tests start at once, and the others go on decoding meanwhile. When half of the seats wait, the results of
half of these are read, of those that ended first: their tests have had the most time. Finished dialogs make
room for new ones, all who enter are prefilled together, and the tests of the other half run on while these
decode. When to refill and whom to ask depends on tokens alone, never on the clock: the same seed gives the
same run. Each dialog draws its noise from its own stream, seeded by (seed, index), so what it samples does
not depend on who shares the batch.

Differs: with feedback "none" a dialog still ends when the public tests pass; in the paper's training without
feedback (appendix B.4) every dialog has all its turns. Where the paper is silent: a response that reaches the
length limit is `truncated`, gets no invented end token in its span, and counts as it ran; a dialog that no
longer fits the context has its feedback cut first (visibly), then ends.

Run alone: `python rollout.py MODEL_DIRECTORY [PROBLEMS]` prints one sampled dialog.
"""

import argparse
import functools
import inspect
import json
import re
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import RETRY_WITHOUT_FEEDBACK, Problem, feedback_message, first_message, make_job
from distributed import friendly_errors, load_model, load_tokenizer
from sandbox import Sandbox, TestResult, Verdict
from sources import first_messages, load_problems

FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)```", re.DOTALL | re.MULTILINE)  # language, content
SENTINEL = "@response@"  # stands for a response when the chat template is rendered; never tokenized
DATE = "26 Jul 2024"  # today, to chat templates that tell it
FEEDBACK = ("true", "random", "none")
CACHE_GROWTH = 256  # tokens by which the cache's capacity grows
PREFILL_TOKENS = 32768  # of prompts and feedback, padding included, that go through the model at once


@dataclass
class Turn:
    """One response and what came of it.

    `ids[start:end]` of its episode are the sampled tokens, the end token included.
    """

    start: int
    end: int
    behaviour_logprobs: list[float]  # one a response token, under the distribution that was sampled from
    text: str = ""
    code: str | None = None  # None: no fenced block, or it does not compile
    results: list[TestResult] | None = None  # on the public tests; None where there was no valid code
    truncated: bool = False  # cut at the length limit, no end token
    feedback: str = ""  # the user message that followed; empty at the last turn
    sandbox_seconds: float = 0.0  # that sampling stood still for this turn's tests

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
    truncated: bool  # ended early because the dialog no longer fitted the context
    index: int


@dataclass(frozen=True)
class RolloutSettings:
    """How dialogs are sampled.

    `feedback`: "true", "random" (from other problems) or "none" (only "try again"). `examples`: a JSON file
    with a list of chat messages, worked examples that precede every dialog (few-shot prompting).
    """

    turn_limit: int = 3
    max_new_tokens: int = 1024  # a response
    context: int = 8192  # a dialog
    temperature: float = 1.0
    top_p: float = 1.0
    feedback: str = "true"
    batch_rows: int = 256  # dialogs in the cache at once
    examples: str = ""


def extract_code(text: str) -> str | None:
    """The code of a response: its last fenced block of Python or, if none says so, of no language at all.

    None if there is none, or if it does not compile: a response without valid code. Blocks of other languages
    are read over, whole, or their ends would be taken for beginnings.
    """
    blocks = [(language.strip().lower(), content) for language, content in FENCE.findall(text)]
    python = [content for language, content in blocks if language.startswith("py")]
    code = (python or [content for language, content in blocks if not language] or [""])[-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "solution.py", "exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    return code if code.strip() else None


# ---- chat template: messages to token ids ------------------------------------------------------------------


def _special_tokens(tokenizer) -> dict[int, str]:
    """Ids and texts of the tokens that structure a dialog; the tokenizer's named ones are only some."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _render(tokenizer, messages: list[dict]) -> str:
    """The template's text of some messages, up to where the next response begins.

    Special tokens that a user message spells out are broken up: a program's output must not be able to end
    the user's turn. Templates that tell today's date get a fixed one, or the same seed would differ tomorrow.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template: give one with --chat_template FILE")
    defused = []
    for message in messages:
        content = message["content"]
        for token in _special_tokens(tokenizer).values():
            content = content.replace(token, f"{token[0]} {token[1:]}")
        defused.append(message | {"content": content})
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
    return tokenizer.apply_chat_template(defused, **options)


def prompt_ids(tokenizer, message: str, before: Sequence[dict] = ()) -> list[int]:
    """The ids of a user message and of the chat messages `before` it, up to where the response begins."""
    text = _render(tokenizer, [*before, {"role": "user", "content": message}])
    return tokenizer.encode(text, add_special_tokens=False)  # the template has written the first one already


def read_examples(path: str) -> list[dict]:
    """The chat messages of a JSON file; none if `path` is empty. Raises: ValueError if it holds no dialog."""
    messages = json.loads(Path(path).read_text()) if path else []
    roles = ["user", "assistant"] * (len(messages) // 2)
    if [message.get("role") for message in messages] != roles:
        raise ValueError(f"{path} must be a list of chat messages, user and assistant by turns")
    return messages


def observation_ids(tokenizer, message: str) -> list[int]:
    """The template's ids between two responses: end of turn, the user's message, the next header."""
    contents = {"user": "?", "assistant": SENTINEL}
    dialog = [{"role": role, "content": content} for role, content in contents.items()]
    text = _render(tokenizer, [*dialog, {"role": "user", "content": message}])
    return tokenizer.encode(text.split(SENTINEL, 1)[1], add_special_tokens=False)


def stop_ids(tokenizer) -> set[int]:
    """Ids that end a response: the end token, and a special one with which the template ends a turn.

    Raises: ValueError if there is neither.
    """
    template_end = observation_ids(tokenizer, "?")[0]
    ends = {tokenizer.eos_token_id} | ({template_end} & _special_tokens(tokenizer).keys())
    if ends == {None}:
        raise ValueError("the tokenizer has no end token, and its chat template ends a turn with none")
    return ends - {None}


# ---- sampling ----------------------------------------------------------------------------------------------


class RaggedCache:
    """A key-value cache whose rows have lengths of their own; transformers' attention layers call `update`.

    Row r holds `lengths[r]` tokens from position 0 on. A forward over `rows` writes each row's new keys
    behind its old ones. Padding at the right of a shorter row writes too, behind its length, where the mask
    hides it until it is overwritten.
    """

    is_compileable = False

    def __init__(self) -> None:
        # A layer each: keys and values, (rows, heads, capacity, head_dim).
        self.stores: list[list[torch.Tensor]] = []
        self.lengths: list[int] = []
        self.rows = slice(0, 0)
        self.positions = torch.empty(0)  # (n, new) where the new tokens of this forward stand
        self.span = 0

    def update(self, keys, values, layer: int, *_unused, **_ignored) -> list[torch.Tensor]:
        """Store keys and values (n, heads, new, head_dim); all of these rows, (n, heads, span, head_dim)."""
        if layer == len(self.stores):
            self.stores.append([new.new_zeros(0, new.shape[1], 0, new.shape[3]) for new in (keys, values)])
        seats = torch.arange(self.rows.start, self.rows.stop, device=keys.device)[:, None]  # (n, 1)
        for part, new in enumerate((keys, values)):
            old = self.stores[layer][part]
            if len(old) < len(self.lengths) or old.shape[2] < self.span:
                capacity = max(old.shape[2], -(-self.span // CACHE_GROWTH) * CACHE_GROWTH)
                # (rows, heads, capacity, head_dim)
                grown = old.new_zeros(max(len(old), len(self.lengths)), old.shape[1], capacity, old.shape[3])
                grown[: len(old), :, : old.shape[2]] = old
                self.stores[layer][part] = grown
            self.stores[layer][part][seats, :, self.positions] = new.transpose(1, 2)
        return [store[self.rows, :, : self.span] for store in self.stores[layer]]

    def get_seq_length(self, *_unused) -> int:
        return 0  # positions are given explicitly

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a == b:
            return
        length = max(self.lengths[a], self.lengths[b])
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]
        for store in (store for layer in self.stores for store in layer):
            row = store[a, :, :length].clone()  # (heads, length, head_dim)
            store[a, :, :length] = store[b, :, :length]
            store[b, :, :length] = row


@functools.cache
def _cache_argument(decoder: type) -> str:
    """transformers 5.24 renames the argument."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@torch.no_grad()
def _forward(model, cache: RaggedCache, rows: slice, new_ids: list[list[int]]) -> torch.Tensor:
    """Append `new_ids` (ragged, a list a row) to the cache; logits behind each row's last token, (n, V)."""
    device = model.device
    counts = [len(ids) for ids in new_ids]
    width, lengths = max(counts), cache.lengths[rows]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in new_ids], device=device)  # (n, new)
    starts = torch.tensor(lengths, device=device)[:, None]  # (n, 1)
    cache.rows, cache.span = rows, max(lengths) + width
    cache.positions = starts + torch.arange(width, device=device)  # (n, new)
    places = torch.arange(cache.span, device=device)  # (span,)
    hidden_from = places > cache.positions[:, None, :, None]  # (n, 1, new, span)
    mask = torch.zeros(hidden_from.shape, dtype=model.dtype, device=device)  # (n, 1, new, span)
    # Half precision can hold this number, and no score is near it.
    mask.masked_fill_(hidden_from, torch.finfo(torch.float16).min)
    decoder = model.get_decoder()
    given = {_cache_argument(type(decoder)): cache}
    output = decoder(ids, attention_mask=mask, position_ids=cache.positions, use_cache=True, **given)
    for row, count in zip(range(rows.start, rows.stop), counts, strict=True):
        cache.lengths[row] += count
    last = torch.tensor(counts, device=device) - 1  # (n,)
    return model.get_output_embeddings()(output.last_hidden_state[torch.arange(len(counts)), last])  # (n, V)


def sample_tokens(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by the inverse of the distribution function, one uniform number a row.

    Args: logits (n, V), noise (n,) in [0, 1). temperature 0 is greedy.
    Returns: tokens (n,) and their log-probs (n,) under the distribution that was sampled from.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)  # (n,)
        return tokens, torch.zeros(len(tokens), device=logits.device)  # a sure thing: log 1
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)  # (n, V)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)  # (n, V)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # (n, V) mass in front of each token
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logprobs = torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)  # (n, V)
    mass = logprobs.exp().double().cumsum(-1)  # (n, V) in double: 128k terms
    threshold = noise.double()[:, None] * mass[:, -1:]  # (n, 1)
    tokens = torch.searchsorted(mass, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)  # (n,)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


# ---- the dialog --------------------------------------------------------------------------------------------


def fitting(problems: Sequence[Problem], tokenizer, settings: RolloutSettings) -> list[int]:
    """Places of the problems whose prompt leaves room for a response: the others would end a run midway."""
    examples = read_examples(settings.examples)
    room = settings.context - settings.max_new_tokens
    frame = len(prompt_ids(tokenizer, "", examples)) + 8  # a text may also merge worse beside the template's

    def fits(message: str) -> bool:
        # A token stands for a byte at least: few prompts have to be encoded.
        return frame + len(message.encode()) <= room or len(prompt_ids(tokenizer, message, examples)) <= room

    return [place for place, message in enumerate(first_messages(problems)) if fits(message)]


def too_long(problems: Sequence[Problem], places: Sequence[int], kind: str, settings: RolloutSettings) -> str:
    """What to say of the problems that are not among the `fitting` places."""
    count = f"{len(problems) - len(places)} of {len(problems)} {kind}"
    limits = f"context {settings.context} less max_new_tokens {settings.max_new_tokens}"
    return f"{count} have a longer prompt than {limits}"


@dataclass(eq=False)
class _Dialog:
    """An episode under way: what is still to be fed to the cache, and the tests that are running."""

    episode: Episode
    noise: np.ndarray  # (turn_limit * max_new_tokens,) one uniform number a sampled token
    feed: list[int]  # ids that the cache does not hold yet
    drawn: int = 0
    public: Future | None = None
    other: tuple[Problem, Future] | None = None  # random feedback: another problem, a wrong program's results
    private: Future | None = None
    picks: np.random.Generator = field(default_factory=np.random.default_rng)


def _end_turn(dialog: _Dialog, tokenizer, sandbox: Sandbox, settings: RolloutSettings, others) -> None:
    """Read the code out of the response and start its public tests."""
    episode, turn = dialog.episode, dialog.episode.turns[-1]
    turn.text = tokenizer.decode(episode.ids[turn.start : turn.end], skip_special_tokens=True)
    turn.code = extract_code(turn.text)
    problem = episode.problem
    dialog.public = turn.code and sandbox.submit(make_job(problem, turn.code, problem.public_tests))
    if settings.feedback == "random" and len(episode.turns) < settings.turn_limit:
        key = problem.answer or problem.name
        while True:
            other = others[int(dialog.picks.integers(len(others)))]
            if (other.answer or other.name) != key:
                break
        wrong = other.incorrect_solutions or ("raise NotImplementedError",)
        code = wrong[int(dialog.picks.integers(len(wrong)))]
        dialog.other = (other, sandbox.submit(make_job(other, code, other.public_tests)))


def _continues(dialog: _Dialog, tokenizer, sandbox: Sandbox, settings: RolloutSettings) -> bool:
    """Wait for the public tests; append the feedback and go on, or end the episode and start its judging."""
    episode, turn = dialog.episode, dialog.episode.turns[-1]
    waited = time.perf_counter()
    turn.results = dialog.public.result() if dialog.public else None
    turn.sandbox_seconds = time.perf_counter() - waited
    episode.public_passed = turn.outcome == "passed"
    if episode.public_passed:
        job = make_job(episode.problem, turn.code, episode.problem.private_tests, stop_at_first_failure=True)
        dialog.private = sandbox.submit(job)
    if episode.public_passed or len(episode.turns) == settings.turn_limit:
        return False
    for cut in (2000, 500, 100):  # characters of a field: a dialog that gets too long loses feedback first
        if settings.feedback == "none":
            turn.feedback = RETRY_WITHOUT_FEEDBACK
        elif settings.feedback == "random":
            other, results = dialog.other
            turn.feedback = feedback_message(other, results.result(), cut=cut, asked=episode.problem)
        else:
            turn.feedback = feedback_message(episode.problem, turn.results, cut=cut)
        new = observation_ids(tokenizer, turn.feedback)
        if episode.ids[-1] == new[0] and not turn.truncated:
            new = new[1:]  # the model itself has ended its turn
        if len(episode.ids) + len(new) + settings.max_new_tokens <= settings.context:
            dialog.feed += new
            episode.ids += new
            return True
    turn.feedback = ""
    episode.truncated = True
    return False


def rollout(
    model,
    tokenizer,
    problems: Sequence[Problem],
    sandbox: Sandbox,
    settings: RolloutSettings,
    seed: int,
    first_index: int = 0,
    progress: bool = False,
    feedback_problems: Sequence[Problem] = (),
) -> list[Episode]:
    """Sample one episode for each entry of `problems` (repeat a problem to get several).

    Args:
        model: a transformers causal LM; tokenizer: its tokenizer, with a chat template.
        seed, first_index: episode i draws its noise from the stream (seed, first_index + i).
        feedback_problems: where random feedback comes from; default `problems`.
    Returns: the episodes, in the order of `problems`.
    Raises: ValueError if a prompt and `max_new_tokens` do not fit the context, or for unknown feedback.
    """
    if settings.feedback not in FEEDBACK:
        raise ValueError(f"feedback is {settings.feedback!r}, but must be one of {', '.join(FEEDBACK)}")
    others = feedback_problems or problems
    if settings.feedback == "random" and len({p.answer or p.name for p in others}) < 2:
        raise ValueError(
            "random feedback comes from another problem: it needs problems with two different answers"
        )
    examples = read_examples(settings.examples)
    was_training = model.training
    model.eval()
    waiting: deque[_Dialog] = deque()
    for index, problem in enumerate(problems, first_index):
        ids = prompt_ids(tokenizer, first_message(problem), examples)
        if len(ids) + settings.max_new_tokens > settings.context:
            raise ValueError(
                f"the prompt of {problem.name} has {len(ids)} tokens: with {settings.max_new_tokens} new "
                f"ones it does not fit a context of {settings.context}"
            )
        noise = np.random.default_rng([seed, index])
        waiting.append(
            _Dialog(
                Episode(problem, ids, [], False, False, False, index),
                noise.random(settings.turn_limit * settings.max_new_tokens),
                feed=list(ids),
                picks=noise,
            )
        )
    dialogs = list(waiting)
    ends = stop_ids(tokenizer)
    cache = RaggedCache()
    seats: list[_Dialog] = []  # seats[i] owns row i of the cache
    active = 0  # seats[:active] decode, the others wait for their tests
    ended: deque[_Dialog] = deque()  # those that wait, the longest first
    bar = tqdm(total=len(dialogs), desc="rollout", unit="dialog", disable=not progress, leave=False)

    def exchange(a: int, b: int) -> None:
        cache.swap(a, b)
        seats[a], seats[b] = seats[b], seats[a]

    while seats or waiting:
        if active <= len(seats) // 2:
            entered = active
            for _ in range((len(ended) + 1) // 2):
                dialog = ended.popleft()
                if _continues(dialog, tokenizer, sandbox, settings):
                    exchange(seats.index(dialog), entered)
                    entered += 1
                else:
                    exchange(seats.index(dialog), len(seats) - 1)
                    seats.pop()
                    cache.lengths.pop()
                    bar.update()
            while waiting and len(seats) < settings.batch_rows:
                seats.append(waiting.popleft())
                cache.lengths.append(0)
                exchange(len(seats) - 1, entered)
                entered += 1
            for dialog in seats[active:entered]:
                at = len(dialog.episode.ids)
                dialog.episode.turns.append(Turn(at, at, []))
            while active < entered:
                # All but the last token of what is new: the last one goes through the decoding step below.
                end, width = active + 1, len(seats[active].feed)
                while end < entered:
                    width = max(width, len(seats[end].feed))
                    if width * (end + 1 - active) > PREFILL_TOKENS:
                        break
                    end += 1
                _forward(model, cache, slice(active, end), [dialog.feed[:-1] for dialog in seats[active:end]])
                for dialog in seats[active:end]:
                    dialog.feed = dialog.feed[-1:]
                active = end
            continue
        decoding = slice(0, active)
        logits = _forward(model, cache, decoding, [dialog.feed for dialog in seats[decoding]])  # (n, V)
        noise = torch.tensor([d.noise[d.drawn] for d in seats[decoding]], device=logits.device)  # (n,)
        tokens, logprobs = sample_tokens(logits, noise, settings.temperature, settings.top_p)  # (n,), (n,)
        sampled = list(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        for seat in range(active - 1, -1, -1):
            (token, logprob), dialog = sampled[seat], seats[seat]
            turn = dialog.episode.turns[-1]
            dialog.episode.ids.append(token)
            dialog.drawn += 1
            turn.end += 1
            turn.behaviour_logprobs.append(logprob)
            dialog.feed = [token]
            turn.truncated = token not in ends and turn.end - turn.start == settings.max_new_tokens
            if token in ends or turn.truncated:
                _end_turn(dialog, tokenizer, sandbox, settings, others)
                active -= 1
                exchange(seat, active)
                ended.append(dialog)
    for dialog in dialogs:
        if dialog.private:
            began = time.perf_counter()
            dialog.episode.solved = all(r.verdict == Verdict.PASSED for r in dialog.private.result())
            dialog.episode.turns[-1].sandbox_seconds += time.perf_counter() - began
    bar.close()
    model.train(was_training)
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
    arguments = parser.parse_args()
    with friendly_errors("rollout.py"), Sandbox() as executor:
        chat, language_model = load_tokenizer(arguments.model), load_model(arguments.model, dtype="auto")
        first = list(load_problems(arguments.problems, "test")[:1])
        print(show(chat, rollout(language_model, chat, first, executor, RolloutSettings(), seed=0)[0]))
