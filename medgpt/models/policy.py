"""A causal model as PPO sees it: log-probabilities and entropies of the sampled tokens."""

from functools import partial

import torch
from torch import Tensor

from medgpt.algos.logprobs import policy_terms
from medgpt.data.batch import PackedBatch
from medgpt.models.language_model import LanguageModel, label_positions


class Policy(LanguageModel):
    """The arguments are a language model's."""

    def forward(  # type: ignore[override] - the loss is PPO's, outside of the model
        self, batch: PackedBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> Tensor:
        """(2, M) float32: log p(label) and entropy at the M positions with a label, in order.

        A batch without labels yields one column that is exactly 0, connected to every weight, so
        that a rank without work takes part in the collectives of the others.
        """
        terms = partial(policy_terms, temperature=temperature, with_entropy=with_entropy)
        chunks = self._per_chunk(
            lambda logits, labels: torch.stack(terms(logits, labels)), batch, label_positions(batch)
        )
        return torch.cat(chunks, dim=1)
