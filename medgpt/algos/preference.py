"""Loss of preference pairs, for reward models.

Shapes: N pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairwiseLoss(NamedTuple):
    loss: Tensor  # ()
    accuracy: Tensor  # () share of pairs with chosen > rejected, in [0, 1]


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    num_pairs: Tensor | int,
    margin: Tensor | float = 0.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> PairwiseLoss:
    """Return the sum over pairs of w * -log sigmoid(chosen - rejected - margin), over `num_pairs`.

    Bradley and Terry, 1952, as in Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, equation
    1, where the weight of a pair is 1 / C(K, 2) for K ranked answers; margin as in Touvron et al.,
    2023, https://arxiv.org/abs/2307.09288, equation 2. With `num_pairs` counted over the global
    batch, the shards' losses add up to that of the whole batch. Without pairs loss and accuracy
    are 0.

    Args:
        chosen: (N,) scores of the better answers, any floating dtype; computed in float32.
        rejected: (N,) scores of the worse answers.
        num_pairs: divisor of the loss.
        margin: minimum difference of the scores, (N,) or the same for all.
        weights: (N,) weights of the losses; accuracy is not weighted. None: all 1.
        mask: (N,) bool, True where there is a pair; elsewhere scores may hold anything. None: all.
    """
    if mask is None:
        mask = torch.ones_like(chosen, dtype=torch.bool)
    difference = chosen.float() - rejected.float() - margin
    # where, not multiply: 0 * nan is nan
    losses = -F.logsigmoid(torch.where(mask, difference, 0.0))
    if weights is not None:
        losses = losses * torch.where(mask, weights, 0.0)
    loss = torch.where(mask, losses, 0.0).sum() / num_pairs
    accuracy = ((chosen > rejected) & mask).sum() / mask.sum().clamp(min=1)
    return PairwiseLoss(loss, accuracy)
