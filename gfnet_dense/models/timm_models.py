"""GFNet as timm models: `timm.create_model('gfnet_h_s', pretrained=True)`.

The networks of :mod:`.gfnet` with the interface of timm's own models. State dicts are the official
ones, as those of the classifiers `GFNet(..., num_classes=1000)` and `GFNetPyramid(...)` are.

They run under torch.fx, torch.compile, torch.export and torch.jit.trace. torch.jit.script they do
not: a filter is computed by autograd functions and keeps what it resized, and the language of
TorchScript has neither.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .architectures import DOWNSAMPLING
from .checkpoint import OFFICIAL_WEIGHTS, adapt_state_dict, load_pretrained
from .gfnet import GFNet, GFNetBase, GFNetPyramid, init_linear

__all__ = ['TimmGFNet', 'TimmGFNetPyramid']

_SOURCES = {'url', 'file', 'hf_hub_id', 'state_dict'}  # of weights, in a pretrained_cfg
_NORM = ('^norm', (99999,))  # timm's mark of what goes with the layer before


class TimmModel(GFNetBase):
    """What a timm model has beyond a network: a head that can be exchanged, and descriptions.

    Args:
        arch: See :class:`GFNetBase`, as for the arguments that are not listed here.
        img_size: Image size in pixels whose grid the parameters live on; others are taken, too.
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 for pooled features.
        global_pool: A pooling of timm, `'avg'` as in the official networks, `''` for none.
        drop_rate: Dropout before the head.
        drop_path_rate: As elsewhere in timm none by default; the official rates are in
            `model.arch.drop_path_rate`.
        filter_resize: See :class:`GFNetBase`.
        filter_backend: See :class:`GFNetBase`.
        device: Where to put the parameters.
        dtype: What dtype to give them.
    """

    output_fmt = 'NHWC'  # of forward_features and of what is not pooled

    def __init__(
        self,
        arch: str | dict,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        filter_resize: str = 'bilinear',
        filter_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            arch,
            img_size,
            in_chans,
            num_classes,
            filter_resize=filter_resize,
            filter_backend=filter_backend,
            drop_path_rate=drop_path_rate,
        )
        self.in_chans = in_chans
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def _build_outputs(self, level_dims: Sequence[int]) -> None:
        self.num_features = level_dims[-1]
        self.norm = LayerNorm(self.num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `(B, num_classes)` of images `(B, in_chans, H, W)` of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map `(B, H', W', C)`, after the norm."""
        for level in self._forward_levels(x):
            y = level
        return self.norm(y)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a map of :meth:`forward_features`; `pre_logits` leaves out the last."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the last map and intermediate ones.

        Args:
            x: Images `(B, in_chans, H, W)`.
            indices: Stages of a hierarchical, blocks of an isotropic network: n for the last n,
                None for all; negative ones count from the end.
            norm: Apply the norm to the maps that have its channels.
            stop_early: Compute nothing after the last map that is asked for.
            output_fmt: `'NCHW'` or `'NHWC'`.
            intermediates_only: Return the intermediate maps alone.

        Returns:
            The map of :meth:`forward_features`, or with `stop_early` that of the level where it
            stopped, and the intermediate maps, in the order of the network.

        Raises:
            ValueError: If `output_fmt` is neither of these.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f'output_fmt must be NCHW or NHWC, but got {output_fmt!r}')
        taken, last = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        for i, y in enumerate(self._forward_levels(x)):
            if i in taken:
                z = self._normalize(y) if norm else y
                if output_fmt == 'NCHW':
                    # In memory, too: operators of mmcv, as RoIAlign, do not look at strides.
                    z = z.permute(0, 3, 1, 2).contiguous()
                intermediates.append(z)
            if stop_early and i == last:
                break
        return intermediates if intermediates_only else (self._normalize(y), intermediates)

    def _normalize(self, y: Tensor) -> Tensor:
        return self.norm(y) if y.shape[-1] == self.num_features else y

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of :meth:`forward_intermediates` do not need.

        Norm and head go in any case where other channels are left than those they are made for.

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
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Exchange the head for a new one; None keeps the pooling."""
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type, input_fmt=self.output_fmt
        )
        self.head.apply(init_linear).to(self.pos_embed).train(self.training)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory."""
        self.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Name what is spared weight decay, beside norms, biases and LayerScale."""
        return {'pos_embed'}

    def load_pretrained(self, checkpoint_path: str | Path) -> None:
        """Load a file, or official weights by name: :func:`.checkpoint.load_pretrained`."""
        load_pretrained(self, checkpoint_path)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Take the weights of an :class:`ImageClassifier`, too."""
        outer = f'{prefix}backbone.'
        for key in [key for key in state_dict if key.startswith(outer)]:
            state_dict[prefix + key.removeprefix(outer)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class TimmGFNet(TimmModel, GFNet):
    """Isotropic GFNet as a timm model; see :class:`TimmModel` for the arguments."""

    def _build_outputs(self, level_dims: Sequence[int]) -> None:
        super()._build_outputs(level_dims)
        self.feature_info = [
            dict(num_chs=dim, reduction=self.arch.patch_size, module=f'blocks.{i}')
            for i, dim in enumerate(level_dims)
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Tell timm the layers: the stem, then each block, the norm with the last one."""
        return dict(stem='^(?:pos_embed|patch_embed)', blocks=[(r'^blocks\.(\d+)', None), _NORM])


class TimmGFNetPyramid(TimmModel, GFNetPyramid):
    """Hierarchical GFNet as a timm model; see :class:`TimmModel` for the arguments."""

    def _build_outputs(self, level_dims: Sequence[int]) -> None:
        super()._build_outputs(level_dims)
        self.feature_info = [
            dict(
                num_chs=dim,
                reduction=self.arch.patch_size * DOWNSAMPLING**i,
                module=f'blocks.{i}.{depth - 1}',
            )
            for i, (dim, depth) in enumerate(zip(level_dims, self.arch.depths, strict=True))
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Tell timm the layers: the stem, then each block, or stage if `coarse`.

        A patch embedding goes with what comes after it, the norm with what comes before it.
        """
        blocks = [(r'^patch_embed\.(\d+)', (0,)), (r'^blocks\.(\d+)\.(\d+)', None)]
        if coarse:
            blocks = [(r'^(?:patch_embed|blocks)\.(\d+)', None)]
        return dict(stem=r'^(?:pos_embed|patch_embed\.0)', blocks=[*blocks, _NORM])


def _create(
    network: type[TimmModel],
    size: str,
    pretrained: bool,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    out_indices: int | Sequence[int] = 4,  # the last four: of a hierarchical network all
    **kwargs: Any,
) -> nn.Module:
    # Files are read by TimmModel.load_pretrained, as strictly as everywhere in this package.
    overlay = {'custom_load': True, **(pretrained_cfg_overlay or {})}
    if 'url' in overlay or 'hf_hub_id' in overlay:
        overlay.setdefault('file', None)  # which timm would prefer
    official = not (isinstance(kwargs.get('pretrained_cfg'), dict) or overlay.keys() & _SOURCES)
    if official and pretrained and cache_dir is not None:
        raise ValueError(
            f'cache_dir={str(cache_dir)!r} is not where official weights are kept: they are in the '
            'checkpoints folder of torch.hub, which the environment variable TORCH_HOME moves'
        )
    return build_model_with_cfg(
        network,
        f'gfnet_{size.replace("-", "_")}',
        pretrained,
        pretrained_cfg_overlay=overlay,
        cache_dir=cache_dir,
        pretrained_filter_fn=lambda state, model: adapt_state_dict(state, model)[0],
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **{'arch': size, **kwargs},
    )


def _cfg(weights: str, top1: float, top5: float, **kwargs: Any) -> dict[str, Any]:
    tsinghua, google = OFFICIAL_WEIGHTS[weights]
    return dict(
        file=weights,  # a name that load_pretrained downloads
        url=f'https://cloud.tsinghua.edu.cn/f/{tsinghua}/?dl=1',
        custom_load=True,
        num_classes=1000,
        input_size=(3, 224, 224),
        interpolation='bicubic',
        crop_pct=0.875,  # 224 of 256
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classifier='head',
        license='mit',
        origin_url='https://github.com/raoyongming/GFNet',
        paper_name='Global Filter Networks for Image Classification',
        paper_ids='arXiv:2107.00645',
        notes=(
            f'ImageNet-1K top-1 {top1}%, top-5 {top5}%, as reported by the authors',
            f'also at https://drive.google.com/file/d/{google}',
        ),
        **kwargs,
    )


_ISOTROPIC = dict(pool_size=(14, 14), first_conv='patch_embed.proj')
_HIERARCHICAL = dict(pool_size=(7, 7), first_conv='patch_embed.0.proj')
default_cfgs = generate_default_cfgs(
    {
        'gfnet_ti.in1k': _cfg('gfnet-ti', 74.6, 92.2, **_ISOTROPIC),
        'gfnet_xs.in1k': _cfg('gfnet-xs', 78.6, 94.2, **_ISOTROPIC),
        'gfnet_s.in1k': _cfg('gfnet-s', 80.0, 94.9, **_ISOTROPIC),
        'gfnet_b.in1k': _cfg('gfnet-b', 80.7, 95.1, **_ISOTROPIC),
        'gfnet_h_ti.in1k': _cfg('gfnet-h-ti', 80.1, 95.1, **_HIERARCHICAL),
        'gfnet_h_s.in1k': _cfg('gfnet-h-s', 81.5, 95.6, **_HIERARCHICAL),
        'gfnet_h_b.in1k': _cfg('gfnet-h-b', 82.9, 96.2, **_HIERARCHICAL),
    }
)


@register_model
def gfnet_ti(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFNet-Ti; `kwargs` are those of :class:`TimmModel` and of timm."""
    return _create(TimmGFNet, 'ti', pretrained, **kwargs)


@register_model
def gfnet_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFNet-XS; `kwargs` are those of :class:`TimmModel` and of timm."""
    return _create(TimmGFNet, 'xs', pretrained, **kwargs)


@register_model
def gfnet_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFNet-S; `kwargs` are those of :class:`TimmModel` and of timm."""
    return _create(TimmGFNet, 's', pretrained, **kwargs)


@register_model
def gfnet_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFNet-B; `kwargs` are those of :class:`TimmModel` and of timm."""
    return _create(TimmGFNet, 'b', pretrained, **kwargs)


@register_model
def gfnet_h_ti(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFNet-H-Ti; `kwargs` are those of :class:`TimmModel` and of timm."""
    return _create(TimmGFNetPyramid, 'h-ti', pretrained, **kwargs)


@register_model
def gfnet_h_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFNet-H-S; `kwargs` are those of :class:`TimmModel` and of timm."""
    return _create(TimmGFNetPyramid, 'h-s', pretrained, **kwargs)


@register_model
def gfnet_h_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFNet-H-B; `kwargs` are those of :class:`TimmModel` and of timm."""
    return _create(TimmGFNetPyramid, 'h-b', pretrained, **kwargs)
