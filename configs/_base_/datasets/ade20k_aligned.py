"""ADE20K as PVT and the GFNet authors test it: sides rounded up to a multiple of 32 pixels.

The image is stretched to that size, not padded.
"""

_base_ = './ade20k.py'

align = dict(type='ResizeToMultiple', size_divisor=32)

# The pipelines of ade20k.py, with this step after the resize.
test_pipeline = [*_base_.test_pipeline[:2], align, *_base_.test_pipeline[2:]]
tta_pipeline = [
    _base_.tta_pipeline[0],
    dict(
        type='TestTimeAug',
        transforms=[
            _base_.tta_pipeline[1].transforms[0],
            [align],
            *_base_.tta_pipeline[1].transforms[1:],
        ],
    ),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
