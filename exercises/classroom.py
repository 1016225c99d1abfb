"""What the exercises share: the check of a student's function, and its effect on training.

A check compares the student's function with that of the tree, on small examples and larger random ones, and
with typical wrong answers: if it does what one of these does, the message is its sentence in sentences.json.
"""

import __future__

import ast
import copy
import inspect
import json
import multiprocessing
import os
import random
import re
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SENTENCES = json.loads(Path(__file__).with_name("sentences.json").read_text())


def from_tree(file: str, *names: str, **scope):
    """Functions and classes of a file, in the order of names: importing transformers would take too long."""
    tree = ast.parse((ROOT / file).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    scope |= {"__name__": __name__, "dataclass": dataclass}
    exec(compile(tree, file, "exec", __future__.annotations.compiler_flag), scope)
    return scope[names[0]] if len(names) == 1 else [scope[name] for name in names]


Turn, Episode = from_tree("rollout.py", "Turn", "Episode")


def episode(spans: list, valid="", solved=False, public_passed=False, truncated=()) -> Episode:
    """A dialog whose responses are at `spans`; 0 is the end token. Args: valid: "y" or "n" for each turn."""
    ids = [10 + position for position in range(spans[-1][1])]
    turns = [Turn(start, end, [-1.0] * (end - start)) for start, end in spans]
    for number, turn in enumerate(turns):
        turn.code = None if valid[number : number + 1] == "n" else "print(1)"
        turn.truncated = number in truncated
        if (end := turn.end - 1 + turn.truncated) < len(ids):
            ids[end] = 0
    return Episode(None, ids, turns, public_passed or solved, solved, False, 0)


def random_episode(number: int) -> Episode:
    draw = random.Random(number)
    cuts = list(accumulate(draw.randint(2, 6) for _ in range(2 * draw.randint(1, 3))))
    solved, spans = draw.random() < 0.5, list(zip(cuts[::2], cuts[1::2], strict=True))
    valid = "".join(draw.choices("yn", k=len(spans)))[:-1] + ("y" if solved else draw.choice("yn"))
    cut = [number for number in range(len(spans)) if draw.random() < 0.3]
    whole = episode(spans, valid, solved, draw.random() < 0.5, cut)
    whole.truncated = draw.random() < 0.3
    return whole


@dataclass
class Task:
    """A function to write, and what its check knows."""

    ours: Callable
    wrong: dict[str, Callable]  # typical wrong answers; sentences.json says what the mistake is
    examples: dict[str, tuple]  # the arguments of each small example
    larger: Callable[[int], tuple]  # the arguments of a random larger example, from its number
    observe: Callable = lambda function, *arguments: {"result": function(*arguments)}


def as_array(value) -> np.ndarray:
    """Numbers in any common form as an array."""
    if value is None:
        raise TypeError("it is None, is a `return` missing?")
    if isinstance(value, (list, tuple)):
        value = [v.tolist() if hasattr(v, "tolist") else v for v in value]
    return np.asarray(value.detach() if hasattr(value, "detach") else value, dtype=float)


def observed(task: Task, function: Callable, arguments: tuple) -> dict[str, np.ndarray] | str:
    """What the function does with a copy of the arguments; a text if it fails."""
    given, failed = copy.deepcopy(arguments), "It raised"
    try:
        results, again = task.observe(function, *given), task.observe(function, *copy.deepcopy(arguments))
        failed = "Its result is no array of numbers:"
        arrays, others = ({n: as_array(v) for n, v in found.items()} for found in (results, again))
    except NotImplementedError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f" (line {f.lineno})" for f in frames if f.filename == function.__code__.co_filename]
        return f"{failed} {type(error).__name__}: {error}{''.join(lines[-1:])}"
    changed = [*map(shown, given)] != [*map(shown, arguments)]
    if not changed and not same(arrays, others):
        return "It gives two results for the same arguments: is something random, or kept from call to call?"
    return "It changed one of its arguments, which others still need: work on a copy." if changed else arrays


def same(one: dict | str, other: dict | str) -> bool:
    """Whether two functions did the same: equal numbers up to rounding, or the same kind of failure."""
    if isinstance(one, str) or isinstance(other, str):
        return type(one) is type(other) and one.split(" (line ")[0] == other.split(" (line ")[0]
    pairs = [(one[name], other[name]) for name in one]
    return all(a.shape == b.shape and np.allclose(a, b, 1e-4, 1e-6, equal_nan=True) for a, b in pairs)


def shown(value) -> str:
    """An argument or a result as a person reads it."""
    if isinstance(value, list) and value and isinstance(value[0], Episode):
        return "".join(f"\n      {shown(entry)}" for entry in value)
    if isinstance(value, Episode):
        spans = ", ".join(f"ids[{t.start}:{t.end}]{' (truncated)' * t.truncated}" for t in value.turns)
        codes = ", ".join("no" if turn.code is None else "yes" for turn in value.turns)
        passed = f"public tests passed: {value.public_passed}; solved: {value.solved}"
        return f"ids {value.ids}; responses: {spans}; valid code: {codes}; {passed}"
    if not isinstance(value, np.ndarray) and not hasattr(value, "detach"):
        return repr(value)
    array = as_array(value).round(4)
    text = str((array.astype(int) if (array == array.round()).all() else array).tolist())
    return text if len(text) <= 300 else f"{text[:300]} and so on"


def compare(stub: Callable, task: Task, function: Callable, sentences: dict[str, str]) -> str | None:
    """What is wrong with a function that should do the task of the stub, in words; None if it is right."""
    names = inspect.signature(stub).parameters
    cases = [(f"the example “{title}”", arguments) for title, arguments in task.examples.items()]
    cases += [(f"the larger random example {number}", task.larger(number)) for number in range(5)]
    theirs = [observed(task, function, arguments) for _, arguments in cases]
    for (title, arguments), got in zip(cases, theirs, strict=True):
        right = observed(task, task.ours, arguments)
        if same(got, right):
            continue
        lines, small = [f"{stub.__name__} is wrong on {title}:"], "random" not in title
        unknown = "unknown" if small else "unknown, small examples right"
        lines += [f"    {n} = {shown(a)}" for n, a in zip(names, arguments, strict=True) if small]
        for key in right if isinstance(got, dict) else ():
            if not same({key: got[key]}, {key: right[key]}):
                lines += [f"  your {key}:  {shown(got[key])}", f"  right {key}: {shown(right[key])}"]
            if got[key].ndim == right[key].ndim == 1 and len(got[key]) != len(right[key]):
                lines.append(f"  Yours has {len(got[key])} numbers, the right one {len(right[key])}.")
            elif got[key].shape != right[key].shape:
                lines.append(f"  Your shape is {got[key].shape}, but must be {right[key].shape}.")
                unknown = "shape"
        alike = [m for m, variant in task.wrong.items() if same(observed(task, variant, arguments), got)]
        for mistake in alike:
            others = zip(cases, theirs, strict=True)
            if all(same(observed(task, task.wrong[mistake], a), b) for (_, a), b in others):
                return "\n".join([*lines, sentences[mistake]])
        if alike:
            return "\n".join([*lines, sentences[alike[0]], SENTENCES["here"]])
        return "\n".join([*lines, got if isinstance(got, str) else SENTENCES[unknown]])
    return None


def checker(tasks: dict[str, Task], module: dict) -> Callable[..., str | None]:
    """The check of an exercise: it returns the message about the first mistake, or None."""
    sentences = SENTENCES[Path(module["__file__"]).stem]

    def check(**others: Callable) -> str | None:
        given = module | others
        for done, (name, task) in enumerate(tasks.items()):
            try:
                if mistake := compare(module[name], task, given[name], sentences):
                    return mistake
            except NotImplementedError as error:
                right = ", ".join(list(tasks)[:done])
                raise NotImplementedError(f"{error}" + f" ({right} is right)" * done) from None
        return None

    return check


def loss_and_gradient(function: Callable, first, *others) -> dict:
    """For `Task.observe`: the result, and the gradient of its sum with respect to the first argument."""
    result = function(first.requires_grad_(), *others)
    if getattr(result, "requires_grad", False):
        result.sum().backward()
    return {"loss": result, "gradient": first.detach() * 0 if first.grad is None else first.grad}


def problem_with_results(stored: dict, times: int = 1) -> tuple:
    """For exercise 6: a problem and results of its tests. Args: times: how often each number is repeated."""
    from data import Problem
    from sandbox import AssertTest, IoTest, TestResult, Verdict

    told = json.loads(re.sub(r"\d{5}", lambda number: " ".join([number[0]] * times), json.dumps(stored)))
    kind, name = (AssertTest, "double") if "code" in told["private"][0] else (IoTest, "")
    public, private = (tuple(kind(**test) for test in told[part]) for part in ("public", "private"))
    results = [TestResult(**result | {"verdict": Verdict(result["verdict"])}) for result in told["results"]]
    solutions = ("def double(x):\n    return x + x",)
    return Problem("double", "Double it.", public, private, (), solutions, entry_point=name), results


def quiet(directory: str) -> None:
    """For the grader's process: work in an empty directory, and print nothing."""
    os.chdir(directory)
    for standard in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), standard)


def verdict_of(grade: Callable, program: str, tests: list, seconds: float) -> bool | str:
    """A grader's verdict; a text if there is none. In a process that the program may be able to end."""
    fork = multiprocessing.get_context("fork")
    with TemporaryDirectory() as directory, ProcessPoolExecutor(1, fork, quiet, (directory,)) as pool:
        try:
            verdict = pool.submit(grade, program, tests, seconds).result()
        except (BrokenProcessPool, SystemExit):
            return SENTENCES["e8_grader"]["ended"]
        except NotImplementedError:
            raise
        except Exception as error:
            return f"It raised {type(error).__name__}: {error}"
    return verdict if isinstance(verdict, bool) else f"It returned {verdict!r}, not True or False."


def main(module: dict) -> None:
    """The command line of an exercise, whose module's names these are."""
    path = Path(module["__file__"])
    try:
        mistake = module["check"]()
    except NotImplementedError as error:
        sys.exit(f"Not written yet: {error}.")
    print(mistake or f"Right. {path.read_text().splitlines()[-1].removeprefix('# ')}.")
    if sys.argv[1:] == ["--effect"] and "install" in module:
        from benchmarks.exercise_curves import show_effect

        names = inspect.signature(module["install"]).parameters
        show_effect(path.stem, module["install"](*[module[name] for name in names]))
    elif sys.argv[1:] == ["--effect"]:
        print(module["NO_EFFECT"])
    sys.exit(1 if mistake else 0)
