"""The error that the data checks raise, and how its messages list names."""

from collections.abc import Iterable


class DataError(ValueError):
    """Data is missing, broken, or differs from what the config says."""


def join_first(values: Iterable[object], count: int = 3) -> str:
    """Join the first values with commas, and say how many more there are.

    Args:
        values: File names, ids, classes; none of them gives `'none'`.
        count: How many to write out.
    """
    texts = [str(value) for value in values]
    more = f' and {len(texts) - count} more' if len(texts) > count else ''
    return (', '.join(texts[:count]) or 'none') + more
