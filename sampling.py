"""Sampling: a key-value cache with rows of different lengths, the next token, which models can be sampled.

Written by hand because `generate` can neither keep a dialog's cache for its next turn nor remove a finished
row. The model makes the mask of each layer itself (all tokens, a window, a chunk): we only tell transformers
the positions of the new tokens. On a GPU a decoding step is a CUDA graph: starting its thousand small
operations one by one takes several times as long as running them (benchmarks/README.md).
The log-probs of `sample_tokens` are those of the distribution that was sampled from, temperature and top-p
included: PPO's behaviour policy.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from transformers import AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.generation.logits_process import TopPLogitsWarper
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_outputs import ModelOutput

from distributed import as_forward
from value_head import tail_logits, trunk_of

CACHE_GROWTH = 256  # tokens by which the cache's capacity grows on a CPU, and what a graph reads of it
GPU_PADDING = 2048  # tokens that a GPU computes in about the time of starting a forward of an 8B model
# transformers' names of the layers that a RaggedCache serves: with keys and values, with a state, with both.
STATE_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "dummy", *STATE_LAYERS}


# ---- the cache ---------------------------------------------------------------------------------------------


class RaggedCache:
    """A key-value cache whose rows have different lengths; transformers calls all methods but `rearrange`.

    Row r holds `lengths[r]` tokens from position 0 on; what it has behind them is not read, but overwritten.
    Layers with a recurrence or a convolution keep a state for each row: what they remember of its tokens.
    """

    is_compileable = False

    def __init__(self, context: int) -> None:
        """Args: context: the maximum number of tokens in a row, and so the maximum capacity."""
        self.context = context
        # Layer to keys and values, (rows, heads, capacity, head_dim); layers that use another's have none.
        self.stores: dict[int, list[torch.Tensor]] = {}
        # Kind, layer and which of its states, to the states of all rows, (rows, ...).
        self.states: dict[tuple[str, int, int], torch.Tensor] = {}
        self.lengths: list[int] = []
        self.rows = slice(0, 0)
        self.row_numbers = torch.empty(0)  # (n, 1) the same as a tensor
        self.positions = torch.empty(0)  # (n, new) of the tokens that this forward appends
        self.empty = False  # whether these rows had no tokens before
        self.span = 0  # tokens of the longest row, the new ones included
        # Number of rows and span to a CUDA graph of a decoding step, its ids and positions (2, n, 1), and its
        # logits (n, V). None: no graphs, because the model cannot be captured.
        self.graphs: dict[tuple[int, int], tuple] | None = {}
        self.few_sizes = False  # whether decoding rounds rows and span up, as graphs need it

    def update(self, keys, values, layer: int, *_unused, **_ignored) -> list[torch.Tensor]:
        """Store new keys and values (n, heads, new, head_dim); returns all, (n, heads, span, head_dim)."""
        if layer not in self.stores:
            self.stores[layer] = [new.new_zeros(0, new.shape[1], 0, new.shape[3]) for new in (keys, values)]
        for part, new in enumerate((keys, values)):
            store = self.stores[layer][part]  # (rows, heads, capacity, head_dim)
            # One token more than the longest row: `decode` may write behind the end of rows that it ignores.
            more_rows, more_tokens = len(self.lengths) - len(store), self.span + 1 - store.shape[2]
            if more_rows > 0 or more_tokens > 0:
                # A GPU has all tokens at once: growing would leave pieces of memory that nothing fits into.
                step = CACHE_GROWTH if new.device.type == "cpu" else self.context + 1
                more_tokens = -(-max(0, more_tokens) // step) * step
                more_tokens = min(more_tokens, self.context + 1 - store.shape[2])
                store = pad(store, (0, 0, 0, more_tokens, 0, 0, 0, max(0, more_rows)))
                self.stores[layer][part] = store
                self.graphs = self.graphs and {}  # they would use the old memory
            store[self.row_numbers, :, self.positions] = new.transpose(1, 2)
        return [store[self.rows, :, : self.span] for store in self.stores[layer]]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0, kind: str = "recurrent"):
        """The states (n, ...) of these rows, which a model may change in place; None for empty rows."""
        states = None if self.empty else self.states.get((kind, layer_idx, state_idx))
        return None if states is None else states[self.rows]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.get_recurrent_state(layer_idx, state_idx, "conv")

    def update_recurrent_state(self, state, layer_idx: int, state_idx: int = 0, kind: str = "recurrent"):
        """Store the states (n, ...) of these rows; returns them."""
        if (kind, layer_idx, state_idx) not in self.states:
            self.states[kind, layer_idx, state_idx] = state.new_zeros(len(self.lengths), *state.shape[1:])
            self.graphs = None  # a graph also runs rows that it ignores, and these would change
        self.states[kind, layer_idx, state_idx][self.rows] = state
        return state

    def update_conv_state(self, new, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int):
        """Store the last of the inputs (n, channels, new); returns all, (n, channels, kernel + new)."""
        before = self.get_conv_state(layer_idx, state_idx)  # (n, channels, kernel)
        if before is None:
            before = new.new_zeros(*new.shape[:2], conv_kernel_size)  # (n, channels, kernel)
        whole = torch.cat([before, new], dim=-1)  # (n, channels, kernel + new)
        self.update_recurrent_state(whole[..., -conv_kernel_size:], layer_idx, state_idx, "conv")
        return whole

    def is_recording_past(self, *_layer) -> bool:
        return False

    def get_seq_length(self, *_layer) -> int:
        return self.span - self.positions.shape[1]

    def get_mask_sizes(self, *_new_and_layer) -> tuple[int, int]:
        return self.span, 0  # how many keys a mask is for, and the position of the first

    def get_query_offset(self, *_layer) -> torch.Tensor | int:
        # For `_by_row`. Empty rows all begin at 0: then transformers can leave the causal mask out.
        return 0 if self.empty else self.positions

    def rearrange(self, sources: list[int | None]) -> None:
        """Row i becomes what row `sources[i]` was; None: an empty row. The other rows are dropped."""
        if sources == [*range(len(self.lengths))]:
            return
        moved = [row for row, source in enumerate(sources) if source not in (row, None)]
        origins = [sources[row] for row in moved]
        length = max((self.lengths[row] for row in origins), default=0)
        self.lengths = [0 if source is None else self.lengths[source] for source in sources]
        if moved:
            to, of = torch.tensor([moved, origins], device=self.positions.device)  # (moved,), (moved,)
            for store in (store for layer in self.stores.values() for store in layer):
                store[to, :, :length] = store[of, :, :length]
        kept = [row for row, source in enumerate(sources) if source is not None]
        for key, store in self.states.items():
            self.states[key] = store.new_zeros(len(sources), *store.shape[1:])  # (rows, ...)
            self.states[key][kept] = store[[sources[row] for row in kept]]


def _by_row(make_mask: Callable) -> Callable:
    """transformers' `sdpa_mask` or `eager_mask`, which take a RaggedCache's positions as `q_offset` too."""

    def make(q_offset=0, mask_function=causal_mask_function, **options) -> torch.Tensor | None:
        if not isinstance(q_offset, torch.Tensor) or q_offset.ndim < 2:
            return make_mask(q_offset=q_offset, mask_function=mask_function, **options)

        def at_positions(row, head, query, key) -> torch.Tensor:  # query: which of the row's new tokens
            return mask_function(row, head, q_offset[row, query], key)

        options |= {"allow_is_causal_skip": False, "use_vmap": False}
        return make_mask(mask_function=at_positions, **options)  # (n, 1, new, span)

    return make


AttentionMaskInterface.register("sdpa", _by_row(sdpa_mask))
AttentionMaskInterface.register("eager", _by_row(eager_mask))


_signature = functools.cache(inspect.signature)  # as it is asked in every decoding step


def _append(network: nn.Module, cache: RaggedCache, ids: torch.Tensor, **options) -> ModelOutput:
    """Run a model or its trunk on ids (n, new) at the cache's rows and positions."""
    cache.row_numbers = torch.arange(cache.rows.start, cache.rows.stop, device=ids.device)[:, None]  # (n, 1)
    if "position_ids" in _signature(type(network).forward).parameters:  # Bloom, for one, takes none
        options["position_ids"] = cache.positions
    return network(ids, cache=cache, use_cache=True, **options)


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: RaggedCache, rows: slice, new_ids: list[list[int]]) -> None:
    """Append `new_ids`, one list per row, to the cache."""
    counts, lengths = [len(ids) for ids in new_ids], cache.lengths[rows]
    width = max(counts)
    if width == 0:
        return
    if min(counts) < width and STATE_LAYERS.intersection(layer_types(model.config)):
        for row, ids in enumerate(new_ids, rows.start):  # one by one: a state would remember the padding
            prefill(model, cache, slice(row, row + 1), [ids])
        return
    # Rows with fewer new tokens are padded with id 0, or with their last token once more. In an empty row
    # these are behind the row's end; else they could be behind the cache's end, and go to the last position.
    ids = torch.tensor([ids + (ids[-1:] or [0]) * (width - len(ids)) for ids in new_ids])  # (n, new)
    starts = torch.tensor(lengths)[:, None]  # (n, 1)
    positions = starts + torch.arange(width)  # (n, new)
    cache.empty = max(lengths) == 0
    if not cache.empty:
        last = starts + torch.tensor(counts)[:, None].clamp(min=1) - 1  # (n, 1)
        positions = torch.minimum(positions, last)  # (n, new)
    cache.positions = positions.to(model.device)  # (n, new)
    cache.rows, cache.span = rows, int(positions.max()) + 1
    _append(trunk_of(model), cache, ids.to(model.device))
    cache.lengths[rows] = [length + count for length, count in zip(lengths, counts, strict=True)]


@torch.no_grad()
def decode(model: PreTrainedModel, cache: RaggedCache, tokens: list[int]) -> torch.Tensor:
    """Append one token to each of the first n rows of the cache; returns the logits after them, (n, V).

    A CUDA graph repeats a step with the same memory and sizes. So that few graphs are enough, the next rows
    are run too, up to a power of two, and the cache is read up to a multiple of `CACHE_GROWTH`. What the
    further rows get is behind their end: it is not read, but overwritten.
    """
    on_gpu = model.device.type == "cuda" and not isinstance(model, FSDPModule)  # whose ranks wait for others
    rows, cache.span = len(tokens), max(cache.lengths[: len(tokens)]) + 1
    if (cache.few_sizes or (on_gpu and cache.graphs is not None)) and not cache.states:
        stored = [len(keys) for keys, _ in cache.stores.values()]
        rows = min(1 << (rows - 1).bit_length(), max(len(cache.lengths), *stored))
        cache.span = min(-(-cache.span // CACHE_GROWTH) * CACHE_GROWTH, cache.context)
    cache.rows, cache.empty, size = slice(0, rows), False, (rows, cache.span)
    padded = ((column + [0] * rows)[:rows] for column in (tokens, cache.lengths))
    inputs = torch.tensor([*padded]).unsqueeze(-1)  # (2, rows, 1)
    if cache.graphs and size in cache.graphs:
        graph, graph_inputs, graph_logits = cache.graphs[size]
        graph_inputs.copy_(inputs)
        graph.replay()
        logits = graph_logits.clone()  # (rows, V) the next step writes into the same memory
    else:
        inputs = inputs.to(model.device)  # (2, rows, 1)
        cache.positions = inputs[1]  # (rows, 1)
        logits = _append(model, cache, inputs[0], logits_to_keep=1).logits[:, -1]  # (rows, V)
        if on_gpu and cache.graphs is not None:
            _capture(model, cache, inputs)
    cache.lengths[: len(tokens)] = [length + 1 for length in cache.lengths[: len(tokens)]]
    return logits[: len(tokens)]


def _capture(model: PreTrainedModel, cache: RaggedCache, inputs: torch.Tensor) -> None:
    """Keep the decoding step that has just run on `inputs` (2, n, 1) as a CUDA graph for its next time."""
    graph = torch.cuda.CUDAGraph()
    try:
        others = (other for other, *_ in cache.graphs.values())
        with torch.cuda.graph(graph, pool=next((other.pool() for other in others), None)):  # they take turns
            logits = _append(model, cache, inputs[0], logits_to_keep=1).logits[:, -1]  # (n, V)
        cache.graphs[len(cache.positions), cache.span] = graph, inputs, logits
    except RuntimeError:  # it waits for the device, as routers of experts do: such a model runs without
        cache.graphs = None


def group_by_length(items: Sequence, length: Callable[[Any], int], budget: int, device: str) -> list[list]:
    """Groups of items of similar length, the longest first, that are padded to one length and run together.

    A group, padding included, is within the budget of tokens, or is one item. Each item has at least 0.9 of
    the length of the longest in its group; on a GPU less, if that adds little padding.
    """
    groups: list[list] = []
    longest = padding = 0
    for item in sorted(items, key=length, reverse=True):
        padding += longest - length(item)
        similar = length(item) >= 0.9 * longest or (device != "cpu" and padding <= GPU_PADDING)
        if groups and longest * (len(groups[-1]) + 1) <= budget and similar:
            groups[-1].append(item)
        else:
            groups.append([item])
            longest, padding = length(item), 0
    return groups


def sample_tokens(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse transform sampling: one token per row, from one uniform random number per row.

    Args: logits (n, V); noise (n,) in [0, 1); temperature 0 is greedy.
    Returns: tokens (n,) and their log-probs (n,) under the distribution that was sampled from.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)  # (n,)
        return tokens, torch.zeros(len(tokens), device=logits.device)  # probability 1
    logits = logits.float() / temperature  # (n, V)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)  # (n, V)
    logprobs = logits.log_softmax(-1)  # (n, V)
    cdf = logprobs.exp().double().cumsum(-1)  # (n, V) a sum of 128k terms in fp32 is too inexact
    threshold = noise.double()[:, None] * cdf[:, -1:]  # (n, 1)
    tokens = torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)  # (n,)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]  # (n,), (n,)


# ---- which models ------------------------------------------------------------------------------------------


def within_positions(config: PretrainedConfig, context: int) -> int:
    """The context, or the number of positions that the model was trained on, if that is smaller."""
    text = config.get_text_config(decoder=True)
    return min(context, getattr(text, "max_position_embeddings", None) or context)


def layer_types(config: PretrainedConfig) -> list[str]:
    """transformers' name of the kind of each layer."""
    return get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]


def check_architecture(config: PretrainedConfig, context: int) -> None:
    """Raises: ValueError, one sentence, if a model's configuration shows that it cannot work here."""
    text, name = config.get_text_config(decoder=True), config.model_type
    if other := ", ".join(sorted({*layer_types(config)} - CACHED_LAYERS)):
        raise ValueError(
            f"{name} has layers of type {other}, whose cache is not known here: choose another model"
        )
    ropes = getattr(text, "rope_parameters", None) or {}
    positions, limits = getattr(text, "max_position_embeddings", None), {}
    for rope in [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            key = "original_max_position_embeddings"
            original = rope.get(key) or getattr(text, key, None) or positions
            limits[f"the length from which on its {rope['rope_type']} rope changes all keys"] = original
    if not ropes and not getattr(text, "alibi", False):
        limits["the number of positions it has embeddings for"] = positions
    if getattr(text, "attn_temperature_tuning", False):
        limits["the length from which on it scales queries by position"] = text.floor_scale
    for what, limit in limits.items():
        if limit and 0 < limit < context:
            raise ValueError(f"context {context} is more than {limit}, {what} ({name}): lower --context")


@torch.no_grad()
def check_logits(model: PreTrainedModel, tokenizer_size: int, context: int) -> None:
    """Compare the model's own logits with those of training and of sampling, on dialogs longer than windows.

    Raises: ValueError, one sentence, if they differ by more than rounding or cannot be computed.
    """
    text, name = model.config.get_text_config(decoder=True), model.config.model_type
    last = 8  # so many tokens at the end of each dialog are compared
    if text._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"sampling needs --attention sdpa or eager, not {text._attn_implementation}")
    known = model.get_input_embeddings().weight.shape[0]
    if tokenizer_size > known:
        raise ValueError(f"the tokenizer has {tokenizer_size} tokens, but {name}'s embedding only {known}")
    sizes = ("window", "chunk_size", "local_attention")  # as architectures name them
    windows = [n for key, n in text.to_dict().items() if type(n) is int and any(s in key for s in sizes)]
    length = min(context, max([32, *windows]) + 32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokenizer_size, (2, length), generator=generator).to(model.device)  # (2, length)
    long, short = ids[0].tolist(), ids[1, : length // 3 + 2 * last].tolist()
    ids[1, len(short) :] = 0  # padding

    def alone(model: PreTrainedModel) -> torch.Tensor:
        rows = (ids[:1], ids[1:, : len(short)])
        logits = [model.forward(row, use_cache=False).logits[0, -last:] for row in rows]  # (last, V) each
        return torch.stack(logits)  # (2, last, V)

    def trained(model: PreTrainedModel) -> torch.Tensor:
        output = trunk_of(model)(ids, use_cache=False)  # last_hidden_state (2, length, D)
        ends = ((0, len(long)), (1, len(short)))
        hidden = torch.cat([output.last_hidden_state[row, end - last : end] for row, end in ends])  # (n, D)
        return tail_logits(model, output, hidden).unflatten(0, (2, last))  # (2, last, V)

    def sampled(model: PreTrainedModel) -> torch.Tensor:
        cache = RaggedCache(length)
        cache.lengths = [0, 0]
        prefill(model, cache, slice(0, 2), [long[: -2 * last], short[:-last]])
        cache.rearrange([1, 0])  # as rollouts do
        prefill(model, cache, slice(1, 2), [long[-2 * last : -last]])
        steps = zip(short[-last:], long[-last:], strict=True)
        logits = [decode(model, cache, [*step]) for step in steps]  # (2, V) each
        return torch.stack(logits, dim=1).flip(0)  # (2, last, V) the long one first again

    def logprobs(path: str, function: Callable) -> torch.Tensor:
        try:
            return as_forward(function, model).log_softmax(-1)  # (2, last, V)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(f"{name} is not supported: {path} fails with {reason}") from error

    own = logprobs("its own forward", alone)  # (2, last, V)
    # The dtype of the computation; the parameters of a sharded model may have another.
    dtype = as_forward(lambda model: trunk_of(model)(ids[:, :1], use_cache=False)[0].dtype, model)
    exact = dtype == torch.float32
    # Half precision: SmolLM2-135M's own forward differs by 0.05 from that in fp32, and sampling by 0.035.
    limit = 1e-3 if exact else 0.1
    for path, function in {"training": trained, "sampling with a cache": sampled}.items():
        gap = (logprobs(path, function) - own).abs()  # (2, last, V)
        # In half precision a router may send single tokens to another expert, so the median token decides.
        difference = (gap.max() if exact else gap.mean(-1).median()).item()
        if not difference < limit:
            wrong = f"{path} gives log-probs that differ by {difference:.2g} from the model's own"
            raise ValueError(f"{name} is not supported: {wrong}")
