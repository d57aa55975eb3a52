"""A wrapper around a data set that passes for the data set itself."""

from typing import Any

from torch.utils.data import Dataset


class DatasetWrapper(Dataset[Any]):
    """A data set with the length and the attributes of another one; subclasses load samples."""

    dataset: Any

    def __init__(self, dataset: Any) -> None:
        self.__dict__['dataset'] = dataset

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped data set."""
        # While this is unpickled there is no data set yet. Special methods are not passed on.
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the wrapped data set, such as its pipeline."""
        setattr(self.dataset, name, value)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)
