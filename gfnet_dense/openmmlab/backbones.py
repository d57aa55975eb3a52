"""The networks as backbones of OpenMMLab: a tuple of maps, frozen stages, `init_cfg`."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, initialize
from mmengine.registry import MODELS
from timm.layers import LayerNorm
from torch import Tensor, nn

from gfnet_dense import models
from gfnet_dense.models.gfnet import GFNetBase


class _RunLog(logging.Handler):
    """Writes what the core logs, such as the weights that were loaded, into the log of the run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on to mmengine's current logger; without one mmengine prints it."""
        print_log(self.format(record), logger='current', level=record.levelno)


@contextmanager
def log_to_run() -> Iterator[None]:
    """Within it, the core logs into the log of the run; the core's logger is left as it was."""
    core, handler = logging.getLogger('gfnet_dense'), _RunLog()
    before = core.level, core.propagate
    core.addHandler(handler)
    core.setLevel(logging.INFO)
    core.propagate = False
    try:
        yield
    finally:
        core.removeHandler(handler)
        core.level, core.propagate = before


_PRETRAINED = ('Pretrained', 'mmengine.Pretrained', PretrainedInit)


class BackboneMixin(GFNetBase, BaseModule):
    """A network with the interface of OpenMMLab's backbones.

    Args:
        arch: As `img_size`, see :class:`gfnet_dense.models.gfnet.GFNetBase`.
        in_channels: Channels of the images.
        num_classes: Classes of the head; 0 for a backbone without one.
        out_indices: Levels whose maps a backbone returns, each through a LayerNorm of its own,
            `norm0`, `norm1` and so on; negative ones count from the end. None for the default of
            the subclass. Levels after the last one are not built.
        drop_path_rate: Drop path rate of the last block; None for the official rate of `arch`.
        frozen_stages: 0 freezes the first patch embedding and the position embedding, n also
            the first n levels with the norms of their outputs; -1 freezes nothing.
        norm_eval: Keep norms in evaluation mode while training. This matters for norms with
            running statistics that replace the LayerNorms, which have none.
        with_cp: Recompute the blocks in the backward pass to save memory.
        init_cfg: See :class:`mmengine.model.BaseModule`; `dict(type='Pretrained',
            checkpoint=...)` takes a path, of an official file too, or the name of official
            weights, such as `'gfnet-h-s'`, which are downloaded on first use.
        **kwargs: `filter_resize`, `filter_backend` and the rest of
            :class:`gfnet_dense.models.gfnet.GFNetBase`.

    Raises:
        ValueError: If an argument is not one of the above.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        num_classes: int = 0,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if 'in_chans' in kwargs:  # the name of the plain networks
            raise ValueError(f'in_chans is called in_channels here, as in OpenMMLab: {kwargs}')
        if isinstance(out_indices, int):
            raise ValueError(f'out_indices must be a list or tuple, but got {out_indices}')
        if in_channels < 1:
            raise ValueError(f'in_channels must be positive, but got {in_channels}')
        kwargs['drop_path_rate'] = drop_path_rate
        super().__init__(arch, img_size, in_channels, num_classes, **kwargs)
        self.init_cfg = copy.deepcopy(init_cfg)
        num_levels = len(self.blocks)
        if not -1 <= frozen_stages <= num_levels:
            raise ValueError(
                f'frozen_stages must be within -1..{num_levels}, but got {frozen_stages}'
            )
        self.out_indices = self._resolve(out_indices, num_levels)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.set_grad_checkpointing(with_cp)
        if not num_classes:
            self.prune_intermediate_layers([*self.out_indices], prune_norm=True)
            for i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm(self.feature_info[i]['num_chs']))
        self._freeze()

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
            ValueError: If `x` does not have that shape.
        """
        if self.num_classes:
            return super().forward(x)
        maps = self.forward_intermediates(
            x, [*self.out_indices], output_fmt='NHWC', intermediates_only=True
        )
        return tuple(
            # Operators of mmcv such as RoIAlign read any other memory format as this one.
            self.get_submodule(f'norm{i}')(y).permute(0, 3, 1, 2).contiguous()
            for i, y in zip(self.out_indices, maps, strict=True)
        )

    @property
    def final_norm(self) -> str:
        """The name of the norm after the last level."""
        return 'norm' if self.num_classes else f'norm{len(self.feature_info) - 1}'

    def _output_level(self, name: str) -> int | None:
        """Return the level whose output a norm is for; None for anything else."""
        number = name.partition('.')[0].removeprefix('norm')
        return int(number) if name.startswith('norm') and number.isdecimal() else None

    def get_stage(self, name: str) -> int | None:
        """Return the stage of a parameter or module, norms of outputs included."""
        level = self._output_level(name)
        if level is not None:
            return level if self.hierarchical else 0
        return super().get_stage(name)

    def init_weights(self) -> None:
        """Load what `init_cfg` names; without it the initialisation of the constructor stays.

        A `Pretrained` file is loaded by :meth:`load_pretrained`, which is strict where mmengine's
        own loading only logs what does not fit.

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
        with log_to_run():
            for cfg in files:
                self.load_pretrained(cfg['checkpoint'])
        self._is_init = True

    def train(self, mode: bool = True) -> 'BackboneMixin':
        """Set the mode; what is frozen, and with `norm_eval` every norm, stays in evaluation."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._NormBase)):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        self.pos_embed.requires_grad = False
        for name, module in self.named_modules():
            level = self._output_level(name)
            level = self.get_level(name) if level is None else level
            is_stem = level is not None and self.get_layer_depth(name)[0] == 0
            if is_stem or (level is not None and level < self.frozen_stages):
                module.eval().requires_grad_(False)


@MODELS.register_module()
class GFNet(BackboneMixin, models.GFNet):
    """Isotropic GFNet as a backbone: maps `(B, C, ceil(H / p), ceil(W / p))` for patches of p.

    By default it returns the map of the last block. For heads over a pyramid take several blocks
    and resample them as with other isotropic backbones, for example with mmseg's
    `neck=dict(type='Feature2Pyramid', embed_dim=384, rescales=[4, 2, 1, 0.5])`.

    See :class:`BackboneMixin` for the arguments; `arch` is `'ti'`, `'xs'`, `'s'`, `'b'` or a dict.
    """


@MODELS.register_module()
class GFNetPyramid(BackboneMixin, models.GFNetPyramid):
    """Hierarchical GFNet as a backbone: maps `(B, C_i, ceil(H / s_i), ceil(W / s_i))`.

    By default it returns the maps of all stages, of strides 4, 8, 16 and 32, each through a
    LayerNorm of its own, `norm0` to `norm3`. The pretrained networks have a norm after the last
    stage only, which becomes `norm3`.

    See :class:`BackboneMixin` for the arguments; `arch` is `'h-ti'`, `'h-s'`, `'h-b'` or a dict.
    """

    def _default_out_indices(self, num_levels: int) -> Sequence[int]:
        return range(num_levels)
