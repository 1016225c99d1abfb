"""docs/gguf.md converts a model whose weights are GGUF. That needs two optional packages."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model

from distributed import find_model, load_model, load_tokenizer
from toy import CHAT_TEMPLATE

TENSORS = {  # of a layer, by their names in a GGUF of the llama family
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order of rotary pairs."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model) -> None:
    import gguf

    config, state = model.config, {name: t.numpy() for name, t in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = [chr(ord("A") + number) for number in range(config.vocab_size - 2)] + ["AB", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 1) + [3])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(len(words) - 1)
    writer.add_chat_template(CHAT_TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in TENSORS.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            weight = interleaved(weight, heads[theirs]) if theirs in heads else weight
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_script_of_the_page_gives_the_logits_of_the_model_and_its_chat_template(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model, page = make_model(64), Path(__file__).parent.parent / "docs" / "gguf.md"
    write_gguf(tmp_path / "tiny.gguf", model)
    (script,) = re.findall("```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.setattr(
        sys, "argv", ["to_safetensors.py", str(tmp_path / "tiny.gguf"), str(tmp_path / "made")]
    )
    exec(script)
    loaded = load_model(str(tmp_path / "made"))
    ids = torch.randint(0, 64, (2, 9))  # (B, T)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert load_tokenizer(str(tmp_path / "made")).chat_template == CHAT_TEMPLATE


def test_a_directory_with_gguf_alone_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(
        ValueError, match="no weights .* only tiny.gguf: docs/gguf.md says how it is converted"
    ):
        find_model(str(tmp_path))
