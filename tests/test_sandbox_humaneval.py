"""The sandbox on honest work: HumanEval+'s own solutions pass, and mutated ones fail.

All 164 problems run, with their base tests and each eighth plus test; with ALL_TESTS=1 in the environment all
124,000 tests run, which takes a minute on two cores.
"""

import ast
import os
from dataclasses import replace
from pathlib import Path

import pytest

from data import Problem, make_job
from sandbox import AssertTest, Limits, Sandbox, Verdict
from sources import load_problems

DATA = Path(__file__).parent / "data" / "HumanEvalPlus-OriginFmt.jsonl.gz"
TESTS_TOGETHER = 400  # so many of a problem's tests become one: 124,000 processes would take minutes
EACH = 1 if os.environ.get("ALL_TESTS") else 8  # of the plus tests
PATIENT = Limits(seconds=120.0)  # of so many tests together, however busy the machine is


class ReturnsNone(ast.NodeTransformer):
    """Each `return x` of the function under test becomes `return None`."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # an inverted helper would undo what an inverted result does

    def visit_Return(self, node: ast.Return) -> ast.AST:
        return ast.copy_location(ast.Return(ast.Constant(None)), node)


class OffByOne(ReturnsNone):
    """Each returned value is one off: a number plus 1, a boolean inverted, a sequence one item shorter."""

    def visit_Return(self, node: ast.Return) -> ast.AST:
        call = ast.Call(ast.Name("_off_by_one", ast.Load()), [node.value or ast.Constant(None)], [])
        return ast.copy_location(ast.Return(call), node)


HELPER = """
def _off_by_one(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float, complex)): return value + 1
    if isinstance(value, str): return value[:-1] if value else 'x'
    if isinstance(value, (list, tuple)): return value[:-1] if value else type(value)((0,))
    if isinstance(value, dict): return {**value, 'x': 1}
    return 1
"""
MUTATIONS = {"None": ReturnsNone, "off by one": OffByOne}


def together(problem: Problem) -> tuple[AssertTest, ...]:
    """The tests of a problem, many to a process; of thousands of asserts, the first that fails ends it."""
    tests = [test.code for test in (*problem.public_tests, *problem.private_tests[::EACH])]
    return tuple(
        AssertTest("\n".join(tests[place : place + TESTS_TOGETHER]))
        for place in range(0, len(tests), TESTS_TOGETHER)
    )


def mutated(problem: Problem, mutation: type[ast.NodeTransformer]) -> str:
    """The solution with the returns of the function under test changed, not those of functions inside it."""
    tree = ast.parse(problem.preamble + problem.correct_solutions[0])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point:
            node.body = [mutation().visit(statement) for statement in node.body]
    return HELPER + ast.unparse(ast.fix_missing_locations(tree))


@pytest.fixture(scope="module")
def problems():
    return list(load_problems(str(DATA), "test"))


@pytest.fixture(scope="module")
def executor():
    with Sandbox() as sandbox:
        yield sandbox


def test_every_canonical_solution_passes_base_and_plus_tests(problems, executor):
    jobs = [
        replace(make_job(problem, problem.correct_solutions[0], together(problem)), limits=PATIENT)
        for problem in problems
    ]
    results = executor.run(jobs)
    failed = {
        problem.name: next(result for result in some if result.verdict != Verdict.PASSED)
        for problem, some in zip(problems, results, strict=True)
        if any(result.verdict != Verdict.PASSED for result in some)
    }
    assert len(problems) == 164 and not failed, failed


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_solution_fails(problems, executor, mutation):
    jobs = [
        replace(
            make_job(problem, "", together(problem), stop_at_first_failure=True),
            program=mutated(problem, MUTATIONS[mutation]),
            limits=PATIENT,
        )
        for problem in problems
    ]
    passed = {
        problem.name
        for problem, results in zip(problems, executor.run(jobs), strict=True)
        if all(result.verdict == Verdict.PASSED for result in results)
    }
    assert not passed  # whoever passes here needs an explanation
