import numpy as np
import pytest
from random_models import SIZES, random_images


@pytest.fixture(scope='session')
def images() -> list[np.ndarray]:
    """Return six RGB images of four sizes."""
    return random_images(SIZES)
