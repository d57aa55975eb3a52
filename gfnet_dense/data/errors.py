"""What the data checks find, the error that they raise, and how messages list names."""

import os
from collections.abc import Iterable
from pathlib import Path


class DataError(ValueError):
    """Data is missing, broken, or differs from what the config says."""


class Fault(str):
    """A finding that stops a run, which would fail or give wrong results."""


class Note(str):
    """A finding that a person should see, and that may be intended."""


Findings = Iterable[Fault | Note]


def not_permitted(path: object) -> str:
    """Return what to say of a file or folder that this user may not read.

    It names the first folder of the path that may not be entered, if there is one.
    """
    for folder in reversed(Path(str(path)).absolute().parents):
        try:
            os.stat(os.path.join(folder, '.'))
        except OSError:
            path = folder
            break
    return f'{path} may not be read by this user: permit it, for example with chmod -R a+rX'


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
