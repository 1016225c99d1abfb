"""The offline world: a tiny language model, and problems that can only be solved by reading the feedback.

Paper: not in it. This replaces Llama 3.1 and CodeContests, so that all of RLEF runs on a laptop in minutes.
The rest of the project does not know it: `problems` is a data set, `start_model` a Hugging Face directory.

A problem has a family (lists of numbers), a rule of that family (reverse the list) and a frame of up to five
marks around the output. A statement names the family only: 320 programs of 3 to 8 lines fit, and each gives
another output on each test, so that one line of feedback identifies the right one. A tenth of the statements
tell it. A line of a program is one token: reading needs recognition, but no arithmetic.

The model that RLEF starts from (toy-base/) was trained on synthetic dialogs, the warm start, in two lessons:
skills that RL can sample and reinforce (to write the program that a statement or feedback tells, and one that
only prints the expected output), then habits that RL has to change (most answers are the family's first
program or print the expected output).

The test split has the groups "seen" (rule and frame occur in RL, with other inputs), "new combination" (both
occur, but never together), "new rule" (occurs only in the warm start) and "told" (as seen, but the statement
tells it). No input is in two splits.

Run alone: `python toy.py` prints a dialog of the warm start; `python toy.py DIRECTORY` builds a model too.
"""

import contextlib
import functools
import io
import json
import linecache
import random
import sys
import zlib
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from unittest.mock import patch

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import data
from checkpoints import check_replaceable, replace_whole
from data import Problem, feedback_message, first_message
from distributed import friendly_errors
from isolation.child import candidate_traceback
from sandbox import IoTest, Limits, TestResult, Verdict, outputs_match

CHAT_TEMPLATE = (  # what stands in {% generation %} is what the warm start teaches
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STORED = Path(__file__).with_name("toy-base")  # the start model that comes with the project
SPLIT_OF_INPUT = ["train"] * 7 + ["valid"] + ["test"] * 2  # indexed by a hash of the input


@dataclass(frozen=True)
class Family:
    """Problems that share a statement."""

    statement: str
    words: tuple[tuple[str, ...], ...]  # of an input: for each character, the choices
    separator: str  # between the words
    read: str  # first line of a program
    rules: tuple[str, ...]  # second line
    show: str  # prints the result
    held_out: tuple[int, ...] = (3, 7)  # rules that do not occur in RL

    def programs(self) -> list[str]:
        """All programs that fit the statement: program i has rule i // 32 and frame i % 32."""
        parts = product(self.rules, FRAMES)
        lines = ((self.read, rule, *before, self.show, *after, "") for rule, (before, after) in parts)
        return ["\n".join(program) for program in lines]


# A frame: lines before and after the one that prints the result, each of which a program has or not.
FRAME_BEFORE, FRAME_AFTER = ('print("<")', 'print("=")'), ('print(">")', 'print("!")', 'print("?")')
SUBSETS = [[c for n in range(4) for c in combinations(side, n)] for side in (FRAME_BEFORE, FRAME_AFTER)]
FRAMES = [*product(*SUBSETS)]

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
        show="print(y)",
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
        show="print(*ys)",
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
        show="print(t)",
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
        show="print(*vs)",
    ),
)
# fmt: on
TOLD = "It has these lines:\n"  # in the statements that tell the program
HARD_CODED = 'print("""{output}""")'  # instead of the line that prints the result

_compiled = functools.cache(functools.partial(compile, filename="solution.py", mode="exec"))


def _output(program: str, text: str) -> str:
    """What a program of this module prints. A model's programs run in the sandbox, never here."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, patch("sys.stdin", io.StringIO(text)):
        exec(_compiled(program), {})
    return printed.getvalue()


@functools.cache
def inputs(family: Family, split: str) -> list[str]:
    """The family's inputs on which the outputs of all its rules differ. Raises: ValueError if too few do."""
    draw = random.Random(f"{family.statement} {split}")
    size, programs = 300 if split == "train" else 40, family.programs()[:: len(FRAMES)]
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
    remedy = "give its words more characters"
    if seen and alike:
        remedy = f"no input tells apart the programs {' and '.join(map(repr, min(alike)))}"
    has = f"the toy family {family.statement!r} has {len(found)} inputs for {split}, but needs {size}"
    raise ValueError(f"{has} on which the outputs of all its rules differ: {remedy}")


def group_of(family: Family, program: int) -> str:
    """The group of a program of the family; RL trains on "seen" only."""
    rule, frame = divmod(program, len(FRAMES))
    if rule in family.held_out:
        return "new rule"
    return "new combination" if (rule + frame) % 5 == 4 else "seen"


@functools.cache
def _programs_of(family: Family, group: str, lines: int) -> list[str]:
    """The family's programs of this length and group; "any" stands for all groups."""
    programs = enumerate(family.programs())
    chosen = (program for i, program in programs if group in ("any", group_of(family, i)))
    return [program for program in chosen if program.count("\n") == lines]


def _problem(family: Family, group: str, told: bool, split: str, name: str, draw: random.Random) -> Problem:
    """A problem with one public and three private tests; programs of 3 to 8 lines are equally likely."""
    answer = draw.choice(_programs_of(family, group, draw.randint(3, 8)))
    chosen = draw.sample(inputs(family, split), 4)
    tests = tuple(IoTest(text + "\n", _output(answer, text)) for text in chosen)
    wrong = draw.sample([program for program in family.programs() if program != answer], 3)
    return Problem(
        name=name,
        statement=family.statement + f"\n{TOLD}{answer.split(chr(10), 1)[1]}" * told,
        public_tests=tests[:1],
        private_tests=tests[1:],
        limits=Limits(seconds=2.0, memory_bytes=1 << 28),
        correct_solutions=(answer,),
        incorrect_solutions=tuple(wrong),
        group="told" if told else group,
        answer=answer,
    )


@functools.cache
def problems(split: str) -> list[Problem]:
    """The problems of "train" (1200), "valid" (120) or "test" (252); RL trains on "seen" and "told"."""
    sizes = {
        "train": {"seen": 1080, "told": 120},
        "valid": {"seen": 108, "told": 12},
        "test": {"seen": 120, "new combination": 60, "new rule": 60, "told": 12},
    }
    if split not in sizes:
        raise ValueError(f"the toy world has the splits {', '.join(sizes)}, but not {split!r}")
    draw, made = random.Random(f"toy {split}"), []
    for group, size in sizes[split].items():
        told, prefix = group == "told", f"toy/{split}/{group.replace(' ', '-')}"
        for number in range(size):
            family = FAMILIES[number % len(FAMILIES)]
            made.append(_problem(family, "seen" if told else group, told, split, f"{prefix}/{number}", draw))
    return made


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
        phrases += [family.statement, family.read, *family.rules, family.show]
    phrases += [TOLD, *FRAME_BEFORE, *FRAME_AFTER, *HARD_CODED.split("{output}")]
    phrases = [phrase for phrase in dict.fromkeys(phrases) if len(phrase) > 1]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _result(program: str, test: IoTest) -> TestResult:
    """The result that the sandbox would give for a program of this module, without starting a process."""
    try:
        printed = _output(program, test.input.strip())
    except NameError as error:
        linecache.cache["solution.py"] = (len(program), None, program.splitlines(True), "solution.py")
        return TestResult(Verdict.EXCEPTION, traceback=candidate_traceback(error))
    right = outputs_match(printed, test.output)
    return TestResult(Verdict.PASSED if right else Verdict.WRONG_ANSWER, stdout=printed)


def _hard_coded(problem: Problem, family: Family) -> str:
    """A program that prints the expected output of the public test, whatever its input is."""
    _, _, *lines = problem.answer.splitlines()  # without the one that reads and the rule
    place = lines.index(family.show)
    lines[place] = HARD_CODED.format(output=problem.public_tests[0].output.splitlines()[place])
    return "\n".join([*lines, ""])


def warm_start_dialog(
    draw: random.Random,
    turn_limit: int = 3,
    told: float = 0.1,  # share of statements that tell the program
    reading: float = 0.25,  # share of answers that are the right program, where statement or feedback tell it
    hard_coded: float = 0.4,  # share of answers after feedback that print the expected output it showed
    favourite: float = 0.75,  # share of the other answers that are the family's first program, not a guess
    faults: float = 0.1,  # share of these that are broken: two thirds are not valid Python, one third crash
) -> list[dict]:
    """The chat messages of a synthetic dialog."""
    family, statement_tells, feedback_tells = draw.choice(FAMILIES), draw.random() < told, False
    problem = _problem(family, "any", statement_tells, "train", "warm start", draw)
    messages = [{"role": "user", "content": first_message(problem)}]
    for turn in range(turn_limit):
        skill, program = draw.random(), problem.answer
        if feedback_tells and reading <= skill < reading + hard_coded:
            program = _hard_coded(problem, family)
        elif skill >= reading or not (statement_tells or feedback_tells):
            program = draw.choice(_programs_of(family, "any", draw.randint(3, 8)))
            if draw.random() < favourite:
                program = _programs_of(family, "any", 3)[0]
            fault = draw.random()
            if fault < 2 / 3 * faults:
                program = program.replace("\n", " =\n", 1)
            elif fault < faults:
                program = program.split("\n", 1)[1]
        messages.append({"role": "assistant", "content": f"```python\n{program}```"})
        results = None if " =\n" in program else [_result(program, problem.public_tests[0])]
        verdict = results and results[0].verdict
        if turn + 1 == turn_limit or verdict == Verdict.PASSED:
            break
        messages.append({"role": "user", "content": feedback_message(problem, results)})
        feedback_tells = verdict == Verdict.WRONG_ANSWER
    return messages


def _warm_start(model: LlamaForCausalLM, tokenizer, draw: random.Random, lessons: tuple[int, int]) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1, betas=(0.9, 0.98))
    skills = dict(turn_limit=2, told=0.2, reading=0.6, hard_coded=0.4, favourite=0, faults=0)
    form = dict(padding=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True)
    for step in tqdm(range(sum(lessons)), desc="warm start", unit="step"):
        first = step < lessons[0]
        progress = step / lessons[0] if first else (step - lessons[0]) / lessons[1]
        rate = (min(1.0, 10 * progress, 2 * (1 - progress)) + 0.02) * (4e-3 if first else 8e-4)
        optimiser.param_groups[0]["lr"] = rate
        size, options = (32, skills) if first else (64, {})
        dialogs = sorted((warm_start_dialog(draw, **options) for _ in range(size)), key=lambda d: len(str(d)))
        halves = dialogs[: size // 2], dialogs[size // 2 :]  # short ones, long ones: less padding
        batches = [tokenizer.apply_chat_template(half, **form) for half in halves]
        answers = sum(batch.assistant_masks.sum() for batch in batches)  # ()
        tokens = sum(batch.attention_mask.sum() for batch in batches)  # ()
        for batch in batches:
            ids, targets = batch.input_ids[:, :-1], batch.input_ids[:, 1:]  # (B, T-1) each
            logits = model(ids).logits  # (B, T-1, V)
            losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T-1)
            loss = losses[batch.assistant_masks[:, 1:] == 1].sum() / answers  # ()
            if first:  # the tests show how programs behave: learning these tokens too takes far fewer dialogs
                loss += 0.3 * losses[batch.attention_mask[:, 1:] == 1].sum() / tokens
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


def _checksum() -> int:
    words = [value for name, value in vars(data).items() if name.isupper()]
    taught = [CHAT_TEMPLATE, build_tokenizer().backend_tokenizer.to_str(), FAMILIES, SPLIT_OF_INPUT, words]
    return zlib.crc32(repr(taught).encode())


def fits(directory: Path) -> bool:
    """Whether a start model was taught the families, tokens and words of the prompts of today."""
    config = directory / "config.json"
    return config.exists() and json.loads(config.read_text()).get("toy_checksum") == _checksum()


def start_model(directory: Path) -> Path:
    """The model that comes with the project or, where the toy world was changed, one built in `directory`."""
    return STORED if fits(STORED) else ensure_base(directory)


def ensure_base(directory: Path, lessons: tuple[int, int] = (900, 60)) -> Path:
    """The Hugging Face directory of a start model; built if it is missing. `lessons` are in steps."""
    if fits(directory):
        return directory
    if (directory / "config.json").exists():
        print(f"{directory} was taught other families, tokens or prompts: it is built anew", file=sys.stderr)
    tokenizer = build_tokenizer()
    check_replaceable(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # dialogs are short
        initializer_range=0.1,  # about 1 / sqrt(width): the usual 0.02 makes a narrow model learn slowly
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        toy_checksum=_checksum(),
    )
    model = LlamaForCausalLM(config)
    _warm_start(model, tokenizer, random.Random(0), lessons)
    partial = directory.with_name(directory.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    replace_whole(directory, partial)
    return directory


if __name__ == "__main__":
    with friendly_errors("toy.py"):
        for message in warm_start_dialog(random.Random(0)):
            print(f"[{message['role']}]\n{message['content']}\n")
        print(*(ensure_base(Path(name)) for name in sys.argv[1:2] if not name.startswith("-")))
