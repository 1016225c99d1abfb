"""A problem: what the model is told, the tests that answer it, the words of the prompts, and where problems
come from.

Paper: section 2.1 and appendix B. A problem has *public* tests, whose outcomes are fed back in the dialog,
and *private* tests, which judge the last response only. The paper's own prompts are longer: ours stand below
as constants, to be swapped.

Run alone: `python data.py SOURCE [SPLIT]` counts a problem set's problems and tests and prints one first
message.

A file of your own, a JSON object a line or parquet, has a row a problem with these columns:
    name, description
    public_tests, private_tests
        [{"input": "1 2\\n", "output": "3\\n"}, ...], or with entry_point ["assert f(1, 2) == 3", ...]
It may have: generated_tests (more private ones), solutions and incorrect_solutions (programs), time_limit
(seconds), memory_limit_bytes, difficulty or cf_rating (groups of results), and for asserts entry_point (the
function's name), signature ("def f(a, b):"), preamble (code before each response) and setup (code for the
judge).
CodeContests' own columns are of this kind: its tests are {"input": [...], "output": [...]}, its solutions
{"language": [...], "solution": [...]} and its time_limit {"seconds": 2, "nanos": 0}.
"""

import ast
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distributed import friendly_errors
from formats.evalplus import read_row
from sandbox import NOT_RUN, AssertTest, IoTest, Job, Limits, TestResult, Verdict

# ---- the words of the prompts: every sentence on a line of its own, every field between lines --------------

FIRST_PROMPT = "{statement}\n\n{format}"
FORMAT_TOKENS = (
    "Write a Python 3 program that reads standard input and writes standard output.\n"
    "Put the whole program into one ```python block.\n"
)
FORMAT_ASSERTS = (
    "Write this Python 3 function:\n{signature}\nPut the whole function into one ```python block.\n"
)

FEEDBACK_TOKENS = {  # one entry a public test that failed
    Verdict.WRONG_ANSWER: (
        "Wrong answer.\nInput:\n{input}\nExpected output:\n{expected}\nYour output:\n{got}\n"
    ),
    Verdict.EXCEPTION: "Exception.\nInput:\n{input}\nTraceback:\n{traceback}\n",
    Verdict.TIMEOUT: "Timeout.\nInput:\n{input}\n",
    Verdict.OUT_OF_MEMORY: "Out of memory.\nInput:\n{input}\n",
    Verdict.TOO_MUCH_OUTPUT: "Too much output.\nInput:\n{input}\n",
}
FEEDBACK_ASSERTS = {  # one entry a public test, passed ones too
    Verdict.PASSED: "Passed.\nTest:\n{test}\n",
    Verdict.WRONG_ANSWER: "Wrong answer.\nTest:\n{test}\nAssertionError: {got} != {expected}\n",
    Verdict.EXCEPTION: "Exception.\nTest:\n{test}\nTraceback:\n{traceback}\n",
    Verdict.TIMEOUT: "Timeout.\nTest:\n{test}\n",
    Verdict.OUT_OF_MEMORY: "Out of memory.\nTest:\n{test}\n",
    Verdict.TOO_MUCH_OUTPUT: "Too much output.\nTest:\n{test}\n",
}
FEEDBACK_ASSERT_UNTOLD = "Wrong answer.\nTest:\n{test}\n"  # the test does not tell the values it compared
MBPP_STATEMENT = "{prompt}\nThese tests must pass:\n{tests}"
FEEDBACK = "{entries}\n{closing}{format}"
NO_VALID_CODE = "Your answer has no valid Python code.\n"
PUBLIC_TESTS_PASSED = "The public tests passed, but the answer is wrong.\n"  # only random feedback gets here
CLOSING = "Try again.\n"
RETRY_WITHOUT_FEEDBACK = "Try again."  # the whole message of feedback mode "none"
CUT = "[{count} characters cut]"
TESTS_CUT = "[{count} tests cut]\n"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Tests are all `IoTest` (standard input and output) or all `AssertTest` (calls of a function).
    """

    name: str  # unique in its set
    statement: str  # what the user message states
    public_tests: tuple[IoTest | AssertTest, ...]  # their outcomes are fed back
    private_tests: tuple[IoTest | AssertTest, ...]  # judge the last response, together with the public ones
    limits: Limits = Limits()
    correct_solutions: tuple[str, ...] = ()
    incorrect_solutions: tuple[str, ...] = ()  # where random feedback comes from
    preamble: str = ""  # stands before each response's code (HumanEval+: its prompt)
    entry_point: str = ""  # assert sets: the function under test
    signature: str = ""  # assert sets: how the prompt spells the function; empty: its name
    setup: str = ""  # assert sets: trusted helper code of the judge
    group: str = ""  # what results are broken down by
    answer: str = ""  # random feedback is never drawn from a problem with the same answer; empty: the name

    @property
    def judging(self) -> str:
        """ "asserts" where tests call a function, else "tokens"."""
        return "asserts" if self.entry_point else "tokens"


def _format_instruction(problem: Problem) -> str:
    if problem.judging == "tokens":
        return FORMAT_TOKENS
    return FORMAT_ASSERTS.format(signature=problem.signature or problem.entry_point)


def first_message(problem: Problem, with_format: bool = True) -> str:
    """The first user message: the statement and, unless told otherwise, how the answer must look."""
    instruction = _format_instruction(problem) if with_format else ""
    return FIRST_PROMPT.format(statement=problem.statement.strip(), format=instruction).strip()


def _shorten(text: str, cut: int) -> str:
    """Cut the middle out, visibly: the head of an input and the last lines of a traceback matter most."""
    text = text.strip("\n")
    if len(text) <= cut:
        return text
    half = cut // 2
    return f"{text[:half]}\n{CUT.format(count=len(text) - 2 * half)}\n{text[-half:]}"


def _entry(problem: Problem, test: IoTest | AssertTest, result: TestResult, cut: int) -> str:
    """What feedback says about one test."""
    # A traceback counts the program's lines; the model knows only those behind the preamble.
    traceback = re.sub(
        r'(File "solution.py", line )(\d+)',
        lambda m: f"{m[1]}{max(1, int(m[2]) - problem.preamble.count(chr(10)))}",
        result.traceback,
    )
    if isinstance(test, IoTest):
        fields = {"input": test.input, "expected": test.output, "got": result.stdout}
        template = FEEDBACK_TOKENS[result.verdict]
    else:
        told = result.call or test.code.removeprefix("assert ").partition(" == Expected(")[0]
        fields = {"test": told, "expected": result.expected, "got": result.got}
        template = FEEDBACK_ASSERTS[result.verdict]
        if result.verdict == Verdict.WRONG_ANSWER and not result.expected:
            template = FEEDBACK_ASSERT_UNTOLD
    fields["traceback"] = traceback
    return template.format(**{name: _shorten(text, cut) for name, text in fields.items()})


def feedback_message(
    problem: Problem,
    results: Sequence[TestResult] | None,
    cut: int = 2000,
    asked: Problem | None = None,
) -> str:
    """The user message after a response that did not pass.

    Args:
        asked: whose answer is asked for again, where the feedback is of another problem (random feedback).
        results: one for each public test; None where the response has no valid code.
        cut: characters that a field (an input, an output, a traceback) may have. All entries together may
            have ten times as many; then tests are left out, those that passed first, and counted.
    """
    if results is None:
        entries = [NO_VALID_CODE]
    else:
        tests = zip(problem.public_tests, results, strict=True)
        run = [(test, result) for test, result in tests if result != NOT_RUN]
        shown = [
            (result.verdict == Verdict.PASSED, _entry(problem, test, result, cut))
            for test, result in run
            if problem.judging == "asserts" or result.verdict != Verdict.PASSED
        ]
        kept, length = set(), 0
        for place in sorted(range(len(shown)), key=lambda place: (shown[place][0], place)):
            length += len(shown[place][1])
            if kept and length > 10 * cut:
                break
            kept.add(place)
        entries = [shown[place][1] for place in sorted(kept)]
        if left_out := len(shown) - len(kept) + len(results) - len(run):
            entries.append(TESTS_CUT.format(count=left_out))
        if all(result.verdict == Verdict.PASSED for result in results):
            entries.append(PUBLIC_TESTS_PASSED)
    instruction = _format_instruction(asked or problem)
    return FEEDBACK.format(entries="\n".join(entries), closing=CLOSING, format=instruction).strip()


def make_job(
    problem: Problem,
    code: str,
    tests: Sequence[IoTest | AssertTest],
    stop_at_first_failure: bool = False,
) -> Job:
    """The sandbox's job that judges `code`, a response's program, on `tests` of `problem`."""
    return Job(
        program=problem.preamble + code,
        tests=tuple(tests),
        limits=problem.limits,
        entry_point=problem.entry_point,
        setup=problem.setup,
        stop_at_first_failure=stop_at_first_failure,
    )


# ---- where problems come from: rows ------------------------------------------------------------------------

PYTHON3 = 3  # CodeContests' number of the language


def _from_evalplus(row: dict) -> Problem:
    """A row of HumanEval+ or MBPP+: base tests are public, plus tests private."""
    said = read_row(row)
    statement = MBPP_STATEMENT.format(prompt=said["prompt"].strip(), tests=said["asserts"])
    return Problem(
        name=said["name"],
        statement=statement if said["asserts"] else said["prompt"],
        public_tests=tuple(map(AssertTest, said["public"])),
        private_tests=tuple(map(AssertTest, said["private"])),
        correct_solutions=(said["solution"],),
        **{name: said[name] for name in ("preamble", "entry_point", "signature", "setup")},
    )


def _from_columns(row: dict) -> Problem:
    """A row of deepmind/code_contests, or of a file of your own."""

    def tests(column: str) -> tuple[IoTest | AssertTest, ...]:
        found = row.get(column) or []
        if isinstance(found, list) and row.get("entry_point"):
            return tuple(AssertTest(test) for test in found if ast.parse(test))
        if isinstance(found, list):
            found = {side: [test.get(side) for test in found] for side in ("input", "output")}
        inputs, outputs = found["input"], found["output"]
        if len(inputs) != len(outputs) or not all(isinstance(text, str) for text in (*inputs, *outputs)):
            raise ValueError(f"a test of {column} has no output, or no input, or one that is no text")
        return tuple(map(IoTest, inputs, outputs))

    def solutions(column: str) -> tuple[str, ...]:
        found = row.get(column) or []
        if isinstance(found, str):
            raise ValueError(f"{column} is a text, but must be a list of texts")
        if isinstance(found, list):
            return tuple(found)
        pairs = zip(found["language"], found["solution"], strict=True)
        return tuple(text for language, text in pairs if language == PYTHON3)

    if not isinstance(row["name"], str) or not isinstance(row["description"], str):
        raise ValueError("its name or its description is no text")
    group = f"difficulty {row['difficulty']}" if row.get("difficulty") is not None else ""
    if rating := row.get("cf_rating"):  # CodeContests: of Codeforces, 0 where there is none
        group = f"rating {rating // 400 * 400} to {rating // 400 * 400 + 399}"
    limit = row.get("time_limit") or {}
    if isinstance(limit, dict):
        limit = (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 1e9  # 0: not stated
    return Problem(
        name=row["name"],
        statement=row["description"],
        public_tests=tests("public_tests"),
        private_tests=tests("private_tests") + tests("generated_tests"),
        limits=Limits(limit or Limits.seconds, row.get("memory_limit_bytes") or Limits.memory_bytes),
        correct_solutions=solutions("solutions"),
        incorrect_solutions=solutions("incorrect_solutions"),
        group=group,
        **{name: row.get(name) or "" for name in ("preamble", "entry_point", "signature", "setup")},
    )


# ---- where problems come from: files and the hub -----------------------------------------------------------

FORMATS = (  # columns that must be there, and what makes a Problem of a row
    ("task_id prompt entry_point canonical_solution base_input plus_input atol", _from_evalplus),
    ("task_id prompt entry_point canonical_solution test", _from_evalplus),
    ("task_id prompt code test_list test_imports test", _from_evalplus),
    ("name description public_tests private_tests", _from_columns),
)
HUB = {  # repository, and its only split, which then serves for every split
    "code_contests": ("deepmind/code_contests", ""),
    "humaneval_plus": ("evalplus/humanevalplus", "test"),
    "mbpp_plus": ("evalplus/mbppplus", "test"),
}
SPLITS = ("train", "valid", "test")
SMALL = 1 << 26  # bytes of rows whose problems are made once and kept


def _problem(stored: dict, where: str) -> Problem:
    """The problem of a row, or of a row that is a line of JSON. Raises: ValueError, one sentence."""
    row = stored
    if list(stored) == ["text"]:
        try:
            row = json.loads(stored["text"])
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
    try:
        if not isinstance(row, dict):
            raise ValueError("it is no object with columns")
        missing, make = min(
            (([c for c in columns.split() if c not in row], make) for columns, make in FORMATS),
            key=lambda fit: len(fit[0]),
        )
        if missing:
            raise ValueError(f"no column {', '.join(missing)} among its columns {', '.join(row)}")
        return make(row)
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not understood: {error}") from error


class Problems(Sequence):
    """Problems made of a table's rows when they are asked for: a large table stays on disk."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice) -> "Problem | Problems":
        if isinstance(place, slice):
            return self.select(range(*place.indices(len(self))))
        return _problem(self.rows[place], f"row {place}")

    def select(self, places: Sequence[int]) -> "Problems":
        return Problems(self.rows.select(places))


def select(problems: Sequence[Problem], places: Sequence[int]) -> Sequence[Problem]:
    """The problems at these places; of a large table still without making them."""
    return problems.select(places) if isinstance(problems, Problems) else [problems[at] for at in places]


def first_messages(problems: Sequence[Problem]) -> Iterator[str]:
    """`first_message` of each problem; of a large table without reading its tests and solutions."""
    if not isinstance(problems, Problems):
        yield from map(first_message, problems)
        return
    unread = dict.fromkeys(("public_tests", "private_tests", "generated_tests", "solutions"), [])
    unread["incorrect_solutions"] = []
    there = [name for name in unread if name in problems.rows.column_names]
    for number, row in enumerate(problems.rows.remove_columns(there)):
        yield first_message(_problem(row | unread, f"row {number}"))


def _have_tests(batch: pa.RecordBatch | pa.Table) -> pa.BooleanArray:
    """Which CodeContests rows have public tests and private or generated ones, without reading any text."""
    counts = []
    for column in ("public_tests", "private_tests", "generated_tests"):
        inputs, outputs = (pc.struct_field(batch[column], side) for side in ("input", "output"))
        counts.append(pc.fill_null(pc.list_value_length(inputs), 0))
        uneven = pc.not_equal(counts[-1], pc.fill_null(pc.list_value_length(outputs), 0))
        if pc.any(uneven).as_py() or pc.list_flatten(outputs).null_count:
            raise ValueError(
                f"a test of {column} has no output: see {batch['name'].filter(uneven).to_pylist()}"
            )
    return pc.and_(pc.greater(counts[0], 0), pc.greater(pc.add(counts[1], counts[2]), 0))


def _open_parquet(files: Sequence[Path]) -> tuple[datasets.Dataset, int]:
    """The rows of parquet files, CodeContests' without tests left out, and how many rows the files have.

    They are copied into datasets' cache once, eight a piece, so that a row's columns lie side by side.
    Datasets' own copying takes 1.8 GB for 13,000 problems, and spreads a row over the mapped file.
    """
    tables = [pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) for file in files]
    schema, stamp = tables[0].schema_arrow, [(file.resolve(), file.stat().st_mtime_ns) for file in files]
    place = Path(
        datasets.config.HF_DATASETS_CACHE, f"rlef-{hashlib.sha256(repr(stamp).encode()).hexdigest()}"
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):  # one rank copies, the others wait
        if not place.exists():
            beside = place.with_suffix(".partial")
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in itertools.chain(*(table.iter_batches(200) for table in tables)):
                    kept = batch.filter(_have_tests(batch)) if "generated_tests" in schema.names else batch
                    for start in range(0, len(kept), 8):
                        writer.write_batch(kept.slice(start, 8))
            beside.replace(place)
    return datasets.Dataset.from_file(str(place)), sum(table.metadata.num_rows for table in tables)


def _files(source: str, split: str) -> list[Path]:
    """The files of a path: itself, or in a folder those whose names begin with the split."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source} is neither a problem set (toy, {', '.join(HUB)}) nor a file")
    files = sorted(path.rglob(f"{split}[-.]*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))]
    if not files:
        raise ValueError(f"{source} holds no .jsonl, .jsonl.gz or .parquet" + f" of {split}" * path.is_dir())
    return files


def _rows(source: str, split: str) -> tuple[datasets.Dataset, int]:
    """The stored rows, and how many there were before some were left out."""
    try:
        if source in HUB:
            repository, only_split = HUB[source]
            rows = datasets.load_dataset(repository, split=only_split or split)
            total = len(rows)
            if source == "code_contests":
                masks = (_have_tests(batch).to_pylist() for batch in rows.with_format("arrow").iter(1000))
                rows = rows.select([place for place, has in enumerate(itertools.chain(*masks)) if has])
            return rows, total
        files = _files(source, split)
        if files[0].suffix == ".parquet":
            return _open_parquet(files)
        # As text, not as JSON: a column of evalplus's own files has other types in every row.
        if not any(file.stat().st_size for file in files):
            raise ValueError(f"{source} is empty")
        rows = datasets.load_dataset("text", data_files=list(map(str, files)), split="train")
        return rows, len(rows)
    except (pa.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def load_problems(source: str, split: str) -> Sequence[Problem]:
    """The problems of a split ("train", "valid" or "test").

    Args:
        source: "toy"; "code_contests", "humaneval_plus" or "mbpp_plus", from the hub; a .jsonl, .jsonl.gz or
            .parquet file, which serves for every split; or a folder with files named by split.
    Problems without public or without private tests are left out, as in the paper, and counted in print.
    Raises: ValueError for an unknown split, rows that are not understood and where no problem is left;
    FileNotFoundError. One sentence each.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}, only {', '.join(SPLITS)}")
    if source == "toy":
        import toy  # here because toy.py builds its problems from this module's Problem and templates

        return toy.problems(split)
    rows, total = _rows(source, split)
    if "generated_tests" in rows.column_names:
        # Rows without tests have gone; perhaps there are too many to make them all.
        problems: Sequence[Problem] = Problems(rows)
        assert not len(rows) or problems[0]
    else:
        kept, made, small = [], [], rows.data.nbytes < SMALL
        for number, row in enumerate(rows):
            if row.get("text", "-").strip():
                problem = _problem(row, f"{source}, {'line' if 'text' in row else 'row'} {number + 1},")
                if problem.public_tests and problem.private_tests:
                    kept.append(number)
                    made += [problem] if small else []
            else:
                total -= 1  # an empty line
        problems = made if small else Problems(rows.select(kept))
    if len(problems) < total:
        print(f"{source}: {total - len(problems)} of {total} problems have no public or no private tests")
    if not problems:
        raise ValueError(f"{source} has no problem with public and private tests")
    if isinstance(problems, list):
        name, count = Counter(problem.name for problem in problems).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{source} has {count} problems of one name, {name}")
    return problems


if __name__ == "__main__":
    with friendly_errors("data.py"):
        problem_set = load_problems(*(sys.argv[1:] or ["toy"])[:1], *(sys.argv[2:] or ["test"])[:1])
        count = sum(len(p.public_tests) + len(p.private_tests) for p in problem_set)
        print(f"{len(problem_set)} problems, {count} tests\n\n{first_message(problem_set[0])}")
