// The filter of large maps, in passes that leave coefficients in memory: rows are transformed strip
// by strip; then columns are transformed, filtered and restored, some slots along W at a time; then
// rows are restored. tiles.h explains the rest. Python defines the name of the kernel in capitals, and
// STRIP.
//
// Coefficients are float16, `(images, ceil(C / 16), 2, ceil(H / 2), 2, ceil(W / 2), 16 channels)`,
// without the rows and columns of zeros of a tile. A strip is STRIP rows of the even part along H
// with those of the odd part. Strips have shifts, `(images, ceil(C / 16), strips)`, and so have
// filtered slots along W, `(images, ceil(C / 16), ceil(W / 2))`.
//
// The grid is (blocks of channels of the first strip or slots, then of the next ..., images).

#include "tiles.h"

static_assert(CHANNELS == 16, "");

DEVICE int half_of(int n) { return (n + 1) / 2; }
DEVICE int blocks_of_channels(int channels) { return (channels + CHANNELS - 1) / CHANNELS; }
DEVICE int strips_of(const Shape& shape) { return (half_of(shape.height) + STRIP - 1) / STRIP; }

DEVICE Shape strip(int height, int width, int channels) {
    const int blocks = blocks_of_channels(channels), x = blockIdx.x;
    return {height, width, channels, x % blocks * CHANNELS, x / blocks * TILE_H, 0};
}

DEVICE Shape some_slots(int height, int width, int channels) {
    const int blocks = blocks_of_channels(channels), x = blockIdx.x;
    return {height, width, channels, x % blocks * CHANNELS, 0, x / blocks * TILE_W};
}

// Return the number of the tile's first 16 channels among those of all images.
DEVICE long long sixteen_of(int image, const Shape& shape) {
    return static_cast<long long>(image) * blocks_of_channels(shape.channels) +
           shape.first_channel / CHANNELS;
}

// Return how many coefficients 16 channels of an image have.
DEVICE int size_of(const Shape& shape) {
    return 4 * half_of(shape.height) * half_of(shape.width) * CHANNELS;
}

// Call function(in tile, offset from the coefficients of its first 16 channels, whether they exist)
// for every 8 values of the tile. A thread keeps to a column as far as it can.
template <class Function>
DEVICE void for_each_eight(u16* tile, const Shape& shape, const Function& function) {
    constexpr int EIGHTS = COLUMNS * CHANNELS / 8;  // of a row
    constexpr int AT_ONCE = THREADS >= EIGHTS ? THREADS / EIGHTS : 1;  // rows
    const int half_h = half_of(shape.height), half_w = half_of(shape.width);
    const int first = AT_ONCE > 1 ? threadIdx.x / EIGHTS : 0;
    if (first >= AT_ONCE) return;
    for (int i = AT_ONCE > 1 ? threadIdx.x % EIGHTS : threadIdx.x; i < EIGHTS; i += THREADS) {
        const int column = i * 8 / CHANNELS, right = column / TILE_W, c = i * 8 % CHANNELS;
        const int w = shape.first_slot + column % TILE_W;
        const int row_size = 2 * half_w * CHANNELS;
        const int start = (right * half_w + w) * CHANNELS + c;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll 4
            for (int r = first; r < TILE_H; r += AT_ONCE) {
                const int h = shape.first_row + r;
                function(tile + (part * TILE_H + r) * STRIDE + i * 8,
                         start + (part * half_h + h) * row_size, h < half_h && w < half_w);
            }
        }
    }
}

DEVICE uint4& eight_at(u16* p) { return *reinterpret_cast<uint4*>(p); }

DEVICE void load_coefficients(u16* tile, const u16* from, const Shape& shape) {
    for_each_eight(tile, shape, [&](u16* at, int offset, bool inside) {
        copy_async(at, from + (inside ? offset : 0), inside);
    });
}

DEVICE void store_coefficients(u16* tile, u16* to, const Shape& shape) {
    for_each_eight(tile, shape, [&](u16* at, int offset, bool inside) {
        if (inside) eight_at(to + offset) = eight_at(at);
    });
}

// Return the shift that all strips of a block of channels can be brought to: the smallest.
DEVICE int common_shift(const int* shifts, const Shape& shape) {
    u32 less = 0;
#pragma unroll 1
    for (int i = lane(); i < strips_of(shape); i += 32) {
        less = larger_bits(less, LARGEST_SHIFT - __ldg(shifts + i));
    }
    return LARGEST_SHIFT - static_cast<int>(largest_of_warp(less));
}

// Find pairs of factors that bring the strips to one shift, which is returned.
DEVICE int find_scales(u32* scales, const int* shifts, const Shape& shape) {
    static_assert(STRIP % 2 == 0 && 8 % STRIP == 0, "");
    const int common = common_shift(shifts, shape);
    for (int i = threadIdx.x; i < HALF_H / STRIP; i += THREADS) {
        scales[i] = i < strips_of(shape) ? power_pair(common - __ldg(shifts + i) + HEADROOM) : 0;
    }
    return common;
}

#ifdef TRANSFORM_STRIPS
KERNEL transform_strips(const u16* x, u16* coefficients, int* strip_shifts, const uint4* basis_w,
                        int height, int width, int channels) {
    SHARED_MEMORY();
    u16* tile = reinterpret_cast<u16*>(shared);
    const Shape shape = strip(height, width, channels);
    x += static_cast<long long>(blockIdx.y) * height * width * channels;
    const int shift = load_parts(tile, x, shape, reinterpret_cast<u32*>(tile + TILE));
    transform_rows(tile, basis_w);
    const long long sixteen = sixteen_of(blockIdx.y, shape);
    store_coefficients(tile, coefficients + sixteen * size_of(shape), shape);
    if (threadIdx.x == 0) {
        strip_shifts[sixteen * strips_of(shape) + shape.first_row / STRIP] = shift;
    }
}
#endif

#ifdef FILTER_STRIPS
// Each warp filters a block of a group: it transforms and multiplies 16 slots along H. Then they
// exchange the coefficients, and each restores 16 rows of both parts.
template <bool ZERO>
DEVICE int filter_block(u16* tile, const u16* coefficients, const int* strip_shifts,
                        const Complex* weight, const uint4* basis_h, float sign,
                        const Shape& shape) {
    static_assert(GROUPS * BLOCKS_H == WARPS, "");
    const int group = warp() % GROUPS, block = warp() / GROUPS;
    uint4* exchange = reinterpret_cast<uint4*>(tile + TILE);  // [warp][along H][along W][lane]
    u32* largest = reinterpret_cast<u32*>(exchange + WARPS * PARTS_H * 2 * 32);  // of warps

    BlockFactors factors;
    load_factors<ZERO>(factors, weight, sign, group, block, shape);
    load_coefficients(tile, coefficients, shape);
    u32* scales = largest + WARPS;
    find_scales(scales, strip_shifts, shape);
    wait_for_copies();
    __syncthreads();
    Coefficients x;
    transform_columns(x, tile, basis_h, group, block, scales);
    multiply_block<ZERO>(x, factors, group, block, shape);

    u32 bits = largest_of_coefficients(x);
    if (lane() == 0) largest[warp()] = bits;
    __syncthreads();
    for (int k = 0; k < BLOCKS_H; ++k) bits = larger_bits(bits, largest[k * GROUPS + group]);
    const int shift = shift_of(bits);
    PackedBlock packed;
    pack_block(packed, x, shift);
    const auto place = [&](int k, int w, int part) -> uint4& {
        return exchange[(((k * GROUPS + group) * PARTS_H + part) * 2 + w) * 32 + lane()];
    };
#pragma unroll
    for (int part = 0; part < PARTS_H; ++part) {
#pragma unroll
        for (int w = 0; w < 2; ++w) place(block, w, part) = four_of(packed, w, part);
    }
    __syncthreads();
#pragma unroll
    for (int part = 0; part < PARTS_H; ++part) {
        restore_block(tile, basis_h, group, part, block,
                      [&](int k, int w, int part) { return place(k, w, part); });
    }
    return shift;
}

// Filter in place; `sign` -1 takes the conjugate spectrum.
KERNEL filter_strips(u16* coefficients, const int* strip_shifts, int* slot_shifts,
                     const Complex* weight, const uint4* basis_h, int height, int width,
                     int channels, float sign) {
    SHARED_MEMORY();
    u16* tile = reinterpret_cast<u16*>(shared);
    const Shape shape = some_slots(height, width, channels);
    const long long sixteen = sixteen_of(blockIdx.y, shape);
    coefficients += sixteen * size_of(shape);
    strip_shifts += sixteen * strips_of(shape);
    int shift;
    if (shape.first_slot == 0) {
        shift = filter_block<true>(tile, coefficients, strip_shifts, weight, basis_h, sign, shape);
    } else {
        shift = filter_block<false>(tile, coefficients, strip_shifts, weight, basis_h, sign, shape);
    }
    const int slot = shape.first_slot + warp() % GROUPS;
    if (warp() < GROUPS && lane() == 0 && slot < half_of(width)) {
        slot_shifts[sixteen * half_of(width) + slot] = shift;
    }
    __syncthreads();
    store_coefficients(tile, coefficients, shape);
}
#endif

#ifdef RESTORE_STRIPS
KERNEL restore_strips(const u16* coefficients, const int* strip_shifts, const int* slot_shifts,
                      u16* y, const uint4* basis_w, int height, int width, int channels) {
    SHARED_MEMORY();
    u16* tile = reinterpret_cast<u16*>(shared);
    int* shifts = reinterpret_cast<int*>(tile + TILE);
    const Shape shape = strip(height, width, channels);
    const long long sixteen = sixteen_of(blockIdx.y, shape);
    load_coefficients(tile, coefficients + sixteen * size_of(shape), shape);
    for (int i = threadIdx.x; i < TILE_W; i += THREADS) {
        const int* from = slot_shifts + sixteen * half_of(width) + i;
        shifts[i] = i < half_of(width) ? *from : LARGEST_SHIFT;
    }
    const int shift = common_shift(strip_shifts + sixteen * strips_of(shape), shape);
    wait_for_copies();
    __syncthreads();
    y += static_cast<long long>(blockIdx.y) * height * width * channels;
    restore_rows(tile, basis_w, shifts, shift, y, shape);
}
#endif

#ifdef CORRELATE_STRIPS
// Coefficients of a batch, and the shifts of their strips.
struct Batch {
    const u16* coefficients;
    const int* shifts;
};

// Correlate a block of coefficients of a group in a share of the images.
template <bool ZERO>
DEVICE void correlate_images(u16* tiles, const Batch& g, const Batch& x, Complex* grad,
                             const uint4* basis_h, const Shape& shape, int images) {
    static_assert(GROUPS * BLOCKS_H == WARPS, "");
    const int group = warp() % GROUPS, block = warp() / GROUPS;
    Gradients gradients = {};
    for (int image = blockIdx.y; image < images; image += gridDim.y) {
        const long long sixteen = sixteen_of(image, shape);
        const long long start = sixteen * size_of(shape), strips = sixteen * strips_of(shape);
        u32* scales_x = reinterpret_cast<u32*>(tiles + 2 * TILE);
        u32* scales_g = scales_x + HALF_H / STRIP;
        u16 *tile_x = tiles, *tile_g = tiles + TILE;
        load_coefficients(tile_x, x.coefficients + start, shape);
        load_coefficients(tile_g, g.coefficients + start, shape);
        const int shift = find_scales(scales_x, x.shifts + strips, shape) +
                          find_scales(scales_g, g.shifts + strips, shape);
        wait_for_copies();
        __syncthreads();
        Coefficients of_x, of_g;
        transform_columns(of_x, tile_x, basis_h, group, block, scales_x);
        transform_columns(of_g, tile_g, basis_h, group, block, scales_g);
        correlate_block<ZERO>(gradients, of_x, of_g, shift, group, block, shape);
        __syncthreads();
    }
    store_gradients<ZERO>(grad, gradients, group, block, shape);
}

// Make gradients of the spectrum, `(gridDim.y, H, W / 2 + 1, C)`, each from a share of the images.
KERNEL correlate_strips(const u16* g, const int* shifts_of_g, const u16* x, const int* shifts_of_x,
                        Complex* grad, const uint4* basis_h, int height, int width, int channels,
                        int images) {
    SHARED_MEMORY();
    u16* tiles = reinterpret_cast<u16*>(shared);
    const Shape shape = some_slots(height, width, channels);
    grad += static_cast<long long>(blockIdx.y) * height * (width / 2 + 1) * channels;
    const Batch of_g = {g, shifts_of_g}, of_x = {x, shifts_of_x};
    if (shape.first_slot == 0) {
        correlate_images<true>(tiles, of_g, of_x, grad, basis_h, shape, images);
    } else {
        correlate_images<false>(tiles, of_g, of_x, grad, basis_h, shape, images);
    }
}
#endif
