"""Parameter groups of GFNet segmentors and detectors: weight decay and layer-wise learning rate."""

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rate decay for a GFNet backbone.

    Norms, biases, LayerScale and position embedding get no weight decay.

    A layer is a run of consecutive blocks, with the patch embedding before it. Layer 0 is the
    stem, layers 1 to `num_layers` are the blocks, and layer `num_layers + 1` holds the norms of the
    outputs and everything outside the backbone. The learning rate of layer l is
    `lr * decay_rate ** (num_layers + 1 - l)`.

    Args:
        optim_wrapper_cfg: The optimizer wrapper, with `optimizer` in it.
        paramwise_cfg: A dict of

            - `decay_rate`: factor from one layer to the layer below. The default, 1, gives all
              layers the same learning rate.
            - `num_layers`: number of layers that the blocks are divided into, evenly and in
              order. By default every block is a layer.

    Raises:
        ValueError: If `paramwise_cfg` is not such a dict or does not fit the backbone.
    """

    paramwise_cfg: dict[str, Any]

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
            raise ValueError(f'the optimizer needs lr and weight_decay, got {self.optimizer_cfg}')
        rate = self.paramwise_cfg['decay_rate']
        if not 0 < rate <= 1:
            raise ValueError(f'decay_rate must be within (0, 1], but got {rate}')

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Append the parameter groups of `module` to `params`."""
        layers = layer_ids(module, self.paramwise_cfg['num_layers'])
        top = max(layers.values())
        no_weight_decay: Any = getattr(module.backbone, 'no_weight_decay', set)
        undecayed = {f'backbone.{name}' for name in no_weight_decay()}
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            lr = self.base_lr * self.paramwise_cfg['decay_rate'] ** (top - layers[name])
            # Norms, biases and LayerScale have one axis.
            decays = param.ndim > 1 and name not in undecayed
            weight_decay = self.base_wd if decays else 0.0
            new = {'params': [], 'lr': lr, 'weight_decay': weight_decay}
            groups.setdefault((lr, decays), new)['params'].append(param)
        params.extend(groups[key] for key in sorted(groups))
        rates = [group['lr'] for group in params]
        print_log(
            f'{len(params)} parameter groups, learning rates {min(rates):.3g} to {max(rates):.3g}',
            logger='current',
        )


def layer_ids(model: nn.Module, num_layers: int | None = None) -> dict[str, int]:
    """Return the layer of each parameter, see :class:`LayerDecayOptimWrapperConstructor`.

    Without `num_layers` every block is a layer.

    Raises:
        ValueError: If the model's `backbone` has no `get_layer_depth`, or fewer blocks than
            `num_layers`.
    """
    backbone: Any = getattr(model, 'backbone', None)
    if not hasattr(backbone, 'get_layer_depth'):
        raise ValueError(
            'layer decay needs a backbone with get_layer_depth, such as GFNet, but got '
            f'{type(backbone).__name__}'
        )
    _, depths = backbone.get_layer_depth('')
    num_blocks = depths - 2
    num_layers = num_blocks if num_layers is None else num_layers
    if not 1 <= num_layers <= num_blocks:
        raise ValueError(
            f'num_layers must be within 1..{num_blocks}, but num_layers is {num_layers} and '
            f'{num_blocks} blocks were found'
        )

    def layer(name: str) -> int:
        depth, _ = backbone.get_layer_depth(name, prefix='backbone.')
        if depth > num_blocks:
            return num_layers + 1
        return 1 + (depth - 1) * num_layers // num_blocks if depth > 0 else 0

    return {name: layer(name) for name, _ in model.named_parameters()}
