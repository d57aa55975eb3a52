"""How this project measures speed: contenders take turns in one run, and ratios are reported.

Machines are shared, so absolute times prove nothing. Contenders that take turns share every
disturbance. Each turn gives a ratio of two times, and the median over the turns cancels most noise.
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
        tasks: The functions to time, by name.
        repeats: Number of turns of each task, at least 2.
        least: Shortest length of a turn in seconds. A turn is at least one run.
        device: Device that the tasks run on.

    Returns:
        The seconds per run of each task, one value for each turn.
    """
    # Until a large tensor has been freed, glibc returns memory to the system and then pays for new
    # pages. Every program that runs a network is past that point.
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)
    counts = {}
    for name, run in tasks.items():
        _seconds(run, 1, device)  # warm up: FFT plans, matrices, memory
        counts[name] = max(1, round(least / _seconds(run, 1, device)))
    times: Times = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, run in tasks.items():
            times[name].append(_seconds(run, counts[name], device))
    return times


def speedup(times: Times, name: str, baseline: str) -> str:
    """Return time of the baseline / time of a task: median and quartiles over the turns."""
    ratios = [b / t for b, t in zip(times[baseline], times[name], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return f'{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})'


def milliseconds(times: Times, name: str) -> str:
    """Return the median time of a task in milliseconds."""
    return f'{1000 * statistics.median(times[name]):.2f}'


def machine(device: str) -> str:
    """Name the hardware and software: processor and threads, or GPU, and torch version."""
    if device.startswith('cuda'):
        where = torch.cuda.get_device_name(device)
    else:
        info = Path('/proc/cpuinfo')
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
        where = f'{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads'
    return f'{where}; torch {torch.__version__}'


def _seconds(run: Callable[[], object], count: int, device: str) -> float:
    """Return the seconds per run, averaged over `count` runs in a row."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count
