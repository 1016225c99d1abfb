"""Where problem sets come from: the hub, files of published sets, files of your own, the toy world.

Paper: training on CodeContests, evaluation also on HumanEval+ and MBPP+ (section 3.3). A row's columns show
its format: rows of CodeContests and of your own files are read here, those of other sets in `formats/`.

Run alone: `python sources.py SOURCE [SPLIT]` prints the size of a problem set and one first message.

A file of your own is JSON (one object per line) or parquet. Each row is a problem. It must have the columns
    name, description
    public_tests, private_tests
        [{"input": "1 2\\n", "output": "3\\n"}, ...], or with entry_point ["assert f(1, 2) == 3", ...]
and may have
    generated_tests                    more private tests
    solutions, incorrect_solutions     lists of programs
    time_limit, memory_limit_bytes     limits of a test, in seconds and bytes
    difficulty or cf_rating            results are also reported for each of their values
    entry_point                        for asserts: the function's name
    signature                          for asserts: the function as the prompt writes it, "def f(a, b):"
    preamble, setup                    for asserts: code before each response, and code for the judge
CodeContests writes tests as {"input": [...], "output": [...]}, solutions as {"language": [...], "solution":
[...]} and time_limit as {"seconds": 2, "nanos": 0}; these forms are read too.
"""

import argparse
import ast
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import toy
from data import Problem, first_message
from distributed import friendly_errors
from formats import evalplus
from sandbox import AssertTest, IoTest, Limits

PYTHON3 = 3  # CodeContests' number of the language
TEST_COLUMNS = ("public_tests", "private_tests", "generated_tests")
SOLUTION_COLUMNS = ("solutions", "incorrect_solutions")
SPLITS = ("train", "valid", "test")
HUB = {  # repository, and its only split, which is then used for every split
    "code_contests": ("deepmind/code_contests", ""),
    "humaneval_plus": ("evalplus/humanevalplus", "test"),
    "mbpp_plus": ("evalplus/mbppplus", "test"),
}
SMALL = 1 << 26  # problems of tables up to this size, in bytes, are made once and kept

# ---- a row becomes a problem -------------------------------------------------------------------------------

datasets.disable_progress_bars()  # they would stand among ours


def _tests(row: dict, column: str) -> tuple[IoTest | AssertTest, ...]:
    tests = row.get(column) or []
    if isinstance(tests, list) and row.get("entry_point"):
        return tuple(AssertTest(test) for test in tests if ast.parse(test))
    if isinstance(tests, list):
        tests = {side: [test.get(side) for test in tests] for side in ("input", "output")}
    inputs, outputs = tests["input"], tests["output"]
    if len(inputs) != len(outputs) or not all(isinstance(text, str) for text in (*inputs, *outputs)):
        raise ValueError(f"a test of {column} has no output, or no input, or one that is no text")
    return tuple(map(IoTest, inputs, outputs))


def _solutions(row: dict, column: str) -> tuple[str, ...]:
    solutions = row.get(column) or []
    if isinstance(solutions, str):
        raise ValueError(f"{column} is a text, but must be a list of texts")
    if isinstance(solutions, list):
        return tuple(solutions)
    pairs = zip(solutions["language"], solutions["solution"], strict=True)
    return tuple(text for language, text in pairs if language == PYTHON3)


def read_row(row: dict) -> Problem:
    """The problem of a row of CodeContests or of a file of your own."""
    if not isinstance(row["name"], str) or not isinstance(row["description"], str):
        raise ValueError("its name or its description is no text")
    group = f"difficulty {row['difficulty']}" if row.get("difficulty") is not None else ""
    if rating := row.get("cf_rating"):  # on Codeforces; 0 if unknown
        group = f"rating {rating // 400 * 400} to {rating // 400 * 400 + 399}"
    limit = row.get("time_limit") or {}
    if isinstance(limit, dict):
        limit = (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 1e9  # 0: not stated
    return Problem(
        name=row["name"],
        statement=row["description"],
        public_tests=_tests(row, "public_tests"),
        private_tests=_tests(row, "private_tests") + _tests(row, "generated_tests"),
        limits=Limits(limit or Limits.seconds, row.get("memory_limit_bytes") or Limits.memory_bytes),
        correct_solutions=_solutions(row, "solutions"),
        incorrect_solutions=_solutions(row, "incorrect_solutions"),
        group=group,
        **{name: row.get(name) or "" for name in ("preamble", "entry_point", "signature", "setup")},
    )


FORMATS = (  # the columns that a row must have, and the function that reads it
    ("task_id prompt entry_point canonical_solution base_input plus_input atol", evalplus.read_row),
    ("task_id prompt entry_point canonical_solution test", evalplus.read_row),
    ("task_id prompt code test_list test_imports test", evalplus.read_row),
    ("name description public_tests private_tests", read_row),
)


def _problem(stored: dict, where: str) -> Problem:
    """The problem of a stored row, which may be a line of JSON. Raises: ValueError, one sentence."""
    try:
        row = json.loads(stored["text"]) if list(stored) == ["text"] else stored
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    try:
        if not isinstance(row, dict):
            raise ValueError("it is no object with columns")
        missing, read = min(
            (([c for c in columns.split() if c not in row], read) for columns, read in FORMATS),
            key=lambda fit: len(fit[0]),
        )
        if missing:
            raise ValueError(f"no column {', '.join(missing)} among its columns {', '.join(row)}")
        return read(row)
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not understood: {error}") from error


# ---- a table becomes a sequence of problems ----------------------------------------------------------------


class Problems(Sequence):
    """Problems that are made from a table's rows when they are asked for: a large table stays on disk."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice) -> "Problem | Problems":
        if isinstance(place, slice):
            return select(self, range(*place.indices(len(self))))
        return _problem(self.rows[place], f"row {place}")


def select(problems: Sequence[Problem], places: Sequence[int]) -> Sequence[Problem]:
    """The problems at these places; a large table stays on disk."""
    if isinstance(problems, Problems):
        return Problems(problems.rows.select(places))
    return [problems[place] for place in places]


def first_messages(problems: Sequence[Problem]) -> Iterator[str]:
    """`first_message` of each problem; the tests and solutions of a large table are not read."""
    if not isinstance(problems, Problems):
        yield from map(first_message, problems)
        return
    unread = dict.fromkeys((*TEST_COLUMNS, *SOLUTION_COLUMNS), [])
    columns = [name for name in unread if name in problems.rows.column_names]
    for number, row in enumerate(problems.rows.remove_columns(columns)):
        yield first_message(_problem(row | unread, f"row {number}"))


def _have_tests(batch: pa.RecordBatch | pa.Table) -> pa.BooleanArray:
    """Which CodeContests rows have public tests and private or generated ones, without reading any text."""
    counts = []
    for column in TEST_COLUMNS:
        inputs, outputs = (pc.struct_field(batch[column], side) for side in ("input", "output"))
        counts.append(pc.fill_null(pc.list_value_length(inputs), 0))
        uneven = pc.not_equal(counts[-1], pc.fill_null(pc.list_value_length(outputs), 0))
        if pc.any(uneven).as_py() or pc.list_flatten(outputs).null_count:
            raise ValueError(
                f"a test of {column} has no output: see {batch['name'].filter(uneven).to_pylist()}"
            )
    return pc.and_(pc.greater(counts[0], 0), pc.greater(pc.add(counts[1], counts[2]), 0))


# ---- files and the hub become tables -----------------------------------------------------------------------


def _open_parquet(files: Sequence[Path]) -> tuple[datasets.Dataset, int]:
    """The rows of parquet files, CodeContests' without tests left out, and how many rows the files have.

    They are copied into the cache once, in batches of eight rows: so the columns of a row are close together.
    Datasets' own copy takes 1.8 GB of memory for 13,000 problems, and spreads a row over the file.
    """
    tables = [pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) for file in files]
    schema, stamp = tables[0].schema_arrow, [(file.resolve(), file.stat().st_mtime_ns) for file in files]
    name = f"rlef-{hashlib.sha256(repr(stamp).encode()).hexdigest()}"
    copy = Path(datasets.config.HF_DATASETS_CACHE, name)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{copy}.lock"):  # one rank copies, the others wait
        if not copy.exists():
            partial = copy.with_suffix(".partial")
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in itertools.chain(*(table.iter_batches(200) for table in tables)):
                    kept = batch.filter(_have_tests(batch)) if "generated_tests" in schema.names else batch
                    for start in range(0, len(kept), 8):
                        writer.write_batch(kept.slice(start, 8))
            partial.replace(copy)
    return datasets.Dataset.from_file(str(copy)), sum(table.metadata.num_rows for table in tables)


def _files(source: str, split: str) -> list[Path]:
    """The files of a path: itself, or for a folder the files whose names begin with the split."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source} is neither a problem set (toy, {', '.join(HUB)}) nor a file")
    files = sorted(path.rglob(f"{split}[-.]*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))]
    if not files:
        raise ValueError(f"{source} holds no .jsonl, .jsonl.gz or .parquet" + f" of {split}" * path.is_dir())
    return files


def _rows(source: str, split: str) -> tuple[datasets.Dataset, int]:
    """The stored rows, and how many there were before CodeContests' rows without tests were left out."""
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
        if not any(file.stat().st_size for file in files):
            raise ValueError(f"{source} is empty")
        # As text, not as JSON: a column of evalplus's own files has another type in every row.
        rows = datasets.load_dataset("text", data_files=list(map(str, files)), split="train")
        return rows, len(rows)
    except (pa.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def load_problems(source: str, split: str) -> Sequence[Problem]:
    """The problems of a split ("train", "valid" or "test").

    Args:
        source: "toy"; "code_contests", "humaneval_plus" or "mbpp_plus" from the hub; a .jsonl, .jsonl.gz or
            .parquet file, which is used for every split; or a folder with files named by split.
    As in the paper, problems without public or without private tests are left out; their number is printed.
    Raises: FileNotFoundError; ValueError for an unknown split, a row that cannot be read, or if no problem is
    left. Each message is one sentence.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}, only {', '.join(SPLITS)}")
    if source == "toy":
        return toy.problems(split)
    rows, total = _rows(source, split)
    if "generated_tests" in rows.column_names:  # rows without tests are already left out
        problems: Sequence[Problem] = Problems(rows)
        assert not len(rows) or problems[0]
    else:
        kept, made, small = [], [], rows.data.nbytes < SMALL
        for number, row in enumerate(rows):
            if not row.get("text", "-").strip():
                total -= 1  # an empty line
                continue
            problem = _problem(row, f"{source}, {'line' if 'text' in row else 'row'} {number + 1},")
            if problem.public_tests and problem.private_tests:
                kept.append(number)
                made += [problem] if small else []
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
    with friendly_errors(Path(sys.argv[0]).name):
        parser = argparse.ArgumentParser(description="Print the size of a problem set and one first message.")
        parser.add_argument("source", nargs="?", default="toy", help="a problem set, file or folder (toy)")
        parser.add_argument("split", nargs="?", default="test", help="train, valid or test (test)")
        arguments = parser.parse_args()
        loaded = load_problems(arguments.source, arguments.split)
        count = sum(len(problem.public_tests) + len(problem.private_tests) for problem in loaded)
        print(f"{len(loaded)} problems, {count} tests\n\n{first_message(loaded[0])}")
