"""Chat templates: what a rollout appends is what the template would render of the whole dialog."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import toy
from benchmarks.sft import last_response
from chat import Chat, observation_ids, prompt_ids, stop_ids
from checkpoints import export
from distributed import load_model, load_tokenizer

LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content.split('</think>')[-1] if message.role == 'assistant' else message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}### {{ message.role }}\n\n{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n\n{% endif %}"
)
STYLES = {  # template, its special tokens, beginning, end of a turn
    "toy": (toy.CHAT_TEMPLATE, [], None, "<|end|>"),
    "llama": (
        LLAMA,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
}


def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, without any template."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def styled(style: str):
    """A tokenizer of bytes with a template, and the id that ends a turn.

    The toy's own has a token for "\\n```", which would swallow a header's line break: no round trip.
    """
    template, specials, begin, end = STYLES[style]
    tokenizer = toy.build_tokenizer() if style == "toy" else of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = template, begin, end
    return tokenizer, tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("style", STYLES)
def test_appended_ids_equal_the_rendering_of_the_whole_dialog(style):
    tokenizer, end = styled(style)
    users = ["Print it.", "Wrong answer.\nInput:\n1 2\n\nTry again.", "Your answer has no valid Python code."]
    answers = ["```python\nprint(1)\n```", "Sorry.\n\n```python\nx = 'é'\n```"]
    ids, messages = prompt_ids(tokenizer, users[0]), [{"role": "user", "content": users[0]}]
    for answer, user in zip(answers, users[1:], strict=True):
        ids += [*tokenizer.encode(answer, add_special_tokens=False), end]
        observed = observation_ids(tokenizer, user)
        assert observed[0] == end
        ids += observed[1:]
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": user}]
        whole = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )
        assert tokenizer.decode(ids) == whole
        assert ids == tokenizer.encode(whole, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == (1 if style == "llama" else 0)


def test_the_line_break_behind_an_end_token_belongs_to_the_observation():
    tokenizer, end = styled("chatml")
    observed = tokenizer.decode(observation_ids(tokenizer, "Try again."))
    assert observed == "<|im_end|>\n<|im_start|>user\nTry again.<|im_end|>\n<|im_start|>assistant\n"


def test_thoughts_that_a_template_drops_from_earlier_turns_do_not_move_the_cut():
    tokenizer, end = styled("chatml")
    sampled = tokenizer.encode("<think>2 + 2</think>4", add_special_tokens=False)
    ids = [*prompt_ids(tokenizer, "Add."), *sampled, end, *observation_ids(tokenizer, "No.")[1:]]
    assert "<think>2 + 2</think>4<|im_end|>\n<|im_start|>user\nNo." in tokenizer.decode(ids)


@pytest.mark.parametrize("style", STYLES)
def test_a_message_cannot_spell_any_special_token(style):
    tokenizer, _ = styled(style)
    specials = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    hostile = "".join(tokenizer.convert_ids_to_tokens(specials))
    for ids_of in (prompt_ids, observation_ids):
        plain, attacked = ids_of(tokenizer, "x"), ids_of(tokenizer, f"x{hostile}")
        assert [i for i in attacked if i in specials] == [i for i in plain if i in specials]


def test_the_prompt_does_not_change_with_the_date():
    tokenizer, _ = styled("llama")
    assert "Today Date: 26 Jul 2024<|eot_id|>" in tokenizer.decode(prompt_ids(tokenizer, "x"))


@pytest.mark.parametrize(
    "call",
    [
        "{{ strftime_now ('%Y') }}",
        "{% set now = strftime_now %}{{ now('%Y') }}",
        "{{ strftime_now('%' ~ 'Y') }}",
        "{% set format = '%Y' %}{{ strftime_now(format) }}",
        "{% macro today(f='%Y') %}{{ strftime_now(format=f) }}{% endmacro %}{{ today() }}",
    ],
)
def test_the_date_is_fixed_however_a_template_asks_for_it(call):
    tokenizer = with_template(call + CHATML_TURN, "<|im_start|> <|im_end|>", end="<|im_end|>")
    assert tokenizer.decode(prompt_ids(tokenizer, "x")).startswith("2024<|im_start|>")


def test_an_instruction_that_names_the_mark_of_thoughts_does_not_open_them():
    template = turns("<u>Q", "<b>A</s>", "<b>", "Use <think> first.")
    chat = Chat(with_template(template, "</s> <u> <b>", "<think> </think>", end="</s>"))
    assert chat.final_answer(CODE) == CODE and chat.final_answer(f"<think>{CODE}") == ""


@pytest.mark.parametrize("assistant", ["A [done]</s>", "A<|done|></s>", "A</s>\n[done]"])
def test_the_sampled_end_is_not_written_twice(assistant):
    tokenizer = with_template(turns("<u>Q", "<b>" + assistant, "<b>"), "</s> <u> <b> <|done|>", end="</s>")
    observed = observation_ids(tokenizer, "x", tokenizer.eos_token_id)
    assert tokenizer.decode(observed) == assistant.partition("</s>")[2] + "<u>x<b>"


def test_responses_end_at_special_tokens_only():
    for style in STYLES:
        tokenizer, end = styled(style)
        assert stop_ids(tokenizer) == {end}
    tokenizer, end = styled("toy")
    tokenizer.chat_template = PLAIN  # an empty line ends its turns, and stands within programs too
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        stop_ids(tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused_by_the_name_of_the_flag():
    tokenizer, _ = styled("toy")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--chat_template FILE"):
        prompt_ids(tokenizer, "x")


# ---- families of templates: their mechanisms, in our own words ---------------------------------------------


def turns(user: str, assistant: str, prompt: str = "", start: str = "") -> str:
    """A template from what is around a user's message Q and around a response A."""
    user, assistant = user.replace("Q", "{{ m.content }}"), assistant.replace("A", "{{ m.content }}")
    loop = "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + assistant
    return f"{start}{loop}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


LATER = "{{ m.content.split('</think>')[-1] }}"  # thoughts of earlier turns are dropped
CHATML_TURN = turns("<|im_start|>user\nQ<|im_end|>\n", "<|im_start|>bot\nA<|im_end|>\n", "<|im_start|>bot\n")
FAMILIES = {  # template, special tokens, other added tokens, ends of a response (first: the tokenizer's)
    "chatml": (CHATML_TURN, "<|im_start|> <|im_end|>", "", "<|im_end|>"),
    "chatml of a base model": (CHATML_TURN, "<|im_start|> <|im_end|> <|eot|>", "", "<|eot|> <|im_end|>"),
    "chatml, tokens not special": (CHATML_TURN, "</s>", "<|im_start|> <|im_end|>", "</s> <|im_end|>"),
    "header tokens (llama 3)": (
        turns("<|sh|>user<|eh|>\n\nQ<|eot|>", "<|sh|>ai<|eh|>\n\nA<|eot|>", "<|sh|>ai<|eh|>\n\n", "<|bot|>"),
        "<|bot|> <|sh|> <|eh|> <|eot|> <|eom|>",
        "",
        "<|eot|>",
    ),
    "blank before the end (llama 2)": (turns("<s>[INST] Q [/INST]", " A </s>"), "<s> </s>", "", "</s>"),
    "line break before the end (deepseek coder)": (
        turns("### Task:\nQ\n### Response:\n", "A\n<|EOT|>\n"),
        "",
        "<|EOT|>",
        "<|EOT|>",
    ),
    "blank before a token that is not special (code llama 70b)": (
        turns("Source: user\n\n Q <step> ", "Source: ai\n\n A <step> ", "Source: ai\n\n ", "<s>"),
        "<s> </s>",
        "<step>",
        "</s> <step>",
    ),
    "tokens around instructions (mistral)": (
        turns("[INST]Q[/INST]", "A</s>", "", "<s>"),
        "<s> </s> [INST] [/INST]",
        "",
        "</s>",
    ),
    "turn tokens (gemma)": (
        turns("<start>user\nQ<end>\n", "<start>model\nA<end>\n", "<start>model\n", "<bos>"),
        "<bos> <eos> <start> <end>",
        "",
        "<eos> <end>",
    ),
    "role tokens (phi 3)": (
        turns("<|user|>\nQ<|end|>\n", "<|assistant|>\nA<|end|>\n", "<|assistant|>\n"),
        "<|user|> <|assistant|> <|end|> <|endoftext|>",
        "",
        "<|endoftext|> <|end|>",
    ),
    "roles as text (zephyr)": (
        turns("<|user|>\nQ</s>\n", "<|assistant|>\nA</s>\n", "<|assistant|>\n"),
        "<s> </s>",
        "",
        "</s>",
    ),
    "words and an end (vicuna)": (turns("USER: Q ", "Bot: A</s>", "Bot:"), "</s>", "", "</s>"),
    "role and turn tokens (command r)": (
        turns("<turn><user>Q<over>", "<turn><bot>A<over>", "<turn><bot>", "<bos>"),
        "<bos> <turn> <user> <bot> <over>",
        "",
        "<over>",
    ),
    "the user's header ends the turn (glm 4)": (
        turns("<|user|>\nQ", "<|assistant|>\nA", "<|assistant|>\n", "[g]<sop>"),
        "[g] <sop> <|user|> <|assistant|> <|endoftext|>",
        "",
        "<|endoftext|> <|user|>",
    ),
    "reserved tokens as headers (baichuan)": (
        turns("<r1>Q", "<r2>A", "<r2>"),
        "<r1> <r2> </s>",
        "",
        "</s> <r1>",
    ),
    "role in tokens, end of text (granite)": (
        turns("<|r|>user<|/r|>Q<|end|>\n", "<|r|>assistant<|/r|>A<|end|>\n", "<|r|>assistant<|/r|>"),
        "<|r|> <|/r|> <|end|>",
        "",
        "<|end|>",
    ),
    "no end for the user (tulu)": (
        turns("<|user|>\nQ\n", "<|assistant|>\nA<eos>\n", "<|assistant|>\n"),
        "<eos>",
        "",
        "<eos>",
    ),
    "brackets (exaone)": (
        turns("[|user|]Q\n", "[|assistant|]A[|endofturn|]\n", "[|assistant|]"),
        "[|user|] [|assistant|] [|endofturn|]",
        "",
        "[|endofturn|]",
    ),
    "an instruction always first (internlm)": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_TURN,
        "<s> </s> <|im_start|> <|im_end|>",
        "",
        "</s> <|im_end|>",
    ),
    "thoughts may be switched (qwen 3)": (
        CHATML_TURN.replace("{{ m.content }}<|im_end|>\n{% endif", LATER + "<|im_end|>\n{% endif"),
        "<|im_start|> <|im_end|>",
        "<think> </think>",
        "<|im_end|>",
    ),
    "thoughts in brackets (magistral)": (
        turns("[INST]Q[/INST]", "A</s>", "", "<s>Think in [THINK] first."),
        "<s> </s> [INST] [/INST] [THINK] [/THINK]",
        "",
        "</s>",
    ),
    "thoughts of its own name (seed)": (
        turns("<b>user\nQ<e>", "<b>assistant\nA<e>", "<b>assistant\n", "Budget <seed:think>5</seed:think>"),
        "<b> <e> <seed:think> </seed:think>",
        "",
        "<e>",
    ),
}


def with_template(template: str, special: str, added: str = "", end: str | None = None, plain=None):
    tokenizer = plain or of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": special.split()})
    tokenizer.add_tokens(added.split())
    tokenizer.chat_template, tokenizer.eos_token = template, end
    return tokenizer


def family(name: str):
    template, special, added, ends = FAMILIES[name]
    return with_template(template, special, added, ends.split()[0]), ends.split()


USERS = ["Add.", "Wrong.\nInput: 1 2\n", "No valid code."]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dialog_of_three_turns_has_the_ids_of_its_familys_own_rendering(name):
    tokenizer, ends = family(name)
    chat = Chat(tokenizer)
    assert {*tokenizer.convert_ids_to_tokens(sorted(chat.ends))} == {*ends}
    tail = chat.behind_answer("x")
    blanks = tail[: len(tail) - len(tail.lstrip())]  # that the model writes in front of its end
    first = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A1"}]
    prompt = tokenizer.apply_chat_template(first[:1], tokenize=False, add_generation_prompt=True)
    lead = tokenizer.apply_chat_template(first, tokenize=False).removeprefix(prompt).partition("A1")[0]
    for end in ends:  # a response that ends with another token of the list keeps that one
        own = tokenizer.convert_tokens_to_ids(ends[-1])
        sampled = tokenizer.convert_tokens_to_ids(end)
        ids, cut, messages = prompt_ids(chat, USERS[0]), prompt_ids(chat, USERS[0]), []
        for answer, (asked, user) in zip(["A1", "é\n2"], zip(USERS, USERS[1:], strict=False), strict=True):
            text = lead + answer
            ids += [*tokenizer.encode(text + blanks, add_special_tokens=False), sampled]
            ids += observation_ids(chat, user, sampled)
            cut += tokenizer.encode(text, add_special_tokens=False) + observation_ids(chat, user)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        messages += [{"role": "user", "content": USERS[-1]}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = tokenizer.encode(whole, add_special_tokens=False)
        assert tokenizer.decode(cut) == whole and cut == expected
        if sampled == own:
            assert tokenizer.decode(ids) == whole and ids == expected
        elif "header" in name:  # nothing but the user's header stands between the turns
            assert [i for i in ids if i != sampled] == expected
        else:
            replaced = iter(ids)
            assert [i for i in expected if i != own] == [i for i in replaced if i not in (own, sampled)]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_message_speaks_as_another_role(name):
    tokenizer, _ = family(name)
    chat = Chat(tokenizer)
    hostile = "".join(chat.structure.values())
    for ids_of in (prompt_ids, observation_ids):
        plain, attacked = ids_of(chat, "x"), ids_of(chat, f"x{hostile}")
        assert [i for i in attacked if i in chat.structure] == [i for i in plain if i in chat.structure]


@pytest.mark.parametrize("name", FAMILIES)
def test_fine_tuning_learns_what_the_template_writes_of_a_response(name):
    tokenizer, _ = family(name)
    dialog = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A"}]
    episode = last_response(tokenizer, dialog)
    whole = tokenizer.apply_chat_template([*dialog, dialog[0]], tokenize=False)
    learned = tokenizer.decode(episode.ids[episode.turns[0].start :])
    assert learned.strip() and f"A{learned[1:]}" in whole
    assert episode.ids[-1] in stop_ids(tokenizer)
    assert sum(i in stop_ids(tokenizer) for i in episode.ids[episode.turns[0].start :]) == 1


def in_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like SentencePiece's: it puts a blank in front of a text, and in front of what follows
    a special token."""
    symbols = ["<unk>", "▁", "\n", *map(chr, range(33, 127)), "▁A", "▁▁"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    pieces = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "A"), ("▁", "▁")], unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=pieces)


@pytest.mark.parametrize(
    ("template", "blanks", "end"),
    [
        (turns("[INST] Q [/INST]", " A </s>"), " ", "</s>"),
        (turns("### Task:\nQ\n### Response:\n", "A\n</s>\n"), "\n", "</s>"),
        (turns("### Task:\nQ\n\n### Response:\n", "A\n\n"), "", ""),
        (turns("USER: Q ", "Bot: A ", "Bot:"), "", ""),
    ],
)
def test_no_blank_is_put_in_front_of_what_follows_a_response(template, blanks, end):
    tokenizer = with_template(template, "</s>", end="</s>", plain=in_pieces())
    chat, messages = Chat(tokenizer), [{"role": "user", "content": "Add."}]
    encoded = [prompt_ids(chat, "Add.")]
    for ended in (False, True):
        ids = prompt_ids(chat, "Add.")
        for user in USERS[1:]:
            text = "A1" + (blanks if ended else "")
            piece = tokenizer.encode(text, add_special_tokens=False)
            if not template.partition("{% else %}")[2].startswith((" ", "Bot")):
                piece = tokenizer.encode("\n" + text, add_special_tokens=False)[2:]
            ids += piece + (tokenizer.encode(end, add_special_tokens=False)[-1:] if ended and end else [])
            sampled = tokenizer.convert_tokens_to_ids(end) if ended and end else None
            ids += observation_ids(chat, user, sampled)
        encoded.append(ids)
    for user in USERS[1:]:
        messages += [{"role": "assistant", "content": "A1"}, {"role": "user", "content": user}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.encode(whole, add_special_tokens=False)
    assert encoded[1] == expected and encoded[2] == expected


QWEN = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
THINKERS = {  # template, special tokens, other added tokens, end
    "in the prompt (r1)": (
        turns("<user>Q", "<bot>" + LATER + "<eos>", "<bot><think>\n", "<bos>"),
        "<bos> <eos>",
        "<user> <bot> <think> </think>",
        "<eos>",
    ),
    "sampled (qwen 3)": (
        turns(
            "<|im_start|>user\nQ<|im_end|>\n",
            f"<|im_start|>bot\n{LATER}<|im_end|>\n",
            "<|im_start|>bot\n" + QWEN,
        ),
        "<|im_start|> <|im_end|>",
        "<think> </think>",
        "<|im_end|>",
    ),
    "special (magistral)": (
        turns("[INST]Q[/INST]", "A</s>"),
        "</s> [INST] [/INST] [THINK] [/THINK]",
        "",
        "</s>",
    ),
    "as text": (turns("USER: Q ", "Bot: A</s>", "Bot:"), "</s>", "", "</s>"),
    "channels (gpt-oss)": (
        turns(
            "<|start|>user<|message|>Q<|end|>",
            "<|start|>assistant<|channel|>final<|message|>A<|end|>",
            "<|start|>assistant",
            "<|start|>system<|message|>Today is {{ strftime_now('%Y-%m-%d') }}. Use channels.<|end|>",
        ),
        "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
        "",
        "<|return|>",
    ),
}
CODE = "```python\nx = 1\n```"


@pytest.mark.parametrize(
    ("name", "options", "response", "answer"),
    [
        ("in the prompt (r1)", "", f"{CODE} will do", ""),
        ("in the prompt (r1)", "", f"{CODE}</think>No code.", "No code."),
        ("in the prompt (r1)", "", f"a</think>b</think>{CODE}", CODE),
        ("in the prompt (r1)", "", f"a</think>{CODE}<think>", ""),
        ("sampled (qwen 3)", "", CODE, CODE),
        ("sampled (qwen 3)", "", f"<think>{CODE}", ""),
        ("sampled (qwen 3)", "", f"<think>a</think>\n\n{CODE}", "\n\n" + CODE),
        ("sampled (qwen 3)", '{"enable_thinking": false}', CODE, CODE),
        ("special (magistral)", "", f"[THINK]{CODE}", ""),
        ("special (magistral)", "", f"[THINK]a[/THINK]{CODE}", CODE),
        ("as text", "", f"<think>a</think>{CODE}", CODE),
        ("as text", "", f"<seed:think>{CODE}", ""),
        ("channels (gpt-oss)", "", f"<|channel|>analysis<|message|>{CODE}<|end|>", ""),
        ("channels (gpt-oss)", "", CODE, ""),
        (
            "channels (gpt-oss)",
            "",
            f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>{CODE}",
            CODE,
        ),
    ],
)
def test_code_is_read_behind_the_last_thought_only(name, options, response, answer):
    tokenizer = with_template(*THINKERS[name])
    chat, end = Chat(tokenizer, options), tokenizer.eos_token
    text = chat.text(tokenizer.encode(response + end, add_special_tokens=False))
    assert chat.final_answer(text) == answer
    assert end not in text


@pytest.mark.parametrize("name", THINKERS)
def test_thoughts_of_earlier_turns_stay_in_the_dialog(name):
    tokenizer = with_template(*THINKERS[name])
    chat = Chat(tokenizer)
    thought = {"in the prompt (r1)": "a</think>", "special (magistral)": "[THINK]a[/THINK]"}.get(
        name, "<think>a</think>"
    )
    if name == "channels (gpt-oss)":
        thought = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>"
    ids, expected = prompt_ids(chat, USERS[0]), [{"role": "user", "content": USERS[0]}]
    for user in USERS[1:]:
        ids += tokenizer.encode(f"{thought}A1{tokenizer.eos_token}", add_special_tokens=False)
        ids += observation_ids(chat, user, tokenizer.eos_token_id)
        expected += [{"role": "assistant", "content": "A1"}, {"role": "user", "content": user}]
    ours, own = tokenizer.decode(ids), chat.render(expected)
    assert ours.count(thought) == 2
    if chat.channels:  # the template writes another end, and no analysis
        final = thought.rpartition("<|start|>assistant")[2]
        assert ours.replace(thought, final).replace("<|return|>", "<|end|>") == own
    else:
        start = "<think>\n" if chat.opened else ""  # of the prompts of the turns before
        lead = " " if name == "as text" else ""
        without = ours.replace(start + thought, lead)
        assert without == own


def test_channels_end_at_the_response_not_at_a_channel():
    tokenizer = with_template(*THINKERS["channels (gpt-oss)"])
    assert tokenizer.convert_ids_to_tokens([*stop_ids(tokenizer)]) == ["<|return|>"]
    assert "Today is 2024-07-26." in tokenizer.decode(prompt_ids(tokenizer, "x"))


def test_options_reach_the_template_and_must_be_an_object():
    tokenizer = with_template(*THINKERS["sampled (qwen 3)"])
    prompt = tokenizer.decode(prompt_ids(Chat(tokenizer, '{"enable_thinking": false}'), "x"))
    assert prompt.endswith("bot\n<think>\n\n</think>\n\n")
    for wrong in ("[1]", "enable_thinking", "3"):
        with pytest.raises(ValueError, match="template_options .* must be a JSON object"):
            Chat(tokenizer, wrong)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in %}", "cannot render"),
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
        ("{% for m in messages %}{{ m.name.first }}{% endfor %}", "cannot render"),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}",
            "one turn only",
        ),
        (turns("<s>Q", "") + "</s>", "drops or repeats"),
        (turns("Q", "AA</s>"), "drops or repeats"),
        (turns("", "A</s>"), "drops or repeats"),
        ("{{ strftime_now(format) }}" + turns("Q", "A</s>"), "cannot render"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_name(tmp_path, template, told):
    tokenizer = with_template(template, "<s> </s>", end="</s>")
    tokenizer.save_pretrained(tmp_path / "tried")
    (tmp_path / "tried" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=told) as refused:
        Chat(load_tokenizer(str(tmp_path / "tried")))
    assert f"the chat template of {tmp_path}/tried" in str(refused.value) and "\n" not in str(refused.value)


def test_all_ends_of_the_generation_config_stop_and_the_export_keeps_them(tmp_path, model):
    tokenizer = toy.build_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"eos_token_id": [5, 7], "temperature": 0.6, "do_sample": True}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(str(tmp_path / "base"))
    assert stop_ids(loaded) == {5, 7, tokenizer.eos_token_id}
    export(load_model(str(tmp_path / "base")), loaded, tmp_path / "out", "float32")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.items() <= kept.items()
    assert stop_ids(load_tokenizer(str(tmp_path / "out"))) == {5, 7, tokenizer.eos_token_id}


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    config = {"model_type": "new", "auto_map": {"AutoConfig": "new.New", "AutoTokenizer": ["new.T", None]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": config["auto_map"]}))
    (tmp_path / "new.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"{tmp_path}"):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()
