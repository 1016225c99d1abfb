"""Text and token ids: code out of a response, and messages that quote special tokens."""

import ast
import time
import warnings

import pytest

from chat import extract_code, observation_ids
from sandbox import IoTest, Job, Limits


def test_an_end_token_that_a_message_spells_out_is_not_one(tokenizer):
    ids = observation_ids(tokenizer, "x<|end|><|assistant|>y")
    assert ids.count(tokenizer.eos_token_id) == 2  # that of the response before, and the message's own


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("first\n```python\nx = 1\n```\nthen\n```python\ny = 2\n```", "y = 2\n"),
        ("```\nx = 1\n```\nthen\n```\ny = 2\n```", "y = 2\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("x = 1", None),
        ("```python\nx = \n```", None),
        ("```python\nx = 1", "x = 1"),  # never closed, but it compiles
        ("```python\nx = (1", None),
        ("```python\nx = 1\0\n```", None),
        ("```python\n\n```", None),
        ("```bash\npip install x\n```\n\n```python\nx = 1\n```", "x = 1\n"),
        ("```text\nplan\n```\nSolution:\n```python\nx = 1\n```", "x = 1\n"),
        ("```Python 3\r\nx = 1\r\n```", "x = 1\r\n"),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```bash\nls\n```", None),
        ("  ```python\nx = 1```", "x = 1"),
    ],
)
def test_code_is_the_last_fenced_block_of_python(text, code):
    assert extract_code(text) == code


F = "def f(n): return n\n"  # an answer
BLOCK = f"```python\n{F}```\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        # fences
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("````python\nx = 1\n```\n````", None),  # a shorter fence does not close, and is no Python
        ("```python\nx = 1\n`````\nDone.", "x = 1\n"),
        ("```python\nx = 1\n~~~\n```", None),  # nor does one of the other kind
        ("```python\nx = 1\n```  \nDone.", "x = 1\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("```python\ns = '''\n```\n'''\n```", "s = '''\n```\n'''\n"),
        (
            "```python\ndef f():\n    '''\n    ```\n    f()\n    ```\n    '''\n```",
            "def f():\n    '''\n    ```\n    f()\n    ```\n    '''\n",
        ),
        ("1. Code:\n\n   ```python\n   if x:\n       y = 2\n   ```", "if x:\n    y = 2\n"),
        ("1. a\n    - b\n        ```python\n        x = 1\n        ```", "x = 1\n"),
        ("- ```python\n  x = 1\n  ```", "x = 1\n"),
        ("\t```python\n\tx = 1\n\t```", "x = 1\n"),
        ("> ```python\n> x = 1\n>\n> y = 2\n> ```", "x = 1\n\ny = 2\n"),
        ("````markdown\n```python\nx = 2\n```\n````\n```python\nx = 1\n```", "x = 1\n"),
        # more than CommonMark: as readers do
        ("The code: ```python\nx = 1\n```", "x = 1\n"),
        ("The code: ```\nx = 1\n```", "x = 1\n"),
        ("Use ```x = 5``` here.\n```python\ny = 1\n```", "y = 1\n"),
        ("Between ``` marks.\n```python\ny = 1\n```", "y = 1\n"),
        ("It ends with ```\nas said:\n```python\ny = 1\n```", "y = 1\n"),
        ("```python\nx = 1```\nand\n```python\ny = 2\n```", "y = 2\n"),
        ("```python\nx = 1\n```This prints nothing.", "x = 1\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```python\nfor x in", "x = 1\n"),
        ("````python\nx = 1\n```\nDone.", None),  # a shorter fence is no end, and no Python
        ("```python print(1)```", "print(1)"),
        ("```python n = int(input())\nprint(n)\n```", "n = int(input())\nprint(n)\n"),
        ("```python import sys\nprint(sys.argv)\n```", "import sys\nprint(sys.argv)\n"),
        ("```python def f(n):\n    return n\n```", "def f(n):\n    return n\n"),
        ("```python (version 3)\nprint(1)\n```", "print(1)\n"),
        ("```\npython\nprint(1)\n```", "print(1)\n"),
        ("```python\nPython\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```\npython\n```\n1\n```", "print(1)\n"),
        ("It is:\n\n ```py x = 1 ```\nDone.", "x = 1 "),
        ("```python -m pip install x```\n" + BLOCK, F),
        (BLOCK + "```python f(3)```", F),
        ("Use ```python x = 5``` here.\n" + BLOCK, F),
        # a fence that is given up, or wraps Markdown: the block of Python in it counts
        (f"```markdown\nHere:\n{BLOCK}```\n", F),
        (f"```\n{BLOCK}```\n", F),
        (f"~~~\n{BLOCK}~~~\n", F),
        (f"```\n{BLOCK}", F),
        (f"```python\ndef f(n):\n    # no, again\n\n{BLOCK}", F),
        # languages
        ("```PY\nx = 1\n```", "x = 1\n"),
        ("```python3\nx = 1\n```", "x = 1\n"),
        ("```{python}\nx = 1\n```", "x = 1\n"),
        ("``` {.python .numberLines}\nx = 1\n```", "x = 1\n"),
        ('```python title="a.py"\nx = 1\n```', "x = 1\n"),
        ("```python:a.py\nx = 1\n```", "x = 1\n"),
        ("```pycon\nx = 1\n```", None),
        ("```python-repl\nx = 1\n```", None),
        ("```json\n[1]\n```", None),
        # after an answer: samples, sessions, examples, excerpts
        (BLOCK + "```pycon\n>>> f(1)\n1\n```", F),
        (BLOCK + "```python\n>>> f(1)\n1\n```", F),
        (BLOCK + "```python\n1\n```", F),
        (BLOCK + "```python\n[1, 'a']\n```", F),
        (BLOCK + "```python\n# prints 1\n```", F),
        (BLOCK + "```python\nimport sys\n```", F),
        ("```\nprint(1)\n```\nOutput:\n```\n1\n```", "print(1)\n"),
        (BLOCK + "```python\nprint(f(3))\n```", F),
        (BLOCK + "```python\nn = 3\nprint(f(n))\n```", F),
        (BLOCK + "```python\nassert f(1) == 1\n```", F),
        (BLOCK + "```python\nif __name__ == '__main__':\n    print(f(2))\n```", F),
        (BLOCK + "```python\nfrom solution import f\nprint(f(2))\n```", F),
        (BLOCK + "```python\nn[0] = 1\n```\nmatters", F),
        (BLOCK + "```python\nfor i in range(n):\n```\nis linear", F),
        (BLOCK + "```sh\npython a.py\n```", F),
        (BLOCK + "Its signature:\n```python\ndef f(n):\n    ...\n```", F),
        (BLOCK + "```python\nclass A:\n    def f(self):\n        pass\n```", F),
        (BLOCK + "Output:\n```python\nx = 5\n```", F),
        # after a draft: a corrected version
        (BLOCK + "Wait:\n```python\ndef f(n): return n + 1\n```", "def f(n): return n + 1\n"),
        ("```python\nimport math\nprint(1)\n```\n" + BLOCK, F),
        (
            "```python\ndef gcd(a, b): return 1\nprint(gcd(1, 2))\n```\n"
            "```python\nfrom math import gcd\nprint(gcd(4, 6))\n```",
            "from math import gcd\nprint(gcd(4, 6))\n",
        ),
        (
            "```python\nimport sys\ninput = sys.stdin.readline\nprint(input())\n```\n"
            "```python\nprint(int(input()))\n```",
            "print(int(input()))\n",
        ),
        (
            "```python\ne = 1\nprint(e)\n```\n"
            "```python\ntry:\n    print(1)\nexcept ValueError as e:\n    print(e)\n```",
            "try:\n    print(1)\nexcept ValueError as e:\n    print(e)\n",
        ),
        (
            "```python\nx = y = rest = 1\nprint(x)\n```\n"
            "```python\nmatch input().split():\n    case [x, *rest]:\n        print(x, rest)\n```",
            "match input().split():\n    case [x, *rest]:\n        print(x, rest)\n",
        ),
        (
            "```python\nos = 1\nprint(os)\n```\n```python\nimport os.path\nprint(os.path)\n```",
            "import os.path\nprint(os.path)\n",
        ),
        (BLOCK + "```python\nf = lambda n: n + 1\n```", "f = lambda n: n + 1\n"),
        # nothing else to choose
        ("```python\n6\n```", "6\n"),
        ("```python\n>>> f(1)\n```", None),
        ("```python\nx = (\n```\nprints\n```\n1\n```", None),
    ],
)
def test_a_reader_and_extract_code_see_the_same_program(text, code):
    assert extract_code(text) == code


STDIN = "n = int(input())\nprint(n * 2)\n"  # an answer to a task of input and output
READS = f"```python\n{STDIN}```\n"
HELPER = "def gcd(a, b):\n    return a if not b else gcd(b, a % b)\n"
FUNCTION = "def main():\n    n = int(input())\n    print(n * 2)\n"
MAIN = "a, b = map(int, input().split())\nprint(gcd(a, b))\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        # a fence that is no end of a block, but opens the answer
        (f"All in one ```python block.\n\n# Solution\n\n{READS}", STDIN),
        (f"I put it into one ```python block.\n\nSolution\n\n{READS}", STDIN),
        (f"```markdown\n# Solution\n\n{READS}## Complexity\nO(n)\n```\n", STDIN),
        (f"```python\n# Your code here\n\n{READS}Done.", STDIN),
        (f"```\n5\n{READS}", STDIN),
        # excerpts, hints and demos after the answer
        (f"{READS}1. Read the number:\n```python\nn = int(input())\n```\n", STDIN),
        (f"{READS}Here\n```python\nmap(int, input().split())\n```\nreads integers.", STDIN),
        (f"{READS}```python\nimport sys\nsys.setrecursionlimit(10**6)\n```\n", STDIN),
        (f"{READS}```python\nimport sys\ndata = sys.stdin.read().split()\n```\n", STDIN),
        (f"{READS}```python\nprint('hello'[::-1])\n```\n", STDIN),
        (f"{READS}```python\nCounter({{'a': 2}})\n```\n", STDIN),
        (f"{READS}```python\nimport solution\nprint(solution.f(3))\n```\n", STDIN),
        ("```\nprint(input())\n```\nTime:\n```\nO(n^2)\n```\n", "print(input())\n"),
        ("```\nprint(input())\n```\nRun it:\n```python a.py < in.txt```\n", "print(input())\n"),
        # a helper, then the program that needs it
        (f"A helper:\n```python\n{HELPER}```\nThen:\n```python\n{MAIN}```\n", f"{HELPER}\n{MAIN}"),
        (f"```python\n{HELPER}```\n```python\n{HELPER}{MAIN}```\n", HELPER + MAIN),
        # what the program needs of earlier blocks is put in front, and nothing else
        (
            "```python\nimport sys\n```\nThen:\n```python\nprint(sys.stdin.read())\n```\n",
            "import sys\n\nprint(sys.stdin.read())\n",
        ),
        (
            "```python\nM = 7\n```\n```python\nk = 1\n```\n```python\nprint(int(input()) % M)\n```\n",
            "M = 7\n\nprint(int(input()) % M)\n",
        ),
        (
            "1.\n```python\nn = int(input())\n```\n2.\n```python\nprint(n * 2)\n```\n",
            "n = int(input())\n\nprint(n * 2)\n",
        ),
        (f"```python\n{FUNCTION}```\nCall it:\n```python\nmain()\n```\n", f"{FUNCTION}\nmain()\n"),
        (
            f"```python\ndef gcd(a, b): return 1\n```\nNo:\n```python\n{HELPER}```\n```python\n{MAIN}```\n",
            f"{HELPER}\n{MAIN}",
        ),
        (f"{READS}1.\n```python\nn = int(input())\n```\n2.\n```python\nprint(n * 2)\n```\n", STDIN),
        (f"```python\nimport math\nprint(1)\n```\nBetter:\n{READS}", STDIN),
        (f"```python\n{MAIN}```\nwith\n```python\n{HELPER}```\n", f"{HELPER}\n{MAIN}"),
        (f"{READS}Demo:\n```python\nprint('input:', 3 * 2)\n```\n", STDIN),
        (
            "```python\nimport os\nprint(os.read(0, 9))\n```\n```python\nassert 1\n```\n",
            "import os\nprint(os.read(0, 9))\n",
        ),
        (f"```\n{STDIN}```\nwhere\n```python\nint('3')\n```\n", STDIN),
        (
            f"```python\n{HELPER}{MAIN}```\nShorter:\n```python\nfrom math import *\n{MAIN}```\n",
            f"from math import *\n{MAIN}",
        ),
        (f"{READS}From a file:\n```python\nwith open('a') as g:\n    print(g.read())\n```\n", STDIN),
        # a corrected version
        (f"{READS}Wait:\n```python\nprint(int(input()) * 2)\n```\n", "print(int(input()) * 2)\n"),
        # indented otherwise than the fence
        ("1. **Code**: ```python\n   n = 1\n   print(n)\n   ```\n", "n = 1\nprint(n)\n"),
        ("1. Code:\n    ```python\ndef f(n):\n    return n\n    ```\n", "def f(n):\n    return n\n"),
        ("1. Code:\n   ```python\n    x = 1\n    print(x)\n   ```\n", "x = 1\nprint(x)\n"),
    ],
)
def test_a_program_of_input_and_output_is_found_among_other_blocks(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    "after",
    [
        "```python\nsorted([3, 1, 2])\n```",
        "```python\nprint('hello'[::-1])\n```",
        "```python\nwords = 'a b c'.split()\n```",
        "```python\nf = f('abc')\nprint(f)\n```",
        "```python\ndef check(candidate):\n    assert candidate(1) == 1\n```",
        "```python\nimport doctest\ndoctest.testmod()\n```",
        "```python\nn = int(input())\nprint(f(n))\n```",
        "```python\ndef f(n):\n    raise NotImplementedError\n```",
        "```python\ndef f(n):\n    ...\n```",
        "```python\nfor f in [1, 2]:\n    print(f)\n```",
    ],
)
def test_the_last_block_that_defines_the_function_counts(after):
    assert extract_code(BLOCK + after, "f") == F
    assert extract_code(f"```python\ndef f(n): return 0\n```\nWait:\n{BLOCK}{after}", "f") == F
    generator = "def f(n):\n    yield n\n"
    assert extract_code(f"```python\n{generator}```\nOutput:\n```python\n[1]\n```", "f") == generator


@pytest.mark.parametrize(
    "made",
    [
        "def double(n):\n    return n * 2\n\nf = double\n",
        "from functools import cache\nf = cache(lambda n: n * 2)\n",
        "from math import gcd as f\n",
        "f: object = lambda n: n * 2\n",
        "f, g = (lambda n: n * 2), None\n",
        "class Solution:\n    def f(self, n):\n        return n * 2\n",
        "f = None\n\ndef f(n):\n    return n * 2\n",
        "try:\n    from math import lcm as f\nexcept ImportError:\n    f = None\n",
    ],
)
@pytest.mark.parametrize("language", ["python", ""])
def test_a_function_may_be_made_in_another_way_than_by_def(made, language):
    demo = "```python\nprint(2 * 3)\n```\n"
    assert extract_code(f"{BLOCK}Or:\n```{language}\n{made}```\n", "f") == (made if language else F)
    assert extract_code(f"```{language}\n{made}```\nDemo:\n{demo}", "f") == made


@pytest.mark.parametrize(
    "after",
    [
        "def f(n):\n    # your code here\n    return\n",
        'def f(n):\n    """Doubles."""\n    return None\n',
        "def make():\n    def f(n):\n        return n\n    return f\nprint(make()(3))\n",
        "class Doubler:\n    def f(self, n):\n        return n * 2\n\nprint(Doubler().f(3))\n",
        "f = [1, 2]\nprint(f)\n",
    ],
)
def test_what_is_no_function_of_that_name_does_not_replace_it(after):
    assert extract_code(f"{BLOCK}Note:\n```python\n{after}```\n", "f") == F


def test_a_function_has_the_helper_of_an_earlier_block_in_front():
    code = "def f(a, b):\n    return a // gcd(a, b)\n"
    text = f"```python\n{HELPER}```\nThen:\n```python\n{code}```\n"
    assert extract_code(text, "f") == f"{HELPER}\n{code}"
    assert extract_code(text, "gcd") == HELPER
    shown = f"```python\n{HELPER}print(gcd(4, 6))\n```\nThen:\n```python\n{code}```\n"
    assert extract_code(shown, "f") == f"{ast.unparse(ast.parse(HELPER))}\n{code}"
    imports = "```python\nfrom typing import List\n```\n"
    typed = "def f(n: List[int]): return n\n"
    assert extract_code(f"{imports}{BLOCK}", "f") == F
    future = f"from __future__ import annotations\n{typed}"
    assert extract_code(f"{imports}```python\n{future}```\n", "f") == future
    assert extract_code(f"{imports}```python\n{typed}```\n", "f") == f"from typing import List\n\n{typed}"
    assert extract_code(f"{BLOCK}Faster:\n```python\n{HELPER}f = gcd\n```\n", "f") == f"{HELPER}f = gcd\n"
    assert extract_code(f"{BLOCK}Shorter:\n```python\nf = lambda n: n\n```", "f") == "f = lambda n: n\n"


def test_a_warning_about_a_response_is_not_printed():
    with warnings.catch_warnings(action="error"):
        assert extract_code("```python\nprint('\\d', 1if 1else 2)\n```")


UNITS = ["```python\nx\n", "```python\nx = (\n```\n", "```python\nx = 1```\n", "```\n", "> ```python\n", "`"]
UNITS += ["~", "```python\nx = 1\n```\n", "a ```\n", "~~~\n```\n", "~`", '```python\n"""\n']


@pytest.mark.parametrize(
    ("before", "unit"),
    [
        *[(before, unit) for before in ("", "```\n") for unit in UNITS],
        *[("```py ", unit) for unit in (" ", "a ", "a,", "x=(", "python\n")],
        ("```python x = f(", "a,"),
    ],
)
def test_a_response_of_nothing_but_fences_is_read_quickly(before, unit):
    began = time.process_time()
    extract_code(before + unit * (32_000 // len(unit)))
    assert time.process_time() - began < 5


def test_what_all_fences_may_compile_is_bounded():
    text = "```python\n# '''\n'''\n```\n" * 98 + "'''\n" + "x = 1\n" * 1000 + "(\n" + "```\n" * 8
    began = time.process_time()
    extract_code(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("way_out", ["pass", "return"])
def test_what_would_take_long_to_compile_is_left_to_the_sandbox(sandbox, way_out):
    """Each `finally` is compiled once for each way out of its `try`: this would need a minute and 3 GB."""
    lines = [f"try: {way_out}", "finally:"]
    nested = "".join(" " * depth + line + "\n" for depth in range(1, 20) for line in lines)
    code = f"def f():\n{nested}{' ' * 20}pass\n"
    assert extract_code(f"```python\n{code}```") == code
    for tests in (1, 4):  # without and with a zygote
        job = Job(code, (IoTest("", ""),) * tests, Limits(1.0, 1 << 27))
        assert "passed" not in [result.verdict for result in sandbox.run([job])[0]]
    assert extract_code("```python\ntry: pass\nfinally: return\n```") is None  # compiled here
    assert extract_code(f"```python\n{code}\nnonlocal x\n```") is None


@pytest.mark.parametrize("terms", [100, 400, 900])
def test_a_sum_of_hundreds_of_terms_is_no_error(terms):
    code = f"def f(n):\n    return {'n + ' * terms}1\n\nf.calls = {'1 + ' * terms}1\nprint(f(3))\n"
    assert extract_code(f"Code:\n```python\n{code}```\nDone.\n", "f") == code
    assert extract_code(f"```python\nf: object\n\n{code}```\n", "f") == f"f: object\n\n{code}"


@pytest.mark.parametrize("after", ["def g(a):\n    a[0] = 1\n", "def f(a):\n    pass\n"])
def test_a_function_that_only_changes_its_argument_is_an_answer(after):
    code = "def f(a):\n    a[0] = 1\n"
    assert extract_code(f"```python\n{code}```\nor\n```python\n{after}```\n", "f") == code
