"""Losses as free functions. All are computed in float32, also inside autocast."""

from torch import Tensor
from torch.nn import functional as F


def bce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over all pixels of all RoIs.

    Args:
        logits: (N, M, M) float.
        targets: (N, M, M) bool, or float in [0, 1].

    Returns:
        float32 scalar; 0 with a gradient for N = 0.
    """
    logits = logits.float()
    if len(logits) == 0:
        return logits.sum()
    return F.binary_cross_entropy_with_logits(logits, targets.float())


def boundary_dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over RoIs of ``1 - (2 * sum(p * y) + 1) / (sum(p) + sum(y) + 1)``, p = sigmoid(logits).

    The Dice loss of Boundary-preserving Mask R-CNN (Cheng et al., ECCV 2020, section 3.3): it
    balances the few boundary pixels against the many others.

    Args:
        logits: (N, M, M) float.
        targets: (N, M, M) bool, or float in [0, 1].

    Returns:
        float32 scalar in [0, 1); 0 with a gradient for N = 0.
    """
    logits = logits.float()
    if len(logits) == 0:
        return logits.sum()
    probs = logits.sigmoid().flatten(1)
    targets = targets.float().flatten(1)
    overlap = (probs * targets).sum(dim=1)
    dice = (2 * overlap + 1) / (probs.sum(dim=1) + targets.sum(dim=1) + 1)
    return (1 - dice).mean()
