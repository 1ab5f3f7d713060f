"""Diversity of one set, without a reference: its effective number of different items, and their mean distance.

Prompt diversity (many prompts, one seed) and noise diversity (one prompt, many seeds) are different claims; distillation loses
the second first. Pass the second as groups to `mean_pairwise_distance` and divide by the teacher's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.samples import Samples, as_samples


def vendi(features: Samples) -> float:
    """The Vendi score (Friedman & Dieng 2023): exp of the entropy of the eigenvalues of the cosine kernel over n.

    Between 1 (all features parallel) and min(n, d). Cosines are taken about the origin: standardise the features by the
    reference first, or a common offset makes everything look alike.
    """
    rows = as_samples(features, "features", least=1)
    norms = rows.norm(dim=1)
    if bool((norms == 0).any()):
        raise UserError(
            f"{int((norms == 0).sum())} feature rows are all zero and have no direction. Check the feature network."
        )
    # The eigenvalues of K / n are the squared singular values of the unit rows over sqrt(n): no n x n matrix.
    share = torch.linalg.svdvals(rows / norms[:, None]).square() / len(rows)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def mean_pairwise_distance(features: Tensor | np.ndarray) -> float:
    """The mean Euclidean distance over all pairs of different rows of (k, d); of (groups, k, d), the mean over the groups."""
    tensor = features if isinstance(features, Tensor) else torch.as_tensor(np.asarray(features))
    groups = tensor[None] if tensor.ndim == 2 else tensor
    if groups.ndim != 3 or len(groups) == 0:
        raise UserError(
            f"features have shape {tuple(tensor.shape)}; give (k, d), or (groups, k, d) for k seeds of each prompt."
        )
    return sum(float(torch.pdist(as_samples(group, "features")).mean()) for group in groups) / len(groups)
