// Transforms of a 16-bit map (B, H, W, C) on an NVIDIA GPU, by matrix products on tensor cores.
//
// folded.py explains the algebra: an axis of n cells is folded about its centre into an even and an
// odd part of ceil(n / 2) values, whose cosine and sine coefficients are products with matrices of
// half the size.
//
// A block of threads holds some rows, columns and CHANNELS channels of an image in shared memory:
//
//     tile[row][column * CHANNELS + channel]    ROWS = 2 * TILE_H, COLUMNS = 2 * TILE_W
//
// Rows 0 to TILE_H - 1 belong to the even part of H or its cosines, the others to the odd part or
// its sines; so do columns. HALF_H and HALF_W are ceil(H / 2) and ceil(W / 2), rounded up to 8 or a
// multiple of 16. A tile that is transformed along an axis holds all of it: TILE_H = HALF_H or
// TILE_W = HALF_W. What lies beyond the map is zero.
//
// Factors are rounded to float16, sums are float32. Before rounding, values are scaled by a power
// of two, which is exact, so that the largest lies between 2^6 and 2^7. Then sums over 256 slots do
// not overflow, and values a million times smaller keep their precision. The true value is
// `stored / 2^shift`.
//
// Python defines HALF_H, HALF_W, TILE_H, TILE_W, CHANNELS, BFLOAT16 (else float16) and VECTOR (how
// many channels a thread reads at once), besides what ptx.h needs.

#pragma once
#include "ptx.h"

constexpr int ROWS = 2 * TILE_H, COLUMNS = 2 * TILE_W;
// Parts that are transformed apart. A half of 8 is too small for the tensor cores: there both parts
// are one, and the matrix has zeros where they would mix.
constexpr int PARTS_H = HALF_H < 16 ? 1 : 2, PARTS_W = HALF_W < 16 ? 1 : 2;
// Blocks of 16 slots, or cells, in a part.
constexpr int BLOCKS_H = 2 * HALF_H / PARTS_H / 16, BLOCKS_W = 2 * HALF_W / PARTS_W / 16;
// From row to row, in values; the 16 bytes more put rows into different banks.
constexpr int STRIDE = COLUMNS * CHANNELS + 8;
constexpr int TILE = ROWS * STRIDE;
// A group is 16 neighbours in the rows of cosines along W, slots and channels, with their 16
// counterparts among the sines.
constexpr int GROUPS = TILE_W * CHANNELS / 16;
constexpr int THREADS = 32 * WARPS;
constexpr int TARGET = 6, LARGEST_SHIFT = 126;
// Where values of different shifts are added up, the basis is multiplied by their scales and by 2^14.
// So where one channel is loud and others are quiet, scales can be as small as 2^-28 without loss.
constexpr int HEADROOM = 14;

static_assert(VECTOR == 1 || VECTOR == 8, "");
static_assert(TILE_W * CHANNELS % 16 == 0 && (CHANNELS == 8 || CHANNELS == 16), "");

// The size of a map, and where the tile begins in it: at a channel, a row of the upper half and a
// slot along W.
struct Shape {
    int height, width, channels;
    int first_channel, first_row, first_slot;
};

struct Complex {
    float re, im;
};

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }
DEVICE u32 larger_bits(u32 a, u32 b) { return a > b ? a : b; }

// Return 2^exponent, clamped to the normal numbers of float32.
DEVICE float power_of_two(int exponent) {
    return bits_to_float(static_cast<u32>(smaller(larger(exponent, -126), 127) + 127) << 23);
}

// Return a pair of 2^exponent in float16, at most 2^15; below 2^-24 zero.
DEVICE u32 power_pair(int exponent) {
    u32 one = exponent < -24 ? 0 : exponent < -14 ? 1u << (exponent + 24) : (exponent + 15u) << 10;
    return one << 16 | one;
}

// Return the shift that scales values up to the one with these bits to the target.
DEVICE int shift_of(u32 largest) {
    return smaller(TARGET + 127 - static_cast<int>(largest >> 23), LARGEST_SHIFT);
}

DEVICE float widen(u16 x) {
#if BFLOAT16
    return bits_to_float(static_cast<u32>(x) << 16);
#else
    return from_float16(x);
#endif
}

DEVICE u32 narrow(float low, float high) {
#if BFLOAT16
    return pack_bfloat16(low, high);
#else
    return pack(low, high);
#endif
}

constexpr u32 INFINITE = BFLOAT16 ? 0x7f80 : 0x7c00;  // bits of infinity; those of NaN are larger

DEVICE float widen_low(u32 pair) { return widen(static_cast<u16>(pair)); }

DEVICE float widen_high(u32 pair) {
#if BFLOAT16
    return bits_to_float(pair & 0xffff0000);
#else
    return from_float16(static_cast<u16>(pair >> 16));
#endif
}

DEVICE u32& pair_at(u16* p) { return *reinterpret_cast<u32*>(p); }

// What a thread reads and writes at once: pairs of channels, or a single one.
constexpr int PAIRS = VECTOR > 1 ? VECTOR / 2 : 1;

struct alignas(2 * VECTOR < 4 ? 4 : 2 * VECTOR) Vector {
    u32 pairs[PAIRS];
};

DEVICE Vector load_vector(const u16* p) {
    if constexpr (VECTOR > 1) return *reinterpret_cast<const Vector*>(p);
    return {{*p}};
}

DEVICE void store_vector(u16* p, const Vector& x) {
    if constexpr (VECTOR > 1) {
        *reinterpret_cast<Vector*>(p) = x;
    } else {
        *p = static_cast<u16>(x.pairs[0]);
    }
}

// Return the largest value of all threads.
DEVICE u32 largest_of_block(u32 x, u32* scratch) {
    x = largest_of_warp(x);
    if (lane() == 0) scratch[warp()] = x;
    __syncthreads();
    for (int i = 0; i < WARPS; ++i) x = larger_bits(x, scratch[i]);
    __syncthreads();
    return x;
}

// Call function(row, chunk) for every VECTOR channels of a quarter of the tile. A thread keeps to a
// column as far as it can.
template <class Function>
DEVICE void for_each_chunk(const Function& function) {
    constexpr int CHUNKS = TILE_W * CHANNELS / VECTOR;  // of a row
    constexpr int AT_ONCE = THREADS >= CHUNKS ? THREADS / CHUNKS : 1;  // rows
    const int first = AT_ONCE > 1 ? threadIdx.x / CHUNKS : 0;
    if (first >= AT_ONCE) return;
    for (int i = AT_ONCE > 1 ? threadIdx.x % CHUNKS : threadIdx.x; i < CHUNKS; i += THREADS) {
#pragma unroll 2
        for (int r = first; r < TILE_H; r += AT_ONCE) function(r, i);
    }
}

// Values of the tile from one quarter to the next.
constexpr int RIGHT = TILE_W * CHANNELS, BOTTOM = TILE_H * STRIDE;

// Call function(chunk in the tile, offset in the map, whether it exists) for every VECTOR channels.
template <class Function>
DEVICE void for_each_chunk_of_map(u16* tile, const Shape& shape, const Function& function) {
    const u32 channels = shape.channels, row_size = shape.width * channels;
    for_each_chunk([&](int r, int i) {
        const int c = shape.first_channel + i * VECTOR % CHANNELS, w = i * VECTOR / CHANNELS;
        const int h = shape.first_row + r;
        const u32 row[2] = {h * row_size, (shape.height - 1 - h) * row_size};
        const u32 column[2] = {w * channels + c, (shape.width - 1 - w) * channels + c};
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int bottom = quarter / 2, right = quarter % 2;
            // The middle cell of an odd axis belongs to the first half alone.
            const bool inside = 2 * h + bottom < shape.height && 2 * w + right < shape.width &&
                                c < shape.channels;
            function(tile + r * STRIDE + i * VECTOR + bottom * BOTTOM + right * RIGHT,
                     row[bottom] + column[right], inside);
        }
    });
}

// Load a part of an image and fold both axes. Each thread folds the cells that it has read, in
// place. Returns the shift.
DEVICE int load_parts(u16* tile, const u16* x, const Shape& shape, u32* scratch) {
    for_each_chunk_of_map(tile, shape, [&](u16* at, u32 offset, bool inside) {
        const u16* from = x + (inside ? offset : 0);
        if constexpr (VECTOR > 1) {
            copy_async(at, from, inside);
        } else {
            *at = inside ? *from : 0;
        }
    });
    wait_for_copies();

    u32 largest = 0;
    for_each_chunk([&](int r, int i) {
        const u16* at = tile + r * STRIDE + i * VECTOR;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            const Vector x = load_vector(at + quarter / 2 * BOTTOM + quarter % 2 * RIGHT);
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) largest = larger_pair(largest, x.pairs[k] & 0x7fff7fff);
        }
    });
    largest = largest_of_block(larger_bits(largest & 0xffff, largest >> 16), scratch);
    if (largest >= INFINITE) {  // of the others: channels keep to themselves
        largest = 0;
        for_each_chunk([&](int r, int i) {
            const u16* at = tile + r * STRIDE + i * VECTOR;
            for (int quarter = 0; quarter < 4; ++quarter) {
                for (int k = 0; k < VECTOR; ++k) {
                    const u32 x = at[quarter / 2 * BOTTOM + quarter % 2 * RIGHT + k] & 0x7fff;
                    if (x < INFINITE) largest = larger_bits(largest, x);
                }
            }
        });
        largest = largest_of_block(largest, scratch);
    }
    const int shift = shift_of(float_to_bits(widen_low(largest))) - 2;  // for sums of four
    const float scale = power_of_two(shift);

    for_each_chunk([&](int r, int i) {
        u16* at = tile + r * STRIDE + i * VECTOR;
        Vector cells[4];
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            cells[quarter] = load_vector(at + quarter / 2 * BOTTOM + quarter % 2 * RIGHT);
        }
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
            float part[4][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float cell[4];
#pragma unroll
                for (int quarter = 0; quarter < 4; ++quarter) {
                    const u32 pair = cells[quarter].pairs[k];
                    cell[quarter] = i ? widen_high(pair) : widen_low(pair);
                }
                // Scaled first, since sums of the largest bfloat16 values overflow.
                const float right[2] = {cell[1] * scale, cell[3] * scale};
                const float top_even = cell[0] * scale + right[0];
                const float top_odd = cell[0] * scale - right[0];
                const float bottom_even = cell[2] * scale + right[1];
                const float bottom_odd = cell[2] * scale - right[1];
                part[0][i] = top_even + bottom_even, part[1][i] = top_odd + bottom_odd;
                part[2][i] = top_even - bottom_even, part[3][i] = top_odd - bottom_odd;
            }
#pragma unroll
            for (int quarter = 0; quarter < 4; ++quarter) {
                cells[quarter].pairs[k] = pack(part[quarter][0], part[quarter][1]);
            }
        }
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            store_vector(at + quarter / 2 * BOTTOM + quarter % 2 * RIGHT, cells[quarter]);
        }
    });
    __syncthreads();
    return shift;
}

// Matrix fragments of the basis of an axis, `(3, PARTS, BLOCKS, BLOCKS, 32)`, by what they are for:
// slot x cell, to transform rows; cell x slot, to restore; slot x cell as right factors, to
// transform columns.
enum { TRANSFORM, RESTORE, TRANSFORM_COLUMNS };

template <int PARTS, int BLOCKS>
DEVICE uint4 fragment(const uint4* basis, int use, int part, int row, int column) {
    const int index = ((use * PARTS + part) * BLOCKS + row) * BLOCKS + column;
    return __ldg(basis + index * 32 + lane());
}

// Eight columns of a matrix for products along W: channels of a row of the tile.
struct Octet {
    int row, channel;
};

DEVICE Octet octet(int index) {
    return {index / (CHANNELS / 8), index % (CHANNELS / 8) * 8};
}

// Return a pointer to a pair of an octet at a column of the tile, from lane / 4 and lane % 4.
DEVICE u16* pair_of_lane(u16* tile, const Octet& at, int column) {
    return tile + at.row * STRIDE + (column + lane() / 4) * CHANNELS + at.channel + lane() % 4 * 2;
}

// Load 16 columns of two octets as factors.
DEVICE uint4 load_octets(u16* tile, const Octet& first, const Octet& second, int column) {
    const Octet& at = lane() < 16 ? first : second;
    return load_transposed(tile + at.row * STRIDE + (column + lane() % 16) * CHANNELS + at.channel);
}

// Transform all rows along W, in place.
DEVICE void transform_rows(u16* tile, const uint4* basis_w) {
    constexpr int ALL = ROWS * CHANNELS / 8;
    constexpr int OCTETS = BLOCKS_W <= 8 && ALL >= 4 * WARPS ? 4 : 2;  // at once
    for (int first = warp() * OCTETS; first < ALL; first += WARPS * OCTETS) {
        Octet at[OCTETS];
#pragma unroll
        for (int n = 0; n < OCTETS; ++n) at[n] = octet(first + n);
#pragma unroll
        for (int part = 0; part < PARTS_W; ++part) {
            uint4 x[BLOCKS_W][OCTETS / 2];
#pragma unroll
            for (int k = 0; k < BLOCKS_W; ++k) {
#pragma unroll
                for (int n = 0; n < OCTETS / 2; ++n) {
                    x[k][n] = load_octets(tile, at[2 * n], at[2 * n + 1], part * HALF_W + 16 * k);
                }
            }
            __syncwarp();
#pragma unroll 2
            for (int block = 0; block < BLOCKS_W; ++block) {
                float sum[OCTETS][4] = {};
#pragma unroll
                for (int k = 0; k < BLOCKS_W; ++k) {
                    const uint4 f = fragment<PARTS_W, BLOCKS_W>(basis_w, TRANSFORM, part, block, k);
#pragma unroll
                    for (int n = 0; n < OCTETS / 2; ++n) {
                        multiply_add(sum[2 * n], f, x[k][n].x, x[k][n].y);
                        multiply_add(sum[2 * n + 1], f, x[k][n].z, x[k][n].w);
                    }
                }
#pragma unroll
                for (int n = 0; n < OCTETS; ++n) {
                    u16* to = pair_of_lane(tile, at[n], part * HALF_W + 16 * block);
                    pair_at(to) = pack(sum[n][0], sum[n][1]);
                    pair_at(to + 8 * CHANNELS) = pack(sum[n][2], sum[n][3]);
                }
            }
        }
    }
    __syncthreads();
}

// Coefficients of 16 slots along H for a group of 16 slots and channels: `[along W][along H][8
// slots]`, each a 16x8 matrix. The first two count cosines and sines. With PARTS_H == 1 the cosines
// lie where the first 8 slots would and the sines where the others would.
typedef float Coefficients[2][PARTS_H][2][4];

// `scales` are pairs of factors of strips of rows, times 2^HEADROOM, or null if the rows have one shift.
DEVICE void transform_columns(Coefficients& sum, u16* tile, const uint4* basis_h, int group,
                              int block, const u32* scales = nullptr) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
        for (int part = 0; part < PARTS_H; ++part) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
#pragma unroll
                for (int r = 0; r < 4; ++r) sum[w][part][k][r] = 0;
            }
        }
    }
    const u16* at = tile + (lane() / 16 * 8 + lane() % 8) * STRIDE + group * 16 + lane() / 8 % 2 * 8;
#pragma unroll
    for (int part = 0; part < PARTS_H; ++part) {
#pragma unroll
        for (int k = 0; k < BLOCKS_H; ++k) {
            uint4 f = fragment<PARTS_H, BLOCKS_H>(basis_h, TRANSFORM_COLUMNS, part, block, k);
            if (scales) {
                // In a single part the second 8 rows are the odd parts of the first.
                const u32* scale = scales + (16 * k + lane() % 4 * 2) / STRIP;
                const u32 first = scale[0], second = scale[PARTS_H == 1 ? 0 : 8 / STRIP];
                f.x = multiply_pair(f.x, first), f.y = multiply_pair(f.y, second);
                f.z = multiply_pair(f.z, first), f.w = multiply_pair(f.w, second);
            }
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                const uint4 x = load_transposed(at + (part * HALF_H + 16 * k) * STRIDE +
                                                w * TILE_W * CHANNELS);
                multiply_add(sum[w][part][0], x, f.x, f.y);
                multiply_add(sum[w][part][1], x, f.z, f.w);
            }
        }
    }
    if (scales) {
        float* values = &sum[0][0][0][0];
#pragma unroll
        for (int i = 0; i < 16 * PARTS_H; ++i) values[i] *= power_of_two(-HEADROOM);
    }
}

// Where four coefficients stand in the spectrum, and what they are. See folded.py.
struct Slot {
    int u, v, channel;
    bool inside, u0, v0, corner;
};

// Most groups have no slot in column 0, which is a case of its own: there ZERO is false.
template <bool ZERO>
DEVICE Slot slot_of(int group, int block, int eight, int r, const Shape& shape) {
    const int f = group * 16 + lane() / 4 + r / 2 * 8;
    Slot slot;
    slot.u = block * 16 + eight * 8 + lane() % 4 * 2 + r % 2;
    slot.v = shape.first_slot + f / CHANNELS;
    slot.channel = shape.first_channel + f % CHANNELS;
    slot.inside = slot.u < (shape.height + 1) / 2 && slot.v < (shape.width + 1) / 2 &&
                  slot.channel < shape.channels;
    // Where the compiler knows the first three, most slots cost no comparison.
    slot.u0 = block == 0 && eight == 0 && r % 2 == 0 && lane() % 4 == 0;
    slot.v0 = ZERO && slot.v == 0;
    slot.corner = slot.u0 && slot.v0;
    return slot;
}

DEVICE bool holds_zero_column(int group, const Shape& shape) {
    return shape.first_slot == 0 && group * 16 < CHANNELS;
}

DEVICE int place(int u, int v, int channel, const Shape& shape) {
    return u * ((shape.width / 2 + 1) * shape.channels) + (v * shape.channels + channel);
}

// The two values of a slot, from its four coefficients.
DEVICE void to_values(float cc, float cs, float sc, float ss, bool u0, bool v0, Complex& first,
                      Complex& second) {
    if (u0) {
        first = {cc, v0 ? -cs : -sc};
        second = {v0 ? sc : ss, v0 ? -ss : cs};
    } else if (v0) {
        first = {cc, -cs};
        second = {sc, -ss};
    } else {
        first = {cc - ss, -cs - sc};
        second = {cc + ss, cs - sc};
    }
}

// The transpose of `to_values`.
DEVICE void from_values(const Complex& first, const Complex& second, bool u0, bool v0, float& cc,
                        float& cs, float& sc, float& ss) {
    if (v0) {
        cc = first.re, cs = -first.im;
        sc = second.re, ss = -second.im;
    } else if (u0) {
        cc = first.re, cs = second.im;
        sc = -first.im, ss = second.re;
    } else {
        cc = first.re + second.re, cs = second.im - first.im;
        sc = -first.im - second.im, ss = second.re - first.re;
    }
}

DEVICE Complex product(const Complex& k, const Complex& x, bool corner) {
    if (corner) return {k.re * x.re, k.im * x.im};
    return {k.re * x.re - k.im * x.im, k.re * x.im + k.im * x.re};
}

// conj(x) * g
DEVICE Complex conjugate_product(const Complex& x, const Complex& g, bool corner) {
    if (corner) return {x.re * g.re, x.im * g.im};
    return {x.re * g.re + x.im * g.im, x.re * g.im - x.im * g.re};
}

// Return the Hermitian part of a spectrum in a zero or Nyquist column, from its values at u and -u.
DEVICE Complex hermitian(const Complex& k, const Complex& mirror, bool u0) {
    if (u0) return {k.re, mirror.re};
    return {0.5f * k.re + 0.5f * mirror.re, 0.5f * k.im - 0.5f * mirror.im};
}

// Return pair i of the coefficients of a block, as `Coefficients` counts them.
template <class Values>
DEVICE auto& place_of(Values& packed, int i) {
    return packed[i / (4 * PARTS_H)][i / 4 % PARTS_H][i % 2][i / 2 % 2];
}

// Return the bits of the largest value of a block that is finite.
DEVICE u32 largest_of_coefficients(const Coefficients& x) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 16 * PARTS_H; ++i) largest = fmaxf(largest, fabsf((&x[0][0][0][0])[i]));
    u32 bits = largest_of_warp(float_to_bits(largest));
    if (bits >= 0x7f800000) {  // infinite: the largest of the others
        largest = 0;
#pragma unroll
        for (int i = 0; i < 16 * PARTS_H; ++i) {
            const float value = fabsf((&x[0][0][0][0])[i]);
            if (float_to_bits(value) < 0x7f800000) largest = fmaxf(largest, value);
        }
        bits = largest_of_warp(float_to_bits(largest));
    }
    return bits;
}

// The coefficients of a block in float16, `[along W][along H][8 columns][8 slots]`, in the order of
// factors.
typedef u32 PackedBlock[2][PARTS_H][2][2];

// Round the coefficients of a block with a shift.
DEVICE void pack_block(PackedBlock& packed, const Coefficients& x, int shift) {
    const float scale = power_of_two(shift);
#pragma unroll
    for (int i = 0; i < 8 * PARTS_H; ++i) {
        const float* values = &x[0][0][0][0] + 2 * i;
        place_of(packed, i) = pack(values[0] * scale, values[1] * scale);
    }
}

DEVICE void unpack_block(const PackedBlock& packed, Coefficients& x) {
#pragma unroll
    for (int i = 0; i < 8 * PARTS_H; ++i) {
        const u32 pair = place_of(packed, i);
        (&x[0][0][0][0])[2 * i] = from_float16(static_cast<u16>(pair));
        (&x[0][0][0][0])[2 * i + 1] = from_float16(static_cast<u16>(pair >> 16));
    }
}

// Bring all blocks to one shift, which is returned.
DEVICE int align_blocks(PackedBlock (&packed)[BLOCKS_H], const int (&shifts)[BLOCKS_H]) {
    // Not the largest of negative shifts: ptxas of CUDA 13.0 loses a sign there.
    int common = LARGEST_SHIFT;
#pragma unroll
    for (int block = 0; block < BLOCKS_H; ++block) common = smaller(common, shifts[block]);
    if (BLOCKS_H == 1) return common;
#pragma unroll
    for (int block = 0; block < BLOCKS_H; ++block) {
        const u32 scale = power_pair(common - shifts[block]);
#pragma unroll
        for (int i = 0; i < 8 * PARTS_H; ++i) {
            u32& pair = (&packed[block][0][0][0][0])[i];
            pair = multiply_pair(pair, scale);
        }
    }
    return common;
}

// The factors of the two values of a slot.
struct Factors {
    Complex first, second;
};

DEVICE Complex load(const Complex* p) {
    const float2 x = __ldg(reinterpret_cast<const float2*>(p));
    return {x.x, x.y};
}

// Load the factors of a slot. Beyond the spectrum, where coefficients are zero, any will do.
template <bool ZERO>
DEVICE Factors load_factors(const Slot& slot, const Complex* weight, float sign,
                            const Shape& shape) {
    // Large halves are rounded up by less than the rows of the spectrum.
    const int u = HALF_H < 16 ? smaller(slot.u, shape.height / 2) : slot.u;
    const int v = smaller(slot.v, shape.width / 2);
    const int mirror = slot.u0 ? shape.height / 2 : shape.height - (HALF_H < 16 ? larger(u, 1) : u);
    const int channel = smaller(slot.channel, shape.channels - 1);
    const int at = place(u, v, channel, shape), at_mirror = place(mirror, v, channel, shape);
    Factors k = {load(weight + at), load(weight + at_mirror)};
    if (slot.v0) {
        const int nyquist = shape.width / 2 * shape.channels;
        k.first = hermitian(k.first, k.second, slot.u0);
        k.second = hermitian(load(weight + at + nyquist), load(weight + at_mirror + nyquist), slot.u0);
    }
    // In the corner both are real values, of which one is not the conjugate of another.
    if (slot.corner) {
        k.first.re *= 0.5f, k.first.im *= 0.5f, k.second.re *= 0.5f, k.second.im *= 0.5f;
    } else {
        k.first.im *= sign, k.second.im *= sign;
    }
    return k;
}

// Multiply four coefficients.
DEVICE void multiply(float& cc, float& cs, float& sc, float& ss, const Slot& slot, const Factors& k) {
    Complex first, second;
    to_values(cc, cs, sc, ss, slot.u0, slot.v0, first, second);
    from_values(product(k.first, first, slot.corner), product(k.second, second, slot.corner),
                slot.u0, slot.v0, cc, cs, sc, ss);
}

// The factors of a block of coefficients.
typedef Factors BlockFactors[PARTS_H][4];

template <bool ZERO>
DEVICE void load_factors(BlockFactors& factors, const Complex* weight, float sign, int group,
                         int block, const Shape& shape) {
#pragma unroll
    for (int eight = 0; eight < PARTS_H; ++eight) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Slot slot = slot_of<ZERO>(group, block, eight, r, shape);
            factors[eight][r] = load_factors<ZERO>(slot, weight, sign, shape);
        }
    }
}

template <bool ZERO>
DEVICE void multiply_block(Coefficients& x, const BlockFactors& factors, int group, int block,
                           const Shape& shape) {
#pragma unroll
    for (int eight = 0; eight < PARTS_H; ++eight) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int k = PARTS_H == 1 ? 1 : eight;
            const Slot slot = slot_of<ZERO>(group, block, eight, r, shape);
            multiply(x[0][0][eight][r], x[0][PARTS_H - 1][k][r], x[1][0][eight][r],
                     x[1][PARTS_H - 1][k][r], slot, factors[eight][r]);
        }
    }
}

// Restore a block of rows of a group from `packed(k, w, part, rows, 0 or 1)`, in place.
template <class Packed>
DEVICE void restore_block(u16* tile, const uint4* basis_h, int group, int part, int block,
                          const Packed& packed) {
    float sum[2][2][4] = {};
#pragma unroll
    for (int k = 0; k < BLOCKS_H; ++k) {
        const uint4 f = fragment<PARTS_H, BLOCKS_H>(basis_h, RESTORE, part, block, k);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            const uint4 x = packed(k, w, part);
            multiply_add(sum[w][0], f, x.x, x.y);
            multiply_add(sum[w][1], f, x.z, x.w);
        }
    }
    const int row = part * HALF_H + block * 16 + lane() / 4;
    u16* to = tile + row * STRIDE + group * 16 + lane() % 4 * 2;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
        for (int rows = 0; rows < 2; ++rows) {
            u16* at = to + w * TILE_W * CHANNELS + rows * 8;
            pair_at(at) = pack(sum[w][rows][0], sum[w][rows][1]);
            pair_at(at + 8 * STRIDE) = pack(sum[w][rows][2], sum[w][rows][3]);
        }
    }
}

DEVICE uint4 four_of(const PackedBlock& packed, int w, int part) {
    return {packed[w][part][0][0], packed[w][part][0][1], packed[w][part][1][0],
            packed[w][part][1][1]};
}

// Filter a group of 16 slots and channels, in place; returns its shift.
template <bool ZERO>
DEVICE int filter_group(u16* tile, const uint4* basis_h, const Complex* weight, float sign,
                        int group, const Shape& shape) {
    PackedBlock packed[BLOCKS_H];
    int shifts[BLOCKS_H];
#pragma unroll
    for (int block = 0; block < BLOCKS_H; ++block) {
        BlockFactors factors;
        load_factors<ZERO>(factors, weight, sign, group, block, shape);
        Coefficients x;
        transform_columns(x, tile, basis_h, group, block);
        multiply_block<ZERO>(x, factors, group, block, shape);
        shifts[block] = shift_of(largest_of_coefficients(x));
        pack_block(packed[block], x, shifts[block]);
    }
    const int common = align_blocks(packed, shifts);
    __syncwarp();
#pragma unroll
    for (int part = 0; part < PARTS_H; ++part) {
#pragma unroll 2
        for (int block = 0; block < BLOCKS_H; ++block) {
            restore_block(tile, basis_h, group, part, block,
                          [&](int k, int w, int part) { return four_of(packed[k], w, part); });
        }
    }
    return common;
}

// Restore all rows along W, in place, and store the map.
DEVICE void restore_rows(u16* tile, const uint4* basis_w, const int* shifts, int shift, u16* y,
                         const Shape& shape) {
    int common = LARGEST_SHIFT;
    for (int i = 0; i < GROUPS; ++i) common = smaller(common, shifts[i]);
    shift += common + HEADROOM;
    // Every value of the spectrum stands for its conjugate, too.
    float scale = 2 / (static_cast<float>(shape.height) * shape.width);
    scale *= power_of_two(-(shift / 2));
    scale = fminf(scale * power_of_two(shift / 2 - shift), 3e38f);
    u32 scales[BLOCKS_W][2];  // of slots 2 * (lane % 4) and + 1, and 8 further
#pragma unroll
    for (int k = 0; k < BLOCKS_W; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // In a single part the second 8 are the sines of the same slots.
            const int v = (PARTS_W == 1 ? 0 : 16 * k + 8 * i) + lane() % 4 * 2;
            const u32 low = power_pair(common - shifts[v * CHANNELS / 16] + HEADROOM);
            const u32 high = power_pair(common - shifts[(v + 1) * CHANNELS / 16] + HEADROOM);
            scales[k][i] = (low & 0xffff) | (high & 0xffff0000);
        }
    }
    constexpr int OCTETS = BLOCKS_W <= 4 ? 2 : 1;  // of the top half at once
    constexpr int ALL = TILE_H * CHANNELS / 8;
    for (int first = warp() * OCTETS; first < ALL; first += WARPS * OCTETS) {
        Octet at[OCTETS];
        uint4 x[PARTS_W][BLOCKS_W][OCTETS];
#pragma unroll
        for (int n = 0; n < OCTETS; ++n) {
            at[n] = octet(first + n);
            const Octet below = {at[n].row + TILE_H, at[n].channel};
#pragma unroll
            for (int part = 0; part < PARTS_W; ++part) {
#pragma unroll
                for (int k = 0; k < BLOCKS_W; ++k) {
                    x[part][k][n] = load_octets(tile, at[n], below, part * HALF_W + 16 * k);
                }
            }
        }
        __syncwarp();
#pragma unroll 2
        for (int block = 0; block < BLOCKS_W; ++block) {
            float sum[PARTS_W][OCTETS][2][4] = {};  // the last but one: even and odd along H
#pragma unroll
            for (int part = 0; part < PARTS_W; ++part) {
#pragma unroll
                for (int k = 0; k < BLOCKS_W; ++k) {
                    uint4 f = fragment<PARTS_W, BLOCKS_W>(basis_w, RESTORE, part, block, k);
                    f.x = multiply_pair(f.x, scales[k][0]), f.y = multiply_pair(f.y, scales[k][0]);
                    f.z = multiply_pair(f.z, scales[k][1]), f.w = multiply_pair(f.w, scales[k][1]);
#pragma unroll
                    for (int n = 0; n < OCTETS; ++n) {
                        multiply_add(sum[part][n][0], f, x[part][k][n].x, x[part][k][n].y);
                        multiply_add(sum[part][n][1], f, x[part][k][n].z, x[part][k][n].w);
                    }
                }
            }
#pragma unroll
            for (int eight = 0; eight < PARTS_W; ++eight) {
#pragma unroll
                for (int n = 0; n < OCTETS; ++n) {
                    float cells[4][2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int r = PARTS_W == 1 ? i : 2 * eight + i, o = PARTS_W - 1;
                        const int odd_r = PARTS_W == 1 ? 2 + i : r;
                        const float even_top = sum[0][n][0][r] + sum[0][n][1][r];
                        const float even_bottom = sum[0][n][0][r] - sum[0][n][1][r];
                        const float odd_top = sum[o][n][0][odd_r] + sum[o][n][1][odd_r];
                        const float odd_bottom = sum[o][n][0][odd_r] - sum[o][n][1][odd_r];
                        cells[0][i] = (even_top + odd_top) * scale;
                        cells[1][i] = (even_top - odd_top) * scale;
                        cells[2][i] = (even_bottom + odd_bottom) * scale;
                        cells[3][i] = (even_bottom - odd_bottom) * scale;
                    }
                    u16* to = pair_of_lane(tile, at[n], block * 16 + eight * 8);
#pragma unroll
                    for (int quarter = 0; quarter < 4; ++quarter) {
                        pair_at(to + quarter / 2 * BOTTOM + quarter % 2 * RIGHT) =
                            narrow(cells[quarter][0], cells[quarter][1]);
                    }
                }
            }
        }
    }
    __syncthreads();
    for_each_chunk_of_map(tile, shape, [&](u16* at, u32 offset, bool inside) {
        if (inside) store_vector(y + offset, load_vector(at));
    });
}

// The gradients of the two factors of each slot of a block, of a lane.
typedef Complex Gradients[PARTS_H][4][2];

// Add the gradients that a block of coefficients of x and g makes. `shift` is the sum of theirs.
template <bool ZERO>
DEVICE void correlate_block(Gradients& sum, const Coefficients& x, const Coefficients& g, int shift,
                            int group, int block, const Shape& shape) {
    // Every value of the spectrum stands for its conjugate, too.
    const float norm = 2 / (static_cast<float>(shape.height) * shape.width);
    const float scale_1 = power_of_two(-(shift / 2));
    const float scale_2 = power_of_two(shift / 2 - shift) * norm;
#pragma unroll
    for (int eight = 0; eight < PARTS_H; ++eight) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Slot slot = slot_of<ZERO>(group, block, eight, r, shape);
            const auto values = [&](const Coefficients& of, Complex& first, Complex& second) {
                constexpr int SINE = PARTS_H - 1;
                const int k = PARTS_H == 1 ? 1 : eight;
                to_values(of[0][0][eight][r], of[0][SINE][k][r], of[1][0][eight][r],
                          of[1][SINE][k][r], slot.u0, slot.v0, first, second);
            };
            Complex of_x[2], of_g[2];
            values(x, of_x[0], of_x[1]);
            values(g, of_g[0], of_g[1]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Complex product = conjugate_product(of_x[i], of_g[i], slot.corner);
                const float scale = slot.corner ? 0.5f * scale_2 : scale_2;
                sum[eight][r][i].re += product.re * scale_1 * scale;
                sum[eight][r][i].im += product.im * scale_1 * scale;
            }
        }
    }
}

template <bool ZERO>
DEVICE void store_gradients(Complex* grad, const Gradients& sum, int group, int block,
                            const Shape& shape) {
#pragma unroll
    for (int eight = 0; eight < PARTS_H; ++eight) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Slot slot = slot_of<ZERO>(group, block, eight, r, shape);
            if (!slot.inside) continue;
            const Complex &first = sum[eight][r][0], &second = sum[eight][r][1];
            const int mirror = slot.u0 ? shape.height / 2 : shape.height - slot.u;
            const bool has_mirror = !slot.u0 || shape.height % 2 == 0;
            Complex* at = grad + place(slot.u, slot.v, slot.channel, shape);
            Complex* at_mirror = grad + place(mirror, slot.v, slot.channel, shape);
            if (slot.v0) {
                // The transpose of `hermitian`.
                const auto store = [&](int column, const Complex& value) {
                    const float re = 0.5f * value.re, im = 0.5f * value.im;
                    at[column] = slot.u0 ? Complex{value.re, 0} : Complex{re, im};
                    if (has_mirror) {
                        at_mirror[column] = slot.u0 ? Complex{value.im, 0} : Complex{re, -im};
                    }
                };
                store(0, first);
                if (shape.width % 2 == 0) store(shape.width / 2 * shape.channels, second);
            } else {
                *at = first;
                if (has_mirror) *at_mirror = second;
            }
        }
    }
}

template <bool ZERO>
DEVICE void store_correlation(Complex* grad, const Coefficients& x, const Coefficients& g,
                              int shift, int group, int block, const Shape& shape) {
    Gradients gradients = {};
    correlate_block<ZERO>(gradients, x, g, shift, group, block, shape);
    store_gradients<ZERO>(grad, gradients, group, block, shape);
}
