"""What can be wrong with data."""


class DataError(ValueError):
    """Data is missing, broken, or not what the config says."""
