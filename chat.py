"""Text to token ids and back: the chat template around a dialog, and the code in a response.

A dialog's ids are only ever appended to. The template is therefore rendered in parts: `prompt_ids` up to
where the first response begins, `observation_ids` from the end of a response to where the next one begins.
The sampled ids between them stay, thoughts included, which most templates drop later: docs/templates.md.

The tokens that structure a dialog are broken up in messages: a quoted text cannot end the user's turn.
Templates that print today's date get a fixed one, or the same seed would give other dialogs tomorrow.
"""

import ast
import builtins
import json
import re
import symtable
import sys
import textwrap
import warnings
from collections.abc import Sequence
from datetime import date
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from transformers.utils import chat_template_utils

MESSAGE, ANSWER = "@message@", "@response@"  # placeholders that show where the template puts messages
DAY = date(2024, 7, 26)  # the fixed date of templates that print today's
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
CHANNEL, CONTENT = "<|channel|>", "<|message|>"  # OpenAI's harmony: the final answer is one of its channels
MARKS = {mark for pair in (*THOUGHTS, (CHANNEL, CONTENT)) for mark in pair}
PYTHON = ("python", "py", "python3")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BINDING = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Pass, ast.Assign, ast.AnnAssign)
INERT = (*BINDING, ast.Expr)  # statements that do nothing by themselves, but what is in them may
ACTIVE = (ast.stmt, ast.Call, ast.Lambda, ast.Yield, ast.YieldFrom, ast.Await)
READING = {"input", "stdin", "fileinput"}  # names of a program that reads its input
OPENING = re.compile(r"\b(?:open|fdopen|read)\((0|['\"]/dev/stdin)")  # what such a program may do instead
WRITING = {"print", "write", "writelines"}
MOST_FENCES = 100  # that are read: a response without an end may have thousands
MOST_COMPILED = 1_000_000  # characters: each fence may open or close a block
MOST_COPIES = 10_000  # of a `finally` in a program that is compiled in this process
FENCE = re.compile(r"((?:(?!```|~~~).)*)(`{3,}|~{3,}(?!~))([^`]*)")  # a line: text before, fence, language
PYTHON_FENCE = re.compile(r"\s*(`{3,}|~{3,})[^\w`~]*(python|py|python3)\b(?!-)", re.IGNORECASE)
# A whole block, but no command that runs a file, as in ```python solution.py```
ONE_LINE = re.compile(r"(?i)\s*(`{3,})[^\w`]*(?:python|py|python3)[ \t]+(?![\w./-]+\.py\b)([^`\s][^`]*)\1\s*")
CODE_BEHIND = re.compile(  # the first line of code, on the line of the fence
    r"(?im)^([ \t]*`{3,}(?:python|py|python3))[ \t]+"
    r"((?:import \w|from \S+ import|def \w+\(|class \w|print\(|\w[\w, ]*=[^`\n]*\()[^`\n]*)$"
)
LANGUAGE_BELOW = re.compile(r"\s*(?:python|py|python3)[ \t]*\n", re.IGNORECASE)
QUOTE = re.compile(r"^(?: {0,3}>)+ ?")
ITEM = re.compile(r"[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)*")  # indentation and the beginning of a list's item


class Chat:
    """A tokenizer and what dialogs need of its chat template. The functions below take a tokenizer too.

    `template_options` is a JSON object that is passed to the template, such as '{"enable_thinking": false}'.
    Raises: ValueError, one sentence, if template or options cannot be used.
    """

    def __init__(self, tokenizer, template_options: str = "") -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template: give one with --chat_template FILE")
        model = tokenizer.name_or_path or "the tokenizer"
        self.tokenizer, self.name = tokenizer, f"the chat template of {model}"
        try:
            self.options = {**json.loads(template_options or "{}")}
        except (ValueError, TypeError) as error:
            raise ValueError(f"template_options is {template_options}, but must be a JSON object") from error
        self.template = tokenizer.get_chat_template()
        added = tokenizer.added_tokens_decoder.items()
        # A response's text leaves special tokens out; `render` breaks those that structure a dialog up.
        self.dropped = {i for i, token in added if token.special and token.content not in MARKS}
        known = {i: token.content for i, token in added if token.special or token.content in self.template}
        self.structure = {i: text for i, text in known.items() if text.strip()}
        prompt = self.render([{"role": "user", "content": MESSAGE}])
        tail = self.behind_answer(MESSAGE)
        if ANSWER in tail or MESSAGE not in tail or MESSAGE not in prompt:
            raise ValueError(f"{self.name} drops or repeats a message of a dialog of user, assistant, user")
        header = prompt.rpartition(MESSAGE)[2]  # of a response; an instruction may name the marks too
        self.opened = [begin for begin, end in THOUGHTS if header.rfind(begin) > header.rfind(end)]
        self.channels = CHANNEL in self.template
        first = next(i for i in self.encode_behind(tail) if tokenizer.decode([i]).strip())
        self.end = first if first in self.structure else None  # the template's end of the assistant's turn
        mark = self.structure.get(first, "")
        self.behind = self.encode_behind(tail.partition(MESSAGE)[0])  # between a response and the message
        # Where the user's header ends the assistant's turn (GLM 4), it is needed after any other end.
        self.opens_next = mark in prompt.partition(MESSAGE)[0] and mark not in prompt.partition(MESSAGE)[2]
        file = Path(model, "generation_config.json")
        listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        listed = listed if isinstance(listed, list) else [listed]
        own = None if self.channels else self.end  # a channel ends before the response does
        self.ends = {tokenizer.eos_token_id, own, *listed} - {None}
        if not self.ends:
            raise ValueError(f"{self.name} ends a turn with no token, and the tokenizer has no end token")

    def render(self, messages: Sequence[dict]) -> str:
        """The template's text of some messages, up to where the next response begins."""
        broken_up = [dict(message) for message in messages]
        for message, token in product(broken_up, self.structure.values()):
            message["content"] = message["content"].replace(token, f"{token[0]} {token[1:]}")
        fixed = {"tokenize": False, "add_generation_prompt": True, "chat_template": self.template}
        options = {"date_string": DAY.strftime("%d %b %Y")} | self.options | fixed
        try:
            with patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DAY)):
                return self.tokenizer.apply_chat_template(broken_up, **options)
        except Exception as error:  # whatever the template's own code raises
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.name} cannot render a dialog of user and assistant: {reason}") from error

    def behind_answer(self, message: str) -> str:
        """The template's text between a response and the next one, with the end token if it has one."""
        contents = (("user", "?"), ("assistant", ANSWER), ("user", message))
        return self.render([{"role": r, "content": text} for r, text in contents]).partition(ANSWER)[2]

    def encode_behind(self, text: str) -> list[int]:
        """The ids of a text within a dialog: alone, some tokenizers would put a blank before it."""
        digit, both = (self.tokenizer.encode(part, add_special_tokens=False) for part in ("0", f"0{text}"))
        if both[: len(digit)] == digit:
            return both[len(digit) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a sampled response, without special tokens except those that mark thoughts."""
        return self.tokenizer.decode([i for i in ids if i not in self.ends and i not in self.dropped])

    def final_answer(self, text: str) -> str:
        """The text of a response after its last thought; empty if the thoughts do not end."""
        if self.channels:
            channel, _, answer = text.rpartition(CHANNEL)[2].partition(CONTENT)
            return answer if channel.split()[:1] == ["final"] else ""
        for begin, end in THOUGHTS:
            _, ended, text = text.rpartition(end)
            if begin in text or (begin in self.opened and not ended):
                return ""
        return text


def as_chat(chat) -> Chat:
    """`chat` itself, or the Chat of a tokenizer."""
    return chat if isinstance(chat, Chat) else Chat(chat)


def prompt_ids(chat, message: str, before: Sequence[dict] = ()) -> list[int]:
    """The ids of a user message and of the chat messages `before` it, up to where the response begins."""
    chat = as_chat(chat)
    text = chat.render([*before, {"role": "user", "content": message}])
    return chat.tokenizer.encode(text, add_special_tokens=False)  # the template has written the BOS token


def observation_ids(chat, message: str, sampled_end: int | None = None) -> list[int]:
    """The ids between two responses: the end token (unless the model sampled it), the message, the header."""
    chat = as_chat(chat)
    ids = chat.encode_behind(chat.behind_answer(message))
    if sampled_end in chat.behind:
        return ids[ids.index(sampled_end) + 1 :]
    ended = sampled_end is not None and chat.end is not None and not chat.opens_next
    return ids[ids.index(chat.end) + 1 :] if ended else ids


def stop_ids(chat) -> set[int]:
    """Ids that end a response: the model's own end tokens, and the token that ends a turn in the template."""
    return as_chat(chat).ends


def read_examples(path: str) -> list[dict]:
    """The chat messages of a JSON file; none if `path` is empty. Raises: ValueError if it holds no dialog."""
    messages = json.loads(Path(path).read_text()) if path else []
    roles = ["user", "assistant"] * (len(messages) // 2)
    if [message.get("role") for message in messages] != roles:
        raise ValueError(f"{path} must be a list of chat messages, user and assistant by turns")
    return messages


# ---- code out of a response --------------------------------------------------------------------------------


def extract_code(text: str, entry_point: str = "") -> str | None:
    """The program in a response; None if no block of code compiles.

    Blocks are CommonMark's. As readers do, we also accept a fence after text, a closing one beside text,
    fences in triple-quoted strings, code indented otherwise than its fence, and a last block that is never
    closed; each only where the code then compiles. Which block counts:

    1. Those whose language is python, py or python3 (`{python}` too); without any, those with no language,
       which also count where rule 3 finds nothing.
    2. Of these, those that compile. A session with `>>>` is none of them.
    3. Of these, the last one that does what is asked for: it defines `entry_point`, the function that the
       tests call, or without one, it reads input and writes output. What it needs of other blocks that
       only import, assign or define something is put in front; if it needs more, it is an example.
    4. Without any, the last one that is a program by itself: that does more than state values (a sample
       output) or signatures (a stub), and needs no name that only an earlier block binds (an example call, an
       excerpt). Else the last one.

    A block that does not compile ends where a block of Python opens in it: it was given up, or is Markdown.
    Nor is such an opening fence taken for the end of the block before it.
    """
    with warnings.catch_warnings(action="ignore"):
        blocks = _blocks(text)
        tagged = [code for language, code in blocks if language in PYTHON]
        plain = [code for language, code in blocks if language in (*PYTHON, "")]
        try:
            answer, other = _choose(tagged or plain, entry_point)
            return answer or _choose(plain, entry_point)[0] or other  # the tagged ones may be examples of it
        except RecursionError:  # `ast.unparse` of a sum of hundreds of terms
            return next(code for code in reversed(plain) if code)


def _choose(codes: Sequence[str], entry_point: str) -> tuple[str | None, str | None]:
    """By rules 3 and 4 of `extract_code`: the program that does what is asked for, and the other choice."""
    answer, chosen, last, bound, helpers = None, None, None, set(), []
    for last in filter(None, codes):
        tree, (needs, provides, binds) = ast.parse(last), names_of(last)
        nodes = [*ast.walk(tree)]
        imports = (n for n in nodes if isinstance(n, ast.ImportFrom))
        foreign = (n for n in imports if n.module not in sys.stdlib_module_names)
        needs |= {alias.name for node in foreign for alias in node.names}  # perhaps of the answer
        needs = set() if "import *" in last else needs
        whole = _with_helpers(last, needs, helpers)
        binding = [statement for statement in tree.body if isinstance(statement, BINDING)]
        only_binds = binding == tree.body
        words = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(ast.parse(whole))}
        reads = words & READING or OPENING.search(whole)
        runs = reads and words & WRITING and not only_binds
        defines, missing = any(isinstance(node, DEFINITIONS) for node in nodes), needs & bound
        if _acts(nodes) or entry_point in provides:
            given = {name for _, names, _ in helpers for name in names}
            if (_defines(tree, entry_point) if entry_point else runs) and missing <= given:
                answer = whole
            chosen = chosen if chosen and missing else whole
        if (defines or only_binds and not answer) and not runs:  # else an excerpt of the answer
            helper = last if only_binds else "\n".join(map(ast.unparse, binding))  # without its example
            helpers.append((helper, provides, needs))
        bound |= binds
    if answer:  # a helper may be shown after it
        answer = _with_helpers(answer, names_of(answer)[0], helpers)
    return answer, chosen or last


def _defines(tree: ast.Module, name: str) -> bool:
    """Whether a program defines a function of this name, or makes one, or has it in a class Solution."""
    body, found = list(tree.body), False
    for node in body:  # grows as we go, by what stands under `if` or `try`
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if node.name == name:
                found |= _acts([*ast.walk(node)])
            case ast.ImportFrom(module=module, names=names) if module in sys.stdlib_module_names:
                found |= name in [alias.asname or alias.name for alias in names]
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                # f = lambda n: n, f = g, f = cache(g), but neither f = 5 nor f = f(3)
                uses = [type(n.ctx) for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]
                constant = isinstance(value, (ast.Constant, ast.List, ast.Dict))
                words = [getattr(n, "id", "") for n in ast.walk(value)]
                found |= ast.Store in uses and name not in words and not constant
            case ast.ClassDef(name="Solution") | ast.If() | ast.Try():
                body += node.body
    return found


def _with_helpers(code: str, needs: set[str], helpers: list[tuple[str, set[str], set[str]]]) -> str:
    """A program behind those helpers, each with the names that it provides and needs, that it needs."""
    whole = code
    for helper, provides, needs_too in reversed(helpers):
        if needs & provides:
            whole, needs = f"{helper}\n{whole}", needs - provides | needs_too
    return whole if _compiles(whole) else code  # imports from __future__ must come first


def _blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks: the first word of the language, and the code, empty if it does not compile."""
    blocks, lines, position = [], CODE_BEHIND.sub(r"\1\n\2", text).split("\n"), 0
    fences = spent = 0
    while position < len(lines) and fences < MOST_FENCES and spent <= MOST_COMPILED:
        whole = ONE_LINE.fullmatch(lines[position])
        if whole and _compiles(whole[2]):
            blocks.append(("python", whole[2]))
        opening, position = FENCE.fullmatch(lines[position]), position + 1
        before, fence, info = opening.groups() if opening else ("", "", "")
        language = re.match(r"\W*([\w-]*)", info)[1].lower()
        item = ITEM.fullmatch(QUOTE.sub("", before))  # None: the fence comes after text
        if not fence or (not item and info.strip() and language not in PYTHON):
            continue
        fences += 1
        indent = len(item[0]) if item else len(before) - len(before.lstrip())
        raw = [QUOTE.sub("", s) for s in lines[position:]] if QUOTE.match(before) else lines[position:]
        body = [line[:indent].lstrip(" \t") + line[indent:] for line in raw]
        closing = re.compile(rf" {{0,3}}{fence[0]}{{{len(fence)},}}\s*")
        ends = [n for n, line in enumerate(body) if closing.fullmatch(line)][:8]
        readings = [("\n".join([*of[:n], ""]), n + 1) for of in (body, raw) for n in ends]
        code = "\n".join(body).partition(fence)[0]
        end = code.count("\n")  # the line in which the fence stands
        readings.insert(len(ends), (code, end + (not PYTHON_FENCE.match([*body, ""][end]))))
        dedented = ((textwrap.dedent(code), n) for code, n in readings)
        for reading in chain(readings, dedented):
            spent += len(reading[0])
            if spent <= MOST_COMPILED and _compiles(reading[0]):
                break
        else:
            reading = "", (ends or [len(body)])[0] + 1
        code, after = reading
        opened = (n for n, line in enumerate(body[:after]) if not code and PYTHON_FENCE.match(line))
        if below := LANGUAGE_BELOW.match(code):
            language, code = "python", code[below.end() :]
        if code or item:
            blocks.append((language, code))
            position += next(opened, after)
    return blocks


def _compiles(code: str) -> bool:
    try:
        # Each way out of a `try` has a copy of its `finally`. So thirty lines of nested ones take a minute:
        # the sandbox, which has limits, compiles these.
        ways = 2 + sum(map(code.count, ("return", "break", "continue")))
        if ways ** code.count("finally") < MOST_COPIES:
            compile(code, "solution.py", "exec")
        symtable.symtable(code, "solution.py", "exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return bool(code.strip())


def _acts(nodes: Sequence[ast.AST]) -> bool:
    """Whether a program does more than state values, signatures, or that something is not implemented."""
    missing = [n for n in nodes if isinstance(n, ast.Raise) and "NotImplementedError" in ast.dump(n)]
    returns = (n for n in nodes if isinstance(n, ast.Return) and isinstance(n.value, ast.Constant | None))
    missing += (n for n in returns if getattr(n.value, "value", None) is None)
    stubs = {id(n) for node in missing for n in ast.walk(node)}
    active = (n for n in nodes if isinstance(n, ACTIVE) and id(n) not in stubs)
    inside = (n for node in nodes if isinstance(node, DEFINITIONS[:2]) for n in ast.walk(node))
    places = (n for n in inside if isinstance(n, (ast.Subscript, ast.Attribute)))
    changes = any(isinstance(n.ctx, ast.Store) for n in places)  # what a function was given
    return changes or not all(isinstance(n, INERT) for n in active)


def names_of(code: str) -> tuple[set[str], set[str], set[str]]:
    """The names that a program needs from elsewhere, that it provides, and that it binds but by an import."""
    tables = [symtable.symtable(code, "solution.py", "exec")]
    for table in tables:  # grows as we go: functions, classes and comprehensions have tables of their own
        tables += table.get_children()
    symbols = [symbol for table in tables for symbol in table.get_symbols()]
    imported = {s.get_name() for s in symbols if s.is_imported()}
    others = (s for s in symbols if not s.is_imported())
    bound = {s.get_name() for s in others if s.is_assigned() or s.is_parameter()}
    provided = {s.get_name() for s in tables[0].get_symbols() if s.is_local()}
    used = {s.get_name() for s in symbols if s.is_global()}
    return used - bound - imported - {*dir(builtins)}, provided, bound
