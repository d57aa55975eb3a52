"""Reading what torch.save wrote, without executing anything from the file."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class CheckpointError(ValueError):
    """A file is no checkpoint, is not safe to read, or does not fit the model."""


def load_file(path: str | Path, *, mmap: bool = False) -> Any:
    """Read a file of tensors, plain containers and numbers, such as any checkpoint of training.

    Args:
        path: A local file written by `torch.save`.
        mmap: Leave the numbers of tensors in the file until they are used.

    Raises:
        OSError: If it cannot be opened.
        CheckpointError: If it is no such file or holds anything else, which is not executed.
    """
    Path(path).open('rb').close()  # errors of opening are their own
    with torch.serialization.safe_globals(PLAIN_TYPES):
        try:
            return torch.load(str(path), map_location='cpu', weights_only=True, mmap=mmap)
        except Exception as e:  # bytes that mean nothing end in errors of almost every kind
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise CheckpointError(
                f'{path} is not a checkpoint that is safe to read: {reason}'
            ) from e


def _history_method(owner: object, name: str) -> Callable:
    # The getattr of mmengine's own list would reach builtins.eval, attribute by attribute.
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise CheckpointError(f'it asks for attribute {name!r} of {owner!r}')
    return getattr(owner, name)


# Beside what torch takes by itself: the arguments in official files, and the logs, of numpy
# numbers, in those of mmengine. Each is a type, or a function with the name it has in files.
PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    HistoryBuffer,
    (_history_method, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    *(type(np.dtype(kind)) for kind in '?bhilqBHILQefd'),
]
