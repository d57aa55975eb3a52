// The filter of maps of which some channels fit on the chip whole: they are read once and written
// once. tiles.h explains the rest. Python defines the name of the kernel in capitals.
//
// The grid is (blocks of channels, images).

#include "tiles.h"

DEVICE Shape whole_map(int height, int width, int channels) {
    return {height, width, channels, static_cast<int>(blockIdx.x) * CHANNELS, 0, 0};
}

#ifdef FILTER_MAPS
// Filter maps; `sign` -1 takes the conjugate spectrum.
KERNEL filter_maps(const u16* x, const Complex* weight, u16* y, const uint4* basis_h,
                   const uint4* basis_w, int height, int width, int channels, float sign) {
    SHARED_MEMORY();
    u16* tile = reinterpret_cast<u16*>(shared);
    int* shifts = reinterpret_cast<int*>(tile + TILE);
    const Shape shape = whole_map(height, width, channels);
    const long long image = static_cast<long long>(blockIdx.y) * height * width * channels;
    const int shift = load_parts(tile, x + image, shape, reinterpret_cast<u32*>(shifts));
    transform_rows(tile, basis_w);
    for (int group = warp(); group < GROUPS; group += WARPS) {
        const int own = holds_zero_column(group, shape)
                            ? filter_group<true>(tile, basis_h, weight, sign, group, shape)
                            : filter_group<false>(tile, basis_h, weight, sign, group, shape);
        if (lane() == 0) shifts[group] = own;
    }
    __syncthreads();
    restore_rows(tile, basis_w, shifts, shift, y + image, shape);
}
#endif

#ifdef CORRELATE_MAPS
// Make the gradient of the spectrum, `(images, H, W / 2 + 1, C)`, of each image. Both maps use the
// tile, one after the other; meanwhile registers keep the coefficients of the first.
KERNEL correlate_maps(const u16* g, const u16* x, Complex* grad, const uint4* basis_h,
                      const uint4* basis_w, int height, int width, int channels) {
    SHARED_MEMORY();
    u16* tile = reinterpret_cast<u16*>(shared);
    u32* scratch = reinterpret_cast<u32*>(tile + TILE);
    const Shape shape = whole_map(height, width, channels);
    const long long image = static_cast<long long>(blockIdx.y) * height * channels;
    grad += image * (width / 2 + 1);
    constexpr int OWN = (GROUPS + WARPS - 1) / WARPS;  // groups of a warp
    PackedBlock packed[OWN][BLOCKS_H];
    int shifts[OWN];
    const int of_x = load_parts(tile, x + image * width, shape, scratch);
    transform_rows(tile, basis_w);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int group = i * WARPS + warp();
        if (GROUPS % WARPS && group >= GROUPS) break;
        int of_blocks[BLOCKS_H];
#pragma unroll
        for (int block = 0; block < BLOCKS_H; ++block) {
            Coefficients x;
            transform_columns(x, tile, basis_h, group, block);
            of_blocks[block] = shift_of(largest_of_coefficients(x));
            pack_block(packed[i][block], x, of_blocks[block]);
        }
        shifts[i] = of_x + align_blocks(packed[i], of_blocks);
    }
    __syncthreads();
    const int of_g = load_parts(tile, g + image * width, shape, scratch);
    transform_rows(tile, basis_w);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int group = i * WARPS + warp();
        if (GROUPS % WARPS && group >= GROUPS) break;
#pragma unroll
        for (int block = 0; block < BLOCKS_H; ++block) {
            Coefficients x, g;
            unpack_block(packed[i][block], x);
            transform_columns(g, tile, basis_h, group, block);
            if (holds_zero_column(group, shape)) {
                store_correlation<true>(grad, x, g, shifts[i] + of_g, group, block, shape);
            } else {
                store_correlation<false>(grad, x, g, shifts[i] + of_g, group, block, shape);
            }
        }
    }
}
#endif
