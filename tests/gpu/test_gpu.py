"""What only a GPU can show: logits in fp32, CUDA graphs, bf16 sampling against training at 1B, the plan."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import toy
from config import Config
from sampling import RaggedCache, decode, prefill
from tools import plan
from train import train
from value_head import use_float32_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, none is here")
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SHAPE |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Config, dict, float]:
    """One iteration of a random Llama of 1B's shape: its settings, its metrics, the peak of its memory."""
    place, tokenizer = tmp_path_factory.mktemp("gpu"), toy.build_tokenizer()
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = Config(
        model=str(place / "base"),
        output=str(place / "run"),
        device="cuda",
        dtype="bfloat16",
        gradient_checkpointing=True,
        iterations=1,
        batch_episodes=32,
        minibatch_episodes=32,
        batch_rows=32,
        max_new_tokens=128,
        context=1024,
        microbatch_tokens=8192,
        logits_chunk=1024,
        valid_split="",
        test_split="",
        limit_problems=32,
    )
    train(config)
    metrics = json.loads((place / "run" / "metrics.jsonl").read_text())
    return config, metrics, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("shape", [(300, 4096), (2, 5, 4096)])
def test_logits_in_fp32_are_those_of_fp32_weights_with_the_gradient_of_the_bf16_layer(shape):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"hidden_size": 4096, "num_hidden_layers": 0}))
    layer = model.get_output_embeddings().to(torch.bfloat16)
    hidden = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # (..., D)
    expected = F.linear(hidden.float(), layer.weight.float()).detach()  # (..., V)
    loss_gradient = torch.randn_like(expected)  # (..., V)
    layer(hidden).backward(loss_gradient.bfloat16())
    plain = hidden.grad, layer.weight.grad
    hidden.grad = layer.weight.grad = None
    use_float32_logits(model)
    logits = layer(hidden)  # (..., V)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits.backward(loss_gradient)
    for ours, theirs in zip((hidden.grad, layer.weight.grad), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def decoded(model, graphs: bool) -> tuple[RaggedCache, torch.Tensor]:
    """The cache, and the logits (12, 3, V) of steps of three of its five rows."""
    cache = RaggedCache(600)
    cache.lengths, cache.graphs = [0] * 5, {} if graphs else None
    prefill(model, cache, slice(0, 5), [[*range(length)] for length in (20, 31, 250, 256, 4)])
    logits = [decode(model, cache, [step, 5, 7]) for step in range(6)]  # (3, V) each
    cache.rearrange([3, 0, 4, 1, 2])
    return cache, torch.stack(logits + [decode(model, cache, [step, 5, 7]) for step in range(6)])


def test_steps_in_cuda_graphs_have_the_logits_of_steps_without():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 2})).eval()
    (cache, logits), (_, expected) = decoded(model, True), decoded(model, False)
    assert [*cache.graphs] == [(4, 256), (4, 512)]
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_a_model_that_waits_for_the_device_is_sampled_without_graphs():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 2})).eval()
    model.model.norm.register_forward_hook(
        lambda module, given, hidden: hidden * hidden.isfinite().all().item()
    )
    (cache, logits), (_, expected) = decoded(model, True), decoded(model, False)
    assert cache.graphs is None
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_bf16_log_probs_of_sampling_and_training_agree(run):
    _, metrics, _ = run
    print({name: metrics[name] for name in ("behaviour_ratio", "behaviour_gap", "first_ratio_worst")})
    assert metrics["behaviour_ratio"] == pytest.approx(1, abs=0.01)
    assert metrics["first_ratio_worst"] < 0.05


def test_an_iteration_of_a_1b_shape_updates_the_policy(run):
    _, metrics, _ = run
    assert metrics["policy_gradient"] > 0 and metrics["value_gradient"] > 0


def test_peak_memory_is_what_the_plan_says(run):
    config, _, peak = run
    planned = plan.total(plan.memory(config, ranks=1))
    print(f"peak {peak / plan.GIB:.2f} GiB, planned {planned / plan.GIB:.2f} GiB")
    assert peak == pytest.approx(planned, rel=0.1)
