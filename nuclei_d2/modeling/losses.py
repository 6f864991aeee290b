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


def class_loss(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None, ignore: int
) -> Tensor:
    """Cross-entropy, averaged over pixels by the weight of their class.

    Args:
        logits: (N, K, H, W) float.
        targets: (N, H, W) int64 in 0..K-1, or ``ignore``; at least one pixel is not ignored.
        class_weights: (K,) float; None: all 1.
        ignore: target of pixels that do not count.

    Returns:
        float32 scalar.
    """
    return F.cross_entropy(logits.float(), targets, class_weights, ignore_index=ignore)


def dice_loss(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """Mean over all classes but 0 of ``1 - (2 * sum(p * y) + 1) / (sum(p) + sum(y) + 1)``.

    Soft Dice (Milletari et al., "V-Net", 2016, with p instead of p^2) over the softmax p; sums go
    over the pixels of the whole batch, so that an image without nuclei is nothing special.

    Args:
        logits: (N, K, H, W) float, K >= 2.
        targets: (N, H, W) int64 in 0..K-1, or ``ignore``.
        ignore: target of pixels that do not count.

    Returns:
        float32 scalar in [0, 1).
    """
    counted = targets != ignore
    probs = logits.float().softmax(dim=1)
    losses = []
    for k in range(1, logits.shape[1]):
        p, y = probs[:, k] * counted, targets == k
        losses.append(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
    return sum(losses) / len(losses)


def distance_loss(predictions: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Smooth L1 (quadratic below an error of 0.1), averaged over the counted pixels.

    Args:
        predictions: (N, H, W) float.
        targets: (N, H, W) float.
        counted: (N, H, W) bool, at least one of them True.

    Returns:
        float32 scalar.
    """
    losses = F.smooth_l1_loss(predictions.float(), targets, reduction="none", beta=0.1)
    return (losses * counted).sum() / counted.sum()
