"""What the data checks find, the error that they raise, and how messages list names."""

from collections.abc import Iterable


class DataError(ValueError):
    """Data is missing, broken, or differs from what the config says."""


class Fault(str):
    """A finding that stops a run, which would fail or give wrong results."""


class Note(str):
    """A finding that a person should see, and that may be intended."""


Findings = Iterable[Fault | Note]


def raise_first(findings: Findings) -> None:
    """Raise the first fault among findings.

    Raises:
        DataError: With the text of the first fault, and how many others there are.
    """
    faults = [finding for finding in findings if isinstance(finding, Fault)]
    if len(faults) > 1:
        raise DataError(f'{faults[0]} (tools/check_data.py lists {len(faults) - 1} more)')
    if faults:
        raise DataError(faults[0])


def join_first(values: Iterable[object], count: int = 3) -> str:
    """Join the first values with commas, and say how many more there are.

    Args:
        values: File names, ids, classes; none of them gives `'none'`.
        count: How many to write out.
    """
    texts = [str(value) for value in values]
    more = f' and {len(texts) - count} more' if len(texts) > count else ''
    return (', '.join(texts[:count]) or 'none') + more
