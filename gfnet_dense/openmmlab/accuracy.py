"""Top-k accuracy of a classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from timm.utils import accuracy


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Top-k accuracy in %: the share of images whose class is among the k highest scores.

    The results are called `accuracy/top1` and so on. Every image counts once, for any batch size
    and any number of processes.

    Args:
        topk: The values of k; a k above the number of classes counts as that number.
        **kwargs: Arguments of :class:`mmengine.evaluator.BaseMetric`.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep for each image whether its `gt_label` is among the highest of `pred_score`."""
        scores = torch.stack([sample['pred_score'] for sample in data_samples]).cpu()
        labels = torch.tensor([sample['gt_label'] for sample in data_samples])
        # timm gives the mean of a batch, and several processes have to know each image.
        for score, label in zip(scores.split(1), labels.split(1), strict=True):
            self.results.append([hit.item() for hit in accuracy(score, label, self.topk)])

    def compute_metrics(self, results: list[list[float]]) -> dict[str, float]:
        """Return the mean over all images."""
        means = torch.tensor(results, dtype=torch.float64).mean(dim=0).tolist()
        return {f'top{k}': mean for k, mean in zip(self.topk, means, strict=True)}
