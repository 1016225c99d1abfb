"""The offline world: a tiny language model, and problems that can only be solved by reading the feedback.

Paper: not in it. This replaces Llama 3.1 and CodeContests, so that all of RLEF runs on a laptop in minutes.
The rest of the project does not know that the world is small: `problems` returns what a data set would, and
`ensure_base` a Hugging Face directory.

A problem has a family (for example lists of numbers), a rule of that family (reverse the list) and a way to
print (with commas). The statement names the family only, so thirty programs are possible. Each of them gives
another output on each public test: one line of feedback identifies the right program, and without feedback
the chance is one in thirty per turn. The parts of an input use different characters (the first number 1 to 4,
the second 5 to 9) and each line of a program is one token, so that reading needs recognition but no
arithmetic. A model with a third of a million parameters learns it in a minute.

The model that RLEF starts from is trained on synthetic dialogs (the warm start), in two lessons. The first
teaches to read: a wrong guess, its feedback, the right program. RL can then sample repairs and reinforce
them. The second teaches a habit that RLEF has to change: most answers, also after feedback, are the family's
first program, some are another guess or broken code, and few use the feedback.

RL sees only a part of the world. The test split has three groups: "seen" (the rule and the way to print occur
in RL, with other inputs), "new combination" (both occur, but never together) and "new rule" (occurs only in
the warm start, which teaches its name). No input is in two splits.

Run alone: `python toy.py [DIRECTORY]` builds the model and prints a dialog of the warm start.
"""

import contextlib
import functools
import io
import json
import linecache
import random
import shutil
import sys
import zlib
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import data
from checkpoints import check_replaceable, replace_whole
from data import Problem, feedback_message, first_message
from distributed import friendly_errors
from isolation.child import candidate_traceback
from sandbox import IoTest, Limits, TestResult, Verdict, outputs_match

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
SPLIT_OF_INPUT = ["train"] * 7 + ["valid"] + ["test"] * 2  # indexed by a hash of the input


@dataclass(frozen=True)
class Family:
    """Problems that share a statement."""

    statement: str
    words: tuple[tuple[str, ...], ...]  # of an input: for each character, the choices
    separator: str  # between the words
    read: str  # first line of a program
    rules: tuple[str, ...]  # second line
    shows: tuple[str, ...]  # third line
    held_out: tuple[int, ...] = (3, 7)  # rules that do not occur in RL

    def programs(self) -> list[str]:
        """All programs that fit the statement: program i has rule i // len(shows), show i % len(shows)."""
        return [f"{self.read}\n{rule}\n{show}\n" for rule in self.rules for show in self.shows]


# fmt: off
FAMILIES = (
    Family(
        statement="Read two integers and print one number.",
        words=(("1234",) * 2, ("56789",) * 3),
        separator=" ",
        read="a, b = map(int, input().split())",
        rules=(
            "y = a + b", "y = a * 10", "y = b * 10", "y = -a", "y = -b", "y = a * 1000 + b",
            "y = b * 100 + a", "y = a % 10", "y = b % 10", "y = a * 1000",
        ),
        shows=("print(y)", 'print("=", y)', 'print(y, "!")'),
    ),
    Family(
        statement="Read some numbers and print some of them.",
        words=(("123",) * 2, ("456",) * 2, ("789",) * 2),
        separator=" ",
        read="xs = list(map(int, input().split()))",
        rules=(
            "ys = xs[::-1]", "ys = xs[1:]", "ys = xs[:2]", "ys = [-x for x in xs]", "ys = [0] + xs",
            "ys = xs + xs", "ys = [x * 10 for x in xs]", "ys = [x * 100 for x in xs]",
            "ys = xs + [0]", "ys = [x * 10 + 1 for x in xs]",
        ),
        shows=("print(*ys)", 'print(*ys, sep=",")', 'print(*ys, sep="+")'),
    ),
    Family(
        statement="Read a word and print another.",
        words=(("abcde",), ("fghij",), ("klmno",), ("pqrst",)),
        separator="",
        read="s = input().strip()",
        rules=(
            "t = s[::-1]", "t = s[1:]", "t = s[:1]", "t = s.upper()", "t = s[-1:]", "t = s + s",
            "t = s[:2]", 't = "-".join(s)', 't = "x" + s', 't = s + "x"',
        ),
        shows=("print(t)", 'print(t + "!")', 'print("<" + t + ">")'),
    ),
    Family(
        statement="Read a line of words and print another line.",
        words=(("abcd", "efgh"), ("ijkl", "mnop"), ("qrst", "uvwz")),
        separator=" ",
        read="ws = input().split()",
        rules=(
            "vs = ws[::-1]", "vs = ws[1:]", "vs = ws[:2]", "vs = [w.upper() for w in ws]",
            "vs = [w[::-1] for w in ws]", "vs = ws + ws", "vs = [w[:1] for w in ws]",
            "vs = [w + w for w in ws]", 'vs = ["x" + w for w in ws]', 'vs = [w + "x" for w in ws]',
        ),
        shows=("print(*vs)", 'print(*vs, sep="-")', 'print(*vs, sep="/")'),
    ),
)
# fmt: on


@functools.cache
def _output(program: str, text: str) -> str:
    """What a program of this module prints. A model's programs run in the sandbox, never here."""
    printed, stdin = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(text)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "solution.py", "exec"), {})
    finally:
        sys.stdin = stdin
    return printed.getvalue()


@functools.cache
def inputs(family: Family, split: str) -> list[str]:
    """The family's inputs in this split: the outputs of all its programs differ on each of them.

    Raises: ValueError, one sentence, if the family has too few such inputs.
    """
    draw = random.Random(f"{family.statement} {split}")
    size, programs = 300 if split == "train" else 40, family.programs()
    found, seen = [], set()
    alike = set(combinations(programs, 2))  # programs that no input has told apart
    for _ in range(10_000):
        text = family.separator.join("".join(map(draw.choice, word)) for word in family.words)
        if text in seen or SPLIT_OF_INPUT[zlib.crc32(text.encode()) % 10] != split:
            continue
        seen.add(text)
        outputs = {p: " ".join(_output(p, text).lower().split()) for p in programs}  # as judged
        alike = {(one, other) for one, other in alike if outputs[one] == outputs[other]}
        if len(set(outputs.values())) == len(programs):
            found.append(text)
        if len(found) == size:
            return found
    message = f"the toy family {family.statement!r} has {len(found)} inputs for {split}, but needs {size}"
    if seen and alike:
        raise ValueError(
            f"{message}: no input tells apart the programs {' and '.join(map(repr, min(alike)))}"
        )
    raise ValueError(f"{message} on which all its programs differ: give its words more characters")


def group_of(family: Family, program: int) -> str:
    """The group of a program of the family; RL trains on "seen" only."""
    rule, show = divmod(program, len(family.shows))
    if rule in family.held_out:
        return "new rule"
    return "new combination" if (rule + show) % 5 == 4 else "seen"


def _problem(family: Family, program: int, split: str, name: str, draw: random.Random) -> Problem:
    """A problem with two public and three private tests."""
    programs = family.programs()
    chosen = draw.sample(inputs(family, split), 5)
    tests = tuple(IoTest(text + "\n", _output(programs[program], text)) for text in chosen)
    wrong = draw.sample([p for i, p in enumerate(programs) if i != program], 3)
    return Problem(
        name=name,
        statement=family.statement,
        public_tests=tests[:2],
        private_tests=tests[2:],
        limits=Limits(seconds=2.0, memory_bytes=1 << 28),
        correct_solutions=(programs[program],),
        incorrect_solutions=tuple(wrong),
        group=group_of(family, program),
        answer=programs[program],
    )


@functools.cache
def problems(split: str) -> list[Problem]:
    """The problems of "train" (1200), "valid" (120), both of group "seen", or "test" (240, all groups)."""
    sizes = {
        "train": {"seen": 1200},
        "valid": {"seen": 120},
        "test": {"seen": 120, "new combination": 60, "new rule": 60},
    }
    if split not in sizes:
        raise ValueError(f"the toy world has the splits {', '.join(sizes)}, but not {split!r}")
    draw = random.Random(f"toy {split}")
    made = []
    for group, size in sizes[split].items():
        for number in range(size):
            family = FAMILIES[number % len(FAMILIES)]
            members = [i for i in range(len(family.programs())) if group_of(family, i) == group]
            name = f"toy/{split}/{group.replace(' ', '-')}/{number}"
            made.append(_problem(family, draw.choice(members), split, name, draw))
    return made


# ---- tokenizer and model -----------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, for each fixed line of the prompts and for each line of the programs."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    phrases = ["```python\n", "\n```", "Traceback (most recent call last):\n", '  File "solution.py", line ']
    phrases += [", in <module>\n", "NameError: name '", "' is not defined"]
    phrases += [data.FORMAT_TOKENS.strip(), data.NO_VALID_CODE, data.CLOSING, data.PUBLIC_TESTS_PASSED]
    for template in data.FEEDBACK_TOKENS.values():
        phrases += [line + "\n" for line in template.splitlines() if "{" not in line]
    for family in FAMILIES:
        phrases += [family.statement + "\n\n", family.read, *family.rules, *family.shows]
    phrases = [phrase for phrase in dict.fromkeys(phrases) if len(phrase) > 1]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:3],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _results(program: str, problem: Problem) -> list[TestResult]:
    """The results that the sandbox would give for a program of this module, without starting a process."""
    results = []
    for test in problem.public_tests:
        try:
            printed = _output(program, test.input.strip())
        except NameError as error:
            linecache.cache["solution.py"] = (len(program), None, program.splitlines(True), "solution.py")
            results.append(TestResult(Verdict.EXCEPTION, traceback=candidate_traceback(error)))
            continue
        right = outputs_match(printed, test.output)
        results.append(TestResult(Verdict.PASSED if right else Verdict.WRONG_ANSWER, stdout=printed))
    return results


def warm_start_dialog(
    draw: random.Random,
    turn_limit: int = 3,
    reading: float = 0.2,
    favourite: float = 0.75,
    faults: float = 0.1,
) -> list[dict]:
    """The chat messages of a synthetic dialog.

    Args:
        reading: the share of answers after feedback that are the right program.
        favourite: the share of the other answers that are the family's first program; the rest are guesses.
        faults: the share of these that are broken: two thirds are not valid Python, one third crash.
    """
    family = draw.choice(FAMILIES)
    programs = family.programs()
    problem = _problem(family, draw.randrange(len(programs)), "train", "warm start", draw)
    messages = [{"role": "user", "content": first_message(problem)}]
    answer_known = False  # from the feedback
    for turn in range(turn_limit):
        program, results = problem.answer, None
        if not answer_known or draw.random() >= reading:
            program = programs[0] if draw.random() < favourite else draw.choice(programs)
            fault = draw.random()
            if fault < 2 / 3 * faults:
                program = program.replace("\n", " =\n", 1)
            elif fault < faults:
                program = program.split("\n", 1)[1]
        messages.append({"role": "assistant", "content": f"```python\n{program}```"})
        if " =\n" not in program:
            results = _results(program, problem)
        if turn + 1 == turn_limit or results and all(r.verdict == Verdict.PASSED for r in results):
            break
        messages.append({"role": "user", "content": feedback_message(problem, results)})
        answer_known = results is not None and results[0].verdict == Verdict.WRONG_ANSWER
    return messages


def _answer_mask(ids: torch.Tensor, tokenizer, first: int) -> torch.Tensor:
    """(B, T-1) Which tokens of `ids[:, 1:]` are of an answer; answers before number `first` do not count."""
    user, assistant = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[1:3])
    markers = torch.where(ids == assistant, 1, torch.where(ids == user, -1, 0))  # (B, T)
    headers = torch.arange(ids.shape[1]) * (markers != 0)  # (B, T)
    in_answer = markers.gather(1, headers.cummax(1).values) == 1  # (B, T) the last marker so far is assistant
    answers = in_answer[:, :-1] & (ids[:, 1:] != user) & (ids[:, 1:] != tokenizer.pad_token_id)  # (B, T-1)
    return answers & ((ids == assistant).cumsum(1)[:, :-1] >= first)  # (B, T-1)


def _warm_start(model: LlamaForCausalLM, tokenizer, draw: random.Random, lessons: tuple[int, int]) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1, betas=(0.9, 0.98))
    bar = tqdm(range(sum(lessons)), desc="warm start", unit="step")
    for step in bar:
        reads = step < lessons[0]
        progress = step / lessons[0] if reads else (step - lessons[0]) / lessons[1]
        rate = (min(1.0, 10 * progress, 2 * (1 - progress)) + 0.02) * (4e-3 if reads else 8e-4)
        optimiser.param_groups[0]["lr"] = rate
        if reads:
            dialogs = [warm_start_dialog(draw, 2, reading=1, favourite=0, faults=0) for _ in range(32)]
        else:
            dialogs = [warm_start_dialog(draw) for _ in range(64)]
        texts = [tokenizer.apply_chat_template(dialog, tokenize=False) for dialog in dialogs]
        rows = sorted(tokenizer(texts, add_special_tokens=False).input_ids, key=len)
        halves = (
            rows[: len(rows) // 2],
            rows[len(rows) // 2 :],
        )  # short ones, long ones: less padding
        batches = [tokenizer.pad({"input_ids": half}, return_tensors="pt").input_ids for half in halves]
        # After 50 steps the first lesson skips the first answer: a random guess cannot be learned.
        masks = [_answer_mask(ids, tokenizer, first=2 if reads and step > 50 else 1) for ids in batches]
        answers, tokens = sum(mask.sum() for mask in masks), sum(map(len, rows)) - len(rows)
        total = 0.0
        for ids, mask in zip(batches, masks, strict=True):  # (B, T), (B, T-1)
            logits = model(ids[:, :-1]).logits  # (B, T-1, V)
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T-1)
            loss = losses[mask].sum() / answers  # ()
            if reads:  # the tests show how programs behave: learning these tokens too takes far fewer dialogs
                loss += 0.3 * losses[ids[:, 1:] != tokenizer.pad_token_id].sum() / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        bar.set_postfix_str(f"loss {total:.3f}")


def ensure_base(directory: Path, seed: int = 0, lessons: tuple[int, int] = (600, 60)) -> Path:
    """The Hugging Face directory of the warm-started model; `lessons` are in steps.

    It is built if it is missing, or if it was taught other families, tokens or words of the prompts.
    """
    tokenizer = build_tokenizer()
    words = [value for name, value in vars(data).items() if name.isupper()]
    taught = [CHAT_TEMPLATE, tokenizer.backend_tokenizer.to_str(), FAMILIES, SPLIT_OF_INPUT, words]
    checksum = zlib.crc32(repr(taught).encode())
    if (directory / "config.json").exists():
        if json.loads((directory / "config.json").read_text()).get("toy_checksum") == checksum:
            return directory
        print(f"{directory} was taught other families, tokens or prompts: it is built anew", file=sys.stderr)
    check_replaceable(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # dialogs are short
        initializer_range=0.1,  # about 1 / sqrt(width): the usual 0.02 makes a narrow model learn slowly
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        toy_checksum=checksum,
    )
    model = LlamaForCausalLM(config)
    _warm_start(model, tokenizer, random.Random(seed), lessons)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    replace_whole(directory, partial)
    return directory


if __name__ == "__main__":
    with friendly_errors("toy.py"):
        for message in warm_start_dialog(random.Random(0)):
            print(f"[{message['role']}]\n{message['content']}\n")
        print(ensure_base(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/toy-base")))
