"""Text and token ids: code out of a response, and messages that quote special tokens."""

import time

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


@pytest.mark.parametrize("unit", ["```python\nx\n", "```python\nx = (\n```\n", "```python\nx = 1```\n"])
def test_a_response_of_nothing_but_fences_is_read_quickly(unit):
    began = time.process_time()
    extract_code(unit * (8000 // len(unit)))
    assert time.process_time() - began < 2


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
