"""ImageNet-1K at 384, 64 images in a batch.

Evaluation resizes the shorter side to 438 and crops the central 384, the same fraction as at 224.
The official code does this, too.
"""

_base_ = './imagenet.py'

train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384)))
test_dataloader = val_dataloader
