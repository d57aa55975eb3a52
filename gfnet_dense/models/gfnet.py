"""GFNet, for classification and for dense prediction on images of any size.

Papers: "Global Filter Networks for Image Classification" (NeurIPS 2021, arXiv 2107.00645) and
"GFNet: Global Filter Networks for Visual Recognition" (TPAMI 45(9), 2023,
doi 10.1109/TPAMI.2023.3263824). State dicts have the keys and shapes of the official
implementation, github.com/raoyongming/GFNet (MIT); none of its code is used here.

Inside a network a map stays `(B, H, W, C)`; it is copied to `(B, C, H, W)` on its way out.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from mmengine.model import BaseModule, PretrainedInit, initialize
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from timm.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gfnet_dense.spectral import Grid, resize_position_embedding

from .architectures import DOWNSAMPLING, HIERARCHICAL, ISOTROPIC, Architecture, coarser
from .checkpoint import load_pretrained
from .global_filter import GlobalFilter

_MLP_RATIO = 4
_PRETRAINED = ('Pretrained', 'mmengine.Pretrained', PretrainedInit)


# torch.fx knows no sizes while it traces. What asks for them becomes one node of its graph: modules
# by timm's register_notrace_module, functions by torch.fx.wrap.
@register_notrace_module
class PatchEmbed(nn.Module):
    """Projection of patches that do not overlap, `(B, C, H, W)` to `(B, H', W', C')`.

    `H' = ceil(H / patch_size)`: what a side lacks is filled with zeros at its end.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Project a map of shape `(B, C, H, W)`."""
        height, width = x.shape[-2:]
        pad = (0, -width % self.patch_size, 0, -height % self.patch_size)
        if any(pad):
            x = F.pad(x, pad)
        # In this memory format the result is contiguous, as whatever follows wants it.
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
        """Process a map of shape `(B, H, W, C)`."""
        y = self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x)))))
        return x + y if self.gamma is None else torch.addcmul(x, self.gamma, y)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as the official code does; leave anything else."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@torch.fx.wrap
def _check_images(x: Tensor, in_channels: int, network: str) -> None:
    if x.ndim != 4 or x.shape[1] != in_channels or 0 in x.shape[2:]:
        raise ValueError(
            f'{network} takes images of shape (B, {in_channels}, H, W), but got {tuple(x.shape)}'
        )


@torch.fx.wrap
def _add_position(x: Tensor, pos_embed: Tensor, grid: Grid) -> Tensor:
    """Add a position embedding of that grid to a map `(B, H, W, C)`."""
    size = x.shape[1], x.shape[2]
    return x + resize_position_embedding(pos_embed, grid, size).unflatten(1, size)


class GFNetBase(BaseModule):
    """What the isotropic and the hierarchical network share.

    A subclass arranges the blocks in levels, the parts of the network after each of which a map
    can be taken. Levels after the last one that is asked for are not built.

    Args:
        arch: A name of the subclass's table or a dict of the fields of :class:`Architecture`.
        img_size: Image size in pixels, int or (H, W), whose grid position embedding and filters
            live on. Other images are taken too: both are resized in forward.
        in_channels: Channels of the images.
        num_classes: Classes of the head; 0 for a backbone without one.
        out_indices: Levels whose maps a backbone returns; None for the default of the subclass.
        filter_resize: How a filter reaches another grid: `'bilinear'`, `'bicubic'`,
            `'centered'` or `'spatial'`, see :func:`gfnet_dense.spectral.resize_spectrum`.
        filter_backend: How filters are computed, see :func:`gfnet_dense.spectral.global_filter`.
        drop_path_rate: Drop path rate of the last block, growing linearly from 0 at the first;
            None for the official one of `arch`.
        frozen_stages: 0 freezes the first patch embedding and the position embedding, n also
            the first n levels with the norms of their outputs; -1 freezes nothing.
        norm_eval: Keep norms in evaluation mode while training. This matters for norms with
            running statistics put in place of the LayerNorms, which have none.
        with_cp: Recompute the blocks in the backward pass to save memory.
        init_cfg: See :class:`mmengine.model.BaseModule`; `dict(type='Pretrained',
            checkpoint=...)` takes a path, of an official file, too, or the name of official
            weights, such as `'gfnet-h-s'`, which are downloaded on first use.

    Raises:
        ValueError: If an argument is not one of the above.
    """

    architectures: Mapping[str, Architecture]
    default_patch_size: int
    loaded_from: str | None = None  # the file that init_weights loaded

    def __init__(
        self,
        arch: str | Mapping,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        num_classes: int = 0,
        out_indices: Sequence[int] | None = None,
        filter_resize: str = 'bilinear',
        filter_backend: str = 'auto',
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        spec = self._architecture(arch)
        level_dims = self._level_dims(spec)
        if in_channels < 1 or num_classes < 0:
            raise ValueError(
                'in_channels must be positive and num_classes not negative, '
                f'but got {in_channels} and {num_classes}'
            )
        size = to_2tuple(img_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f'img_size must be a positive int or (H, W), but got {img_size}')
        drop_path_rate = spec.drop_path_rate if drop_path_rate is None else drop_path_rate
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be within [0, 1), but got {drop_path_rate}')
        if not -1 <= frozen_stages <= len(level_dims):
            raise ValueError(
                f'frozen_stages must be within -1..{len(level_dims)}, but got {frozen_stages}'
            )
        self.arch = spec
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_indices = self._resolve(out_indices, len(level_dims))
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(spec.depths)))

        def make_block(dim: int, grid: Grid) -> Block:
            return Block(
                dim, grid, filter_resize, filter_backend, next(rates), spec.layer_scale_init_value
            )

        self.grid = coarser(size, spec.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), spec.embed_dims[0]))
        self._build(spec, make_block)
        self._build_outputs(level_dims)
        # The filters and LayerScales are made as they start; convolutions keep torch's default.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)
        self._freeze()

    def _architecture(self, arch: str | Mapping) -> Architecture:
        network, table = type(self).__name__, self.architectures
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
        return Architecture(**{'patch_size': self.default_patch_size, **arch})

    @abstractmethod
    def _level_dims(self, spec: Architecture) -> Sequence[int]:
        """Return the channels of each level of the whole network."""

    @abstractmethod
    def _build(self, spec: Architecture, make_block: Callable[[int, Grid], Block]) -> None:
        """Make `patch_embed` and `blocks`, up to the last level of `out_indices`."""

    @abstractmethod
    def _levels(self) -> Iterator[tuple[PatchEmbed | None, Sequence[nn.Module]]]:
        """Yield the patch embedding, where there is one, and the blocks of each level."""

    def _build_outputs(self, level_dims: Sequence[int]) -> None:
        """Make what follows the maps: norm and head of a classifier, the norms of a backbone."""
        if self.num_classes:
            self.norm = LayerNorm(level_dims[-1])
            self.head = nn.Linear(level_dims[-1], self.num_classes)
        else:
            for i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm(level_dims[i]))

    def _default_out_indices(self, num_levels: int) -> Sequence[int]:
        return [num_levels - 1]

    def _resolve(self, out_indices: Sequence[int] | None, num_levels: int) -> tuple[int, ...]:
        if self.num_classes:
            if out_indices is not None:
                raise ValueError(
                    f'a classifier has no out_indices, but got {out_indices} '
                    f'with num_classes={self.num_classes}'
                )
            return (num_levels - 1,)
        if out_indices is None:
            out_indices = self._default_out_indices(num_levels)
        resolved = tuple(i + num_levels if i < 0 else i for i in out_indices)
        if not resolved or list(resolved) != sorted({*resolved} & {*range(num_levels)}):
            raise ValueError(
                f'out_indices must be increasing and within 0..{num_levels - 1} '
                f'(or negative, from the end), but got {tuple(out_indices)}'
            )
        return resolved

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute logits or maps of a batch of images.

        Args:
            x: Images of shape `(B, in_channels, H, W)`, any H and W from 1 up.

        Returns:
            Logits of shape `(B, num_classes)`, or without a head the maps of `out_indices`, each
            through its LayerNorm, of shape `(B, C_i, H_i, W_i)` in contiguous memory.

        Raises:
            ValueError: If `x` is not of that shape.
        """
        maps = [y for i, y in enumerate(self._forward_levels(x)) if i in self.out_indices]
        if self.num_classes:
            return self.head(self.norm(maps[-1]).mean(dim=(1, 2)))
        return tuple(
            # Operators of mmcv, RoIAlign among them, read any other memory format as this one.
            self.get_submodule(f'norm{i}')(y).permute(0, 3, 1, 2).contiguous()
            for i, y in zip(self.out_indices, maps, strict=True)
        )

    def _forward_levels(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the map `(B, H_i, W_i, C_i)` after each level, before any norm."""
        _check_images(x, self.in_channels, type(self).__name__)
        for level, (patch_embed, blocks) in enumerate(self._levels()):
            if patch_embed is not None:
                x = patch_embed(x if level == 0 else x.permute(0, 3, 1, 2))
            if level == 0:
                x = _add_position(x, self.pos_embed, self.grid)
            for block in blocks:
                if self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            yield x

    def init_weights(self) -> None:
        """Load what `init_cfg` names; without it the initialisation of the constructor stands.

        A `Pretrained` file is loaded by :func:`gfnet_dense.models.checkpoint.load_pretrained`,
        which is strict where mmengine's own loading only logs what does not fit.

        Raises:
            ValueError: If there is no `type`, or a `Pretrained` has more or less than a
                `checkpoint`.
        """
        cfgs = self.init_cfg or []
        cfgs = [cfgs] if isinstance(cfgs, Mapping) else cfgs
        for cfg in cfgs:
            if 'type' not in cfg:
                raise ValueError(
                    f'init_cfg of {type(self).__name__} has no type, but is {dict(cfg)}: give '
                    'type=Pretrained, too'
                )
        files = [cfg for cfg in cfgs if cfg['type'] in _PRETRAINED]
        if not files:
            super().init_weights()
            return
        for cfg in files:
            if set(cfg) != {'type', 'checkpoint'}:
                raise ValueError(
                    f'init_cfg of {type(self).__name__} takes type and checkpoint alone (it finds '
                    f'the backbone of a segmentor or detector by itself), but got {dict(cfg)}'
                )
        initialize(self, [cfg for cfg in cfgs if cfg not in files])
        for cfg in files:
            load_pretrained(self, cfg['checkpoint'])
        self._is_init = True

    def train(self, mode: bool = True) -> 'GFNetBase':
        """Set the mode; what is frozen, and with `norm_eval` every norm, stays in evaluation."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, (nn.LayerNorm, _BatchNorm, _InstanceNorm)):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        self.pos_embed.requires_grad = False
        for level, (patch_embed, blocks) in enumerate(self._levels()):
            frozen = [patch_embed] if level in range(max(1, self.frozen_stages)) else []
            if level < self.frozen_stages:
                frozen += [*blocks, getattr(self, f'norm{level}', None)]
            for module in frozen:
                if module is not None:
                    module.eval().requires_grad_(False)


@MODELS.register_module()
class GFNet(GFNetBase):
    """Isotropic GFNet: one patch embedding, blocks of one width; each block is a level.

    As a backbone it returns maps `(B, C, ceil(H / p), ceil(W / p))` of the patch size p, by
    default that of the last block. For heads over a pyramid take several blocks and resample
    them as with other isotropic backbones, for example with mmseg's
    `neck=dict(type='Feature2Pyramid', embed_dim=384, rescales=[4, 2, 1, 0.5])`.

    See :class:`GFNetBase` for the arguments; `arch` is `'ti'`, `'xs'`, `'s'`, `'b'` or a dict.
    """

    architectures = ISOTROPIC
    default_patch_size = 16

    def _level_dims(self, spec: Architecture) -> Sequence[int]:
        if len(spec.depths) != 1:
            raise ValueError(f'GFNet has one stage, but got depths {spec.depths}')
        return spec.embed_dims * spec.depths[0]

    def _build(self, spec: Architecture, make_block: Callable[[int, Grid], Block]) -> None:
        (dim,) = spec.embed_dims
        self.patch_embed = PatchEmbed(self.in_channels, dim, spec.patch_size)
        self.blocks = nn.ModuleList(
            make_block(dim, self.grid) for _ in range(self.out_indices[-1] + 1)
        )

    def _levels(self) -> Iterator[tuple[PatchEmbed | None, Sequence[nn.Module]]]:
        for i, block in enumerate(self.blocks):
            yield (self.patch_embed if i == 0 else None), [block]


@MODELS.register_module()
class GFNetPyramid(GFNetBase):
    """Hierarchical GFNet: stages of strides 4, 8, 16 and 32; each stage is a level.

    As a backbone it returns maps `(B, C_i, ceil(H / s_i), ceil(W / s_i))`, by default of all
    stages, each through a LayerNorm of its own, `norm0` to `norm3`. The pretrained networks
    have a norm after the last stage only, which becomes `norm3`.

    See :class:`GFNetBase` for the arguments; `arch` is `'h-ti'`, `'h-s'`, `'h-b'` or a dict.
    """

    architectures = HIERARCHICAL
    default_patch_size = 4

    def _level_dims(self, spec: Architecture) -> Sequence[int]:
        return spec.embed_dims

    def _default_out_indices(self, num_levels: int) -> Sequence[int]:
        return range(num_levels)

    def _build(self, spec: Architecture, make_block: Callable[[int, Grid], Block]) -> None:
        self.patch_embed = nn.ModuleList()
        self.blocks = nn.ModuleList()
        in_channels, patch_size, grid = self.in_channels, spec.patch_size, self.grid
        for stage in range(self.out_indices[-1] + 1):
            dim = spec.embed_dims[stage]
            if stage > 0:
                in_channels, patch_size = spec.embed_dims[stage - 1], DOWNSAMPLING
                grid = coarser(grid, DOWNSAMPLING)
            self.patch_embed.append(PatchEmbed(in_channels, dim, patch_size))
            self.blocks.append(
                nn.ModuleList(make_block(dim, grid) for _ in range(spec.depths[stage]))
            )

    def _levels(self) -> Iterator[tuple[PatchEmbed | None, Sequence[nn.Module]]]:
        yield from zip(self.patch_embed, self.blocks, strict=True)
