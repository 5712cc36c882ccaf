"""A language model that is quick enough to be trained in a test."""

import torch
from torch import Tensor, nn

from mlreviews.models import LMOutput


class Bigram(nn.Module):
    """A `CausalLM` that sees the last token only; for texts without padding."""

    vocab_size, max_length = 259, None

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(self.vocab_size, width, generator=generator)
        self.embed_tokens = nn.Embedding(self.vocab_size, width, _weight=vectors)
        self.norm = nn.Identity()
        self.lm_head = nn.Linear(width, self.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, generator=generator)

    def forward(self, ids: Tensor, cache: object = None, **layout: object) -> LMOutput:
        hidden = self.embed_tokens(ids)
        return LMOutput(self.lm_head(hidden), cache, (hidden,))
