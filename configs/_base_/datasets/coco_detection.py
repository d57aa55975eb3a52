"""COCO 2017 with boxes: 118,287 training and 5,000 validation images, 80 classes.

Pipelines, loaders and metric are mmdetection's: a shorter side of 800 and a longer one of at most
1333 pixels, flip, batches of images of similar aspect padded to their common size.
"""

_base_ = 'mmdet::_base_/datasets/coco_detection.py'

# The folder with annotations/, train2017/ and val2017/, unless the environment variable is set.
data_root = '{{$COCO_ROOT:data/coco}}'

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val2017.json')
test_evaluator = val_evaluator

# Scales and flips are those of mmdetection's test-time augmentation of RetinaNet.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=scale, keep_ratio=True)
                for scale in ((1333, 800), (666, 400), (2000, 1200))
            ],
            [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
                        'flip_direction',
                    ),
                )
            ],
        ],
    ),
]  # fmt: skip
