"""The causal model that PPO trains: log-probabilities and entropies of the sampled tokens."""

import torch
from torch import Tensor

from medgpt.algos.logprobs import label_logprobs, policy_terms
from medgpt.data.loader.batch import PackedBatch
from medgpt.models.language_model import LanguageModel, label_positions


class Policy(LanguageModel):
    """Takes the arguments of LanguageModel."""

    def forward(  # type: ignore[override] - the loss is PPO's, outside of the model
        self, batch: PackedBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> Tensor:
        """Return (2, M) float32: log p(label) and entropy in nats at the M positions with a label.

        The entropy is 0 unless `with_entropy`. A batch without labels yields one column of exactly
        0 with a gradient path to every weight, so that a rank without data takes part in the
        collectives.
        """

        def terms(logits: Tensor, labels: Tensor) -> Tensor:
            if with_entropy:
                return torch.stack(policy_terms(logits, labels, temperature=temperature))
            logprobs = label_logprobs(logits, labels, temperature=temperature, overwrite=True)
            return torch.stack([logprobs, torch.zeros_like(logprobs)])

        return torch.cat(self._map_label_chunks(terms, batch, label_positions(batch)), dim=1)
