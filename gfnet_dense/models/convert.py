"""Clean checkpoints: the weights of a GFNet and nothing else, after a forward pass with them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from gfnet_dense.serialization import CheckpointError, save_weights

from .checkpoint import (
    backbone_weights,
    find_weights,
    match_state_dict,
    prefix_errors,
    read_state_dict,
)
from .gfnet import GFNetBase, network_of, official_network


def convert_checkpoint(source: str | Path, target: str | Path, overwrite: bool = False) -> str:
    """Write the GFNet of a checkpoint to a file of its own, after a forward pass; say what it is.

    Args:
        source: An official file or its name, or a checkpoint of this project: of a classifier, or
            of a segmentor or detector, whose backbone is taken.
        target: The file to write, as :func:`gfnet_dense.serialization.save_weights` does.
        overwrite: Replace a target that exists.

    Raises:
        FileExistsError: If the target exists and is not to be replaced, or is the source.
        OSError: If the source cannot be opened or the target cannot be written.
        CheckpointError: If the source cannot be read safely, does not hold the whole of a GFNet,
            or computes values that are not finite.
    """
    source, target = find_weights(source, official_network), Path(target)
    if target.exists() and target.samefile(source):  # whose heads and optimizer would be lost
        raise FileExistsError(f'{target} is the source: choose another name')
    if target.exists() and not overwrite:
        raise FileExistsError(f'{target} exists: choose another name or overwrite it (--force)')
    state = backbone_weights(read_state_dict(source))
    with prefix_errors(source):
        model = network_of(state)
        norms = _intermediate_norms(state, model)
        names = {f'norm{level}' for level in norms}
        rest = {key: value for key, value in state.items() if key.partition('.')[0] not in names}
        model.load_state_dict(match_state_dict(rest, model))
        _check_forward(model, norms)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_weights(state, target)
    height, width = model.grid
    levels = *norms, len(model.blocks) - 1
    outputs = f'{model.num_classes} classes' if model.num_classes else f'maps {levels}'
    return f'{type(model).__name__} {model.size}, grid {height}x{width}, {outputs}'


def _intermediate_norms(state: Mapping[str, Tensor], model: GFNetBase) -> dict[int, nn.Module]:
    """Return the norms of a backbone's outputs before the last one, by level."""
    norms: dict[int, nn.Module] = {}
    for level, info in enumerate(model.feature_info[:-1]):
        name = f'norm{level}'
        own = {k: state[f'{name}.{k}'] for k in ('weight', 'bias') if f'{name}.{k}' in state}
        if own:
            norms[level] = LayerNorm(info['num_chs'])
            try:
                norms[level].load_state_dict(own)
            except RuntimeError as e:
                raise CheckpointError(f'{name} does not fit: {" ".join(str(e).split())}') from None
    return norms


@torch.no_grad()
def _check_forward(model: GFNetBase, norms: Mapping[int, nn.Module]) -> None:
    image_size = [side * model.arch.patch_size for side in model.grid]
    noise = torch.rand(1, model.in_chans, *image_size, generator=torch.Generator().manual_seed(0))
    features, maps = model.eval().forward_intermediates(noise, output_fmt='NHWC')
    outputs = [model.forward_head(features)]
    outputs += [norm(maps[level]) for level, norm in norms.items()]
    if not all(output.isfinite().all() for output in outputs):
        raise CheckpointError('computes values that are not finite')
