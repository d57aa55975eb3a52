"""Finetuning at 384 of an isotropic GFNet that was trained at 224, as the official code does."""

_base_ = './image_classifier.py'

model = dict(
    backbone=dict(
        img_size=384,
        # How the official code brings the filters of the checkpoint to the grid of 384.
        filter_resize='bicubic',
        # The official code finetunes in evaluation mode, where nothing is dropped.
        drop_path_rate=0.0,
    ),
)
