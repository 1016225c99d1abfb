"""Exercise 7: n@k in closed form.

The paper reports 1@3 and 10@100. A problem has N rollouts; f of them end with all *public* tests passed, c of
these f pass the private tests too. Draw some of the N without replacement. Of those that passed the public
tests submit n, chosen at random (fewer if fewer passed). How likely is it that a submission is right?

Paper: section 3.1. Read first: evaluate.py's docstring; about the hypergeometric distribution. 20 minutes.
Check: python exercises/e7_n_at_k.py
"""

import random
from math import comb

from classroom import Task, checker, from_tree, main


def n_at_k(rollouts: int, public_passed: int, solved: int, n: int, draws: int) -> float:
    """The probability that one of at most n submissions is right.

    Args: rollouts: N; public_passed: f; solved: c; n: the most submissions; draws: how many are drawn of N.
    """
    raise NotImplementedError("n_at_k must return a probability (math.comb(a, b) is 0 for b > a)")


# ---- the check: nothing below is yours to write ------------------------------------------------------------

ours = from_tree("evaluate.py", "n_at_k", comb=comb)


def none_right(f: int, c: int, submitted: int) -> float:
    return comb(f - c, submitted) / comb(f, submitted)


def replaced(N, f, c, n, k, drawn: bool, submitted: bool) -> float:
    """With replacement, if so `drawn` (the number that passes is then binomial), or if so `submitted`."""
    binomial = [comb(k, j) * (f / N) ** j * (1 - f / N) ** (k - j) for j in range(k + 1)]
    without = [comb(f, j) * comb(N - f, k - j) / comb(N, k) for j in range(k + 1)]
    chances, numbers = binomial if drawn else without, [min(n, j, f) for j in range(k + 1)]
    wrong = [(1 - c / f) ** m if submitted and f else none_right(f, c, m) for m in numbers]
    return sum(chance * (1 - none) for chance, none in zip(chances, wrong, strict=True))


WRONG = {
    "pass@k": lambda N, f, c, n, k: 1 - comb(N - c, k) / comb(N, k),
    "no filter by public tests": lambda N, f, c, n, k: 1 - comb(N - c, min(n, k)) / comb(N, min(n, k)),
    "all are drawn": lambda N, f, c, n, k: 1 - none_right(f, c, min(n, f)),
    "with replacement": lambda *given: replaced(*given, drawn=True, submitted=True),
    "drawn with replacement": lambda *given: replaced(*given, drawn=True, submitted=False),
    "submitted with replacement": lambda *given: replaced(*given, drawn=False, submitted=True),
    "always n": lambda N, f, c, n, k: 1 - none_right(f, c, n),
    "mean number": lambda N, f, c, n, k: 1 - (1 - c / f) ** min(n, k * f / N) if f else 0.0,
}
EXAMPLES = {
    "1@3, six rollouts": (6, 4, 2, 1, 3),
    "2@3, six rollouts": (6, 3, 1, 2, 3),
    "no rollout passes the public tests": (5, 0, 0, 1, 2),
    "more draws than rollouts that fail": (4, 3, 1, 2, 3),
}


def larger(number: int) -> tuple:
    draw = random.Random(number)
    rollouts = draw.randint(10, 40)
    passed = draw.randint(4, rollouts)
    return rollouts, passed, draw.randint(0, passed), draw.randint(1, 4), draw.randint(1, rollouts)


TASKS = {"n_at_k": Task(ours, WRONG, EXAMPLES, larger)}
check = checker(TASKS, globals())
NO_EFFECT = "n@k has no effect on learning: it measures a policy after training, and no update depends on it."

if __name__ == "__main__":
    main(globals())

# The solution: n_at_k in evaluate.py
