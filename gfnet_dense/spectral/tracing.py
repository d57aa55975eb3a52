"""How torch runs the current call: directly, into a graph, or under a transform."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # Asked in Python: within a graph, Dynamo up to torch 2.11 takes it for true. Before torch 2.7
    # nobody can tell, so all graphs count as exported.
    return getattr(torch.compiler, 'is_exporting', lambda: True)()


def is_capturing() -> bool:
    """Tell whether torch records a graph: compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Tell whether a transform of `torch.func` (vmap, grad, jvp, ...) is active."""
    # Private: up to torch 2.14 no public function tells this.
    return torch._C._are_functorch_transforms_active()


def is_in_forward_mode() -> bool:
    """Tell whether tensors can have tangents of forward-mode differentiation."""
    # Private: the public way asks every tensor for its tangent.
    return forward_ad._current_level >= 0


def is_plain(*tensors: Tensor) -> bool:
    """Tell whether torch runs on these tensors directly, so that nobody misses an operator."""
    if is_capturing() or is_transformed() or is_in_torch_dispatch_mode():
        return False
    return all(
        type(t) is torch.nn.Parameter or (type(t) is Tensor and _has_values(t)) for t in tensors
    )


def _has_values(t: Tensor) -> bool:
    # Operators turn lazily negated tensors, and zeros without memory, into others first. Gradients
    # that torch.autograd.grad() gets with is_grads_batched=True have no storage.
    return torch._C._has_storage(t) and not (t.is_neg() or t._is_zerotensor())


def operator_unsupported_reason() -> str | None:
    """Say why the current graph cannot hold custom operators; None if it can, or without a graph.

    A backend made of custom operators asks this before anything else.
    """
    if torch.jit.is_tracing() or (torch.compiler.is_compiling() and _is_exporting()):
        return "exported graphs hold torch's own operators only"
    if torch.compiler.is_compiling() and is_transformed():
        return 'compiled graphs do not support custom operators under transforms of torch.func'
    return None
