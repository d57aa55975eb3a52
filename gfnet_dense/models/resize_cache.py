"""The cache of parameters that a network resizes to the size of its images."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gfnet_dense.spectral.tracing import is_capturing, is_transformed

# How many resized parameters a module caches. Each may take more memory than the parameter itself,
# so the cache serves runs over images of one or two sizes.
_MAX_CACHED = 2

_Cache = tuple[Tensor | None, dict[tuple[Any, ...], Tensor]]


class ResizeCache(nn.Module):
    """A module that resizes one parameter in forward, and in evaluation caches the results.

    A cached result serves for as long as the parameter holds the values that it was made from.
    Modules resize in every forward in training, with gradients, in graphs, under transforms of
    torch.func and modes of torch's dispatcher, and on the meta device. Copies and pickles leave out
    the cache.
    """

    _cache: _Cache

    def __init__(self) -> None:
        super().__init__()
        self.clear_cache()

    def resized(
        self, parameter: Tensor, key: tuple[Any, ...], resize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return `resize(parameter)`; equal keys must mean equal functions."""
        learning = torch.is_grad_enabled() and parameter.requires_grad
        # A graph that is being captured can neither compare values nor hold cached tensors.
        # Transforms of torch.func replace the parameter or make tensors that must not outlive them,
        # and so do modes such as FakeTensorMode.
        ordinary = (
            isinstance(parameter, nn.Parameter)
            and not parameter.is_meta
            and not (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
            and not is_transformed()
            and not is_in_torch_dispatch_mode()
        )
        if self.training or learning or is_capturing() or not ordinary:
            return resize(parameter)
        return self._cached(parameter, key, resize)

    # Later forwards may need gradients, so cached tensors are no inference tensors.
    @torch.inference_mode(False)
    def _cached(
        self, parameter: Tensor, key: tuple[Any, ...], resize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        # Only comparing values is safe: an edit through `.data`, as EMA does, leaves version
        # counter and address unchanged. On a CPU comparing costs less than resizing; on a GPU it
        # waits for the device.
        source, cached = self._cache
        if (
            source is None
            or source.dtype != parameter.dtype
            or source.device != parameter.device
            or not torch.equal(source, parameter)
        ):
            source, cached = self._cache = parameter.detach().clone(), {}
        result = cached.get(key)
        if result is None:
            result = resize(source)
            # The dict is replaced and never changed, because other threads may be reading it.
            self._cache = source, dict([*cached.items(), (key, result)][-_MAX_CACHED:])
        return result

    def clear_cache(self) -> None:
        """Free the cached tensors."""
        self._cache = None, {}

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as every module does, and clear the cache."""
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_cache': (None, {})}
