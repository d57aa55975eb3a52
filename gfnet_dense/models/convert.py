"""Clean checkpoints: the weights of a GFNet and nothing else, seen to work."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gfnet_dense.serialization import CheckpointError, save_weights

from .checkpoint import (
    backbone_weights,
    describe_size,
    find_weights,
    match_state_dict,
    naming,
    read_state_dict,
    recognize_size,
)
from .gfnet import GFNet, GFNetBase, GFNetPyramid


def convert_checkpoint(source: str | Path, target: str | Path, overwrite: bool = False) -> str:
    """Write the GFNet of a checkpoint to a file of its own, after a forward pass with it.

    Args:
        source: An official file or its name, or a checkpoint of this project: of a classifier, or
            of a segmentor or detector, whose backbone is taken.
        target: The file to write, as :func:`gfnet_dense.serialization.save_weights` does.
        overwrite: Replace a target that exists.

    Returns:
        What was converted, in a few words.

    Raises:
        FileExistsError: If the target exists and is not to be replaced.
        OSError: If the source cannot be opened or the target not be written.
        CheckpointError: If the source cannot be read safely, does not hold the whole of a GFNet,
            or gives values that are not finite.
    """
    source, target = find_weights(source), Path(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f'{target} exists: choose another name or overwrite it (--force)')
    state = backbone_weights(read_state_dict(source))
    with naming(source):
        model = network_of(state)
        state = match_state_dict(state, model)
        model.load_state_dict(state)
        _check_forward(model)
    save_weights(state, target)
    size = describe_size(recognize_size(state))
    height, width = model.grid
    outputs = f'{model.num_classes} classes' if model.num_classes else f'maps {model.out_indices}'
    return f'{type(model).__name__} {size}, grid {height}x{width}, {outputs}'


def network_of(state: Mapping[str, Tensor]) -> GFNetBase:
    """Build the network that weights are of, by their keys and shapes; the weights are not loaded.

    Raises:
        CheckpointError: If there is no such network.
    """
    embed_dims, depths, hierarchical = recognize_size(state)
    if hierarchical:
        network, stem, block = GFNetPyramid, 'patch_embed.0', 'blocks.0.0'
    else:
        network, stem, block = GFNet, 'patch_embed', 'blocks.0'
    norms = [int(match[1]) for key in state if (match := re.fullmatch(r'norm(\d+)\.weight', key))]
    try:
        _, in_channels, patch_size, _ = state[f'{stem}.proj.weight'].shape
        rows = state[f'{block}.filter.complex_weight'].shape[0]
        columns = state['pos_embed'].shape[1] // rows
        return network(
            {
                'embed_dims': embed_dims,
                'depths': depths,
                'patch_size': patch_size,
                'layer_scale_init_value': 1.0 if f'{block}.gamma' in state else None,
            },
            img_size=(rows * patch_size, columns * patch_size),
            in_channels=in_channels,
            num_classes=state['head.weight'].shape[0] if 'head.weight' in state else 0,
            out_indices=sorted(norms) or None,
        )
    except KeyError as e:
        raise CheckpointError(f'lacks {e.args[0]}') from None
    except (ValueError, IndexError, ZeroDivisionError) as e:
        raise CheckpointError(f'its shapes are those of no GFNet: {e}') from None


@torch.no_grad()
def _check_forward(model: GFNetBase) -> None:
    image_size = [side * model.arch.patch_size for side in model.grid]
    noise = torch.rand(
        1, model.in_channels, *image_size, generator=torch.Generator().manual_seed(0)
    )
    outputs = model.eval()(noise)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    if not all(output.isfinite().all() for output in outputs):
        raise CheckpointError('computes values that are not finite')
