"""Estimate the KL divergence from the reference, and adapt the KL coefficient.

Shapes: B sequences, T response tokens, padded on the right.
"""

from typing import Literal, TypedDict

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Return (B, T) KL(policy || reference) in nats, estimated from each sampled token.

    Schulman, http://joschu.net/blog/kl-approx.html, with d = log p - log p_ref: k1 is d, k2 is
    d^2 / 2, k3 is exp(-d) - 1 + d. k1 and k3 are unbiased. k2 and k3 are never negative, but as a
    reward they do not have the gradient of the reverse KL; k1 has.

    Args:
        logprobs: (B, T) of the tokens that the policy sampled.
        ref_logprobs: (B, T) of the same tokens under the reference.
    """
    difference = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return (-difference).expm1() + difference  # expm1: exact if the two agree


class AdaptiveKLState(TypedDict):
    coef: float


class AdaptiveKL:
    """A KL coefficient that is adapted to reach a target KL (Ziegler et al., 2019, section 2.2).

    https://arxiv.org/abs/1909.08593
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        """`target` in nats per sequence; `horizon` in sequences."""
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, mean_kl: float, num_sequences: int) -> None:
        """Raise the coefficient if the KL is above the target, lower it if below.

        Args:
            mean_kl: mean over sequences of the sum over tokens, in nats.
        """
        error = min(max(mean_kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_sequences / self.horizon

    def state_dict(self) -> AdaptiveKLState:
        return {"coef": self.coef}

    def load_state_dict(self, state: AdaptiveKLState) -> None:
        self.coef = state["coef"]
