"""Parameter groups of GFNet segmentors and detectors: weight decay and layer-wise learning rate."""

import re
from collections.abc import Iterable
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

_BLOCK = re.compile(r'backbone\.blocks\.(?:(\d+)\.)?(\d+)\.\D')
_STEM = re.compile(r'backbone\.(pos_embed|patch_embed\.(0\.)?proj\.)')
_DOWNSAMPLING = re.compile(r'backbone\.patch_embed\.([1-9]\d*)\.')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Give the layers of a GFNet backbone learning rates that shrink towards the input.

    Norms, biases, LayerScale and position embedding are spared weight decay.

    A layer is a run of blocks, with the patch embedding before it. Layers are numbered from the
    stem, 0, over the blocks, 1 to `num_layers`, to what is new in dense prediction, the norms of
    the outputs and all that is not backbone. A parameter of layer l learns at
    `lr * decay_rate ** (num_layers + 1 - l)`.

    Args:
        optim_wrapper_cfg: The optimizer wrapper, with `optimizer` in it.
        paramwise_cfg: A dict of

            - `decay_rate`: factor from one layer to the one below; 1, the default, for the same
              learning rate everywhere.
            - `num_layers`: number of layers that the blocks are divided into, evenly and in
              their order; by default every block is a layer.

    Raises:
        ValueError: If `paramwise_cfg` is not such a dict or does not fit the backbone.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = set(self.paramwise_cfg) - {'decay_rate', 'num_layers'}
        if unknown:
            raise ValueError(
                f'unknown keys in paramwise_cfg: {", ".join(sorted(unknown))}; '
                'decay_rate and num_layers are known'
            )
        # An empty dict would make mmengine put all parameters in one group.
        self.paramwise_cfg = {'decay_rate': 1.0, 'num_layers': None, **self.paramwise_cfg}
        if self.base_lr is None or self.base_wd is None:
            raise ValueError(
                f'the optimizer needs lr and weight_decay, but is {self.optimizer_cfg}'
            )
        if not 0 < self.paramwise_cfg['decay_rate'] <= 1:
            raise ValueError(
                f'decay_rate must be within (0, 1], but got {self.paramwise_cfg["decay_rate"]}'
            )

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Append the parameter groups of `module` to `params`."""
        named = dict(module.named_parameters())
        layers = layer_ids(named, self.paramwise_cfg['num_layers'])
        top = max(layers.values())
        groups: dict[tuple[float, bool], dict] = {}
        for name, param in named.items():
            if not param.requires_grad:
                continue
            lr = self.base_lr * self.paramwise_cfg['decay_rate'] ** (top - layers[name])
            # Norms, biases and LayerScale have one axis.
            decays = param.ndim > 1 and not name.endswith('pos_embed')
            weight_decay = self.base_wd if decays else 0.0
            new = {'params': [], 'lr': lr, 'weight_decay': weight_decay}
            groups.setdefault((lr, decays), new)['params'].append(param)
        params.extend(groups[key] for key in sorted(groups))
        rates = [group['lr'] for group in params]
        print_log(
            f'{len(params)} parameter groups, learning rates {min(rates):.3g} to {max(rates):.3g}',
            logger='current',
        )


def layer_ids(names: Iterable[str], num_layers: int | None = None) -> dict[str, int]:
    """Number the layers of a segmentor, detector or classifier by its parameters' names.

    Args:
        names: Parameter names; those of the backbone begin with `backbone.`.
        num_layers: Number of layers that the blocks are divided into, None for one each.

    Returns:
        The layer of each name, see :class:`LayerDecayOptimWrapperConstructor`.

    Raises:
        ValueError: If there is no GFNet, or it has fewer blocks than `num_layers`.
    """
    names = list(names)
    blocks = {match.groups(): None for name in names if (match := _BLOCK.match(name))}
    # Stages and blocks in order: (stage or None, block).
    order = sorted(blocks, key=lambda block: [int(i or 0) for i in block])
    if not order or not 1 <= (num_layers or 1) <= len(order):
        raise ValueError(
            f'layer decay needs a GFNet as backbone with at least num_layers blocks, but '
            f'num_layers is {num_layers} and {len(order)} blocks were found'
        )
    num_layers = num_layers or len(order)
    layer_of = {block: 1 + i * num_layers // len(order) for i, block in enumerate(order)}

    def layer(name: str) -> int:
        if match := _BLOCK.match(name):
            return layer_of[match.groups()]
        if match := _DOWNSAMPLING.match(name):  # goes with the first block of its stage
            return layer_of[match[1], '0']
        return 0 if _STEM.match(name) else num_layers + 1

    return {name: layer(name) for name in names}
