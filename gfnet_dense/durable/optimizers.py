"""The optimizers of a run: one, or several in an :class:`mmengine.optim.OptimWrapperDict`."""

from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict


def wrappers_of(optim_wrapper: Any) -> list[OptimWrapper]:
    """Return the optimizer wrappers of a runner, one or several."""
    several = isinstance(optim_wrapper, OptimWrapperDict)
    return [*optim_wrapper.values()] if several else [optim_wrapper]


def parameter_groups(optim_wrapper: Any) -> list[dict[str, Any]]:
    """Return the parameter groups of all optimizers."""
    wrappers = wrappers_of(optim_wrapper)
    return [group for wrapper in wrappers for group in wrapper.optimizer.param_groups]


def makes_step(optim_wrapper: Any) -> bool:
    """Tell whether this iteration ends with a step; accumulated gradients postpone it."""
    return all(wrapper.should_update() for wrapper in wrappers_of(optim_wrapper))


def accumulated_batches(optim_wrapper: Any) -> int:
    """Return how many batches make one step, of the optimizer that accumulates most."""
    # It has no public name.
    return max(int(wrapper._accumulative_counts) for wrapper in wrappers_of(optim_wrapper))
