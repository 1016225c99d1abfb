"""Exercise 6: the feedback message.

After a response that failed a public test the user writes again. The message may tell everything about the
public tests, and nothing about the private ones: they measure. For problems of standard input and output it
lists the tests that failed; for asserts all tests, so that the model sees what works already.

Paper: section 2.1, appendix B. Read first: `TestResult` in sandbox.py and the templates at the top of data.py
(other words are right too, but the toy world's model has learned only these). About 20 minutes.
Check: python exercises/e6_feedback.py         Effect on learning: python exercises/e6_feedback.py --effect
"""

import random
import re
from dataclasses import replace

from classroom import SENTENCES, main

import data
from data import Problem
from sandbox import AssertTest, IoTest, TestResult, Verdict


def feedback(problem: Problem, results: list[TestResult] | None) -> str:
    """The user message after a response that did not pass; each text of more than 2,000 characters is cut.

    Wrong answer: the input, what was expected, what came out (asserts: `call`, `expected` and `got` of the
    result; the test's `code` where `call` is empty). Exception: input and traceback. Timeout, out of memory,
    too much output: which, and the input. No valid code: that the code is not valid.

    Args: problem: `public_tests`; `private_tests`; `entry_point`, empty if the tests are no asserts.
        results: one for each public test; None if the response has no valid code.
    """
    raise NotImplementedError("feedback must return the text of a message")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

SAY = SENTENCES["e6_feedback"]
WORDS = {Verdict.TIMEOUT: "time", Verdict.OUT_OF_MEMORY: "memory", Verdict.TOO_MUCH_OUTPUT: "output"}


def example(number: int, filler="") -> tuple[Problem, list[TestResult], dict[str, str], dict[str, str]]:
    """A problem, results, and texts that must, and must not, be in the message, each with its sentence."""
    draw, asserts = random.Random(number), number % 2 == 1
    fresh = (f"{text}{filler}" for text in draw.sample(range(10_000, 100_000), 40))
    secret = [next(fresh), next(fresh)]
    tests, results, needed, forbidden = [], [], {}, dict.fromkeys(secret, SAY["tells private tests"])
    verdicts = draw.sample(list(Verdict), 4) if number > 1 else [Verdict.WRONG_ANSWER, Verdict.PASSED]
    for verdict in verdicts:
        given, expected, got, place = (next(fresh) for _ in range(4))
        call = f"double({given})"
        tests.append(AssertTest(f"assert {call} == {expected}") if asserts else IoTest(given, expected))
        result = TestResult(verdict, call=call * (asserts and verdict != Verdict.TIMEOUT))
        if verdict == Verdict.PASSED:
            where, mistake = (needed, "left out") if asserts else (forbidden, "shown")
            where[given] = SAY[f"passed tests {mistake}"]
        else:
            needed[given] = SAY["input"].format(given)
        if verdict == Verdict.WRONG_ANSWER:
            needed |= {expected: SAY["expected"].format(expected), got: SAY["got"].format(got)}
            result = replace(result, **dict(got=got, expected=expected) if asserts else dict(stdout=got))
        if verdict == Verdict.EXCEPTION:
            result = replace(result, traceback=f"Traceback (most recent call last):\nValueError: {place}")
            needed[place] = SAY["traceback"].format(place)
        if verdict in WORDS:
            needed[WORDS[verdict]] = SAY["verdict"].format(WORDS[verdict])
        results.append(result)
    private = AssertTest("assert double({}) == {}".format(*secret)) if asserts else IoTest(*secret)
    problem = Problem(str(number), "Double it.", (*tests,), (private,), entry_point="double" * asserts)
    return problem, results, needed, forbidden


def mistake_in(feedback, number: int, earlier: set[str]) -> str | None:
    """What is wrong with the message of an example. Args: earlier: texts of the examples before."""
    problem, results, needed, forbidden = example(number)
    message = feedback(problem, results)
    if not isinstance(message, str):
        return f"feedback returned {message!r:.100}, but must return a text: is a `return` missing?"
    wrong = [SAY["another problem's"]] * any(text in message for text in earlier)
    wrong += [sentence for text, sentence in forbidden.items() if text in message]
    wrong += [SAY["tells nothing"]] * (not any(text in message for text in needed if text.isdigit()))
    wrong += [sentence for text, sentence in needed.items() if text not in message + message.lower()]
    came = [r.got or r.stdout for r in results if r.verdict == Verdict.WRONG_ANSWER]
    swapped = [re.search(rf"\bexpect\w*[\s:=`]+(output[\s:=`]+)?{got}", message.lower()) for got in came]
    wrong += [SAY["swapped"]] * any(swapped)
    earlier |= {text for text in (*needed, *forbidden) if text.isdigit()}
    lines = [f"feedback is wrong on example {number} ({problem.public_tests[0].__class__.__name__}s):"]
    for test, result in zip(problem.public_tests, results, strict=True):
        told = {name: value for name, value in vars(result).items() if value}
        lines.append(f"    public {test}\n        {told}")
    lines += [f"    private {problem.private_tests[0]}", f"Your message:\n{message:.1500}\n", *wrong[:1]]
    return "\n".join(lines) if wrong else None


def check(feedback=feedback) -> str | None:
    earlier: set[str] = set()
    try:
        for number in range(12):
            if mistake := mistake_in(feedback, number, earlier):
                return mistake
        if "code" not in (message := str(feedback(example(0)[0], None))).lower():
            return f"Your message if there is no valid code:\n{message}\n{SAY['no valid code']}"
        long = max(len(feedback(*example(number, "7" * 50_000)[:2])) for number in range(12))
        return SAY["uncut"] if long > 40_000 else None
    except NotImplementedError:
        raise
    except Exception as error:
        return f"feedback raised {type(error).__name__}: {error}"


def another(problem, results, calls=[]):  # noqa: B006
    calls.append((problem, results))
    return data.feedback_message(*calls[max(0, len(calls) - 2)])


WRONG = {
    "tells private tests": lambda problem, results: "\n".join(
        [data.feedback_message(problem, results), *(str([*vars(t).values()]) for t in problem.private_tests)]
    ),
    "tells nothing": lambda problem, results: data.RETRY_WITHOUT_FEEDBACK,
    "another problem's": another,
    "passed tests left out": lambda *given: re.sub(r"Passed.\n.*\n.*\n", "", data.feedback_message(*given)),
}


def install(feedback) -> dict:
    """Put the function in place of ours."""
    import rollout

    rollout.feedback_message = lambda problem, results, cut, asked: feedback(problem, results)
    return {}


if __name__ == "__main__":
    main(globals())

# The solution: feedback_message in data.py
