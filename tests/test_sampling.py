"""Sampling: the frequencies of tokens and the log-probs that are recorded of them."""

import torch
from conftest import make_model

from sampling import RaggedCache, decode, prefill, sample_tokens


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)  # (n, V)
    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0))  # (n,)
    tokens, logprobs = sample_tokens(logits, noise, temperature=0.5, top_p=1.0)
    expected = torch.softmax(logits[0] / 0.5, -1)  # (V,)
    torch.testing.assert_close(torch.bincount(tokens, minlength=4) / 20000, expected, atol=0.015, rtol=0)
    torch.testing.assert_close(logprobs.exp(), expected[tokens])
    kept, logprobs = sample_tokens(logits, noise, temperature=1.0, top_p=0.8)
    assert set(kept.tolist()) == {0, 1}  # 0.64 and 0.24: the second crosses 0.8 and stays
    torch.testing.assert_close(logprobs[kept == 0][0].exp(), torch.tensor(0.7311), atol=1e-3, rtol=0)
    assert sample_tokens(logits, noise, temperature=0, top_p=1.0)[0].unique().tolist() == [0]


def test_the_cache_is_never_longer_than_a_dialog_may_be():
    """One row holds 70 tokens when another enters with 90: the span is not their sum."""
    model, cache = make_model(50), RaggedCache(context=100)
    cache.lengths = [0]
    prefill(model, cache, slice(0, 1), [list(range(45)) + list(range(25))])
    cache.rearrange([0, None])
    prefill(model, cache, slice(1, 2), [[2] * 90])
    for _ in range(10):
        decode(model, cache, [1, 2])
    assert cache.lengths == [80, 100] and cache.span == 100
    assert {store.shape[2] for layer in cache.stores.values() for store in layer} == {101}


def test_rows_and_span_rounded_up_for_graphs_change_no_logits_and_no_other_row():
    """Three of five rows decode, as four; the others, one of which is as long as the memory, stay intact."""
    model, draw = make_model(50), torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(50, (5, 300), generator=draw).tolist(), [20, 31, 250, 256, 4]
    logits = []
    for few_sizes in (False, True):
        cache = RaggedCache(context=300)
        cache.few_sizes, cache.lengths = few_sizes, [0] * 5
        prefill(model, cache, slice(0, 5), [row[:length] for row, length in zip(ids, lengths, strict=True)])
        steps = [decode(model, cache, [ids[row][lengths[row] + n] for row in range(3)]) for n in range(8)]
        assert cache.span == (300 if few_sizes else 258) and len(cache.positions) == (4 if few_sizes else 3)
        cache.rearrange([3, 4, 0, 1, 2])
        steps.append(decode(model, cache, [1, 2, 3, 4, 5]))  # (5, V)
        logits.append(torch.cat(steps))  # (29, V)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
