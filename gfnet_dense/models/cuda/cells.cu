// What a block of the network computes for each cell alone, on an NVIDIA GPU: LayerNorm, and the
// residual with LayerScale. Maps are read once and written once, in the types that they have.
//
// A map is an array of cells of CHANNELS channels, which are handled in groups of four. LANES
// neighbouring lanes of a warp share a cell: the first holds groups 0, LANES, 2 * LANES and so on.
// Sums are float32.
//
// Python defines CHANNELS, a multiple of 4, LANES, a power of two, and the types MAP and RESULT of
// maps (0 for float32, 1 for bfloat16, 2 for float16), besides what ptx.h needs.

#include "ptx.h"

constexpr int FLOAT32 = 0, BFLOAT16 = 1;
constexpr int FOURS = CHANNELS / 4;  // of a cell

constexpr int OWN = (FOURS + LANES - 1) / LANES;  // fours of a lane
constexpr int THREADS = 32 * WARPS, CELLS = THREADS / LANES;  // of a thread block at once

struct Four {
    float at[4];
};

template <int TYPE>
DEVICE Four load(const void* map, long long index) {
    if constexpr (TYPE == FLOAT32) {
        const uint4 x = static_cast<const uint4*>(map)[index];
        return {{bits_to_float(x.x), bits_to_float(x.y), bits_to_float(x.z), bits_to_float(x.w)}};
    } else {
        const uint2 x = static_cast<const uint2*>(map)[index];
        const auto widen = [](u32 bits) {
            if constexpr (TYPE == BFLOAT16) return bits_to_float(bits << 16);
            return from_float16(static_cast<u16>(bits));
        };
        return {{widen(x.x & 0xffff), widen(x.x >> 16), widen(x.y & 0xffff), widen(x.y >> 16)}};
    }
}

template <int TYPE>
DEVICE void store(void* map, long long index, const Four& x) {
    if constexpr (TYPE == FLOAT32) {
        static_cast<uint4*>(map)[index] = {float_to_bits(x.at[0]), float_to_bits(x.at[1]),
                                           float_to_bits(x.at[2]), float_to_bits(x.at[3])};
    } else if constexpr (TYPE == BFLOAT16) {
        static_cast<uint2*>(map)[index] = {pack_bfloat16(x.at[0], x.at[1]),
                                           pack_bfloat16(x.at[2], x.at[3])};
    } else {
        static_cast<uint2*>(map)[index] = {pack(x.at[0], x.at[1]), pack(x.at[2], x.at[3])};
    }
}

// What a lane holds of a cell, or of a parameter.
struct Part {
    Four own[OWN];
};

DEVICE int four_of(int i) { return i * LANES + lane() % LANES; }
DEVICE bool has(int i) { return FOURS % LANES == 0 || four_of(i) < FOURS; }

template <int TYPE>
DEVICE Part load_part(const void* map, long long cell, bool inside) {
    Part part;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        part.own[i] = inside && has(i) ? load<TYPE>(map, cell * FOURS + four_of(i)) : Four{};
    }
    return part;
}

template <int TYPE>
DEVICE void store_part(void* map, long long cell, bool inside, const Part& part) {
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        if (inside && has(i)) store<TYPE>(map, cell * FOURS + four_of(i), part.own[i]);
    }
}

// Call function(i, k) for channel k of group i, for each group that a lane holds.
template <class Function>
DEVICE void for_each(const Function& function) {
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        if (!has(i)) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) function(i, k);
    }
}

// Call a function with every cell of the map and whether it exists. All lanes of a warp take part.
template <class Function>
DEVICE void for_each_cell(int cells, const Function& function) {
    for (long long first = static_cast<long long>(blockIdx.x) * CELLS; first < cells;
         first += static_cast<long long>(gridDim.x) * CELLS) {
        const long long cell = first + threadIdx.x / LANES;
        function(cell, cell < cells);
    }
}

// Return the sum of the lanes whose numbers differ in bits FROM to TO / 2 alone.
template <int FROM, int TO>
DEVICE float sum_of_lanes(float x) {
#pragma unroll
    for (int bit = FROM; bit < TO; bit *= 2) x += of_lane_xor(x, bit);
    return x;
}

DEVICE float sum_of_cell(float x) { return sum_of_lanes<1, LANES>(x); }

// Store the sums of a thread block, `(N, CHANNELS)`; the next block's follow `stride` values later.
template <int N>
DEVICE void store_sums(const Part (&sums)[N], float* partial_sums, int stride) {
    SHARED_MEMORY();
    float* of_warps = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float sum = sum_of_lanes<LANES, 32>(sums[n].own[i].at[k]);
                if (lane() < LANES && has(i)) {
                    of_warps[(warp() * N + n) * CHANNELS + 4 * four_of(i) + k] = sum;
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < N * CHANNELS; i += THREADS) {
        float sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += of_warps[w * N * CHANNELS + i];
        partial_sums[static_cast<long long>(blockIdx.x) * stride + i] = sum;
    }
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias over the channels of each cell. Keeps means,
// then values of 1 / sqrt(variance + eps), in `statistics`, `(2, cells)`.
KERNEL normalize(const void* x, const float* weight, const float* bias, void* y,
                 float* statistics, int cells, float eps) {
    const Part w = load_part<FLOAT32>(weight, 0, true), b = load_part<FLOAT32>(bias, 0, true);
    for_each_cell(cells, [&](long long cell, bool inside) {
        Part part = load_part<MAP>(x, cell, inside);
        float sum = 0, squares = 0;
        for_each([&](int i, int k) { sum += part.own[i].at[k]; });
        const float mean = sum_of_cell(sum) / CHANNELS;
        for_each([&](int i, int k) {
            part.own[i].at[k] -= mean;
            squares += part.own[i].at[k] * part.own[i].at[k];
        });
        const float scale = rsqrtf(sum_of_cell(squares) / CHANNELS + eps);
        for_each([&](int i, int k) {
            part.own[i].at[k] = part.own[i].at[k] * scale * w.own[i].at[k] + b.own[i].at[k];
        });
        store_part<RESULT>(y, cell, inside, part);
        if (inside && lane() % LANES == 0) {
            statistics[cell] = mean;
            statistics[cells + cell] = scale;
        }
    });
}

// The gradients of `normalize`: of x, to which `residual` is added unless it is null, and the sums of
// thread blocks that make up those of weight and bias.
KERNEL normalize_backward(const void* g, const void* x, const float* weight,
                          const float* statistics, const float* residual, void* grad_x,
                          float* partial_sums, int cells, int stride) {
    const Part w = load_part<FLOAT32>(weight, 0, true);
    Part sums[2] = {};
    for_each_cell(cells, [&](long long cell, bool inside) {
        Part grad = load_part<RESULT>(g, cell, inside), normal = load_part<MAP>(x, cell, inside);
        const Part other = load_part<FLOAT32>(residual, cell, inside && residual);
        const float mean = inside ? __ldg(statistics + cell) : 0;
        const float scale = inside ? __ldg(statistics + cells + cell) : 0;
        float sum = 0, product = 0;
        for_each([&](int i, int k) {
            float& value = normal.own[i].at[k];
            float& slope = grad.own[i].at[k];
            value = (value - mean) * scale;
            sums[0].own[i].at[k] += slope * value;
            sums[1].own[i].at[k] += slope;
            slope *= w.own[i].at[k];
            sum += slope;
            product += slope * value;
        });
        sum = sum_of_cell(sum) / CHANNELS;
        product = sum_of_cell(product) / CHANNELS;
        for_each([&](int i, int k) {
            float& slope = grad.own[i].at[k];
            slope = (slope - sum - normal.own[i].at[k] * product) * scale + other.own[i].at[k];
        });
        store_part<MAP>(grad_x, cell, inside, grad);
    });
    store_sums(sums, partial_sums, stride);
}

// What y is multiplied by: a scale for each channel, and a factor for each image. Null is 1.
struct Scales {
    Part of_channels;
    const float* of_images;
    u32 cells_of_image;

    DEVICE float of_image(long long cell, bool inside) const {
        return of_images && inside ? __ldg(of_images + static_cast<u32>(cell) / cells_of_image) : 1;
    }
};

DEVICE Scales load_scales(const float* scale, const float* factors, int cells_of_image) {
    Scales scales = {load_part<FLOAT32>(scale, 0, scale), factors, static_cast<u32>(cells_of_image)};
    if (!scale) for_each([&](int i, int k) { scales.of_channels.own[i].at[k] = 1; });
    return scales;
}

// out = x + scale * factor * y; `out` is float32.
KERNEL add_scaled(const void* x, const float* scale, const float* factors, const void* y, float* out,
                  int cells, int cells_of_image) {
    const Scales scales = load_scales(scale, factors, cells_of_image);
    for_each_cell(cells, [&](long long cell, bool inside) {
        Part sum = load_part<MAP>(x, cell, inside);
        const Part part = load_part<RESULT>(y, cell, inside);
        const float factor = scales.of_image(cell, inside);
        for_each([&](int i, int k) {
            sum.own[i].at[k] += scales.of_channels.own[i].at[k] * (factor * part.own[i].at[k]);
        });
        store_part<FLOAT32>(out, cell, inside, sum);
    });
}

// The gradients of `add_scaled`: of y, and the sums of thread blocks that make up the gradient of
// the scale, and the sum of that of y over all cells.
KERNEL add_scaled_backward(const float* g, const float* scale, const float* factors, const void* y,
                           void* grad_y, float* partial_sums, int cells, int cells_of_image,
                           int stride) {
    const Scales scales = load_scales(scale, factors, cells_of_image);
    Part sums[2] = {};
    for_each_cell(cells, [&](long long cell, bool inside) {
        Part grad = load_part<FLOAT32>(g, cell, inside);
        const Part part = load_part<RESULT>(y, cell, inside);
        const float factor = scales.of_image(cell, inside);
        for_each([&](int i, int k) {
            float& slope = grad.own[i].at[k];
            slope *= factor;
            sums[0].own[i].at[k] += slope * part.own[i].at[k];
            slope *= scales.of_channels.own[i].at[k];
            sums[1].own[i].at[k] += slope;
        });
        store_part<RESULT>(grad_y, cell, inside, grad);
    });
    store_sums(sums, partial_sums, stride);
}
