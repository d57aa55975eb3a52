"""How this project measures speed: contenders that take turns in one run, and their ratios.

Machines are shared, so an absolute time proves nothing. Whatever else a machine does meets all
contenders alike, and the median over the turns of the ratio of two times in the same turn is
nearly free of it.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Times = dict[str, list[float]]


def measure(
    tasks: Mapping[str, Callable[[], object]], repeats: int, least: float, device: str
) -> Times:
    """Time tasks in turns.

    Args:
        tasks: What to time, by name.
        repeats: Turns of each task, 2 or more.
        least: Seconds that a turn lasts, or one run of the task, whichever is longer.
        device: Where the tasks compute.

    Returns:
        Seconds of a run by name, a value for each turn.
    """
    # The allocator of glibc gives memory back to the system, and takes fresh pages at great cost,
    # until it has seen a large tensor go: as in any program that runs a network.
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)
    counts = {}
    for name, run in tasks.items():
        _seconds(run, 1, device)  # plans, matrices, memory
        counts[name] = max(1, round(least / _seconds(run, 1, device)))
    times: Times = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, run in tasks.items():
            times[name].append(_seconds(run, counts[name], device))
    return times


def speedup(times: Times, name: str, baseline: str) -> str:
    """Return how many times as fast as a baseline a task is: median and quartiles of the turns."""
    ratios = [b / t for b, t in zip(times[baseline], times[name], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return f'{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})'


def milliseconds(times: Times, name: str) -> str:
    """Return the median time of a task."""
    return f'{1000 * statistics.median(times[name]):.2f}'


def machine(device: str) -> str:
    """Return what was measured on: processor and threads, or GPU, and torch."""
    if device.startswith('cuda'):
        where = torch.cuda.get_device_name(device)
    else:
        info = Path('/proc/cpuinfo')
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
        where = f'{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads'
    return f'{where}; torch {torch.__version__}'


def _seconds(run: Callable[[], object], count: int, device: str) -> float:
    """Return the time of one run, the mean of `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count
