"""What gpu.py measures: an iteration in bf16, decoding in four ways, an update at 8B's width.

Each measurement takes the sizes, works on the device of `sizes.config`, and returns what it found by name.
"""

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

# In front of this file's own directory, which has a sandbox.py too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from distributed import process_group  # noqa: E402
from episodes import for_sampling  # noqa: E402
from rollout import PREFILL_TOKENS, Episode, Turn, rollout  # noqa: E402
from sampling import RaggedCache, decode, prefill, sample_tokens  # noqa: E402
from sandbox import Sandbox  # noqa: E402
from tools import plan  # noqa: E402
from train import draw_minibatches, load_networks, prepare, update  # noqa: E402
from value_head import ValueModel, layers_of, use_float32_logits  # noqa: E402

# bf16 operations a second without sparsity, from the data sheets of the SXM cards.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
LOGIT_SCALE = 3.0  # random logits deviate by about 1; those of a trained model by a few times as much
WARM_UP = 8  # decoding steps before the clock starts


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    shapes: dict[str, LlamaConfig]  # "1b" and "8b"
    rows: tuple[int, ...]  # that decode together
    contexts: tuple[int, ...]  # that they have at the end
    steps: int  # that are timed
    blocks: int | None  # of generate_batch's cache; None: what it chooses
    config: Config  # of an iteration; its learning rate does not matter


ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
ONE_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
BATCH = {"batch_episodes": 32, "minibatch_episodes": 32, "batch_rows": 32, "max_new_tokens": 128}
MEMORY = {"gradient_checkpointing": True, "context": 4096, "microbatch_tokens": 16384, "logits_chunk": 1024}
LARGE = Sizes(
    shapes={"1b": LlamaConfig(**ONE_B), "8b": plan.model_shape(PRESETS["8b"]["model"])},
    rows=(8, 32, 128),
    contexts=(1024, 4096),
    steps=64,
    blocks=None,
    config=Config(device="cuda", dtype="bfloat16", **BATCH, **MEMORY),
)
TWO = {"batch_episodes": 2, "minibatch_episodes": 2, "max_new_tokens": 4}
SMALL = Sizes(
    shapes={"1b": LlamaConfig(**TINY, tie_word_embeddings=True), "8b": LlamaConfig(**TINY)},
    rows=(2, 3),
    contexts=(64,),
    steps=4,
    blocks=8,
    config=replace(LARGE.config, device="cpu", context=512, microbatch_tokens=512, **TWO),
)


# ---- what several parts need -------------------------------------------------------------------------------


def clock() -> float:
    """Seconds, when everything that was started on the GPU has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build(shape: LlamaConfig, device: str):
    """A model of this shape with random weights in bf16 and, as `load_model` has it, logits in fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    model.get_output_embeddings().weight.data *= LOGIT_SCALE
    use_float32_logits(model)
    return model


def with_layers(shape: LlamaConfig, layers: int) -> LlamaConfig:
    """The same shape with fewer layers."""
    return LlamaConfig.from_dict(shape.to_dict() | {"num_hidden_layers": layers})


def card_memory(device: str) -> float:
    """Bytes of the GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device == "cuda" else 1 << 40


def draw_ids(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(vocabulary, size=(rows, length)).tolist()


# ---- correctness -------------------------------------------------------------------------------------------


def compare_logprobs(sizes: Sizes, name: str) -> dict:
    """One iteration in bf16. Nothing is learned: with AdamW an 8B model needs more than one GPU."""
    config, shape = sizes.config, sizes.shapes[name]
    policy = build(shape, config.device)
    critic = ValueModel(build(with_layers(shape, 2), config.device)).to(config.device)
    for layer in layers_of(policy):  # as `load_model` does
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    optimisers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (policy, critic)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 1.0) for optimiser in optimisers]
    problems, tokenizer = toy.problems("train")[: config.batch_episodes], toy.build_tokenizer()
    with Sandbox() as sandbox:
        began = clock()
        episodes = rollout(policy, tokenizer, problems, sandbox, config.sampling(), seed=0)
        seconds = clock() - began
    minibatches = draw_minibatches(episodes, 0, config)
    (microbatches,), prepared = prepare(policy, policy, critic, minibatches, config)
    updated = update(policy, critic, optimisers, schedules, microbatches, config)
    gaps = torch.cat([m.old_logprobs - m.behaviour_logprobs for m in microbatches])  # (R,)
    return {
        "first ratio - 1, worst": updated["ratio_worst"],
        "behaviour gap, mean": gaps.abs().mean().item(),
        "largest": prepared["behaviour_gap"],
        "ratio outside 0.8 to 1.2": ((gaps.exp() - 1).abs() > 0.2).float().mean().item(),
        "entropy": prepared["entropy"],
        "gradient": updated["policy_gradient"],
        "sampled tokens": len(gaps),
        "sampled tokens/s": len(gaps) / seconds,
    }


# ---- decoding ----------------------------------------------------------------------------------------------


def prefilled(model, rows: int, context: int, length: int) -> tuple[RaggedCache, float]:
    """A cache with `length` random tokens in each row, and how many tokens a second went into it."""
    ids = draw_ids(rows, length, model.config.vocab_size)
    cache, together, began = RaggedCache(context), max(1, PREFILL_TOKENS // length), clock()
    cache.lengths = [0] * rows
    for start in range(0, rows, together):
        part = slice(start, min(rows, start + together))
        prefill(model, cache, part, ids[part])
    return cache, rows * length / (clock() - began)


def decode_as_rollouts(model, sizes: Sizes, rows: int, context: int, graphs: bool = True) -> dict:
    """`decode` and `sample_tokens`, and each token on the host, where `rollout` decides what follows."""
    cache, prefill = prefilled(model, rows, context, context - sizes.steps - WARM_UP)
    if not graphs:
        cache.graphs = None
    draw, tokens, began = np.random.default_rng(0), [0] * rows, 0.0
    for step in range(WARM_UP + sizes.steps):
        if step == WARM_UP:
            began = clock()
        logits = decode(model, cache, tokens)  # (n, V)
        noise = logits.new_tensor(draw.random(rows), dtype=torch.float64)  # (n,)
        sampled, logprobs = sample_tokens(logits, noise, 1.0, 1.0)  # (n,), (n,)
        tokens, _ = sampled.tolist(), logprobs.tolist()
    return rates(rows, sizes.steps, clock() - began) | {"prefill tokens/s": prefill}


def rates(rows: int, steps: int, seconds: float) -> dict:
    return {"tokens/s": rows * steps / seconds, "ms a step": 1000 * seconds / steps}


def decode_with_generate_batch(model, sizes: Sizes, rows: int, context: int, graphs: bool) -> dict:
    """transformers' continuous batching, counted while every row decodes."""
    new = 2 * sizes.steps  # the first rows decode while the last ones are prefilled
    prompts = draw_ids(rows, context - new, model.config.vocab_size)
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    limits = {"max_batch_tokens": min(PREFILL_TOKENS, rows * context), "num_blocks": sizes.blocks}
    batching = ContinuousBatchingConfig(use_cuda_graph=graphs, **limits)
    made = model.generate_batch(prompts, settings, batching, record_timestamps=True)
    times = [output.timestamps for output in made.values() if output.timestamps]
    if [len(of_row) for of_row in times] != [new] * rows:
        raise RuntimeError(f"generate_batch ended {len(times)} of {rows} rows")
    began, ended = max(of_row[0] for of_row in times), min(of_row[-1] for of_row in times)
    tokens = sum(began < moment <= ended for of_row in times for moment in of_row)
    if not tokens:
        raise RuntimeError("the first row had ended before the last one began")
    return rates(rows, tokens / rows, ended - began)


# ---- updates and memory ------------------------------------------------------------------------------------


def draw_episodes(config: Config, vocabulary: int) -> list[Episode]:
    """Dialogs of a quarter of the context up to all of it, with three responses that make up 40 %."""
    episodes, longest = [], config.context
    lengths = np.linspace(longest // 4, longest, config.batch_episodes).astype(int).tolist()
    for index, length in enumerate(lengths):
        (ids,), turn = draw_ids(1, length, vocabulary), length // 3
        spans = [((n + 1) * turn - int(0.4 * turn), (n + 1) * turn) for n in range(3)]
        turns = [Turn(start, end, [-5.0] * (end - start), code="") for start, end in spans]
        episodes.append(Episode(None, ids, turns, True, index % 2 == 0, False, index))
    return episodes


def forward_flops(shape: LlamaConfig, lengths: Sequence[int], logits: int) -> float:
    """Floating-point operations of one forward: two a weight and token, causal attention, `logits` tokens."""
    width, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    keys = width * shape.num_key_value_heads // heads
    weights = 2 * width * width + 2 * width * keys + 3 * width * inner
    layer = sum(2 * weights * length + 2 * width * length**2 for length in lengths)
    return shape.num_hidden_layers * layer + 2 * width * shape.vocab_size * logits


def iteration_flops(shape: LlamaConfig, lengths: Sequence[int], logits: int) -> tuple[float, float]:
    """Of `prepare` (policy, initial policy, critic), and of updates (a backward pass counts twice)."""
    whole, trunk = forward_flops(shape, lengths, logits), forward_flops(shape, lengths, 0)
    return 2 * whole + trunk, 3 * (whole + trunk)


def measure_update(sizes: Sizes, place: Path) -> dict:
    """Prepare and update as train.py does them on one GPU, with weights and optimisers in fp32."""
    config, whole = replace(sizes.config, model=str(place)), sizes.shapes["8b"]
    for layers in range(whole.num_hidden_layers, 0, -1):
        shape = with_layers(whole, layers)
        shape.save_pretrained(place)
        planned = plan.total(plan.memory(config, ranks=1))
        if planned < 0.88 * card_memory(config.device):
            break
    build(shape, config.device).save_pretrained(place)
    gc.collect()
    torch.cuda.empty_cache()
    episodes = draw_episodes(config, shape.vocab_size)
    lengths = [len(episode.ids) for episode in episodes]
    responses = sum(turn.end - turn.start for episode in episodes for turn in episode.turns)
    with process_group(config.device, unsharded=False) as device:
        config = replace(config, device=device)
        reference, trainable = load_networks(config)
        minibatches, seconds = draw_minibatches(episodes, 0, config), []
        for _ in range(2):  # the first time everything is chosen and allocated
            began = clock()
            (microbatches,), _ = prepare(trainable[0], reference, trainable[1], minibatches, config)
            seconds.append(clock() - began)
            began = clock()
            update(*trainable, microbatches, config)
            seconds.append(clock() - began)
        with for_sampling(trainable[0], device, config.dtype, config.gather_weights) as sampler:
            decode_as_rollouts(sampler, sizes, config.batch_rows, config.context)
    in_prepare, in_update = iteration_flops(shape, lengths, responses)
    figures = {
        "layers": layers,
        "tokens": sum(lengths),
        "prepare tokens/s": sum(lengths) / seconds[2],
        "update tokens/s": sum(lengths) / seconds[3],
        "prepare TFLOP/s": in_prepare / seconds[2] / 1e12,
        "update TFLOP/s": in_update / seconds[3] / 1e12,
        "planned GiB": planned / plan.GIB,
    }
    if torch.cuda.is_available():
        peak, name = torch.cuda.max_memory_allocated() / plan.GIB, torch.cuda.get_device_name()
        flops = next((flops for card, flops in PEAK_FLOPS.items() if card in name), float("nan"))
        figures |= {"model FLOP utilisation": in_update / seconds[3] / flops}
        figures |= {"peak GiB": peak, "peak / planned": peak / figures["planned GiB"]}
    return figures
