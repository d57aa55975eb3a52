"""GFNet with its head for the 1,000 classes of ImageNet, trained as the official code does.

Each batch gets mixup or cutmix, chosen at random; labels are smoothed by 0.1. Leaves set the size
and, for a hierarchical network, the type of the backbone. The size determines the drop path.
"""

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClassificationPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode='batch'),
        # The recipe has no random erasing. DeiT's is
        # random_erasing=dict(probability=0.25, mode='pixel').
    ),
    backbone=dict(type='GFNet', arch='xs', img_size=224, num_classes=1000),
    label_smoothing=0.1,
)
