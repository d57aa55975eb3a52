from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import numpy as np


@pytest.fixture(scope='session')
def images() -> 'list[np.ndarray]':
    """Return six RGB images of four sizes."""
    # Not on top: the process that hands tests out loads this file, too.
    from random_models import SIZES, random_images

    return random_images(SIZES)
