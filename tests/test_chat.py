"""Text and token ids: code out of a response, and messages that quote special tokens."""

import pytest

from chat import extract_code, observation_ids


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
        ("```python\nx = 1", None),
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
