"""Samplers of training data."""

from collections.abc import Iterator
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

    def __iter__(self) -> Iterator[int]:
        """Return the indices of an epoch, which has its own order."""
        epoch, self.epoch = self.epoch, self.seed + self.epoch  # timm seeds the order with it
        try:
            return super().__iter__()
        finally:
            self.epoch = epoch
