"""The critic: a language model's trunk and a linear head, read at one position per turn.

Paper: section 2.2 and appendix A. RLEF's actions are whole responses, so its critic says what a *turn* is
worth: V(c_t) for the dialog so far, c_t, read at the last token of the prompt of turn t, before any token of
the response. All turns of an episode come out of one forward over the whole dialog: attention is causal, so
what is read at a turn's prompt cannot depend on its response, and does depend on every earlier one.

The critic is a network of its own, initialised from the same checkpoint as the policy; the output layer is
replaced by a randomly initialised linear layer to a scalar. With `token_level_values` in train.py (the
paper's ablation) the same network is read in front of every response token instead.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


class ValueModel(nn.Module):
    """Trunk and scalar head.

    Takes the trunk of `language_model` as its own: pass a model that nothing else uses.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = language_model.get_decoder()
        width = language_model.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, dtype=torch.float32)  # (D) -> (1), in fp32 whatever the trunk's type
        nn.init.normal_(self.head.weight, std=width**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Values (N,) read at the tokens ids[rows, columns].

        Ids (B, T) padded at the right, rows and columns (N,).
        """
        hidden = self.trunk(ids, use_cache=False).last_hidden_state  # (B, T, D)
        return self.head(hidden[rows, columns].float())[:, 0]  # (N,)
