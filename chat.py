"""Text to token ids and back: the chat template around a dialog, and the code in a response.

Tokens in, tokens out: a dialog's ids are only ever appended to. The template is therefore rendered in parts:
`prompt_ids` up to where the first response begins, `observation_ids` from the end of a response to where the
next one begins. What the model sampled stands between these parts as it was sampled.

A text that a user message quotes cannot end the user's turn: special tokens in it are broken up. Templates
that print today's date get a fixed one, or the same seed would give other dialogs tomorrow.
"""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)```", re.DOTALL | re.MULTILINE)  # language, content
SENTINEL = "@response@"  # stands for a response when the chat template is rendered; never tokenized
DATE = "26 Jul 2024"  # today, for templates that print the date


def extract_code(text: str) -> str | None:
    """The code of a response: its last fenced block of Python or, if there is none, of no language at all.

    None if there is no such block, or if it does not compile: a response without valid code. Blocks of other
    languages are matched whole and ignored, or their closing fences would be taken for opening ones.
    """
    blocks = [(language.strip().lower(), content) for language, content in FENCE.findall(text)]
    python = [content for language, content in blocks if language.startswith("py")]
    code = (python or [content for language, content in blocks if not language] or [""])[-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "solution.py", "exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    return code if code.strip() else None


def _special_tokens(tokenizer) -> dict[int, str]:
    """Ids and texts of the tokens that structure a dialog; the tokenizer's named ones are only some."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _render(tokenizer, messages: list[dict]) -> str:
    """The template's text of some messages, up to where the next response begins."""
    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template: give one with --chat_template FILE")
    escaped = []
    for message in messages:
        content = message["content"]
        for token in _special_tokens(tokenizer).values():
            content = content.replace(token, f"{token[0]} {token[1:]}")
        escaped.append(message | {"content": content})
    options = {"tokenize": False, "add_generation_prompt": True, "date_string": DATE}
    return tokenizer.apply_chat_template(escaped, **options)


def prompt_ids(tokenizer, message: str, before: Sequence[dict] = ()) -> list[int]:
    """The ids of a user message and of the chat messages `before` it, up to where the response begins."""
    text = _render(tokenizer, [*before, {"role": "user", "content": message}])
    return tokenizer.encode(text, add_special_tokens=False)  # the template has written the first one already


def observation_ids(tokenizer, message: str) -> list[int]:
    """The template's ids between two responses: end of turn, the user's message, the next header."""
    dialog = [("user", "?"), ("assistant", SENTINEL), ("user", message)]
    text = _render(tokenizer, [{"role": role, "content": content} for role, content in dialog])
    return tokenizer.encode(text.split(SENTINEL, 1)[1], add_special_tokens=False)


def stop_ids(tokenizer) -> set[int]:
    """Ids that end a response: the end token, and a special one with which the template ends a turn.

    Raises: ValueError if there is neither.
    """
    template_end = observation_ids(tokenizer, "?")[0]
    ends = {tokenizer.eos_token_id} | ({template_end} & _special_tokens(tokenizer).keys())
    if ends == {None}:
        raise ValueError("the tokenizer has no end token, and its chat template ends a turn with none")
    return ends - {None}


def read_examples(path: str) -> list[dict]:
    """The chat messages of a JSON file; none if `path` is empty. Raises: ValueError if it holds no dialog."""
    messages = json.loads(Path(path).read_text()) if path else []
    roles = ["user", "assistant"] * (len(messages) // 2)
    if [message.get("role") for message in messages] != roles:
        raise ValueError(f"{path} must be a list of chat messages, user and assistant by turns")
    return messages
