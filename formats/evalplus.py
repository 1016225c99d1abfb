"""Evalplus's rows, HumanEval+ and MBPP+: their test code cut into asserts that each judge one call.

Paper: section 3.3 evaluates on both. A row has inputs by the hundred. The original tests, the *base* tests,
come first and give feedback; evalplus's own, the *plus* tests, score. What a call must return stands in the
row as code (`test` of the hub's rows), or it is what the canonical solution returns (evalplus's own files,
with `base_input` and `plus_input`): then the canonical solution runs in the judge's process, never in this
one. Nothing of a row is executed here; its long lists are not even parsed, which would take seconds.

Run alone: `python -m formats.evalplus FILE` prints the base tests of the first row of a .jsonl.gz file.
"""

import ast
import contextlib
import gzip
import json
import re
import sys

# The judge has the standard library only: to import numpy for each test would cost more than the test. This
# stand-in has what evalplus's helpers call; unlike numpy it does not stretch the shorter side. `Expected`
# stands right of ==, so that a failed assert can tell both values; its == is the data set's own comparison.
JUDGE_HELPERS = """\
import sys, types
from math import inf, nan
sys.set_int_max_str_digits(100000)
def allclose(got, expected, rtol=1e-05, atol=1e-08):
    if isinstance(expected, (list, tuple)):
        same = isinstance(got, (list, tuple)) and len(got) == len(expected)
        return same and all(allclose(g, e, rtol, atol) for g, e in zip(got, expected))
    return got == expected or abs(got - expected) <= min(atol + rtol * abs(expected), sys.float_info.max)
numpy = sys.modules["numpy"] = types.ModuleType("numpy")
numpy.allclose, numpy.ndarray = allclose, type("ndarray", (), {})
class Expected:
    def __init__(self, *values):
        self.values = values
    def __eq__(self, got):
        try:
            assertion(got, *self.values)
            return True
        except (ArithmeticError, AssertionError, TypeError, ValueError):
            return False
    def __repr__(self):
        return repr(self.values[0])
"""
# Evalplus's comparison, for its own files, which hold inputs only. (It takes a second answer for Mbpp/558 and
# 581, we do not. The hub's rows bring their comparisons along.)
COMPARISON = """
def assertion(out, exp, atol):
    {normalise}
    if atol == 0 and all(isinstance(x, float) for x in (exp if isinstance(exp, (list, tuple)) else [exp])):
        atol = 1e-06
    assert out == exp or atol != 0 and allclose(out, exp, 1e-07, atol)
scope = {{}}
exec({solution!r}, scope)
reference = scope[{name!r}]
"""
AS_SETS = "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array"
NORMALISE = {name: "out, exp = set(out), set(exp)" for name in (*AS_SETS.split(), "find_dissimilar", "Diff")}
NORMALISE |= {  # may return any object but None, such as a match
    name: "out, exp = out if isinstance(out, bool) else out is not None, exp is not None"
    for name in ("check_str", "text_match_three", "text_starta_endb")
}
# HumanEval/32: any zero of the polynomial is right. The hub's row tries to unpack the function's result.
ZERO_COMPARISON = """
def assertion(out, exp, coefficients, atol):
    assert abs(sum(c * out**i for i, c in enumerate(coefficients))) <= atol
"""
# How many different inputs the original tests of each HumanEval problem have. The hub's rows have them first,
# and do not say how many they are.
HUMANEVAL_BASE_TESTS = """
7 4 3 6 3 3 3 4 5 4 5 3 3 4 3 3 5 5 4 5 5 5 3 3 5 8 3 3 3 2 4 12 99 7 1 2 8 3 100 10 9 5 3 9 12 3 4 5 7 7
100 7 6 105 7 5 12 8 4 5 5 12 5 7 7 5 8 7 8 25 9 9 6 8 9 4 10 9 7 4 8 6 16 5 5 4 7 6 7 8 6 6 10 5 9 7 10 8 7
5 5 6 8 12 4 5 4 8 8 5 7 7 9 3 12 5 7 7 13 12 11 7 5 4 16 8 13 8 8 10 10 7 14 12 10 5 11 8 8 4 5 26 11 7 12 6
7 4 7 7 10 7 4 9 6 8 14 11 10 6 3 8 4 4""".split()


def _elements(text: str) -> tuple[list[str], str]:
    """Cut Python source behind a "[" into the elements of this list and what follows it."""
    depth, start, found = 0, 0, []
    for token in re.finditer(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[\[({\])},]", text):
        if token[0] in "[({":
            depth += 1
        elif token[0] in "])}" and depth:
            depth -= 1
        elif token[0] in "]," and not depth:
            found.append(text[start : token.start()].strip())
            start = token.end()
            if token[0] == "]":
                break
    return [element for element in found if element], text[start:]


def _hub_rounds(source: str) -> tuple[str, str, list[dict[str, str]]]:
    """The hub's test code: helpers, then a loop over inputs and results, within `check` or not.

    Returns: the helpers, the assert of a round, and for each round the texts of its loop variables, that of
    the input first; no round where the code has another shape.
    """
    lists = {}
    for name in ("inputs", "results"):
        before, assigned, after = source.partition(f"{name} = [")
        if assigned:
            lists[name], rest = _elements(after)
            source = f"{before}{name} = []{rest}"
    body = ast.parse(source).body
    check = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    match (check.body if check else body)[-1]:
        case ast.For(target, iterator, [statement]):
            columns = [lists[n.id] for n in ast.walk(iterator) if isinstance(n, ast.Name) and n.id in lists]
            names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)][-len(columns) :]
        case _:
            return "", "", []
    match statement:
        case ast.Expr(ast.Call(ast.Name("assertion"), [call, *others])):
            judged = f"assert {ast.unparse(call)} == Expected({', '.join(map(ast.unparse, others))})"
        case _:
            judged = ast.unparse(statement)
    helpers = source.partition("def check(" if check else "inputs = [")[0]
    return helpers, judged, [dict(zip(names, texts, strict=True)) for texts in zip(*columns, strict=True)]


def _like(value: object, model: object) -> object:
    """JSON has no tuples, sets and complex numbers: give `value` the types of an assert's argument."""
    if isinstance(value, list) and isinstance(model, (list, tuple, set)):
        parts = [part for part in model if isinstance(part, (list, tuple, set, dict))]
        return type(model)(_like(item, parts[0]) if parts else item for item in value)
    if isinstance(value, dict) and isinstance(model, dict) and model:
        return {key: _like(item, next(iter(model.values()))) for key, item in value.items()}
    return complex(value) if isinstance(value, str) and isinstance(model, (int, float, complex)) else value


def _calls(asserts: str, name: str) -> list[ast.Call]:
    """The calls of a function in some asserts."""
    nodes = [node for node in ast.walk(ast.parse(asserts)) if isinstance(node, ast.Call)]
    return [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id == name]


def _own_rounds(row: dict, name: str, asserts: str, solution: str) -> tuple[str, str, list[dict[str, str]]]:
    """As `_hub_rounds`, for evalplus's own files."""
    models = []  # arguments of the asserts
    for call in _calls(asserts, name):
        with contextlib.suppress(ValueError):  # an expression: other asserts tell the types
            models.append([ast.literal_eval(argument) for argument in call.args])
    rounds = []
    for given in [*row["base_input"], *row["plus_input"]]:
        model = next((model for model in models if len(model) == len(given)), None)
        rounds.append({"inp": repr(list(map(_like, given, model)) if model else given)})
    helpers = COMPARISON.format(normalise=NORMALISE.get(name, "pass"), solution=solution, name=name)
    return helpers, f"assert candidate(*inp) == Expected(reference(*inp), {row['atol']})", rounds


def read_row(row: dict) -> dict:
    """What a row of HumanEval+ or MBPP+ says, in any of evalplus's formats.

    Returns: name, prompt, asserts (the text of MBPP's base tests, else empty), public and private (code of a
    test each), solution; preamble, entry_point, signature and setup, as in `Problem`.
    Raises: ValueError, SyntaxError or KeyError where the row is not of these formats.
    """
    solution = row["code"] if "code" in row else row["prompt"] + row["canonical_solution"]
    asserts = "\n".join(row["test_list"]) if "test_list" in row else row.get("assertion", "").strip()
    defined = {node.name: node for node in ast.walk(ast.parse(solution)) if isinstance(node, ast.FunctionDef)}
    name = row.get("entry_point") or next((name for name in defined if _calls(asserts, name)), "")
    if name not in defined:
        raise ValueError("its solution does not define the function that its tests call")
    helpers, judged, rounds = (
        _own_rounds(row, name, asserts, solution) if "base_input" in row else _hub_rounds(row["test"])
    )
    if name == "find_zero" and rounds:
        helpers += ZERO_COMPARISON
        exp = "exp" if "exp" in rounds[0] else "reference(*inp)"
        judged = f"assert candidate(*inp) == Expected({exp}, *inp, 0.0001)"
    judged = judged.replace("candidate(", f"{name}(")
    tests = {}  # input -> code
    for texts in rounds:

        def spelled(found: re.Match, texts: dict[str, str] = texts) -> str:
            return texts[found[1]][1:-1] if found[0][0] == "*" else texts[found[1]]  # f(*[1, 2]) is f(1, 2)

        tests[next(iter(texts.values()))] = re.sub(rf"\*?\b({'|'.join(texts)})\b", spelled, judged)
    if not tests:  # code of another shape is one test
        tests[""] = row["test"] + ("" if asserts else "\ncheck(candidate)")
    if asserts:  # an input that MBPP's statement names is judged as evalplus judges it
        public = []
        for node in ast.parse(asserts).body:
            text = ast.unparse(node)
            calls = _calls(text, name)
            public.append(tests.pop(ast.unparse(ast.List(calls[0].args)) if len(calls) == 1 else None, text))
    else:
        number = row["task_id"].removeprefix("HumanEval/")
        known = number.isdigit() and int(number) < len(HUMANEVAL_BASE_TESTS)
        base = int(HUMANEVAL_BASE_TESTS[int(number)]) if known else len(tests)
        base = len(set(map(repr, row["base_input"]))) if "base_input" in row else base
        public = [tests.pop(given) for given in list(tests)[:base]]
    prompt, quoted = row["prompt"], asserts and "test_list" not in row
    defined[name].body, defined[name].decorator_list = [], []
    return {
        "name": str(row["task_id"]) if "entry_point" in row else f"Mbpp/{row['task_id']}",
        "prompt": ast.literal_eval(prompt.strip()).partition("\nassert")[0].strip() if quoted else prompt,
        "asserts": asserts,
        "public": public,
        "private": list(tests.values()) or public,
        "solution": solution,
        "preamble": "" if asserts else prompt + "\n",
        "entry_point": name,
        "signature": ast.unparse(defined[name]),
        "setup": "\n".join([JUDGE_HELPERS, *row.get("test_imports", []), helpers]),
    }


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("formats.evalplus: which .jsonl.gz file of evalplus?")
    with gzip.open(sys.argv[1], "rt") as file:
        print(*read_row(json.loads(next(file)))["public"], sep="\n")
