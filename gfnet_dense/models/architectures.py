"""The sizes of GFNet, in one table, and how its grids follow from each other."""

import dataclasses
from collections.abc import Sequence

from gfnet_dense.spectral import Grid

DOWNSAMPLING = 2  # between the stages of a hierarchical network


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What distinguishes one size from another.

    Attributes:
        embed_dims: Channels of each stage; one stage for an isotropic network.
        depths: Blocks of each stage.
        patch_size: Pixels a side of the patches of the first embedding.
        layer_scale_init_value: Initial LayerScale, None for a network without it.
        drop_path_rate: Drop path rate of the last block in the official training.
    """

    embed_dims: Sequence[int]
    depths: Sequence[int]
    patch_size: int
    layer_scale_init_value: float | None = None
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for field in ('embed_dims', 'depths'):
            value = getattr(self, field)
            value = (value,) if isinstance(value, int) else tuple(value)
            if not value or not all(isinstance(v, int) and v > 0 for v in value):
                raise ValueError(f'{field} must be positive integers, but got {value}')
            object.__setattr__(self, field, value)
        if self.patch_size < 1:
            raise ValueError(f'patch_size must be positive, but got {self.patch_size}')
        if len(self.embed_dims) != len(self.depths):
            raise ValueError(
                'embed_dims and depths must be of the same length, '
                f'but got {self.embed_dims} and {self.depths}'
            )


# Sizes of the official repository; drop path rates of its training commands.
ISOTROPIC = {
    'ti': Architecture(256, 12, 16),
    'xs': Architecture(384, 12, 16),
    's': Architecture(384, 19, 16, drop_path_rate=0.15),
    'b': Architecture(512, 19, 16, drop_path_rate=0.25),
}
HIERARCHICAL = {
    'h-ti': Architecture((64, 128, 256, 512), (3, 3, 10, 3), 4, 1e-3, 0.1),
    'h-s': Architecture((96, 192, 384, 768), (3, 3, 10, 3), 4, 1e-5, 0.2),
    'h-b': Architecture((96, 192, 384, 768), (3, 3, 27, 3), 4, 1e-6, 0.4),
}


def coarser(grid: Grid, stride: int) -> Grid:
    """Return the grid `(h, w)` after a convolution of that stride, rounded up."""
    return -(-grid[0] // stride), -(-grid[1] // stride)
