"""Image classification, for pretraining: preprocessing, network and loss.

The losses and the mixing of images are timm's; the hyperparameters stand in the configs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor


@MODELS.register_module()
class ClassificationPreprocessor(ImgDataPreprocessor):
    """Move a batch to the device and normalise it; in training, also erase and mix.

    Args:
        num_classes: Number of classes.
        mixup: Arguments of :class:`timm.data.Mixup`, which makes soft targets of the labels;
            None for no mixing, which leaves labels as they are.
        random_erasing: Arguments of :class:`timm.data.random_erasing.RandomErasing`, which comes
            before mixing, as in the official training; None for no erasing.
        label_smoothing: Share of a soft target that is spread over all classes.
        **kwargs: `mean` and `std` of the pixels, 0 to 255, and the other arguments of
            :class:`mmengine.model.ImgDataPreprocessor`.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: Mapping[str, Any] | None = None,
        random_erasing: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        targets = dict(num_classes=num_classes, label_smoothing=label_smoothing)
        self.mixup = None if mixup is None else Mixup(**mixup, **targets)
        self.random_erasing = None if random_erasing is None else RandomErasing(**random_erasing)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Process a batch.

        Args:
            data: `inputs`, images of shape `(B, C, H, W)` or B of shape `(C, H, W)`, and, unless
                it is for inference, `data_samples` with `gt_label` each.
            training: Whether to erase and to mix.

        Returns:
            The batch with normalised `inputs` of shape `(B, C, H, W)` and, where there are
            labels, `targets`: class indices `(B,)`, or if mixed distributions over the classes
            `(B, num_classes)`.

        Raises:
            ValueError: If a label is none of the classes, or an odd number of images is to be
                mixed.
        """
        data = super().forward(data, training)
        if data['data_samples'] is None:
            return data
        inputs, targets = data['inputs'], self._targets(data['data_samples'])
        if training and self.random_erasing is not None:
            self.random_erasing.device = inputs.device
            inputs = self.random_erasing(inputs)
        if training and self.mixup is not None:
            if len(inputs) % 2:
                raise ValueError(
                    f'mixup pairs the images of a batch, but there are {len(inputs)}: set an even '
                    'batch_size, and drop_last=True for the training dataloader'
                )
            inputs, targets = self.mixup(inputs, targets)
        return {**data, 'inputs': inputs, 'targets': targets}

    def _targets(self, data_samples: Sequence[BaseDataElement]) -> Tensor:
        for sample in data_samples:
            if not 0 <= sample.gt_label < self.num_classes:
                raise ValueError(
                    f'label {sample.gt_label} of {sample.get("img_path", "an image")} is none of '
                    f'the {self.num_classes} classes of the model: set num_classes of its backbone'
                )
        return torch.tensor([s.gt_label for s in data_samples], device=self.device)


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A GFNet with its head, trained with cross entropy.

    Args:
        backbone: Config of a :class:`GFNet` or :class:`GFNetPyramid` with `num_classes`. Its
            parameters are `backbone.*` as in segmentors and detectors, so that their `init_cfg`
            takes the checkpoints of this model.
        data_preprocessor: Config of a :class:`ClassificationPreprocessor`, which is told the
            number of classes and the label smoothing.
        label_smoothing: Share of a target that is spread over all classes.
        init_cfg: See :class:`mmengine.model.BaseModule`; pretrained weights are named in the
            `init_cfg` of the backbone.

    Raises:
        ValueError: If the backbone has no head.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        data_preprocessor: Mapping[str, Any],
        label_smoothing: float = 0.1,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        network = MODELS.build(backbone)
        if not getattr(network, 'num_classes', 0):
            raise ValueError(f"a classifier's backbone needs num_classes, got {dict(backbone)}")
        defaults = dict(num_classes=network.num_classes, label_smoothing=label_smoothing)
        super().__init__(MODELS.build(data_preprocessor, default_args=defaults), init_cfg)
        self.backbone = network
        self.label_smoothing = label_smoothing

    def forward(
        self,
        inputs: Tensor,
        data_samples: list[BaseDataElement] | None = None,
        targets: Tensor | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict[str, Tensor] | list[BaseDataElement]:
        """Run the network.

        Args:
            inputs: Normalised images of shape `(B, C, H, W)`.
            data_samples: What is known of the images, for `'predict'`.
            targets: Class indices `(B,)` or soft targets `(B, num_classes)`, for `'loss'`.
            mode: `'tensor'`, `'predict'` or `'loss'`.

        Returns:
            For `'tensor'` the logits `(B, num_classes)`; for `'loss'` a dict with `loss`; for
            `'predict'` the data samples, or as many new ones, with `pred_score`, the probability
            of each class `(num_classes,)`, and `pred_label`, the index of the highest.

        Raises:
            ValueError: If `mode` is none of these.
        """
        logits = self.backbone(inputs)
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            soft = targets is not None and targets.is_floating_point()
            smoothing = LabelSmoothingCrossEntropy(self.label_smoothing)
            criterion = SoftTargetCrossEntropy() if soft else smoothing
            return dict(loss=criterion(logits.float(), targets))
        if mode != 'predict':
            raise ValueError(f"mode must be 'tensor', 'predict' or 'loss', but got {mode!r}")
        scores = logits.float().softmax(dim=-1)
        labels = scores.argmax(dim=-1).tolist()
        if data_samples is None:
            data_samples = [BaseDataElement() for _ in scores]
        for sample, score, label in zip(data_samples, scores, labels, strict=True):
            sample.pred_score = score.clone()  # a view would be dumped with its whole batch
            sample.pred_label = label
        return data_samples

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the weights of the network alone, too: official files, and those of timm models."""
        if not prefix and isinstance(state_dict.get('model'), Mapping):
            weights = state_dict['model']
            state_dict.clear()
            state_dict.update(weights)
        if f'{prefix}pos_embed' in state_dict:
            for key in [key for key in state_dict if key.startswith(prefix)]:
                own = key.removeprefix(prefix)
                state_dict[f'{prefix}backbone.{own}'] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
