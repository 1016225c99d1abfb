"""What several tests share: a tiny random model with the toy world's tokenizer, and one sandbox."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import toy
from sandbox import Sandbox

# Models are tiny: more threads only wait for each other, here and in the processes that tests start.
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="session")
def sandbox():
    with Sandbox(workers=2) as executor:
        yield executor


@pytest.fixture(scope="session")
def tokenizer():
    return toy.build_tokenizer()


def make_model(vocabulary: int, seed: int = 0, end: int | None = None) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention, as the big ones have.

    It says the token `end` now and then.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    if end is not None:
        ids = torch.randint(0, vocabulary, (8, 50))  # (B, T)
        with torch.no_grad():
            usual = model.get_decoder()(ids).last_hidden_state.mean((0, 1))  # (D,)
            model.lm_head.weight[end] = 4 * usual / usual.square().sum()
    return model


@pytest.fixture(scope="session")
def model(tokenizer):
    return make_model(len(tokenizer), end=tokenizer.eos_token_id)
