"""Weights from files: official ones, this project's, and segmentors or detectors that hold one.

Reading executes nothing from a file. Fitting weights to a network is strict: only the classifier,
the norms of the outputs and the channels of the images may differ from the file; everything else
must be there and be used. What the parameters of a network are called is asked of the network.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from timm.models import adapt_input_conv
from torch import Tensor

from gfnet_dense.serialization import CheckpointError, load_file, plain_keys
from gfnet_dense.spectral import Grid, resize_position_embedding, resize_spectrum

from .global_filter import GlobalFilter
from .hub import OFFICIAL_WEIGHTS, fetch

if TYPE_CHECKING:
    from .gfnet import GFNetBase


def find_weights(name: str | Path, official_network: Callable[[str], 'GFNetBase']) -> Path:
    """Return the path of a file of weights.

    Args:
        name: A path, or a name of :data:`gfnet_dense.models.hub.OFFICIAL_WEIGHTS`, whose file is
            downloaded on first use.
        official_network: Makes the network of a name, which a download has to match.

    Raises:
        FileNotFoundError: If there is no such file.
        DownloadError: If official weights are not there yet and cannot be downloaded.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in OFFICIAL_WEIGHTS:
        return fetch(str(name), partial(check_official, official_network, str(name)))
    raise FileNotFoundError(
        f'no checkpoint at {name}: give a path, or to download official weights '
        f'(github.com/raoyongming/GFNet) one of {", ".join(OFFICIAL_WEIGHTS)}, or train from '
        'scratch: init_cfg=None of the backbone, in timm pretrained=False'
    )


def check_official(official_network: Callable[[str], 'GFNetBase'], name: str, path: Path) -> None:
    """Raise a CheckpointError unless a file holds exactly the network that its name says."""
    state = read_state_dict(path)
    with prefix_errors(path):
        match_state_dict(state, official_network(name))


@contextmanager
def prefix_errors(path: Path) -> Iterator[None]:
    """Put the path of a file before the message of a :class:`CheckpointError`."""
    try:
        yield
    except CheckpointError as e:
        raise CheckpointError(f'{path}: {e}') from None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file without executing anything from it.

    Args:
        path: A file written by `torch.save`: a state dict, or a dict that holds one under
            `model` (official files) or `state_dict` (mmengine); or a `.safetensors` file. Prefixes
            such as `module.` are taken off, see :func:`gfnet_dense.serialization.plain_keys`.

    Raises:
        OSError: If it cannot be opened.
        CheckpointError: If it is not a checkpoint, or holds more than tensors and plain values.
    """
    return find_state_dict(load_file(path), path)


def find_state_dict(content: object, path: str | Path) -> dict[str, Tensor]:
    """Return the weights in what :func:`load_file` has read, as :func:`read_state_dict` does."""
    state = content if isinstance(content, Mapping) else {}
    held = [state[key] for key in ('model', 'state_dict') if isinstance(state.get(key), Mapping)]
    state = held[0] if held else state
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f'{path} holds no state dict, neither itself nor under model')
    return plain_keys(state)


def adapt_state_dict(
    state: Mapping[str, Tensor], model: 'GFNetBase'
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit the weights of a network to the outputs and grids of another network of its size.

    Args:
        state: Weights of a GFNet, alone or as the `backbone.` of a segmentor or detector.
        model: The network to fit them to.

    Returns:
        A state dict that lacks nothing of `model` but output norms or a head, and notes that
        say what was resized and what of the file is not used.

    Raises:
        CheckpointError: If the weights are not those of a network of the model's size.
    """
    state = backbone_weights(state)
    own = model.state_dict()
    found = model.recognize_size(state)
    # The file may hold levels that the model does not build, as a whole network does.
    if found not in (model.size, model.recognize_size(own)):
        raise CheckpointError(f'holds {found}, but the model is {model.size}')

    # The final norm of a classifier is the norm of a backbone's last level.
    finals = {'norm', f'norm{len(model.feature_info) - 1}'}
    adapted, unused, unknown = {}, [], []
    for key, value in state.items():
        module, _, parameter = key.rpartition('.')
        name = f'{model.final_norm}.{parameter}' if module in finals else key
        level = model.get_level(key)
        if name in own and not (module == 'head' and value.shape != own[name].shape):
            adapted[name] = value
        elif _is_output(key) or (level is not None and level >= len(model.blocks)):
            unused.append(key)
        else:
            unknown.append(key)
    missing = [key for key in own if key not in adapted and not _is_output(key)]
    if missing or unknown:
        faults = [f'lacks {", ".join(missing)}'] if missing else []
        faults += [f'has unexpected weights {", ".join(unknown)}'] if unknown else []
        raise CheckpointError('; '.join(faults))

    notes = _resize(adapted, model) + _adapt_channels(adapted, own)
    for key, value in adapted.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f'holds {key} of shape {tuple(value.shape)}, the model has {tuple(own[key].shape)}'
            )
    if unused:
        notes.append(f'not used by this network: {", ".join(unused)}')
    return adapted, notes


def match_state_dict(state: Mapping[str, Tensor], model: 'GFNetBase') -> dict[str, Tensor]:
    """Return the weights of a network that equals `model`, outputs and grids included.

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


def _is_output(key: str) -> bool:
    """Tell whether a parameter belongs to a head or a norm of an output, which may differ."""
    module, _, parameter = key.rpartition('.')
    is_output = module == 'head' or module.rstrip('0123456789') == 'norm'
    return is_output and parameter in ('weight', 'bias')


def _resize(state: dict[str, Tensor], model: 'GFNetBase') -> list[str]:
    """Resize position embedding and filters in `state` to the model's grids; say which."""
    filters = {
        f'{name}.complex_weight': module
        for name, module in model.named_modules()
        if isinstance(module, GlobalFilter)
    }
    resized: dict[tuple[Grid, Grid, str], list[str]] = defaultdict(list)
    try:
        # A half spectrum does not tell the width of its grid, but the number of positions does,
        # and the grids of later stages follow.
        rows = state[next(iter(filters))].shape[0]
        first = rows, state['pos_embed'].shape[1] // rows
        if first != model.grid:
            state['pos_embed'] = resize_position_embedding(state['pos_embed'], first, model.grid)
            resized[first, model.grid, 'bicubic'].append('pos_embed')
        grids = model.stage_grids(first)
        for key, module in filters.items():
            grid = grids[model.get_stage(key) or 0]
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
    """Fit the first convolution, made for RGB, to the model's image channels, as timm does."""
    key = next(key for key in own if key.startswith('patch_embed.') and key.endswith('.weight'))
    old, new = state[key].shape[1], own[key].shape[1]
    if old != 3 or new == old:
        return []
    state[key] = adapt_input_conv(new, state[key])
    return [f'adapted from {old} to {new} image channels: {key}']
