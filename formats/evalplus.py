"""Rows of HumanEval+ and MBPP+ (evalplus): their test code is cut into asserts of one call each.

Paper: both sets are evaluated in section 3.3. A row has hundreds of inputs. The original tests, called *base*
tests, come first and are our public tests; the *plus* tests that evalplus added are our private tests. The
expected results are either in the row, as code (`test`, in the rows on the hub), or they are what the
canonical solution returns (evalplus's own files, with `base_input` and `plus_input`). In the second case the
canonical solution runs in the judge's process. No code of a row runs in this process, and the long lists of a
row are cut as text, because parsing them would take seconds.
"""

import ast
import contextlib
import re

from data import MBPP_STATEMENT, Problem
from formats import values
from sandbox import AssertTest

# The judge has only the standard library: importing numpy would take longer than a test. This replacement has
# what evalplus's helpers call; unlike numpy, it does not broadcast. `Expected` is the right side of ==, so
# that a failed assert can report both values; its == is the comparison of the data set.
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
# Evalplus's comparison, for its own files, which have inputs only; rows on the hub contain their comparison.
# (Evalplus accepts a second answer for Mbpp/558 and 581, we do not.)
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
# The number of different inputs in the original tests of each HumanEval problem. Rows on the hub begin with
# these inputs, but do not say how many they are.
HUMANEVAL_BASE_TESTS = """
7 4 3 6 3 3 3 4 5 4 5 3 3 4 3 3 5 5 4 5 5 5 3 3 5 8 3 3 3 2 4 12 99 7 1 2 8 3 100 10 9 5 3 9 12 3 4 5 7 7
100 7 6 105 7 5 12 8 4 5 5 12 5 7 7 5 8 7 8 25 9 9 6 8 9 4 10 9 7 4 8 6 16 5 5 4 7 6 7 8 6 6 10 5 9 7 10 8 7
5 5 6 8 12 4 5 4 8 8 5 7 7 9 3 12 5 7 7 13 12 11 7 5 4 16 8 13 8 8 10 10 7 14 12 10 5 11 8 8 4 5 26 11 7 12 6
7 4 7 7 10 7 4 9 6 8 14 11 10 6 3 8 4 4""".split()


def _elements(text: str) -> tuple[list[str], str]:
    """Cut Python source that follows a "[" into the elements of this list and the rest of the source."""
    depth, start, found = 0, 0, []
    for token in re.finditer(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[\[({\])},]", text):
        depth += (token[0] in "[({") - (token[0] in "])}")
        if depth < 0 or depth == 0 and token[0] == ",":
            found.append(text[start : token.start()].strip())
            start = token.end()
        if depth < 0:
            break
    return [element for element in found if element], text[start:]


def _hub_rounds(source: str) -> tuple[str, str, list[dict[str, str]]]:
    """Cut the test code of a row on the hub: helpers, then a loop over inputs and results, maybe in `check`.

    Returns: the helpers, the loop's statement as an assert, and for each round the source of its loop
    variables, the input first. There are no rounds if the code has another form.
    """
    lists = {}
    for name in ("inputs", "results"):
        before, assigned, after = source.partition(f"{name} = [")
        if assigned:
            lists[name], rest = _elements(after)
            source = f"{before}{name} = []{rest}"
    body = values.parse(source, "test").body
    check = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    match (check.body if check else body)[-1:]:
        case [ast.For(target, iterator, [statement])]:
            columns = [lists[n.id] for n in ast.walk(iterator) if isinstance(n, ast.Name) and n.id in lists]
            names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)][-len(columns) :]
        case _:
            return "", "", []
    match statement:
        case ast.Expr(ast.Call(ast.Name("assertion"), [call, *others])):
            template = f"assert {ast.unparse(call)} == Expected({', '.join(map(ast.unparse, others))})"
        case _:
            template = ast.unparse(statement)
    helpers = source.partition("def check(" if check else "inputs = [")[0]
    return helpers, template, [dict(zip(names, texts, strict=True)) for texts in zip(*columns, strict=True)]


def _like(value: object, model: object) -> object:
    """`value`, read from JSON, with the types of an assert's argument: tuples, sets, complex numbers."""
    if isinstance(value, list) and isinstance(model, (list, tuple, set)):
        inner = [item for item in model if isinstance(item, (list, tuple, set, dict))]
        return type(model)(_like(item, inner[0]) if inner else item for item in value)
    if isinstance(value, dict) and isinstance(model, dict) and model:
        return {key: _like(item, next(iter(model.values()))) for key, item in value.items()}
    return complex(value) if isinstance(value, str) and isinstance(model, (int, float, complex)) else value


def _calls(asserts: str, name: str) -> list[ast.Call]:
    """The calls of a function in some asserts."""
    nodes = [node for node in ast.walk(ast.parse(asserts)) if isinstance(node, ast.Call)]
    return [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id == name]


def _own_rounds(row: dict, name: str, asserts: str, solution: str) -> tuple[str, str, list[dict[str, str]]]:
    """The same as `_hub_rounds`, for rows of evalplus's own files."""
    models = []  # arguments in the asserts, which show the types
    for call in _calls(asserts, name):
        with contextlib.suppress(ValueError):  # an argument that is no literal
            models.append([ast.literal_eval(argument) for argument in call.args])
    rounds = []
    for given in [*row["base_input"], *row["plus_input"]]:
        model = next((model for model in models if len(model) == len(given)), None)
        rounds.append({"inp": repr(list(map(_like, given, model)) if model else given)})
    helpers = COMPARISON.format(normalise=NORMALISE.get(name, "pass"), solution=solution, name=name)
    atol = values.number(row, "atol")
    return helpers, f"assert candidate(*inp) == Expected(reference(*inp), {atol})", rounds


def _base_tests(row: dict, name: str, asserts: str, tests: dict[str, str]) -> list[str]:
    """Remove the base tests from `tests` (code by input) and return their code."""
    if asserts:  # an input of MBPP's asserts is compared as evalplus compares it
        base = []
        for node in ast.parse(asserts).body:
            text = ast.unparse(node)
            calls = _calls(text, name)
            given = ast.unparse(ast.List(calls[0].args)) if len(calls) == 1 else None
            base.append(tests.pop(given, text))
        return base
    number, count = str(row["task_id"]).removeprefix("HumanEval/"), len(tests)
    if "base_input" in row:
        count = len(set(map(repr, row["base_input"])))
    elif number.isdigit() and int(number) < len(HUMANEVAL_BASE_TESTS):
        count = int(HUMANEVAL_BASE_TESTS[int(number)])
    return [tests.pop(given) for given in list(tests)[:count]]


def read_row(row: dict) -> Problem:
    """The problem of a row in one of evalplus's formats. Raises: ValueError, SyntaxError, KeyError."""
    if type(row["task_id"]) not in (int, str) or row["task_id"] == "":
        raise ValueError(f"task_id is {row['task_id']!r:.60}, but must be a number or a text")
    for column in ("prompt", "code", "canonical_solution", "entry_point", "assertion", "test"):
        blank = not values.text(row, column).strip()
        needed = column in ("canonical_solution", "entry_point")
        if column in row and (row[column] is None or needed and blank):
            raise ValueError(f"{column} is empty")
    for column in ("test_list", "test_imports"):
        values.texts(row.get(column, []), column)
    for column in ("base_input", "plus_input"):
        given = row.get(column, [])
        if not isinstance(given, list) or not all(isinstance(arguments, list) for arguments in given):
            raise ValueError(f"{column} must be a list of lists of arguments")
    solution = row["code"] if "code" in row else row["prompt"] + row["canonical_solution"]
    asserts = "\n".join(row["test_list"]) if "test_list" in row else row.get("assertion", "").strip()
    tree = values.parse(solution, "code" if "code" in row else "prompt with canonical_solution")
    defined = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    name = row.get("entry_point") or next((name for name in defined if _calls(asserts, name)), "")
    if name not in defined:
        wanted = f"its entry_point {name!r}" if name else "a function that its test_list calls"
        raise ValueError(f"its solution does not define {wanted}")
    if "base_input" in row:
        helpers, template, rounds = _own_rounds(row, name, asserts, solution)
    else:
        helpers, template, rounds = _hub_rounds(values.text(row, "test"))
    if name == "find_zero" and rounds:
        helpers += ZERO_COMPARISON
        expected = "exp" if "exp" in rounds[0] else "reference(*inp)"
        template = f"assert candidate(*inp) == Expected({expected}, *inp, 0.0001)"
    template = template.replace("candidate(", f"{name}(")
    tests = {}  # the code of a test by its input
    for texts in rounds:
        starred = {f"*{variable}": text[1:-1] for variable, text in texts.items()}  # f(*[1, 2]) is f(1, 2)
        code = re.sub(r"\*?\w+", lambda m, known=texts | starred: known.get(m[0], m[0]), template)
        tests[next(iter(texts.values()))] = code
    if not tests:  # code of another form is one test, which may use what the prompt defines
        tests[""] = values.text(row, "test")
        tests[""] += "\ncheck(candidate)" if "def check(" in tests[""] else ""
        helpers = "" if asserts else row["prompt"]
    setup = "\n".join([JUDGE_HELPERS, *row.get("test_imports", []), helpers])
    values.assert_tests([*row.get("test_list", []), next(iter(tests.values()))], name, "test", setup)
    public = _base_tests(row, name, asserts, tests)
    prompt = row["prompt"]
    if asserts and "test_list" not in row:  # evalplus's own MBPP+ prompts are string literals with an assert
        prompt = ast.literal_eval(prompt.strip()).partition("\nassert")[0]
    defined[name].body, defined[name].decorator_list = [], []
    return Problem(
        name=str(row["task_id"]) if "entry_point" in row else f"Mbpp/{row['task_id']}",
        statement=MBPP_STATEMENT.format(prompt=prompt.strip(), tests=asserts) if asserts else prompt,
        public_tests=tuple(map(AssertTest, public)),
        private_tests=tuple(map(AssertTest, list(tests.values()) or public)),
        limits=values.limits(values.number(row, "time_limit"), values.number(row, "memory_limit_bytes")),
        correct_solutions=(solution,),
        preamble="" if asserts else prompt + "\n",
        entry_point=name,
        signature=ast.unparse(defined[name]),
        setup=setup,
    )
