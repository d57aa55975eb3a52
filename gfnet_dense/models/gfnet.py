"""GFNet (Global Filter Networks): sizes, blocks, networks and timm's entry points, in this order.

Papers: "Global Filter Networks for Image Classification" (NeurIPS 2021, arXiv 2107.00645) and
"GFNet: Global Filter Networks for Visual Recognition" (TPAMI 45(9), 2023,
doi 10.1109/TPAMI.2023.3263824). State dicts have the keys and shapes of the official
implementation, github.com/raoyongming/GFNet (MIT); none of its code is used here.

The networks have the interface of timm's own models, take images of any size, and run under
torch.compile, torch.export (for one height and width), torch.jit.trace and the feature extraction
of timm by torch.fx. They do not run under torch.jit.script: TorchScript supports neither autograd
functions nor the cache of resized parameters.

Inside a network a map has the shape `(B, H, W, C)`.
"""

import dataclasses
import itertools
import logging
import math
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm,
    calculate_drop_path_rates,
    create_classifier,
    register_notrace_module,
    to_2tuple,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gfnet_dense.serialization import CheckpointError
from gfnet_dense.spectral import Grid, resize_position_embedding
from gfnet_dense.spectral.tracing import is_transformed

from . import fused_block
from .checkpoint import adapt_state_dict, find_weights, prefix_errors, read_state_dict
from .global_filter import GlobalFilter
from .hub import OFFICIAL_WEIGHTS
from .mlp import Mlp, apply_to_cells
from .resize_cache import ResizeCache

_logger = logging.getLogger(__name__)

_MLP_RATIO = 4
_DOWNSAMPLING = 2  # between the stages of a hierarchical network


# Sizes


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The values that distinguish one size of GFNet from another.

    Attributes:
        embed_dims: Channels of each stage; an isotropic network has one stage.
        depths: Number of blocks of each stage.
        patch_size: Side of the patches of the first embedding, in pixels.
        layer_scale_init_value: Initial LayerScale; None for a network without LayerScale.
        drop_path_rate: Drop path rate of the last block in the official training.

    Raises:
        ValueError: If a value is not positive, or `embed_dims` and `depths` differ in length.
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
                'embed_dims and depths must have the same length, '
                f'but got {self.embed_dims} and {self.depths}'
            )


# Sizes of the official repository; drop path rates of its training commands.
ISOTROPIC = {
    'ti': Architecture(256, 12, 16),  # type: ignore[arg-type]
    'xs': Architecture(384, 12, 16),  # type: ignore[arg-type]
    's': Architecture(384, 19, 16, drop_path_rate=0.15),  # type: ignore[arg-type]
    'b': Architecture(512, 19, 16, drop_path_rate=0.25),  # type: ignore[arg-type]
}
HIERARCHICAL = {
    'h-ti': Architecture((64, 128, 256, 512), (3, 3, 10, 3), 4, 1e-3, 0.1),
    'h-s': Architecture((96, 192, 384, 768), (3, 3, 10, 3), 4, 1e-5, 0.2),
    'h-b': Architecture((96, 192, 384, 768), (3, 3, 27, 3), 4, 1e-6, 0.4),
}


class Size(NamedTuple):
    """The size of a network as its weights tell it."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    hierarchical: bool

    def __str__(self) -> str:
        table = HIERARCHICAL if self.hierarchical else ISOTROPIC
        values = f'embed_dims {self.embed_dims}, depths {self.depths}'
        for name, arch in table.items():
            if (arch.embed_dims, arch.depths) == (self.embed_dims, self.depths):
                return f'{name} ({values})'
        return f'{"a hierarchical" if self.hierarchical else "an isotropic"} network of {values}'


def image_size(img_size: int | Sequence[int]) -> Grid:
    """Return an image size in pixels, int or (H, W), as (H, W).

    Raises:
        ValueError: If it is neither, or not positive.
    """
    size = to_2tuple(img_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f'img_size must be a positive int or (H, W), but got {img_size}')
    return size[0], size[1]


def downsampled_grid(grid: Grid, stride: int) -> Grid:
    """Return the grid `(h, w)` after a patch embedding with this stride, rounded up."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


# Blocks. torch.fx knows no sizes while it traces, so whatever asks for a size becomes one node of
# its graph: modules through timm's register_notrace_module, functions through torch.fx.wrap.


@register_notrace_module
class PatchEmbed(nn.Module):
    """Projection of patches that do not overlap, `(B, H, W, C)` to `(B, H', W', C')`.

    `H' = ceil(H / patch_size)`: a side that is no multiple of `patch_size` is padded with zeros at
    its end.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Project a map `(B, H, W, C)`."""
        height, width = x.shape[1:3]
        x = x.permute(0, 3, 1, 2)
        patch = self.patch_size
        # Not -width % patch: torch.compile cannot negate a size that varies.
        pad = (0, (patch - width % patch) % patch, 0, (patch - height % patch) % patch)
        if any(pad):
            x = F.pad(x, pad)
        # In this memory format the result, seen as (B, H', W', C'), is contiguous. vmap has none.
        if not is_transformed():
            x = x.contiguous(memory_format=torch.channels_last)
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Global filter and MLP under one residual: `x + gamma * MLP(LN(filter(LN(x))))`."""

    def __init__(
        self,
        dim: int,
        grid: Grid,
        filter_resize: str,
        filter_backend: str,
        drop_path: float,
        layer_scale_init_value: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.filter = GlobalFilter(dim, grid, filter_resize, filter_backend)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, dim * _MLP_RATIO)
        self.drop_path = DropPath(drop_path)
        self.gamma = None
        if layer_scale_init_value is not None:
            self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))

    def forward(self, x: Tensor) -> Tensor:
        """Process a map `(B, H, W, C)`; the shape stays the same."""
        if (y := fused_block.run(self, x)) is not None:
            return y
        filtered = self.filter(self.norm1(x))

        def mix_channels(x: Tensor, filtered: Tensor) -> Tensor:
            y = self.drop_path(self.mlp(self.norm2(filtered)))
            return x + y if self.gamma is None else torch.addcmul(x, self.gamma, y)

        return apply_to_cells(self, mix_channels, _MLP_RATIO, x, filtered)


MakeBlock = Callable[[int, Grid], Block]


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as the official code does; leave any other module."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@torch.fx.wrap
def _check_images(x: Tensor, in_chans: int, network: str) -> None:
    if x.ndim != 4 or x.shape[1] != in_chans or 0 in x.shape[2:]:
        raise ValueError(f'{network} takes images (B, {in_chans}, H, W), but got {tuple(x.shape)}')


@register_notrace_module
class PositionEmbedding(ResizeCache):
    """Adds the position embedding of a network, which owns the parameter, to a map."""

    def forward(self, x: Tensor, pos_embed: Tensor, grid: Grid) -> Tensor:
        """Add an embedding `(1, h * w, C)` of grid `(h, w)` to a map `(B, H, W, C)`."""
        size = x.shape[1], x.shape[2]
        if size != tuple(grid):
            key = grid, size
            pos_embed = self.resized(pos_embed, key, lambda p: resize_position_embedding(p, *key))
        return x + pos_embed.unflatten(1, size)


# Networks


class GFNetBase(nn.Module):
    """The common part of the isotropic and the hierarchical network.

    A network is a sequence of levels, the parts after which a map can be taken: the blocks of an
    isotropic network, the stages of a hierarchical one.

    Args:
        arch: A name of the subclass's table, or a dict of the fields of :class:`Architecture`.
        img_size: Image size in pixels, int or (H, W), whose grid the position embedding and the
            filters live on. Images may have any size: forward resizes both.
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 for pooled features.
        global_pool: A pooling of timm; `'avg'` as in the official networks, `''` for none.
        drop_rate: Dropout before the head.
        drop_path_rate: Drop path rate of the last block, growing linearly from 0 at the first
            block. 0 by default, as elsewhere in timm; None for the official rate of `arch`.
        filter_resize: How a filter reaches another grid: `'bilinear'`, `'bicubic'`,
            `'centered'` or `'spatial'`, see :func:`gfnet_dense.spectral.resize_spectrum`.
        filter_backend: How filters are computed, see :func:`gfnet_dense.spectral.global_filter`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is not one of the above.
    """

    architectures: ClassVar[Mapping[str, Architecture]]
    default_patch_size: ClassVar[int]
    hierarchical: ClassVar[bool]
    output_fmt = 'NHWC'  # timm's name for the layout of forward_features and of unpooled outputs

    patch_embed: nn.Module
    blocks: nn.ModuleList
    feature_info: list[dict[str, Any]]
    global_pool: Any  # of timm
    loaded_from: str | None = None  # the file that load_pretrained has loaded

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float | None = 0.0,
        filter_resize: str = 'bilinear',
        filter_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.arch = spec = self.architecture_of(arch)
        if in_chans < 1 or num_classes < 0:
            raise ValueError(
                'in_chans must be positive and num_classes not negative, '
                f'but got {in_chans} and {num_classes}'
            )
        size = image_size(img_size)
        drop_path_rate = spec.drop_path_rate if drop_path_rate is None else drop_path_rate
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be within [0, 1), but got {drop_path_rate}')
        self.in_chans = in_chans
        self.num_features = spec.embed_dims[-1]
        self.grad_checkpointing = False

        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(spec.depths)))

        def make_block(dim: int, grid: Grid) -> Block:
            return Block(
                dim, grid, filter_resize, filter_backend, next(rates), spec.layer_scale_init_value
            )

        self.grid = downsampled_grid(size, spec.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), spec.embed_dims[0]))
        self.add_position = PositionEmbedding()
        self._build(spec, make_block)
        self.norm: nn.Module = LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self._make_head(num_classes, global_pool)
        # Filters and LayerScales have their initial values; convolutions keep torch's default.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)
        self.to(device=device, dtype=dtype)

    @classmethod
    def architecture_of(cls, arch: str | Mapping[str, Any]) -> Architecture:
        """Return the architecture that the argument `arch` of a network means."""
        network, table = cls.__name__, cls.architectures
        if isinstance(arch, str):
            if arch not in table:
                raise ValueError(
                    f'unknown arch {arch!r} of {network}, choose one of {", ".join(table)} '
                    'or give a dict with embed_dims and depths'
                )
            return table[arch]
        fields = [field.name for field in dataclasses.fields(Architecture)]
        if not isinstance(arch, Mapping) or not {'embed_dims', 'depths'} <= set(arch) <= {*fields}:
            raise ValueError(
                f'arch of {network} must be a name or a dict with embed_dims and depths and '
                f'perhaps {", ".join(fields[2:])}, but got {arch!r}'
            )
        return Architecture(**{'patch_size': cls.default_patch_size, **arch})

    @abstractmethod
    def _build(self, spec: Architecture, make_block: MakeBlock) -> None:
        """Make `patch_embed`, `blocks` and `feature_info`."""

    @abstractmethod
    def _forward_level(self, x: Tensor, level: int) -> Tensor:
        """Compute a level from the map `(B, H, W, C)` of the level before it, or from images."""

    def _forward_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _to_maps(self, images: Tensor) -> Tensor:
        """Check images `(B, C, H, W)` and return them as maps `(B, H, W, C)`."""
        _check_images(images, self.in_chans, type(self).__name__)
        return images.permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Any:
        """Compute logits `(B, num_classes)` of images `(B, in_chans, H, W)` of any size.

        Raises:
            ValueError: If `x` does not have that shape.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map `(B, H', W', C)`, after the norm."""
        x = self._to_maps(x)
        for level in range(len(self.blocks)):
            x = self._forward_level(x, level)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a map of :meth:`forward_features`, or only pool it (`pre_logits`)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the last map and intermediate ones.

        Args:
            x: Images `(B, in_chans, H, W)`.
            indices: Levels: n for the last n, None for all; negative ones count from the end.
            norm: Apply the norm to the maps that have its channels.
            stop_early: Compute nothing after the last map that is asked for.
            output_fmt: `'NCHW'` or `'NHWC'`.
            intermediates_only: Return the intermediate maps alone.

        Returns:
            The map of :meth:`forward_features`, or with `stop_early` the map of the level where it
            stopped, and the intermediate maps, in the order of the network.

        Raises:
            ValueError: If `output_fmt` is neither of the two.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f'output_fmt must be NCHW or NHWC, but got {output_fmt!r}')
        taken, last = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        y = self._to_maps(x)
        for level in range(last + 1 if stop_early else len(self.blocks)):
            y = self._forward_level(y, level)
            if level in taken:
                z = self._normalize(y) if norm else y
                if output_fmt == 'NCHW':
                    # In memory too: operators of mmcv such as RoIAlign do not look at strides.
                    z = z.permute(0, 3, 1, 2).contiguous()
                intermediates.append(z)
        return intermediates if intermediates_only else (self._normalize(y), intermediates)

    def _normalize(self, y: Tensor) -> Tensor:
        return self.norm(y) if y.shape[-1] == self.num_features else y

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of :meth:`forward_intermediates` do not need.

        Norm and head are removed in any case if the last map left has other channels than theirs.

        Args:
            indices: The maps, as in :meth:`forward_intermediates`.
            prune_norm: Remove the norm.
            prune_head: Remove the head.

        Returns:
            The indices, none of them negative.
        """
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if isinstance(self.patch_embed, nn.ModuleList):
            self.patch_embed = self.patch_embed[: last + 1]
        num_features = self.feature_info[last]['num_chs']
        changed = num_features != self.num_features
        self.num_features = num_features
        if prune_norm or changed:
            self.norm = nn.Identity()
        if prune_head or changed:
            self.reset_classifier(0, '')
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; None keeps the pooling."""
        self._make_head(num_classes, global_pool)
        self.head.apply(init_linear).to(self.pos_embed).train(self.training)

    def _make_head(self, num_classes: int, global_pool: str | None) -> None:
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type, input_fmt=self.output_fmt
        )
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay, besides norms, biases and LayerScale."""
        return {'pos_embed'}

    # Names. What the parameters are called is known here and nowhere else.

    def _place(self, name: str) -> tuple[int, int] | None:
        """Return stage and block of a parameter or module; block -1 is the patch embedding."""
        first, *rest = name.split('.')
        numbers = [int(number) for number in itertools.takewhile(str.isdecimal, rest)]
        numbers = numbers if self.hierarchical else [0, *numbers]
        if first == 'pos_embed':
            return 0, -1
        if first == 'patch_embed' and numbers:
            return numbers[0], -1
        return (numbers[0], numbers[1]) if first == 'blocks' and len(numbers) > 1 else None

    def get_level(self, name: str) -> int | None:
        """Return the level of a parameter or module; None for norm, head and anything foreign."""
        place = self._place(name)
        return None if place is None else place[0] if self.hierarchical else max(place[1], 0)

    def get_stage(self, name: str) -> int | None:
        """Return the stage of a parameter or module; None for head and anything foreign."""
        if name.partition('.')[0] == self.final_norm:
            return len(self.arch.depths) - 1
        place = self._place(name)
        return None if place is None else place[0]

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer of a parameter for layer decay, and the number of layers.

        Layer 0 is the stem; then every block is a layer, with the patch embedding before it; the
        last layer is the norm, the head and anything that is not of this network. The names of this
        network begin with `prefix`, such as `'backbone.'`.
        """
        stages: Any = self.blocks if self.hierarchical else [self.blocks]
        depths = [len(stage) for stage in stages]
        num_layers = sum(depths) + 2
        is_own = param_name.startswith(prefix)
        place = self._place(param_name.removeprefix(prefix)) if is_own else None
        if place is None:
            return num_layers - 1, num_layers
        stage, block = place
        depth = 0 if place == (0, -1) else sum(depths[:stage]) + max(block, 0) + 1
        return depth, num_layers

    @staticmethod
    def recognize_size(state: Mapping[str, Tensor]) -> Size:
        """Return the size of the network that weights belong to.

        Raises:
            CheckpointError: If these are no weights of a GFNet.
        """
        dims: dict[int, list[int]] = defaultdict(list)  # of the blocks of each stage
        hierarchical = False
        for key, value in state.items():
            if match := re.fullmatch(r'blocks\.(?:(\d+)\.)?\d+\.norm1\.weight', key):
                hierarchical |= match[1] is not None
                dims[int(match[1] or 0)].append(value.numel())
        if not dims:
            raise CheckpointError('holds no weights of a GFNet, which has keys like blocks.0.…')
        stages = [dims[stage] for stage in sorted(dims)]
        return Size(tuple(stage[-1] for stage in stages), tuple(map(len, stages)), hierarchical)

    def stage_grids(self, grid: Grid) -> list[Grid]:
        """Return the grid of each stage for maps whose first grid is `grid`."""
        grids = [grid]
        for _ in self.arch.depths[1:]:
            grids.append(downsampled_grid(grids[-1], _DOWNSAMPLING))
        return grids

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Store position embedding and filters for an image size in pixels, int or (H, W).

        The outputs for images of that size stay the same: forward resizes in the same way.

        Raises:
            ValueError: If the size is not positive.
        """
        grid = downsampled_grid(image_size(img_size), self.arch.patch_size)
        embedding = resize_position_embedding(self.pos_embed, self.grid, grid)
        self.pos_embed = nn.Parameter(embedding, self.pos_embed.requires_grad)
        self.add_position.clear_cache()
        self.grid = grid
        stages: Any = self.blocks if self.hierarchical else [self.blocks]
        # Levels that were pruned have no blocks.
        for blocks, stage_grid in zip(stages, self.stage_grids(grid), strict=False):
            for block in blocks:
                block.filter.set_grid(stage_grid)

    @property
    def final_norm(self) -> str:
        """The name of the norm after the last level."""
        return 'norm'

    @property
    def size(self) -> Size:
        """The size of the whole network, also if levels were pruned."""
        return Size(tuple(self.arch.embed_dims), tuple(self.arch.depths), self.hierarchical)

    # Weights

    def load_pretrained(self, checkpoint_path: str | Path) -> None:
        """Load a checkpoint, resizing what lives on another grid.

        Loading is strict: only the classifier, the norms of the outputs and the channels of the
        images may differ from the file. The log says what was loaded, which parameters were
        resized, and which keep their initial values; of a classifier it warns.

        Args:
            checkpoint_path: A file, or a name of official weights such as `'gfnet-h-s'`, which are
                downloaded on first use.

        Raises:
            FileNotFoundError: If there is no such file.
            DownloadError: If official weights are not there yet and cannot be downloaded.
            CheckpointError: If the file cannot be read safely or does not fit the network.
        """
        path = find_weights(checkpoint_path, official_network)
        state = read_state_dict(path)
        with prefix_errors(path):
            state, notes = adapt_state_dict(state, self)
        # adapt_state_dict has settled what may be missing; it is named below.
        missing, _ = self.load_state_dict(state, strict=False)
        self.loaded_from = str(path)
        _logger.info('loaded %d tensors from %s', len(state), path)
        for note in notes:
            _logger.info(note)
        if missing:
            level = logging.WARNING if 'head.weight' in missing else logging.INFO
            _logger.log(level, 'not in %s, newly initialised: %s', path, ', '.join(missing))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also take the weights of a classifier that holds the network as `backbone`."""
        outer = f'{prefix}backbone.'
        for key in [key for key in state_dict if key.startswith(outer)]:
            state_dict[prefix + key.removeprefix(outer)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


# timm's mark for parameters that belong to the layer before them.
_LAST = ('^norm', (99999,))


class GFNet(GFNetBase):
    """Isotropic GFNet: one patch embedding, blocks of one width. Each block is a level.

    Maps have the stride of the patches, 16 pixels by default. See :class:`GFNetBase` for the
    arguments; `arch` is `'ti'`, `'xs'`, `'s'`, `'b'` or a dict.
    """

    architectures = ISOTROPIC
    default_patch_size = 16
    hierarchical = False

    def _build(self, spec: Architecture, make_block: MakeBlock) -> None:
        if len(spec.depths) != 1:
            raise ValueError(f'GFNet has one stage, but got depths {spec.depths}')
        (dim,), (depth,) = spec.embed_dims, spec.depths
        self.patch_embed = PatchEmbed(self.in_chans, dim, spec.patch_size)
        self.blocks = nn.ModuleList(make_block(dim, self.grid) for _ in range(depth))
        self.feature_info = [
            dict(num_chs=dim, reduction=spec.patch_size, module=f'blocks.{i}') for i in range(depth)
        ]

    def _forward_level(self, x: Tensor, level: int) -> Tensor:
        if level == 0:
            x = self.add_position(self.patch_embed(x), self.pos_embed, self.grid)
        return self._forward_block(self.blocks[level], x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Tell timm the layers: the stem, then each block; the norm belongs to the last block."""
        return dict(stem='^(?:pos_embed|patch_embed)', blocks=[(r'^blocks\.(\d+)', None), _LAST])


class GFNetPyramid(GFNetBase):
    """Hierarchical GFNet: stages of strides 4, 8, 16 and 32. Each stage is a level.

    See :class:`GFNetBase` for the arguments; `arch` is `'h-ti'`, `'h-s'`, `'h-b'` or a dict.
    """

    architectures = HIERARCHICAL
    default_patch_size = 4
    hierarchical = True
    patch_embed: nn.ModuleList

    def _build(self, spec: Architecture, make_block: MakeBlock) -> None:
        self.patch_embed = nn.ModuleList()
        self.blocks = nn.ModuleList()
        self.feature_info = []
        in_chans, patch_size, reduction = self.in_chans, spec.patch_size, spec.patch_size
        stages = zip(spec.embed_dims, spec.depths, self.stage_grids(self.grid), strict=True)
        for stage, (dim, depth, grid) in enumerate(stages):
            self.patch_embed.append(PatchEmbed(in_chans, dim, patch_size))
            self.blocks.append(nn.ModuleList(make_block(dim, grid) for _ in range(depth)))
            module = f'blocks.{stage}.{depth - 1}'
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=module))
            in_chans, patch_size, reduction = dim, _DOWNSAMPLING, reduction * _DOWNSAMPLING

    def _forward_level(self, x: Tensor, level: int) -> Tensor:
        x = self.patch_embed[level](x)
        if level == 0:
            x = self.add_position(x, self.pos_embed, self.grid)
        stage: Any = self.blocks[level]
        for block in stage:
            x = self._forward_block(block, x)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Tell timm the layers: the stem, then each block, or each stage if `coarse`.

        A patch embedding belongs to the layer after it, the norm to the layer before it.
        """
        blocks = [(r'^patch_embed\.(\d+)', (0,)), (r'^blocks\.(\d+)\.(\d+)', None)]
        if coarse:
            blocks = [(r'^(?:patch_embed|blocks)\.(\d+)', None)]
        return dict(stem=r'^(?:pos_embed|patch_embed\.0)', blocks=[*blocks, _LAST])


# From weights to networks


def network_of(state: Mapping[str, Tensor]) -> GFNetBase:
    """Build the network that weights belong to, by their keys and shapes, without loading them.

    Raises:
        CheckpointError: If there is no such network.
    """
    size = GFNetBase.recognize_size(state)
    network: type[GFNetBase] = GFNetPyramid if size.hierarchical else GFNet
    first = '.0' if size.hierarchical else ''
    stem, block = f'patch_embed{first}', f'blocks{first}.0'
    try:
        _, in_chans, patch_size, _ = state[f'{stem}.proj.weight'].shape
        rows = state[f'{block}.filter.complex_weight'].shape[0]
        columns = state['pos_embed'].shape[1] // rows
        return network(
            {
                'embed_dims': size.embed_dims,
                'depths': size.depths,
                'patch_size': patch_size,
                'layer_scale_init_value': 1.0 if f'{block}.gamma' in state else None,
            },
            img_size=(rows * patch_size, columns * patch_size),
            in_chans=in_chans,
            num_classes=state['head.weight'].shape[0] if 'head.weight' in state else 0,
        )
    except KeyError as e:
        raise CheckpointError(f'lacks {e.args[0]}') from None
    except (ValueError, IndexError, ZeroDivisionError) as e:
        raise CheckpointError(f'its shapes are those of no GFNet: {e}') from None


def official_network(name: str) -> GFNetBase:
    """Return the network of official weights, such as `'gfnet-h-s'`, on the meta device."""
    arch = name.removeprefix('gfnet-')
    with torch.device('meta'):
        return (GFNetPyramid if arch in HIERARCHICAL else GFNet)(arch)


# Entry points of timm

_SOURCES = {'url', 'file', 'hf_hub_id', 'state_dict'}  # of weights, in a pretrained_cfg


def _create(
    network: type[GFNetBase],
    size: str,
    pretrained: bool,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    out_indices: int | Sequence[int] | None = None,
    output_stride: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    name = f'gfnet_{size.replace("-", "_")}'
    stride = 32 if network.hierarchical else 16
    if output_stride not in (None, stride):
        raise ValueError(
            f'{name} has an output stride of {stride} and no dilated form, but got output_stride='
            f'{output_stride}: take a decoder over a pyramid, such as Unet, FPN or UPerNet'
        )
    if out_indices is None:  # the last four: all stages of a hierarchical network of these sizes
        depths = network.architecture_of(kwargs.get('arch', size)).depths
        out_indices = min(4, len(depths) if network.hierarchical else sum(depths))
    # load_pretrained reads files as strictly as everywhere in this package.
    overlay = {'custom_load': True, **(pretrained_cfg_overlay or {})}
    if 'url' in overlay or 'hf_hub_id' in overlay:
        overlay.setdefault('file', None)  # which timm would prefer
    official = not (isinstance(kwargs.get('pretrained_cfg'), dict) or overlay.keys() & _SOURCES)
    if official and pretrained and cache_dir is not None:
        raise ValueError(
            f'cache_dir={str(cache_dir)!r} does not apply to official weights: they are in the '
            'checkpoints folder of torch.hub, which the environment variable TORCH_HOME moves'
        )
    return build_model_with_cfg(
        network,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        cache_dir=cache_dir,
        pretrained_filter_fn=lambda state, model: adapt_state_dict(state, model)[0],
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **{'arch': size, **kwargs},
    )


def _cfg(weights: str, top1: float, top5: float) -> dict[str, Any]:
    tsinghua, google = OFFICIAL_WEIGHTS[weights]
    hierarchical = weights.startswith('gfnet-h')
    return dict(
        file=weights,  # a name that load_pretrained downloads
        url=f'https://cloud.tsinghua.edu.cn/f/{tsinghua}/?dl=1',
        custom_load=True,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7) if hierarchical else (14, 14),
        interpolation='bicubic',
        crop_pct=0.875,  # 224 of 256
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv='patch_embed.0.proj' if hierarchical else 'patch_embed.proj',
        classifier='head',
        license='mit',
        origin_url='https://github.com/raoyongming/GFNet',
        paper_name='Global Filter Networks for Image Classification',
        paper_ids='arXiv:2107.00645',
        notes=(
            f'ImageNet-1K top-1 {top1}%, top-5 {top5}%, as reported by the authors',
            f'also at https://drive.google.com/file/d/{google}',
        ),
    )


default_cfgs = generate_default_cfgs(
    {
        'gfnet_ti.in1k': _cfg('gfnet-ti', 74.6, 92.2),
        'gfnet_xs.in1k': _cfg('gfnet-xs', 78.6, 94.2),
        'gfnet_s.in1k': _cfg('gfnet-s', 80.0, 94.9),
        'gfnet_b.in1k': _cfg('gfnet-b', 80.7, 95.1),
        'gfnet_h_ti.in1k': _cfg('gfnet-h-ti', 80.1, 95.1),
        'gfnet_h_s.in1k': _cfg('gfnet-h-s', 81.5, 95.6),
        'gfnet_h_b.in1k': _cfg('gfnet-h-b', 82.9, 96.2),
    }
)


def _entry_point(network: type[GFNetBase], size: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(network, size, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = f'gfnet_{size.replace("-", "_")}'
    create.__doc__ = (
        f'{network.__name__} {size}; `kwargs` are those of :class:`GFNetBase` and of timm.'
    )
    return register_model(create)


gfnet_ti = _entry_point(GFNet, 'ti')
gfnet_xs = _entry_point(GFNet, 'xs')
gfnet_s = _entry_point(GFNet, 's')
gfnet_b = _entry_point(GFNet, 'b')
gfnet_h_ti = _entry_point(GFNetPyramid, 'h-ti')
gfnet_h_s = _entry_point(GFNetPyramid, 'h-s')
gfnet_h_b = _entry_point(GFNetPyramid, 'h-b')
