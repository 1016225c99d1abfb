"""Exercise 6: the feedback message.

After a response that failed a public test the user writes again. The message may tell everything about the
public tests, and nothing about the private ones: they measure. For problems of standard input and output it
lists the tests that failed; for asserts all tests, so that the model sees what works already.

Paper: section 2.1, appendix B. Read first: `TestResult` in sandbox.py, the templates in data.py. 20 minutes.
Check: python exercises/e6_feedback.py         Effect on learning: python exercises/e6_feedback.py --effect
"""

import json
import re

from classroom import ROOT, SENTENCES, main, problem_with_results

import data
from data import Problem
from sandbox import TestResult


def feedback(problem: Problem, results: list[TestResult] | None) -> str:
    """The user message after a response that did not pass. Each text in it has at most 2,000 characters: of a
    longer one the middle is left out.

    Wrong answer: the input, what was expected, what came out (asserts: `call`, `expected` and `got` of the
    result; the test's `code` where `call` is empty). Exception: input and traceback. Timeout, out of memory,
    too much output: which, and the input. No valid code: that the code is not valid.

    Args: problem: `public_tests`; `private_tests`; `entry_point`, empty if the tests are no asserts.
        results: one for each public test; None if the response has no valid code.
    """
    raise NotImplementedError("feedback must return the text of a message")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

SAY = SENTENCES["e6_feedback"]
EXAMPLES = json.loads((ROOT / "exercises" / "messages.json").read_text())


def mistake_in(message: object, number: int) -> str | None:
    """What is wrong with the message of an example."""
    if not isinstance(message, str):
        return f"feedback returned {message!r:.100}, but must return a text: is a `return` missing?"
    public, private, results, needed, forbidden = EXAMPLES[number].values()
    earlier = re.findall(r"\d{5}", json.dumps(EXAMPLES[:number]))
    wrong = [SAY["another problem's"]] * any(text in message for text in earlier)
    wrong += [SAY["tells a solution"]] * ("return x + x" in message)
    wrong += [SAY[mistake] for pattern, mistake in forbidden.items() if re.search(pattern, message.lower())]
    wrong += [SAY["tells nothing"]] * (not any(text in message for text in needed if text.isdigit()))
    wrong += [SAY[mistake].format(text) for text, mistake in needed.items() if text not in message.lower()]
    tests = [f"    public {test}, result {told}" for test, told in zip(public, results, strict=True)]
    lines = [f"feedback is wrong on example {number}:", *tests, f"    private {private[0]}", "Your message:"]
    return "\n".join([*lines, f"{message:.1500}\n", *wrong[:1]]) if wrong else None


def check(feedback=feedback) -> str | None:
    try:
        for number, stored in enumerate(EXAMPLES):
            if mistake := mistake_in(feedback(*problem_with_results(stored)), number):
                return mistake
        if "code" not in (message := str(feedback(problem_with_results(EXAMPLES[0])[0], None))).lower():
            return f"Your message if there is no valid code:\n{message}\n{SAY['no valid code']}"
        for number, stored in enumerate(EXAMPLES):
            message = feedback(*problem_with_results(stored, times=10_000))
            if len(message) > 40_000 or mistake_in(message, number):
                return SAY["uncut" if len(message) > 40_000 else "cut as a whole"]
        return None
    except NotImplementedError:
        raise
    except Exception as error:
        return f"feedback raised {type(error).__name__}: {error}"


WRONG = {
    "tells private tests": lambda p, results: f"{data.feedback_message(p, results)}\n{p.private_tests}",
    "tells nothing": lambda problem, results: data.RETRY_WITHOUT_FEEDBACK,
    "another problem's": lambda *given, calls=[]: (  # noqa: B006
        calls.append(given) or data.feedback_message(*calls[max(0, len(calls) - 2)])
    ),
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
