"""UperNet with GFNet-H-B on ADE20K."""

_base_ = [
    './_base_/models/upernet_gfnet_h.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/mmseg_runtime.py',
]

model = dict(
    backbone=dict(
        arch='h-b',
        # Within the field's 0.2 to 0.4 for UperNet; not tuned.
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-h-b'),
    ),
)
# Twelve layers, as for ConvNeXt-S and larger.
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
