"""Chat templates: what a rollout appends is what the template would render of the whole dialog."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import toy
from chat import observation_ids, prompt_ids, stop_ids

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


def styled(style: str):
    """A tokenizer of bytes with a template, and the id that ends a turn.

    The toy's own has a token for "\\n```", which would swallow a header's line break: no round trip.
    """
    template, specials, begin, end = STYLES[style]
    tokenizer = toy.build_tokenizer()
    if style != "toy":
        vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        plain.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
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
