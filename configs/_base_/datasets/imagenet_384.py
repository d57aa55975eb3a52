"""ImageNet-1K at 384, 64 images in a batch: the shorter side to 438, of which the middle 384.

As in the official code that is the share of the image that is evaluated at 224.
"""

_base_ = './imagenet.py'

train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384)))
test_dataloader = val_dataloader
