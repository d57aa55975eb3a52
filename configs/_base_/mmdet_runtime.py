"""The runtime of detection: mmdetection's, and the registration of this package."""

_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['gfnet_dense'], allow_failed_imports=False)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='coco/bbox_mAP'))
