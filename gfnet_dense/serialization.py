"""Checkpoint files: read without executing anything from them, written whole or not at all."""

import argparse
import errno
import io
import math
import os
import pickle
import re
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

_WRAPPERS = re.compile(
    r'^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+'
    r'|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module)\.'
)


class CheckpointError(ValueError):
    """A file is no checkpoint, is not safe to read, or does not fit the model."""


def load_file(path: str | Path, *, mmap: bool = False) -> Any:
    """Read a file of tensors, plain containers and numbers, such as any checkpoint of training.

    Args:
        path: A local file written by `torch.save` or safetensors, whatever its name.
        mmap: Leave the numbers of tensors in a file of `torch.save` until they are used.

    Raises:
        OSError: If it cannot be opened or read.
        CheckpointError: If it is no such file or holds anything else, which is not executed.
    """
    types: list[Any] = [(value, name) for name, value in PLAIN_TYPES.items()]
    with Path(path).open('rb') as file, torch.serialization.safe_globals(types):
        try:
            if file.peek(9)[8:9] == b'{':  # the length of a header, and the header, in JSON
                return safetensors.torch.load(file.read())
            mmap = mmap and zipfile.is_zipfile(file)  # older files are not made for it
            file.seek(0)
            source = str(path) if mmap else file
            return torch.load(source, map_location='cpu', weights_only=True, mmap=mmap)
        except Exception as e:  # bytes that mean nothing end in errors of almost every kind
            if isinstance(e, OSError) and e.errno != errno.EINVAL:
                raise  # the disk or the network failed; EINVAL is a jump to nowhere in the file
            # Torch's own text, which begins with how to read the file unsafely, is not passed on.
            text = str(e).rpartition('WeightsUnpickler error:')[2].strip() or type(e).__name__
            foreign = re.search(r'GLOBAL (\S+)', text)
    if foreign:
        raise CheckpointError(
            f'{path} is not safe to read: it asks for {foreign[1]}, and only tensors, plain '
            'containers and numbers are taken. Nothing of it was executed'
        )
    reason = text.splitlines()[0].partition('. ')[0]
    raise CheckpointError(
        f'{path} is not a checkpoint, or only a part of one ({reason}): get the file again'
    )


def plain_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights without the prefixes that wrappers of a module put into their names.

    `DistributedDataParallel` saves `module.`, `torch.compile` saves `_orig_mod.` and FSDP saves
    `_fsdp_wrapped_module.`; the last two also stand within a name.
    """
    return {_WRAPPERS.sub('', str(key)): value for key, value in state.items()}


def check_finite(state: Mapping[str, Any], path: str | Path) -> None:
    """Check that no weight is NaN or infinite: such a model gives one answer to everything.

    Args:
        state: The weights.
        path: Their file, for the error message.

    Raises:
        CheckpointError: If one is.
    """
    # Masks of attention may hold minus infinity.
    broken = [
        key
        for key, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not (value.float() < math.inf).all()
    ]
    if broken:
        more = f' and {len(broken) - 3} more' if len(broken) > 3 else ''
        raise CheckpointError(
            f'{path} has weights that are not finite, {", ".join(broken[:3])}{more}: its training '
            'had failed. Take an earlier checkpoint'
        )


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` when the block ends, and not at all if it raises.

    What was at `path` stays until then. The file lies beside it under a name of its own, which
    the file object has, ending in `.partial`.

    Raises:
        OSError: If it cannot be written, for example to a full disk.
    """
    # A process that is killed leaves this behind; the next one of the same machine reuses it.
    # Another machine that shares the folder has a name of its own.
    temporary = path.with_name(f'{path.name}.{socket.gethostname()}.partial')
    try:
        with temporary.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, outlasts a failure of power
        finally:
            os.close(folder)
    except OSError as e:
        if e.errno and not e.filename:
            e.filename = str(path)  # the error of a full disk does not say which
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights to a file of their own, and see that they are read back the same.

    The file is of safetensors if its name ends in `.safetensors`, otherwise of `torch.save` with
    the weights under `state_dict`, where mmengine and timm look for them.

    Raises:
        OSError: If it cannot be written; what was there before stays.
    """
    # Saving a view would save its whole storage.
    state = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()
    }
    if path.suffix == '.safetensors':
        content = safetensors.torch.save(state)
    else:
        buffer = io.BytesIO()
        torch.save({'state_dict': state}, buffer)
        content = buffer.getvalue()
    with write_whole(path) as file:
        file.write(content)
        file.flush()
        written = load_file(file.name)
        written = written.get('state_dict', written)
        if written.keys() != state.keys() or not all(
            torch.equal(written[key], value) for key, value in state.items()
        ):
            raise OSError(errno.EIO, 'other weights than written are read back', str(path))


class _HistoryBuffer:
    """Stands for mmengine's logs where mmengine is not installed; they are read and not used."""

    min = max = current = mean = None


def _history_method(owner: object, name: str) -> Any:
    # The getattr of mmengine's own list would reach builtins.eval, attribute by attribute.
    if owner is not PLAIN_TYPES[HISTORY] or name not in ('min', 'max', 'current', 'mean'):
        # in torch's words
        raise pickle.UnpicklingError(f'GLOBAL {type(owner).__name__}.{name}')
    return getattr(owner, name)


HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_NUMBERS = [type(np.dtype(code)) for code in '?bhilqBHILQefd']
_multiarray: Any = np._core.multiarray  # type: ignore[attr-defined]

# Types and functions that a file may hold beside what torch allows by itself, by their name in
# files: the arguments in official files, and the logs, of numpy numbers, in those of mmengine.
# gfnet_dense.durable puts mmengine's own class under HISTORY.
PLAIN_TYPES: dict[str, Any] = {
    'argparse.Namespace': argparse.Namespace,
    HISTORY: _HistoryBuffer,
    'builtins.getattr': _history_method,
    'numpy.ndarray': np.ndarray,
    'numpy.dtype': np.dtype,
    'numpy._core.multiarray._reconstruct': _multiarray._reconstruct,
    'numpy._core.multiarray.scalar': _multiarray.scalar,
    # as numpy 1 named them
    'numpy.core.multiarray._reconstruct': _multiarray._reconstruct,
    'numpy.core.multiarray.scalar': _multiarray.scalar,
    **{f'numpy.dtypes.{kind.__name__}': kind for kind in _NUMBERS},
}
