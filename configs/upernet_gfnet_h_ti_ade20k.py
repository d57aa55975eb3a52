"""UperNet with GFNet-H-Ti on ADE20K."""

_base_ = [
    './_base_/models/upernet_gfnet_h.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/mmseg_runtime.py',
]

model = dict(
    backbone=dict(
        arch='h-ti',
        # Within the field's 0.2 to 0.4 for UperNet; not tuned.
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='gfnet-h-ti'),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
