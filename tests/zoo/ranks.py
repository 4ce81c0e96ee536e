"""The mean over the ranks of torch.distributed, as published criterions take it."""

from __future__ import annotations

import torch
import torch.distributed as dist


def mean_over_ranks(count: float) -> float:
    """A number's mean over all ranks; the number itself where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return float(count)
    total = torch.as_tensor([float(count)])
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
