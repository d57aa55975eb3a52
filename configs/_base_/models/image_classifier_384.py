"""Finetuning of an isotropic GFNet at 384 after training at 224, as the official code does."""

_base_ = './image_classifier.py'

model = dict(
    backbone=dict(
        img_size=384,
        # The official code resizes the filters of the checkpoint to 384 this way.
        filter_resize='bicubic',
        # The official code finetunes in evaluation mode, which switches drop path off.
        drop_path_rate=0.0,
    ),
)
