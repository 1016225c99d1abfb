"""A language model in two parts, trunk and tail; the critic: a trunk and a linear head, read once per turn.

Paper: section 2.2 and appendix A. RLEF's actions are whole responses, so its critic says what a *turn* is
worth: V(c_t) for the dialog so far, c_t, read at the last token of the prompt of turn t, before any token of
the response. One forward over the whole dialog gives the values of all its turns: attention is causal, so the
value of a turn depends on every earlier response, but not on the turn's own.

The critic is a separate network, initialised from the same checkpoint as the policy; the output layer is
replaced by a randomly initialised linear layer to a scalar. With `token_level_values` in config.py (the
paper's ablation) the same network is read before every response token instead.

The policy's log-probs need logits for response tokens only, computed in chunks. Some models also scale or cap
their logits (Granite, Gemma 2). They do so in their own `forward`, so `tail_logits` runs that.
"""

from copy import copy
from types import MethodType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """A causal LM without its output layer: from ids to the last hidden states."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4's text model calls itself its decoder


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal LM, whatever the architecture calls them."""
    return next(part for part in trunk_of(model).children() if isinstance(part, nn.ModuleList))


def tail_logits(model: PreTrainedModel, output: ModelOutput, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own logits (n, V) for `hidden` (n, D), which are some rows of the trunk's `output`."""
    output, trunk = copy(output), trunk_of(model)
    output.last_hidden_state = hidden[None]  # (1, n, D)
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)  # (1, n) unused
    with patch.object(trunk, "forward", lambda *_, **__: output):
        return model.forward(ids, use_cache=False).logits[0]  # (n, V) model(...) would repeat FSDP2's hooks


class _Float32Logits(torch.autograd.Function):
    """hidden (..., D) times weight (V, D), in fp32; the gradient is that of the half-precision layer."""

    @staticmethod
    def forward(context, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(hidden, weight)
        if hidden.is_cuda:  # sums in fp32 without a copy of the weight
            rows = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)  # (n, V)
            return rows.unflatten(0, hidden.shape[:-1])  # (..., V)
        return F.linear(hidden.float(), weight.float())  # (..., V)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = context.saved_tensors
        gradient = gradient.to(weight.dtype)  # (..., V)
        return gradient @ weight, gradient.flatten(0, -2).T @ hidden.flatten(0, -2)  # (..., D), (V, D)


def use_float32_logits(model: PreTrainedModel) -> None:
    """Make the output layer return logits in fp32: bf16 numbers near 28, a top logit, are 0.125 apart."""

    def forward(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        weight = layer.weight  # (V, D)
        if weight.dtype == torch.float32:
            return F.linear(hidden, weight, layer.bias)  # (..., V)
        if weight.requires_grad or weight.is_cuda:
            logits = _Float32Logits.apply(hidden, weight)  # (..., V)
        else:  # on a CPU the copy in fp32 takes a quarter of a decoding step: frozen layers keep it
            if getattr(layer, "kept", (None,))[0] != weight._version:
                layer.kept = weight._version, weight.float()
            logits = F.linear(hidden.float(), layer.kept[1])  # (..., V)
        return logits if layer.bias is None else logits + layer.bias

    if isinstance(layer := model.get_output_embeddings(), nn.Linear):
        layer.forward = MethodType(forward, layer)


class ValueModel(nn.Module):
    """Trunk and scalar head.

    Takes the trunk of `language_model` as its own: pass a model that nothing else uses.
    """

    def __init__(self, language_model: PreTrainedModel, seed: int = 0) -> None:
        super().__init__()
        self.trunk = trunk_of(language_model)
        width = language_model.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # on any number of ranks: some architectures draw numbers when loaded
            self.head = nn.Linear(width, 1, dtype=torch.float32)  # D -> 1, in fp32 whatever the trunk's type
            nn.init.normal_(self.head.weight, std=width**-0.5)
            nn.init.zeros_(self.head.bias)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Values (N,) read at the tokens ids[rows, columns].

        Ids (B, T) padded at the right, rows and columns (N,).
        """
        hidden = self.trunk(ids, use_cache=False).last_hidden_state  # (B, T, D)
        return self.head(hidden[rows, columns].float()).sum(-1)  # (N,) not [:, 0]: FSDP2 warns about views
