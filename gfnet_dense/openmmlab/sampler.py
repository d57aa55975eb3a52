"""Samplers of training data."""

from typing import Any

import timm.data.distributed_sampler
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Dataset


@DATA_SAMPLERS.register_module()
class RepeatAugSampler(timm.data.distributed_sampler.RepeatAugSampler):
    """timm's repeated augmentation: every image several times, each time in another process.

    The number of samples of an epoch stays the same. In a single process the repetitions of an
    image follow each other.

    Args:
        dataset: The dataset.
        seed: Seed of the order, the same in all processes; None for a random one.
        **kwargs: Arguments of timm's sampler, such as `num_repeats`, 3 by default.
    """

    def __init__(self, dataset: Dataset[Any], seed: int | None = None, **kwargs: Any) -> None:
        rank, world_size = get_dist_info()
        super().__init__(dataset, num_replicas=world_size, rank=rank, **kwargs)
        self.seed = sync_random_seed() if seed is None else seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which gives each its own order."""
        super().set_epoch(self.seed + epoch)  # timm seeds the order with it
