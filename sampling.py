"""Sampling: a key-value cache with rows of different lengths, a forward over it, the next token.

Written by hand because `generate` can neither keep a dialog's cache for its next turn nor let a finished row
leave. `forward` is the one place that runs a model on the cache. The log-probs that `sample_tokens` returns
are of the distribution that was sampled from, temperature and top-p included: PPO's behaviour policy.
"""

import functools
import inspect

import torch
from torch.nn.functional import pad

CACHE_GROWTH = 256  # tokens by which the cache's capacity grows


class RaggedCache:
    """A key-value cache whose rows have different lengths; transformers' attention layers call `update`.

    Row r holds `lengths[r]` tokens from position 0 on. A forward over `rows` writes each row's new keys
    behind its old ones. Padding at the right of a shorter row writes too, behind its length, where the mask
    hides it until it is overwritten.
    """

    is_compileable = False

    def __init__(self) -> None:
        # A layer each: keys and values, (rows, heads, capacity, head_dim).
        self.stores: list[list[torch.Tensor]] = []
        self.lengths: list[int] = []
        self.rows = slice(0, 0)
        self.positions = torch.empty(0)  # (n, new) of the tokens that this forward appends
        self.span = 0

    def update(self, keys, values, layer: int, *_unused, **_ignored) -> list[torch.Tensor]:
        """Store keys and values (n, heads, new, head_dim); all of these rows, (n, heads, span, head_dim)."""
        if layer == len(self.stores):
            self.stores.append([new.new_zeros(0, new.shape[1], 0, new.shape[3]) for new in (keys, values)])
        rows = torch.arange(self.rows.start, self.rows.stop, device=keys.device)[:, None]  # (n, 1)
        for part, new in enumerate((keys, values)):
            store = self.stores[layer][part]  # (rows, heads, capacity, head_dim)
            more_rows, more_tokens = len(self.lengths) - len(store), self.span - store.shape[2]
            if more_rows > 0 or more_tokens > 0:
                more_tokens = -(-max(0, more_tokens) // CACHE_GROWTH) * CACHE_GROWTH
                store = pad(store, (0, 0, 0, more_tokens, 0, 0, 0, max(0, more_rows)))
                self.stores[layer][part] = store
            store[rows, :, self.positions] = new.transpose(1, 2)
        return [store[self.rows, :, : self.span] for store in self.stores[layer]]

    def get_seq_length(self, *_unused) -> int:
        return 0  # positions are given explicitly

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a == b:
            return
        length = max(self.lengths[a], self.lengths[b])
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]
        for store in (store for layer in self.stores for store in layer):
            row = store[a, :, :length].clone()  # (heads, length, head_dim)
            store[a, :, :length] = store[b, :, :length]
            store[b, :, :length] = row


@functools.cache
def _cache_argument(decoder: type) -> str:
    """transformers 5.24 renames the argument."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@torch.no_grad()
def forward(model, cache: RaggedCache, rows: slice, new_ids: list[list[int]]) -> torch.Tensor:
    """Append `new_ids` (ragged, a list a row) to the cache; logits behind each row's last token, (n, V)."""
    device = model.device
    counts = [len(ids) for ids in new_ids]
    width, lengths = max(counts), cache.lengths[rows]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in new_ids], device=device)  # (n, new)
    starts = torch.tensor(lengths, device=device)[:, None]  # (n, 1)
    cache.rows, cache.span = rows, max(lengths) + width
    cache.positions = starts + torch.arange(width, device=device)  # (n, new)
    places = torch.arange(cache.span, device=device)  # (span,)
    hidden_from = places > cache.positions[:, None, :, None]  # (n, 1, new, span)
    mask = torch.zeros(hidden_from.shape, dtype=model.dtype, device=device)  # (n, 1, new, span)
    # Half precision can hold this number, and no score is near it.
    mask.masked_fill_(hidden_from, torch.finfo(torch.float16).min)
    decoder = model.get_decoder()
    given = {_cache_argument(type(decoder)): cache}
    output = decoder(ids, attention_mask=mask, position_ids=cache.positions, use_cache=True, **given)
    for row, count in zip(range(rows.start, rows.stop), counts, strict=True):
        cache.lengths[row] += count
    last = torch.tensor(counts, device=device) - 1  # (n,)
    return model.get_output_embeddings()(output.last_hidden_state[torch.arange(len(counts)), last])  # (n, V)


def sample_tokens(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by the inverse of the cumulative distribution function, one uniform number a row.

    Args: logits (n, V), noise (n,) in [0, 1). temperature 0 is greedy.
    Returns: tokens (n,) and their log-probs (n,) under the distribution that was sampled from.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)  # (n,)
        return tokens, torch.zeros(len(tokens), device=logits.device)  # probability 1
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)  # (n, V)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)  # (n, V)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # (n, V) probability of all tokens before each
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)  # (n, V)
        logprobs = torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)  # (n, V)
    cdf = logprobs.exp().double().cumsum(-1)  # (n, V) in double: 128k terms
    threshold = noise.double()[:, None] * cdf[:, -1:]  # (n, 1)
    tokens = torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)  # (n,)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]  # (n,), (n,)
