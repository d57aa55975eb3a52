"""Weights from files: official ones, this project's, and segmentors or detectors that hold one.

Reading executes nothing from a file. Loading is strict: of a GFNet only its classifier, the norms
of its outputs and the channels of its images may differ from the file, everything else must be
there and be used.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from timm.models import adapt_input_conv
from torch import Tensor

from gfnet_dense.serialization import CheckpointError, load_file
from gfnet_dense.spectral import resize_position_embedding, resize_spectrum

from .architectures import DOWNSAMPLING, HIERARCHICAL, ISOTROPIC, coarser
from .global_filter import GlobalFilter
from .hub import OFFICIAL_WEIGHTS, fetch

if TYPE_CHECKING:
    from .gfnet import GFNetBase


def load_pretrained(model: 'GFNetBase', path: str | Path) -> None:
    """Load a checkpoint into a GFNet, resizing what lives on another grid.

    Says in the log what was loaded, which parameters were resized, and which were left as they
    were initialised.

    Args:
        model: The network.
        path: What :func:`find_weights` takes.

    Raises:
        FileNotFoundError: If there is no such file.
        DownloadError: If official weights are not there yet and cannot be downloaded.
        CheckpointError: If the file cannot be read safely or does not fit the network.
    """
    path = find_weights(path)
    state = read_state_dict(path)
    with naming(path):
        state, notes = adapt_state_dict(state, model)
    # What may be missing is settled by adapt_state_dict, and named below.
    missing, _ = model.load_state_dict(state, strict=False)
    model.loaded_from = str(path)
    print_log(f'loaded {len(state)} tensors from {path}', logger='current')
    for note in notes:
        print_log(note, logger='current')
    if missing:
        print_log(f'not in the file, newly initialised: {", ".join(missing)}', logger='current')


def find_weights(name: str | Path) -> Path:
    """Return the path of a file of weights.

    Args:
        name: A path, or a name of :data:`gfnet_dense.models.hub.OFFICIAL_WEIGHTS`, whose file is
            downloaded on first use.

    Raises:
        FileNotFoundError: If there is no such file.
        DownloadError: If official weights are not there yet and cannot be downloaded.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in OFFICIAL_WEIGHTS:
        return fetch(str(name), partial(_check_official, str(name)))
    raise FileNotFoundError(
        f'no checkpoint at {name}: give a path, or to download official weights '
        f'(github.com/raoyongming/GFNet) one of {", ".join(OFFICIAL_WEIGHTS)}, or train from '
        'scratch: init_cfg=None of the backbone, in timm pretrained=False'
    )


def _check_official(name: str, path: Path) -> None:
    """Raise a CheckpointError unless a file holds the very network that its name says."""
    arch = name.removeprefix('gfnet-')
    # By the registry, for the module of the networks imports this one.
    network = MODELS.get('GFNetPyramid' if arch in HIERARCHICAL else 'GFNet')
    with torch.device('meta'):
        model = network(arch, num_classes=1000)
    state = read_state_dict(path)
    with naming(path):
        match_state_dict(state, model)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path of a file before what is wrong with its weights."""
    try:
        yield
    except CheckpointError as e:
        raise CheckpointError(f'{path}: {e}') from None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file without executing anything from it.

    Args:
        path: A file written by `torch.save`: a state dict, or a dict that holds one under
            `model` (official files) or `state_dict` (mmengine); or a `.safetensors` file.

    Raises:
        OSError: If it cannot be opened.
        CheckpointError: If it is not a checkpoint, or holds more than tensors and plain values.
    """
    content = load_file(path)
    for key in ('model', 'state_dict'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise CheckpointError(f'{path} holds no state dict, neither itself nor under model')
    return dict(content)


def adapt_state_dict(
    state: Mapping[str, Tensor], model: 'GFNetBase'
) -> tuple[dict[str, Tensor], list[str]]:
    """Bring the weights of a network to the outputs and grids of another one of its size.

    Args:
        state: Weights of a GFNet, alone or as the `backbone.` of a segmentor or detector.
        model: The network to bring them to.

    Returns:
        A state dict that lacks nothing of `model` but output norms or a head, and notes that
        say what was resized and what of the file is not used.

    Raises:
        CheckpointError: If the weights are not those of a network of the model's size.
    """
    state = backbone_weights(state)
    own = model.state_dict()
    found, wanted = recognize_size(state), recognize_size(own)
    complete = model.arch.embed_dims, model.arch.depths, wanted[2]
    # Levels that the model does not build may be in the file, as of the whole network.
    if found not in (complete, wanted):
        raise CheckpointError(
            f'holds {describe_size(found)}, but the model is {describe_size(complete)}'
        )

    # The final norm of a classifier is the norm of a backbone's last level.
    num_levels = model.arch.depths[0] if not wanted[2] else len(model.arch.depths)
    final = f'norm{num_levels - 1}.'
    adapted, unused, unknown = {}, [], []
    for key, value in state.items():
        name = key
        if key.startswith(('norm.', final)):
            name = ('norm.' if 'norm.weight' in own else final) + key.partition('.')[2]
        if name in own and not (name.startswith('head.') and value.shape != own[name].shape):
            adapted[name] = value
        elif _OUTPUT.fullmatch(key) or _is_beyond(key, len(model.blocks)):
            unused.append(key)
        else:
            unknown.append(key)
    missing = [key for key in own if key not in adapted and not _OUTPUT.fullmatch(key)]
    if missing or unknown:
        faults = [f'lacks {", ".join(missing)}'] if missing else []
        faults += [f'holds {", ".join(unknown)}, which the model has not'] if unknown else []
        raise CheckpointError('; '.join(faults))

    notes = _resize(adapted, own, model) + _adapt_channels(adapted, own)
    for key, value in adapted.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f'holds {key} of shape {tuple(value.shape)}, '
                f'but the model has {tuple(own[key].shape)}'
            )
    if unused:
        notes.append(f'not used by this network: {", ".join(unused)}')
    return adapted, notes


def match_state_dict(state: Mapping[str, Tensor], model: 'GFNetBase') -> dict[str, Tensor]:
    """Return the weights of a network that is the very one, outputs and grids included.

    Args:
        state: As for :func:`adapt_state_dict`.
        model: The network that the weights should be of.

    Raises:
        CheckpointError: If anything is missing, left over, or of another shape.
    """
    matched, differences = adapt_state_dict(state, model)
    if missing := model.state_dict().keys() - matched.keys():
        differences.append(f'lacks {", ".join(sorted(missing))}')
    if differences:
        raise CheckpointError('; '.join(differences))
    return matched


def backbone_weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights of the `backbone.` of a segmentor or detector, or else all of them."""
    prefix = 'backbone.'
    found = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    return found or state


_BLOCK = re.compile(r'blocks\.(?:(\d+)\.)?\d+\.\D')  # blocks.{stage}.{i}. or blocks.{i}.
_OUTPUT = re.compile(r'(?:norm\d*|head)\.(?:weight|bias)')  # what may differ from the file
_LEVEL = re.compile(r'(?:blocks|patch_embed)\.(\d+)\.')
_Size = tuple[tuple[int, ...], tuple[int, ...], bool]


def recognize_size(state: Mapping[str, Tensor]) -> _Size:
    """Return embed_dims, depths, and whether the network is hierarchical.

    Raises:
        CheckpointError: If these are no weights of a GFNet.
    """
    dims: dict[int, int] = {}
    depths: Counter[int] = Counter()
    hierarchical = False
    for key, value in state.items():
        match = _BLOCK.match(key)
        if match and key.endswith('.norm1.weight'):
            hierarchical |= match[1] is not None
            dims[_stage(key)] = value.numel()
            depths[_stage(key)] += 1
    if not depths:
        raise CheckpointError('holds no weights of a GFNet, which has keys like blocks.0.…')
    stages = sorted(depths)
    return tuple(dims[i] for i in stages), tuple(depths[i] for i in stages), hierarchical


def describe_size(size: _Size) -> str:
    """Return embed_dims and depths in words, with the name of `arch` where they have one."""
    embed_dims, depths, hierarchical = size
    table = HIERARCHICAL if hierarchical else ISOTROPIC
    for name, arch in table.items():
        if (arch.embed_dims, arch.depths) == (embed_dims, depths):
            return f'{name} (embed_dims {embed_dims}, depths {depths})'
    kind = 'a hierarchical' if hierarchical else 'an isotropic'
    return f'{kind} network of embed_dims {embed_dims}, depths {depths}'


def _resize(state: dict[str, Tensor], own: Mapping[str, Tensor], model: 'GFNetBase') -> list[str]:
    """Resize position embedding and filters in `state` to the model's grids; say which."""
    filters = {
        f'{name}.complex_weight': module
        for name, module in model.named_modules()
        if isinstance(module, GlobalFilter)
    }
    # A half spectrum does not tell the width of its grid, but the number of positions does, and
    # the grids of later stages follow.
    resized = defaultdict(list)
    try:
        rows = state[next(iter(filters))].shape[0]
        grid = rows, state['pos_embed'].shape[1] // rows
        if grid != model.grid:
            state['pos_embed'] = resize_position_embedding(state['pos_embed'], grid, model.grid)
            resized[grid, model.grid, 'bicubic'].append('pos_embed')
        stage = 0
        for key, module in filters.items():
            while stage < _stage(key):
                grid, stage = coarser(grid, DOWNSAMPLING), stage + 1
            if grid != module.grid:
                state[key] = resize_spectrum(state[key], grid, module.grid, module.resize)
                resized[grid, module.grid, module.resize].append(key)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as e:
        raise CheckpointError(f'position embedding and filters do not fit together: {e}') from e
    return [
        f'resized from grid {old} to {new}, {method}: {", ".join(keys)}'
        for (old, new, method), keys in resized.items()
    ]


def _adapt_channels(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Bring the first convolution from RGB to the model's image channels, as timm does."""
    key = next(key for key in own if re.fullmatch(r'patch_embed\.(0\.)?proj\.weight', key))
    old, new = state[key].shape[1], own[key].shape[1]
    if old != 3 or new == old:
        return []
    state[key] = adapt_input_conv(new, state[key])
    return [f'adapted from {old} to {new} image channels: {key}']


def _stage(key: str) -> int:
    """Return the stage of a block's parameter, 0 in an isotropic network."""
    match = _BLOCK.match(key)
    return int(match[1] or 0)


def _is_beyond(key: str, num_levels: int) -> bool:
    match = _LEVEL.match(key)
    return match is not None and int(match[1]) >= num_levels
