"""Tiny models of many architectures: equal logits in the model, in training and in sampling, or a refusal."""

import inspect
import runpy
import sys

import pytest
import torch
from conftest import make_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from config import parse_config
from distributed import load_model, process_group
from ppo import collate, response_logprobs
from rollout import Episode, Turn
from sampling import RaggedCache, check_architecture, check_logits, decode, prefill
from tools import plan
from value_head import ValueModel, layers_of

WINDOW = 16
WANTED = (  # a value, and the names under which architectures may know it
    (128, "vocab_size vocab_size_per_layer_input"),
    (64, "d_model hidden_size intermediate_size_mlp lru_width n_embd word_embed_proj_dim"),
    (96, "decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size intermediate_size n_inner"),
    (
        4,
        "decoder_attention_heads encoder_attention_heads linear_num_value_heads mamba_n_heads "
        "mamba_num_heads moe_num_experts n_head n_heads n_layer n_layers n_routed_experts "
        "num_attention_heads num_experts num_hidden_layers num_layers num_local_experts",
    ),
    (
        2,
        "altup_num_inputs decoder_layers encoder_layers index_n_heads linear_num_key_heads "
        "max_window_layers moe_k moe_top_k moe_topk num_experts_per_tok num_global_key_value_heads "
        "num_key_value_heads num_kv_heads num_mem_blocks num_query_groups sliding_window_pattern",
    ),
    (
        16,
        "attention_chunk_size attention_window_size attn_window block_size chunk_size global_head_dim "
        "head_dim hidden_size_per_layer_input index_head_dim kv_lora_rank linear_key_head_dim "
        "linear_value_head_dim local_attention mamba_chunk_size mamba_d_state qk_head_dim sliding_window "
        "sliding_window_size ssm_state_size state_size v_head_dim window_size",
    ),
    (256, "max_position_embeddings max_seq_len n_ctx n_positions"),
    (True, "use_sliding_window"),
    (
        32,
        "dim_model_base expert_ffn_hidden_size mamba_d_head mamba_head_dim moe_intermediate_size "
        "q_lora_rank shared_expert_intermediate_size shared_intermediate_size",
    ),
    (
        1,
        "decoder_sparse_step first_k_dense_replace mamba_n_groups moe_num_shared_experts n_group "
        "n_shared_experts num_shared_experts topk_group zero_expert_num",
    ),
    (8, "index_topk laurel_rank qk_nope_head_dim qk_rope_head_dim rotary_dim"),
    (0.2, "init_std initializer_range"),
    (1.0, "initializer_factor"),
    (None, "activation_sparsity_pattern bos_token_id eos_token_id pad_token_id"),
    (4.0, "logits_scaling"),
    (0.25, "logit_scale"),
    (2.0, "embedding_multiplier final_logit_softcapping"),
    (False, "tie_word_embeddings"),
    (0.5, "residual_multiplier"),
    (0.3, "lm_head_multiplier"),
    (
        0.1,
        "activation_dropout attention_dropout attn_pdrop dropout embd_pdrop hidden_dropout layerdrop "
        "resid_pdrop router_jitter_noise",
    ),
)
COMMON = {name: value for value, names in WANTED for name in names.split()}
BY_TURNS = ["sliding_attention", "full_attention"] * 2
SPECIAL = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": BY_TURNS,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
        "intermediate_size": [96, 96, 96, 96],
    },
    "gpt_oss": {"layer_types": BY_TURNS},
    "llama4_text": {
        "intermediate_size": 32,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0, 1, 0],
        "attn_temperature_tuning": True,
        "interleave_moe_layer_step": 1,
    },
    "ministral": {"layer_types": BY_TURNS},
    "persimmon": {"num_key_value_heads": 4},
    "olmo3": {"layer_types": BY_TURNS},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4},
    **dict.fromkeys(
        "deepseek_v3 minicpm3 glm4_moe_lite axk1 longcat_flash sarvam_mla youtu".split(),
        {"head_dim": 8, "num_key_value_heads": 4},
    ),
    "diffllama": {"attention_dropout": 0.0},
    "cwm": {"bos_token_id": 1, "pad_token_id": None, "eos_token_id": 2, "layer_types": BY_TURNS},
    "gemma3_text": {"layer_types": BY_TURNS},
    "gemma2": {"layer_types": BY_TURNS},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "mamba2": {"num_heads": 4, "head_dim": 32, "hidden_size": 64, "expand": 2, "n_groups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "xglm": {"attention_heads": 4},
    "exaone4": {"layer_types": BY_TURNS},
}
EQUAL = """
llama mistral ministral mixtral qwen2 qwen2_moe qwen3 qwen3_moe phi phi3 phimoe gemma gemma2 gemma3_text
gemma3n_text cohere cohere2 granite granitemoe gpt_oss olmo olmo2 olmo3 olmoe starcoder2 stablelm falcon gpt2
gpt_neox gpt_bigcode gptj bloom mpt opt xglm biogpt persimmon nemotron exaone4 smollm3 helium glm glm4
deepseek_v2 deepseek_v3 minicpm3 llama4_text arcee seed_oss hunyuan_v1_dense ernie4_5 diffllama nanochat cwm
gemma4_text ministral3 glm4_moe glm4_moe_lite minimax_m2 apertus
qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid lfm2 granitemoehybrid bamba falcon_h1 mamba2 lfm2_moe
""".split()
REFUSED = {
    "layers of type .*, whose cache is not known here": ["deepseek_v32", "deepseek_v4"],
    "not supported: .* (differ by|fails with)": "gpt_neo rwkv openai-gpt jamba mamba recurrent_gemma".split(),
}


def tiny(name: str) -> torch.nn.Module:
    kind = CONFIG_MAPPING[name]
    renamed = getattr(kind, "attribute_map", {})
    known = {*kind().to_dict(), *renamed, *inspect.signature(kind.__init__).parameters}
    given = {key: value for key, value in COMMON.items() if key in known} | SPECIAL.get(name, {})
    given = {key: v for key, v in given.items() if v is not None or key.endswith("token_id")}
    if getattr(kind(), "final_logit_softcapping", None) is None:
        given.pop("final_logit_softcapping", None)
    for old, new in renamed.items():
        if old in given and new in given:
            del given[old]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**given)).eval()
    assert sum(p.numel() for p in model.parameters()) < 12e6
    for parameter_name, parameter in model.named_parameters():  # zeros hide what biases and sinks do
        if (
            parameter.ndim == 1
            and parameter.std() < 1e-6
            and ("bias" in parameter_name or "sink" in parameter_name)
        ):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_composite() -> torch.nn.Module:
    """A Gemma 3 that reads images too; its checkpoints have other names than its parameters."""
    text = tiny("gemma3_text").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config).eval()


def own_logits(model, dialogs: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([dialog]), use_cache=False).logits[0] for dialog in dialogs]  # (T, V) each


@pytest.mark.parametrize("few_sizes", [False, True])
@pytest.mark.parametrize("name", EQUAL)
@torch.no_grad()
def test_logits_of_training_and_sampling_are_the_model_s_own(name, few_sizes):
    model, draw = tiny(name), torch.Generator().manual_seed(1)
    check_architecture(model.config, 200)
    check_logits(model, 128, 200)
    dialogs = [torch.randint(5, 128, (n,), generator=draw).tolist() for n in (111, 90, 60)]
    own = own_logits(model, dialogs)
    episodes = [Episode(None, d, [Turn(5, len(d), [])], False, False, False, 0) for d in dialogs]
    got, _ = response_logprobs(model, collate(episodes, torch.device("cpu")), 1.0, chunk=37)  # (R,)
    expected = [
        o.log_softmax(-1)[4 : len(d) - 1].gather(1, torch.tensor(d[5:])[:, None])
        for o, d in zip(own, dialogs, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(expected)[:, 0], atol=1e-4, rtol=1e-4)
    cache, seats = RaggedCache(111), [0, 1]
    cache.lengths, cache.few_sizes = [0, 0], few_sizes  # as with CUDA graphs

    def add(rows: slice, counts: list[int]) -> None:
        parts = zip(seats[rows], cache.lengths[rows], counts, strict=True)
        prefill(model, cache, rows, [dialogs[d][start : start + n] for d, start, n in parts])

    def step() -> None:
        logits = decode(model, cache, [dialogs[d][n] for d, n in zip(seats, cache.lengths, strict=True)])
        for d, length, row in zip(seats, cache.lengths, logits, strict=True):
            torch.testing.assert_close(row, own[d][length - 1], atol=1e-4, rtol=1e-4)

    add(slice(0, 2), [29, 10])
    for _ in range(9):
        step()
    seats = [1, 0, 2]
    cache.rearrange([1, 0, None])
    add(slice(1, 2), [39])
    add(slice(2, 3), [6])
    for _ in range(5):
        step()
    add(slice(0, 3), [8, 21, 0])
    for _ in range(2):
        step()


@pytest.mark.parametrize("name", ["llama", "lfm2", "qwen3_5_text", "falcon_h1"])
@torch.no_grad()
def test_a_row_that_waits_stays_as_it_is_while_others_decode(name):
    model, cache = tiny(name), RaggedCache(100)
    ids = torch.randint(5, 128, (4, 30), generator=torch.Generator().manual_seed(2))  # (4, 30)
    cache.lengths, cache.few_sizes = [0] * 4, True  # as with CUDA graphs: three rows run as four
    prefill(model, cache, slice(0, 4), ids[:, :20].tolist())
    for column in range(20, 29):
        decode(model, cache, ids[:3, column].tolist())
    cache.rearrange([3])
    logits = decode(model, cache, [ids[3, 20].item()])  # (1, V)
    torch.testing.assert_close(logits[0], own_logits(model, [ids[3].tolist()])[0][20], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EQUAL)
def test_a_plan_knows_the_numbers_that_the_cache_keeps(name):
    model, cache = tiny(name), RaggedCache(200)
    cache.lengths = [0]
    prefill(model, cache, slice(0, 1), [[5, 6, 7]])
    kept = sum(part.shape[1] * part.shape[3] for layer in cache.stores.values() for part in layer)
    assert plan.key_value_numbers(model.config) == kept


@pytest.mark.parametrize("name", EQUAL)
def test_a_plan_can_be_made_for_it(name, tmp_path):
    tiny(name).config.save_pretrained(tmp_path)
    config = parse_config(["--model", str(tmp_path), "--plan", "--context", "200", "--max_new_tokens", "20"])
    text, fits = plan.report(config, 2, plan.GIB)
    assert fits, text


def test_a_plan_refuses_a_model_that_cannot_be_sampled(tmp_path):
    tiny("deepseek_v32").config.save_pretrained(tmp_path)
    config = parse_config(["--model", str(tmp_path), "--plan", "--context", "200", "--max_new_tokens", "20"])
    with pytest.raises(
        ValueError, match="deepseek_v32 has layers of type indexed_attention, whose cache is not known here"
    ):
        plan.report(config, 2, plan.GIB)


def test_a_plan_refuses_a_model_that_training_cannot_load(tmp_path):
    CONFIG_MAPPING["mistral3"]().save_pretrained(tmp_path)
    config = parse_config(["--model", str(tmp_path), "--plan"])
    with pytest.raises(ValueError, match="Unrecognized configuration class .*Mistral3Config"):
        plan.report(config, 2, plan.GIB)


def test_the_rows_of_an_evaluation_follow_from_free_memory(monkeypatch):
    model, pages = make_model(128), {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.get)
    # By hand: 2 layers with 2 heads of 8 keys and values in fp32, and six distributions over 128 tokens.
    row = 200 * 2 * 2 * 2 * 8 * 4 + 6 * 128 * 4
    assert plan.rows_that_fit(model, 200, 256) == int(0.9 * 4096000 // row) < 256
    assert plan.rows_that_fit(model, 200, 3) == 3
    with pytest.raises(ValueError, match="a dialog of context 20000000 needs .* GiB and 0.0 are free"):
        plan.rows_that_fit(model, 20_000_000, 3)


@pytest.mark.parametrize(("sentence", "name"), [(s, name) for s, names in REFUSED.items() for name in names])
def test_a_model_that_cannot_be_sampled_is_refused_in_one_sentence(sentence, name):
    model = tiny(name)
    with pytest.raises(ValueError, match=sentence) as refused:
        check_architecture(model.config, 200)
        check_logits(model, 128, 200)
    assert "\n" not in str(refused.value)


def test_the_probe_is_longer_than_a_window_of_any_name():
    sizes = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "initializer_range": 0.2}
    kinds = [[["global", "local"], 1]]
    config = GPTNeoConfig(vocab_size=128, attention_types=kinds, window_size=128, **sizes)
    with pytest.raises(ValueError, match="sampling with a cache gives log-probs that differ"):
        check_logits(GPTNeoForCausalLM(config).eval(), 128, 200)


def test_a_model_that_cannot_compute_its_own_logits_is_refused():
    model = make_model(128)
    model.model.norm.forward = lambda hidden: hidden + None
    assert "not supported: its own forward fails with TypeError" in refused(model, 200)


def refused(model, context: int, tokenizer_size: int = 128) -> str:
    with pytest.raises(ValueError) as error:
        check_architecture(model.config, context)
        check_logits(model, tokenizer_size, context)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_a_context_in_which_keys_would_change_is_refused_and_a_shorter_one_works(rope):
    long = rope["rope_type"] == "longrope"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=128,
        rope_parameters=rope | {"rope_theta": 1e4},
        max_position_embeddings=640 if long else 64,
        **sizes,
    )
    model = LlamaForCausalLM(config).eval()
    check_architecture(config, 64)
    check_logits(model, 128, 64)
    assert f"context 65 is more than 64, the length from which on its {rope['rope_type']}" in refused(
        model, 65
    )


def test_what_a_model_has_no_room_for_is_refused():
    assert "context 257 is more than 256, the number of positions" in refused(tiny("gpt2"), 257)
    assert "the tokenizer has 129 tokens, but llama's embedding only 128" in refused(
        make_model(128), 200, 129
    )
    model = make_model(128)
    model.config._attn_implementation = "flash_attention_2"
    assert "sampling needs --attention sdpa or eager, not flash_attention_2" in refused(model, 200)


def test_an_attention_that_cannot_be_sampled_with_is_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="needs --attention sdpa or eager, not flash_attention_2"):
        parse_config(["--model", "any", "--plan", "--attention", "flash_attention_2"])


def test_rollout_py_samples_within_the_positions_of_a_model(tmp_path, tokenizer, monkeypatch, capsys):
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 400, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rollout.py", str(tmp_path)])
    runpy.run_module("rollout", run_name="__main__")
    assert "; not solved]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["phimoe", "mixtral", "opt", "gpt2"])
def test_two_passes_are_equal_with_gradient_checkpointing_wherever_randomness_is_set(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), gradient_checkpointing=True)
    episode = Episode(None, list(range(40)), [Turn(5, 40, [])], False, False, False, 0)
    first, second = (
        response_logprobs(model, collate([episode], torch.device("cpu")), 1.0)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    first.sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in layers_of(model)[0].parameters())


def test_logits_of_a_bf16_model_are_computed_in_fp32_with_the_layer_s_own_gradient(tmp_path):
    make_model(128).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="bfloat16")
    hidden = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    layer = model.get_output_embeddings()
    logits = layer(hidden)  # (3, 5, V)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ layer.weight.float().T)
    logits.square().sum().backward()
    ours = hidden.grad.clone(), layer.weight.grad.clone()
    hidden.grad = layer.weight.grad = None
    (torch.nn.functional.linear(hidden, layer.weight) * logits.detach().bfloat16() * 2).sum().backward()
    for got, expected in zip(ours, (hidden.grad, layer.weight.grad), strict=True):
        torch.testing.assert_close(got, expected, atol=0.2, rtol=0.03)


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        "gemma3n_text",
        "gemma4_text",
        "opt",
        "llama4_text",
        "gemma3",
        "lfm2",
        "qwen3_5_text",
        "falcon_h1",
    ],
)
def test_a_sharded_model_has_the_logits_of_the_whole_one(name, tmp_path):
    model = tiny_composite() if name == "gemma3" else tiny(name)
    for buffer_name, buffer in model.named_buffers():
        if "layer_scalar" in buffer_name:  # Gemma 4's checkpoints store it
            buffer.fill_(0.5)
    model.save_pretrained(tmp_path)
    ids = torch.randint(5, 128, (1, 40), generator=torch.Generator().manual_seed(0))  # (1, T)
    with process_group("cpu", unsharded=False), torch.no_grad():
        sharded = load_model(str(tmp_path))
        torch.testing.assert_close(sharded(ids).logits, model(ids).logits)


def test_a_critic_begins_with_the_same_head_whether_it_is_sharded_or_not(tmp_path):
    tiny("qwen3_5_text").save_pretrained(tmp_path)

    def head() -> torch.Tensor:
        torch.manual_seed(0)
        load_model(str(tmp_path))  # the policy: where it is sharded, this draws random numbers
        return load_model(str(tmp_path), wrap=ValueModel).head.weight

    whole = head()  # (1, D)
    with process_group("cpu", unsharded=False):
        assert torch.equal(whole, head().full_tensor())
