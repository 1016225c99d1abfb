"""The memory plan: how many bytes one rank needs at most, computed from the models' shapes.

Paper: 288 GPUs for 8B and 2,304 for 70B, without an explanation. Here the terms are written out. The weights
and the optimiser states of policy and critic and the weights of the frozen reference are always in memory. In
addition, either a rollout needs memory (a whole copy of the policy, the key-value cache with every dialog at
its maximum length) or an update does (gradients, the layers that FSDP2 has gathered, activations, a chunk of
logits); the larger counts. Not included are fragmentation, NCCL's buffers, the CUDA context, and the states
of recurrent layers (for a dialog about as much as a few hundred tokens need): leave some GiB for them.

Run alone: `python train.py --preset 8b --plan --ranks 8`.
"""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from rollout import PREFILL_TOKENS
from sampling import RaggedCache, check_architecture, layer_types, prefill
from value_head import layers_of, trunk_of

GIB = 1 << 30
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
# The models of the presets, so that a plan does not need the hub: (layers, width, inner width, heads).
SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": (32, 4096, 14336, 32),
    "meta-llama/Llama-3.1-70B-Instruct": (80, 8192, 28672, 64),
}


def model_shape(model: str) -> PretrainedConfig:
    """The architecture of a model; for the models of the presets without the hub."""
    if model not in SHAPES or Path(model).is_dir():
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    names = "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"
    return LlamaConfig(**LLAMA, **dict(zip(names, SHAPES[model], strict=True)))


def layer_shapes(shape: PretrainedConfig) -> list[PretrainedConfig]:
    """The shape of each layer of a text model; in Gemma 4, for one, they differ."""
    differ = getattr(shape, "is_heterogeneous", False)
    return [*shape.per_layer_config] if differ else [shape] * shape.num_hidden_layers


def key_value_numbers(shape: PretrainedConfig) -> int:
    """Numbers that the cache keeps of a token, in all layers; `shape` is a text model's."""
    numbers = 0
    for kind, layer in zip(layer_types(shape), layer_shapes(shape), strict=True):
        if kind in ("linear_attention", "conv", "dummy"):  # a state; or nothing, or that of another layer
            continue
        heads = layer.num_attention_heads
        head = getattr(layer, "head_dim", 0) or layer.hidden_size // heads
        heads = getattr(layer, "num_key_value_heads", None) or heads
        if getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False):
            heads = 1
        compressed = getattr(layer, "kv_lora_rank", None)  # as in DeepSeek: one vector for keys and values
        numbers += compressed + layer.qk_rope_head_dim if compressed else 2 * heads * head
    return numbers


def rows_that_fit(model, context: int, wanted: int) -> int:
    """How many of `wanted` dialogs can be sampled at once in the memory that is free now."""
    shape, cache = model.config.get_text_config(decoder=True), RaggedCache(0)
    cache.lengths = [0]
    prefill(model, cache, slice(0, 1), [[0]])
    states = sum(state.numel() * state.itemsize for state in cache.states.values())
    if model.device.type == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free, _ = torch.cuda.mem_get_info(model.device)
    needed = context * key_value_numbers(shape) * model.dtype.itemsize + states + shape.vocab_size * 6 * 4
    if (rows := int(0.9 * free // needed)) < 1:
        sizes = f"{needed / GIB:.1f} GiB and {free / GIB:.1f} are free"
        raise ValueError(f"a dialog of context {context} needs {sizes}: lower --context")
    return min(rows, wanted)


def memory(config, ranks: int) -> dict[str, dict[str, float]]:
    """Bytes per rank by phase ("always", "rollout", "update") and name; `config` is the one of training."""
    whole_shape = model_shape(config.model)  # with a part for images, where it has one
    shape = whole_shape.get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole_shape)
    compute, state = getattr(torch, config.dtype).itemsize, 4  # bytes of a number
    every = sum(p.numel() for p in model.parameters())  # the numbers of parameters
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    layer, layers, width = max(sizes), shape.num_hidden_layers, shape.hidden_size
    inner = [getattr(of, "intermediate_size", None) or 4 * width for of in layer_shapes(shape)]
    inner = max(max(size) if isinstance(size, list) else size for size in inner)
    root = every - sum(sizes)  # embeddings, output layer and last norm, which are gathered together
    critic = sum(p.numel() for p in trunk_of(model).parameters()) + width + 1
    sharded = ranks > 1 or state != compute or config.cpu_offload
    key_value = key_value_numbers(shape) // layers
    # For its backward pass a layer keeps the inputs and outputs of the norms (in fp32 inside them), of the
    # projections, of rotation and attention, and the four tensors of the gated MLP.
    inside = compute * (8 * width + 2 * key_value + 4 * inner) + 4 * 2 * width
    tokens = config.microbatch_tokens
    kept = layers * compute * width + inside if config.gradient_checkpointing else layers * inside
    rows = min(config.batch_rows, -(-config.batch_episodes // ranks))
    # The logits as computed and in fp32: converted, over temperature, log-softmax, exponentiated, multiplied.
    softmax = shape.vocab_size * (compute + 5 * 4)
    on_device = 0 if config.cpu_offload else 1
    two_layers = 2 * layer * compute * sharded  # one computes while the next one is gathered
    whole = every * compute if config.gather_weights else root * compute + two_layers
    return {
        "always": {
            "policy: weights": on_device * every * state / ranks,
            "policy: optimiser": on_device * 2 * every * state / ranks,
            "critic: weights": on_device * critic * state / ranks,
            "critic: optimiser": on_device * 2 * critic * state / ranks,
            "reference": on_device * every * compute / ranks,
        },
        "rollout": {
            "weights for sampling": whole * sharded,
            "keys and values": rows * config.context * layers * key_value * compute,
            "prompts and feedback": max(config.context, min(rows * config.context, PREFILL_TOKENS)) * inside,
            "next-token distribution": rows * softmax,
        },
        "update": {
            "policy: gradients": on_device * every * state / ranks,
            "critic: gradients": on_device * critic * state / ranks,
            # Weights, gradients, and the gradients in fp32 that are being sent to their ranks.
            "gathered: embeddings": root * (2 * compute + 4) * sharded,
            "gathered: layers": two_layers + layer * (compute + 4) * sharded,
            "activations": tokens * kept,
            "logits chunk": min(config.logits_chunk, tokens) * softmax,
        },
    }


def total(plan: dict[str, dict[str, float]]) -> float:
    """The maximum over time, in bytes."""
    sums = {phase: sum(parts.values()) for phase, parts in plan.items()}
    return sums["always"] + max(sums["rollout"], sums["update"])


def report(config, ranks: int, gpu_bytes: float) -> tuple[str, bool]:
    """The plan as text, and whether it fits `gpu_bytes`; if not, the text names flags that help."""
    check_architecture(model_shape(config.model), config.context)
    plan = memory(config, ranks)
    lines = [f"{config.model} on {ranks} ranks, GiB a rank"]
    for phase, parts in plan.items():
        lines += [f"{phase:>8}  {name:<26}{size / GIB:>9.2f}" for name, size in parts.items()]
        lines.append(f"{phase:>8}  {'sum':<26}{sum(parts.values()) / GIB:>9.2f}")
    need = total(plan)
    lines.append(f"{'worst':>8}  {'always + the larger':<26}{need / GIB:>9.2f} of {gpu_bytes / GIB:.2f}")
    if need <= gpu_bytes:
        return "\n".join(lines), True
    savings = "--gradient_checkpointing, --no-gather_weights, --cpu_offload or more --ranks"
    lines.append(f"does not fit: lower --batch_rows, --microbatch_tokens, --logits_chunk, or try {savings}")
    return "\n".join(lines), False
