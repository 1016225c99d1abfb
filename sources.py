"""Where problem sets come from: the hub, files of published sets, files of your own, the toy world.

Paper: training on CodeContests, evaluation also on HumanEval+ and MBPP+ (section 3.3). A row's columns show
its format, and `formats/` has a file for each: own.py lists the columns of a file of your own.

Run alone: `python sources.py SOURCE [SPLIT]` prints the size of a problem set and one first message;
with `--check`, which problems their own solutions fail, and which a solution that is known as wrong passes.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import datasets
import pyarrow as pa

import toy
from data import Problem, first_message, make_job
from distributed import friendly_errors
from formats import apps, evalplus, livecodebench, own
from sandbox import Sandbox, Verdict

TEST_COLUMNS = ("public_tests", "private_tests", "generated_tests")
SOLUTION_COLUMNS = ("solutions", "incorrect_solutions")
FILE_COLUMNS = ("input_file", "output_file")
SPLITS = ("train", "valid", "test")
HUB = {  # repository, and its only split, which is then used for every split
    "code_contests": ("deepmind/code_contests", ""),
    "humaneval_plus": ("evalplus/humanevalplus", "test"),
    "mbpp_plus": ("evalplus/mbppplus", "test"),
}
NO_TESTS = "have no public or no private tests"  # why problems are left out
NO_STATEMENT = "have an empty statement"
OBJECTS = "take objects such as a TreeNode, which no column defines"
FILES = "read or write files instead of standard input and output"
SMALL = 1 << 26  # problems of tables up to this size, in bytes, are made once and kept

datasets.disable_progress_bars()  # they would stand among ours
FORMATS = (  # the columns that a row must have, and the function that reads it
    ("task_id prompt entry_point canonical_solution base_input plus_input atol", evalplus.read_row),
    ("task_id prompt entry_point canonical_solution test", evalplus.read_row),
    ("task_id prompt code test_list test_imports test", evalplus.read_row),
    ("question input_output", apps.read_row),
    ("question_id question_content public_test_cases private_test_cases", livecodebench.read_row),
    ("name description public_tests private_tests", own.read_row),
)


def _one_of_each(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError if it has a key twice, of which json would drop one."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is there twice")
    return row


def _problem(stored: dict, where: str) -> tuple[Problem, str]:
    """The problem of a stored row or line of JSON, and why it is left out, or "". Raises: ValueError."""
    row = stored
    try:
        if list(stored) == ["text"]:
            row = json.loads(stored["text"].removeprefix("\ufeff"), object_pairs_hook=_one_of_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}; each line must be one object") from error
    try:
        if not isinstance(row, dict):
            raise ValueError("it is no object with columns: each line must be one")
        columns, read = max(FORMATS, key=lambda known: fmean(name in row for name in known[0].split()))
        if missing := [name for name in columns.split() if name not in row]:
            raise ValueError(f"no column {', '.join(missing)} among its columns {', '.join(row)}")
        problem = read(row)
        reasons = {  # the first that holds
            FILES: any(map(row.get, FILE_COLUMNS)),
            OBJECTS: re.search(r"\b(Tree|List)?Node\b", problem.signature),
            NO_STATEMENT: not problem.statement.strip(),
            NO_TESTS: not (problem.public_tests and problem.private_tests),
        }
        return problem, next((reason for reason, holds in reasons.items() if holds), "")
    except (AttributeError, KeyError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not understood: {error}") from error


# ---- a table becomes a sequence of problems ----------------------------------------------------------------


class Problems(Sequence):
    """Problems that are made from a table's rows when they are asked for: a large table stays on disk."""

    def __init__(self, rows: datasets.Dataset, source: str) -> None:
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice) -> "Problem | Problems":
        if isinstance(place, slice):
            return select(self, range(*place.indices(len(self))))
        row = self.rows[place]
        return _problem(row, f"{self.source}, the row of {row.get('name', place)!r},")[0]


def select(problems: Sequence[Problem], places: Sequence[int]) -> Sequence[Problem]:
    """The problems at these places; a large table stays on disk."""
    if isinstance(problems, Problems):
        return Problems(problems.rows.select(places), problems.source)
    return [problems[place] for place in places]


def first_messages(problems: Sequence[Problem]) -> Iterator[str]:
    """`first_message` of each problem; the tests and solutions of a large table are not read."""
    if not isinstance(problems, Problems):
        yield from map(first_message, problems)
        return
    unread = {name: [] for name in (*TEST_COLUMNS, *SOLUTION_COLUMNS) if name in problems.rows.column_names}
    for row in problems.rows.remove_columns([*unread]):
        yield first_message(_problem(row | unread, f"{problems.source}, the row of {row.get('name')!r},")[0])


def _read(rows: datasets.Dataset, source: str) -> Iterator[tuple[str, str, Problem | None]]:
    """For each row: its problem's name, why it is left out, and the problem. An empty line has no name."""
    for number, row in enumerate(rows, 1):
        line = list(row) == ["text"]
        if line and not row["text"].strip():
            yield "", "", None
            continue
        where = f"{source}, {'line' if line else 'row'} {number},"
        problem, reason = _problem(row, where)
        try:
            json.dumps(problem, default=vars, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # JSON can tell one half of a character without the other
            half = error.object[error.start]
            raise ValueError(f"{where} has {half!r}, half of a character: write the whole one") from error
        yield problem.name, reason, problem


def _read_code_contests(rows: datasets.Dataset) -> list[tuple[str, str, None]]:
    """As `_read`, but without reading the texts of tests: the problems are made when they are asked for."""
    found, wrong = [], defaultdict(list)
    short = [name for name in ("name", "description", *FILE_COLUMNS) if name in rows.column_names]
    tests = zip(*map(rows.data.column, TEST_COLUMNS), strict=True)
    for number, (row, columns) in enumerate(zip(rows.select_columns(short), tests, strict=True), 1):
        name, counts = row["name"], []
        if not isinstance(name, str) or not name:
            raise ValueError(f"row {number}: name is no text, or empty: {name!r:.60}")
        for column, stored in zip(TEST_COLUMNS, columns, strict=True):
            inputs, outputs = (stored[side].values or pa.nulls(0) for side in ("input", "output"))
            if len(inputs) != len(outputs) or inputs.null_count or outputs.null_count:
                side = "input" if inputs.null_count and not outputs.null_count else "output"
                wrong[f"a test of {column} has no {side}"].append(name)
            counts.append(len(inputs))
        reason = "" if counts[0] and any(counts[1:]) else NO_TESTS
        reason = NO_STATEMENT if row["description"] == "" else reason
        found.append((name, FILES if any(map(row.get, FILE_COLUMNS)) else reason, None))
    for what, names in wrong.items():
        raise ValueError(f"{what}: see {names}")
    return found


# ---- files and the hub become tables -----------------------------------------------------------------------


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


def _rows(source: str, split: str) -> datasets.Dataset:
    """The stored rows, as the hub or the files have them."""
    try:
        if source in HUB:
            repository, only_split = HUB[source]
            return datasets.load_dataset(repository, split=only_split or split)
        files = _files(source, split)
        if not any(file.stat().st_size for file in files):
            raise ValueError(f"{source} is empty")
        # As text, not as JSON: a column of evalplus's own files has another type in every row.
        kind, options = "text", {}
        if files[0].suffix == ".parquet":  # in its copy the columns of a row are close together
            kind, options = "parquet", {"batch_size": 8, "writer_batch_size": 8}
        return datasets.load_dataset(kind, data_files=list(map(str, files)), split="train", **options)
    except (pa.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def _usable(rows: datasets.Dataset, source: str) -> tuple[Sequence[Problem], list[str]]:
    """The problems of the rows that can be used, and their names; the others are printed."""
    kept, left_out = {}, defaultdict(list)  # by the number of the row; by the reason
    structs = {field.name for field in rows.data.schema if pa.types.is_struct(field.type)}
    if structs.issuperset(TEST_COLUMNS) and {"name", "description"}.issubset(rows.column_names):
        try:
            small, found = False, _read_code_contests(rows)
        except (AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"{source} is not understood: {error}") from error
    else:
        small, found = rows.data.nbytes < SMALL, _read(rows, source)
    for number, (name, reason, problem) in enumerate(found):
        if reason:
            left_out[reason].append(name)
        elif name:
            kept[number] = (name, problem if small else None)
    total = len(kept) + sum(map(len, left_out.values()))
    for reason, unused in sorted(left_out.items(), reverse=True):
        shown = ", ".join(unused[:5]) + " and others" * (len(unused) > 5)
        print(f"{source}: {shown} left out: {len(unused)} of {total} problems {reason}")
    if not kept:
        raise ValueError(f"{source} has no problem with public and private tests")
    names, made = zip(*kept.values(), strict=True)
    problems = list(made) if small else Problems(rows.select([*kept]), source)
    assert problems[0]
    return problems, list(names)


def one_for_all_splits(source: str) -> bool:
    """Whether a problem set has no splits of its own: a file, HumanEval+, MBPP+."""
    return bool(HUB.get(source, ("", ""))[1]) or Path(source).is_file()


def load_problems(source: str, split: str, holdout: float = 0.0) -> Sequence[Problem]:
    """The problems of a split. As in the paper, those without public or private tests are left out, and told.

    Args:
        source: "toy"; "code_contests", "humaneval_plus" or "mbpp_plus" from the hub; a .jsonl, .jsonl.gz or
            .parquet file, which is used for every split; or a folder with files named by split.
        holdout: the share of the problems of a file that is in no train split; 0: all are in every split.
    Raises: FileNotFoundError; ValueError for an unknown split, a bad row, or no problem: one sentence each.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}, only {', '.join(SPLITS)}")
    if holdout and not (0 < holdout < 1 and one_for_all_splits(source)):
        raise ValueError(f"holdout {holdout} must be between 0 and 1, and {source} a set without splits")
    if source == "toy":
        return toy.problems(split)
    problems, names = _usable(_rows(source, split), source)
    keys = names
    if isinstance(problems, Problems) and "source" in problems.rows.column_names:
        keys = zip(names, problems.rows["source"], strict=True)  # sites of CodeContests may share names
    (first, count), *_ = Counter(keys).most_common(1)
    if count > 1:
        raise ValueError(f"{source} has {count} problems of one name, {first}")
    if holdout:
        shares = {"test": (0, holdout / 2), "valid": (holdout / 2, holdout), "train": (holdout, math.inf)}
        low, high = shares[split]  # whatever else is in the set, a name is always in the same split
        places = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names]
        problems = select(problems, [i for i, place in enumerate(places) if low <= place < high])
        if not problems:
            raise ValueError(
                f"holdout {holdout} of the {len(names)} problems in {source} leaves none for {split}"
            )
    return problems


def check(problems: Sequence[Problem], most: int) -> None:
    """Run `most` right and wrong solutions of each problem, and print which are not what they should be."""
    solved, failing, passing, slowest = set(), set(), set(), (0.0, "no test")
    with Sandbox() as sandbox:
        for start in range(0, len(problems), 32):
            runs = [  # all are queued before the first result is waited for
                (p, right, number, sandbox.submit(make_job(p, code, p.public_tests + p.private_tests, True)))
                for p in problems[start : start + 32]
                for right, codes in ((True, p.correct_solutions), (False, p.incorrect_solutions))
                for number, code in enumerate(codes[:most], 1)
            ]
            solved |= {problem.name for problem, right, *_ in runs if right}
            for problem, right, number, job in runs:
                name = problem.name
                try:
                    results = job.result()
                except ValueError as error:  # its tests are wrong, and tell no solution from another
                    if name not in failing:
                        print(error)
                    failing.add(name)
                    continue
                passed = results[-1].verdict == Verdict.PASSED
                slowest = max(slowest, *((result.seconds, name) for result in results))
                if right and not passed:
                    failing.add(name)
                    error = results[-1].traceback.strip().rpartition("\n")[2]
                    told = f"{results[-1].verdict}. {error}".removesuffix(". ")
                    print(f"{name}: its solution {number} fails test {len(results)}: {told}")
                elif passed and not right:
                    passing.add(name)
                    print(f"{name}: its wrong solution {number} passes all tests")
    wrongly, without = len(passing), len(problems) - len(solved | failing)
    print(
        f"{len(problems)} problems: {len(failing)} fail an own solution, {wrongly} are passed by a wrong "
        f"one, {without} have none; the slowest test took {slowest[0]:.2f} s ({slowest[1]})"
    )


if __name__ == "__main__":
    with friendly_errors(Path(sys.argv[0]).name):
        parser = argparse.ArgumentParser(description="Print the size of a problem set and one first message.")
        add = parser.add_argument
        add("source", nargs="?", default="toy", help="a problem set, file or folder (toy)")
        add("split", nargs="?", default="test", help="train, valid or test (test)")
        add("--check", type=int, nargs="?", const=10, metavar="N", help="run N solutions a problem (10)")
        arguments = parser.parse_args()
        loaded = load_problems(arguments.source, arguments.split)
        if arguments.check:
            check(loaded, arguments.check)
            sys.exit()
        count = sum(len(problem.public_tests) + len(problem.private_tests) for problem in loaded)
        print(f"{len(loaded)} problems, {count} tests\n\n{first_message(loaded[0])}")
