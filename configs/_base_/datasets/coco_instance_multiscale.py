"""COCO 2017 with boxes and masks, trained at many scales.

Swin, PVT v2, ConvNeXt and HorNet use this augmentation of DETR and Sparse R-CNN for 3x schedules: a
shorter side of 480 to 800 pixels, and half of the images cropped before. Evaluation uses a shorter
side of 800.
"""

_base_ = 'mmdet::_base_/datasets/coco_instance.py'

# The folder with annotations/, train2017/ and val2017/, unless the environment variable is set.
data_root = '{{$COCO_ROOT:data/coco}}'

resize = dict(
    type='RandomChoiceResize',
    scales=[(side, 1333) for side in range(480, 801, 32)],
    keep_ratio=True,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [resize],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True,
                ),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                resize,
            ],
        ],
    ),
    dict(type='PackDetInputs'),
]

train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val2017.json')
test_evaluator = val_evaluator
