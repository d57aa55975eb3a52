"""A very small hierarchical GFNet for images of 64x64 pixels; the nano configs use it."""

nano_backbone = dict(
    type='GFNetPyramid',
    arch=dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 4, 2), layer_scale_init_value=1e-2),
    img_size=64,
    drop_path_rate=0.05,
)
