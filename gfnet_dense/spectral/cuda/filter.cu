// The global filter of a 16-bit map (B, H, W, C) on an NVIDIA GPU, in one pass over memory.
//
// A block of threads holds all cells of an image and CHANNELS of its channels in shared memory and
// transforms them by matrix products on tensor cores. folded.py explains the algebra: an axis of n
// cells is folded about its centre into an even and an odd part of ceil(n / 2) values, whose
// cosine and sine coefficients are products with matrices of half the size.
//
//     tile[row][column * CHANNELS + channel]    ROWS = 2 * HALF_H, COLUMNS = 2 * HALF_W
//
// Rows 0 to HALF_H - 1 of the tile belong to the even part of H or its cosines, the others to the
// odd part or its sines; so do columns. HALF_H and HALF_W are ceil(H / 2) and ceil(W / 2), rounded
// up to 8 or a multiple of 16; what lies beyond the map is zero.
//
// Factors are rounded to float16, sums are float32. Before rounding, values are scaled by a power
// of two, which is exact, so that the largest lies between 2^6 and 2^7. Then sums over 256 slots do
// not overflow, and values a million times smaller keep their precision. The true value is
// `stored / 2^shift`.
//
// Python defines CORRELATE (which of the kernels), HALF_H, HALF_W, CHANNELS, BFLOAT16 (else float16)
// and VECTOR (how many channels a thread reads at once), besides what ptx.h needs.

constexpr int ROWS = 2 * HALF_H, COLUMNS = 2 * HALF_W;
// Parts that are transformed apart. A half of 8 is too small for the tensor cores: there both parts
// are one, and the matrix has zeros where they would mix.
constexpr int PARTS_H = HALF_H < 16 ? 1 : 2, PARTS_W = HALF_W < 16 ? 1 : 2;
// Blocks of 16 slots, or cells, in a part.
constexpr int BLOCKS_H = ROWS / PARTS_H / 16, BLOCKS_W = COLUMNS / PARTS_W / 16;
// From row to row, in values; the 16 bytes more put rows into different banks.
constexpr int STRIDE = COLUMNS * CHANNELS + 8;
constexpr int TILE = ROWS * STRIDE;
// A group is 16 neighbours in the rows of cosines along W, slots and channels, with their 16
// counterparts among the sines. A warp filters one at a time.
constexpr int GROUPS = HALF_W * CHANNELS / 16;
constexpr int THREADS = 32 * WARPS;
constexpr int TARGET = 6, LARGEST_SHIFT = 126;
// The basis that restores rows is multiplied by 2^14. So where one channel is loud and others are
// quiet, their groups can be scaled by as little as 2^-28 without loss.
constexpr int HEADROOM = 14;

static_assert(HALF_W * CHANNELS % 16 == 0 && CHANNELS >= 2 && CHANNELS <= 16, "");

struct Shape {
    int height, width, channels;
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

// Load an image and fold both axes. Each thread folds the cells that it has read, in place. Returns
// the shift.
DEVICE int load_parts(u16* tile, const u16* x, const Shape& shape, u32* scratch) {
    constexpr int CHUNKS = CHANNELS / VECTOR, PLACES = HALF_H * HALF_W * CHUNKS;
    constexpr int RIGHT = HALF_W * CHANNELS, BOTTOM = HALF_H * STRIDE;
    const int first_channel = blockIdx.x * CHANNELS, row_size = shape.width * shape.channels;
    for (int i = threadIdx.x; i < PLACES; i += THREADS) {
        const int c = i % CHUNKS * VECTOR, w = i / CHUNKS % HALF_W, h = i / CHUNKS / HALF_W;
        u16* to = tile + h * STRIDE + w * CHANNELS + c;
        const int row[2] = {h * row_size, (shape.height - 1 - h) * row_size};
        const int column[2] = {w * shape.channels, (shape.width - 1 - w) * shape.channels};
        const bool in_channels = first_channel + c < shape.channels;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int bottom = quarter / 2, right = quarter % 2;
            // The middle cell of an odd axis belongs to the first half alone.
            const bool inside = 2 * h + bottom < shape.height && 2 * w + right < shape.width &&
                                in_channels;
            u16* at = to + bottom * BOTTOM + right * RIGHT;
            const u16* from = x + (inside ? row[bottom] + column[right] + first_channel + c : 0);
            if constexpr (VECTOR > 1) {
                copy_async<2 * VECTOR>(at, from, inside);
            } else {
                *at = inside ? *from : 0;
            }
        }
    }
    wait_for_copies();

    u32 largest = 0;
    for (int i = threadIdx.x; i < PLACES; i += THREADS) {
        const int c = i % CHUNKS * VECTOR, w = i / CHUNKS % HALF_W, h = i / CHUNKS / HALF_W;
        const u16* at = tile + h * STRIDE + w * CHANNELS + c;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            const Vector x = load_vector(at + quarter / 2 * BOTTOM + quarter % 2 * RIGHT);
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) largest = larger_pair(largest, x.pairs[k] & 0x7fff7fff);
        }
    }
    largest = largest_of_block(larger_bits(largest & 0xffff, largest >> 16), scratch);
    if (largest >= INFINITE) {  // of the others: channels keep to themselves
        largest = 0;
        for (int i = threadIdx.x; i < PLACES; i += THREADS) {
            const int c = i % CHUNKS * VECTOR, w = i / CHUNKS % HALF_W, h = i / CHUNKS / HALF_W;
            const u16* at = tile + h * STRIDE + w * CHANNELS + c;
            for (int quarter = 0; quarter < 4; ++quarter) {
                for (int k = 0; k < VECTOR; ++k) {
                    const u32 x = at[quarter / 2 * BOTTOM + quarter % 2 * RIGHT + k] & 0x7fff;
                    if (x < INFINITE) largest = larger_bits(largest, x);
                }
            }
        }
        largest = largest_of_block(largest, scratch);
    }
    const int shift = shift_of(float_to_bits(widen_low(largest))) - 2;  // for sums of four
    const float scale = power_of_two(shift);

    for (int i = threadIdx.x; i < PLACES; i += THREADS) {
        const int c = i % CHUNKS * VECTOR, w = i / CHUNKS % HALF_W, h = i / CHUNKS / HALF_W;
        u16* at = tile + h * STRIDE + w * CHANNELS + c;
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
    }
    __syncthreads();
    return shift;
}

// Matrix fragments of the basis of an axis, `(2, PARTS, BLOCKS, BLOCKS, 32)`: first slot x cell, to
// transform, then cell x slot, to restore.
template <int PARTS, int BLOCKS>
DEVICE uint4 fragment(const uint4* basis, int inverse, int part, int row, int column) {
    const int index = ((inverse * PARTS + part) * BLOCKS + row) * BLOCKS + column;
    return __ldg(basis + index * 32 + lane());
}

// Eight columns of a matrix for products along W: channels of a row of the tile, or of several rows
// where there are fewer than 8 channels.
struct Octet {
    int row, channel;
};

DEVICE Octet octet(int index) {
    if constexpr (CHANNELS >= 8) return {index / (CHANNELS / 8), index % (CHANNELS / 8) * 8};
    return {index * (8 / CHANNELS), 0};
}

// Return a pointer to value n of an octet at a column of the tile.
DEVICE u16* value_at(u16* tile, const Octet& at, int column, int n) {
    u16* start = tile + at.row * STRIDE + column * CHANNELS + at.channel;
    return start + (CHANNELS >= 8 ? n : n / CHANNELS * STRIDE + n % CHANNELS);
}

// Load 16 columns of two octets as factors.
DEVICE uint4 load_octets(u16* tile, const Octet& first, const Octet& second, int column) {
    if constexpr (CHANNELS >= 8) {
        const Octet& at = lane() < 16 ? first : second;
        return load_transposed(value_at(tile, at, column + lane() % 16, 0));
    } else {
        const auto load = [&](const Octet& at, int next) {
            const int k = column + lane() / 4 + next;
            return transpose(pair_at(value_at(tile, at, k, lane() % 4 * 2)));
        };
        return {load(first, 0), load(first, 8), load(second, 0), load(second, 8)};
    }
}

// Transform all rows along W, in place.
DEVICE void transform_rows(u16* tile, const uint4* basis_w) {
    constexpr int OCTETS = BLOCKS_W <= 8 ? 4 : 2;  // at once
    constexpr int ALL = ROWS * CHANNELS / 8;
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
                    const uint4 f = fragment<PARTS_W, BLOCKS_W>(basis_w, 0, part, block, k);
#pragma unroll
                    for (int n = 0; n < OCTETS / 2; ++n) {
                        multiply_add(sum[2 * n], f, x[k][n].x, x[k][n].y);
                        multiply_add(sum[2 * n + 1], f, x[k][n].z, x[k][n].w);
                    }
                }
                const int column = part * HALF_W + 16 * block + lane() / 4;
#pragma unroll
                for (int n = 0; n < OCTETS; ++n) {
                    u16* to = value_at(tile, at[n], column, lane() % 4 * 2);
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

DEVICE void transform_columns(Coefficients& sum, u16* tile, const uint4* basis_h, int group,
                              int block) {
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
            const uint4 f = fragment<PARTS_H, BLOCKS_H>(basis_h, 0, part, block, k);
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                const uint4 x = load_transposed(at + (part * HALF_H + 16 * k) * STRIDE +
                                                w * HALF_W * CHANNELS);
                multiply_add(sum[w][part][0], x, f.x, f.z);
                multiply_add(sum[w][part][1], x, f.y, f.w);
            }
        }
    }
}

// Where four coefficients stand in the spectrum, and what they are. See folded.py.
struct Slot {
    int u, v, channel;
    bool inside, u0, v0, corner;
};

DEVICE Slot slot_of(int group, int block, int eight, int r, const Shape& shape) {
    const int f = group * 16 + lane() / 4 + r / 2 * 8;
    Slot slot;
    slot.u = block * 16 + eight * 8 + lane() % 4 * 2 + r % 2;
    slot.v = f / CHANNELS;
    slot.channel = blockIdx.x * CHANNELS + f % CHANNELS;
    slot.inside = slot.u < (shape.height + 1) / 2 && slot.v < (shape.width + 1) / 2 &&
                  slot.channel < shape.channels;
    // The compiler knows the first three, so most slots cost no comparison.
    slot.u0 = block == 0 && eight == 0 && r % 2 == 0 && lane() % 4 == 0;
    slot.v0 = slot.v == 0;
    slot.corner = slot.u0 && slot.v0;
    return slot;
}

DEVICE bool holds_zero_column(int group) { return group * 16 < CHANNELS; }

DEVICE int place(int u, int v, int channel, const Shape& shape) {
    return (u * (shape.width / 2 + 1) + v) * shape.channels + channel;
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

// All coefficients of a group in float16, `[block][along W][along H][8 slots][8 rows]`.
typedef u32 Packed[BLOCKS_H][2][PARTS_H][2][2];

// Round the coefficients of a block; returns their shift.
DEVICE int pack_block(u32 (&packed)[2][PARTS_H][2][2], const Coefficients& x) {
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
    const int shift = shift_of(bits);
    const float scale = power_of_two(shift);
#pragma unroll
    for (int i = 0; i < 8 * PARTS_H; ++i) {
        const float* values = &x[0][0][0][0] + 2 * i;
        (&packed[0][0][0][0])[i] = pack(values[0] * scale, values[1] * scale);
    }
    return shift;
}

// Bring all blocks to one shift, which is returned.
DEVICE int align_blocks(Packed& packed, const int (&shifts)[BLOCKS_H]) {
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

#if !CORRELATE

// The factors of the two values of a slot.
struct Factors {
    Complex first, second;
};

DEVICE Complex load(const Complex* p) {
    const float2 x = __ldg(reinterpret_cast<const float2*>(p));
    return {x.x, x.y};
}

// Load the factors of a slot. Beyond the spectrum, where coefficients are zero, any will do.
DEVICE Factors load_factors(const Slot& slot, const Complex* weight, int group, float sign,
                            const Shape& shape) {
    const int u = smaller(slot.u, shape.height / 2), v = smaller(slot.v, shape.width / 2);
    const int mirror = slot.u0 ? shape.height / 2 : shape.height - larger(u, 1);
    const int channel = smaller(slot.channel, shape.channels - 1);
    const int at = place(u, v, channel, shape), at_mirror = place(mirror, v, channel, shape);
    Factors k = {load(weight + at), load(weight + at_mirror)};
    if (holds_zero_column(group) && slot.v0) {
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

// Filter a group of 16 slots and channels, in place; returns its shift.
DEVICE int filter_group(u16* tile, const uint4* basis_h, const Complex* weight, float sign,
                        int group, const Shape& shape) {
    Packed packed;
    int shifts[BLOCKS_H];
#pragma unroll
    for (int block = 0; block < BLOCKS_H; ++block) {
        Factors factors[PARTS_H][4];
#pragma unroll
        for (int eight = 0; eight < PARTS_H; ++eight) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const Slot slot = slot_of(group, block, eight, r, shape);
                factors[eight][r] = load_factors(slot, weight, group, sign, shape);
            }
        }
        Coefficients x;
        transform_columns(x, tile, basis_h, group, block);
#pragma unroll
        for (int eight = 0; eight < PARTS_H; ++eight) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int k = PARTS_H == 1 ? 1 : eight;
                const Slot slot = slot_of(group, block, eight, r, shape);
                multiply(x[0][0][eight][r], x[0][PARTS_H - 1][k][r], x[1][0][eight][r],
                         x[1][PARTS_H - 1][k][r], slot, factors[eight][r]);
            }
        }
        shifts[block] = pack_block(packed[block], x);
    }
    const int common = align_blocks(packed, shifts);
    __syncwarp();
#pragma unroll
    for (int part = 0; part < PARTS_H; ++part) {
#pragma unroll 2
        for (int block = 0; block < BLOCKS_H; ++block) {
            float sum[2][2][4] = {};
#pragma unroll
            for (int k = 0; k < BLOCKS_H; ++k) {
                const uint4 f = fragment<PARTS_H, BLOCKS_H>(basis_h, 1, part, block, k);
#pragma unroll
                for (int w = 0; w < 2; ++w) {
#pragma unroll
                    for (int rows = 0; rows < 2; ++rows) {
                        multiply_add(sum[w][rows], f, packed[k][w][part][0][rows],
                                     packed[k][w][part][1][rows]);
                    }
                }
            }
            u16* to = tile + (part * HALF_H + block * 16 + lane() / 4) * STRIDE + group * 16 +
                      lane() % 4 * 2;
#pragma unroll
            for (int w = 0; w < 2; ++w) {
#pragma unroll
                for (int rows = 0; rows < 2; ++rows) {
                    u16* at = to + w * HALF_W * CHANNELS + rows * 8;
                    pair_at(at) = pack(sum[w][rows][0], sum[w][rows][1]);
                    pair_at(at + 8 * STRIDE) = pack(sum[w][rows][2], sum[w][rows][3]);
                }
            }
        }
    }
    return common;
}

// Restore all rows along W and store the map times `scale`.
DEVICE void restore_rows(u16* tile, const uint4* basis_w, const int* shifts, int shift, float scale,
                         u16* y, const Shape& shape) {
    int common = LARGEST_SHIFT;
    for (int i = 0; i < GROUPS; ++i) common = smaller(common, shifts[i]);
    shift += common + HEADROOM;
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
    constexpr int ALL = HALF_H * CHANNELS / 8;
    const int row_size = shape.width * shape.channels;
    for (int first = warp() * OCTETS; first < ALL; first += WARPS * OCTETS) {
        Octet at[OCTETS];
        uint4 x[PARTS_W][BLOCKS_W][OCTETS];
#pragma unroll
        for (int n = 0; n < OCTETS; ++n) {
            at[n] = octet(first + n);
            const Octet below = {at[n].row + HALF_H, at[n].channel};
#pragma unroll
            for (int part = 0; part < PARTS_W; ++part) {
#pragma unroll
                for (int k = 0; k < BLOCKS_W; ++k) {
                    x[part][k][n] = load_octets(tile, at[n], below, part * HALF_W + 16 * k);
                }
            }
        }
#pragma unroll 2
        for (int block = 0; block < BLOCKS_W; ++block) {
            float sum[PARTS_W][OCTETS][2][4] = {};  // the last but one: even and odd along H
#pragma unroll
            for (int part = 0; part < PARTS_W; ++part) {
#pragma unroll
                for (int k = 0; k < BLOCKS_W; ++k) {
                    uint4 f = fragment<PARTS_W, BLOCKS_W>(basis_w, 1, part, block, k);
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
                const int w = block * 16 + eight * 8 + lane() / 4;
                const int column[2] = {w * shape.channels, (shape.width - 1 - w) * shape.channels};
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
                    const int value = lane() % 4 * 2;  // of the octet, the first of a pair
                    const int channel = blockIdx.x * CHANNELS + at[n].channel + value % CHANNELS;
                    const int h = at[n].row + (CHANNELS >= 8 ? 0 : value / CHANNELS);
                    const int row[2] = {h * row_size, (shape.height - 1 - h) * row_size};
#pragma unroll
                    for (int quarter = 0; quarter < 4; ++quarter) {
                        const int bottom = quarter / 2, right = quarter % 2;
                        if (2 * h + bottom >= shape.height || 2 * w + right >= shape.width ||
                            channel >= shape.channels) {
                            continue;
                        }
                        u16* to = y + (row[bottom] + column[right] + channel);
                        const u32 pair = narrow(cells[quarter][0], cells[quarter][1]);
                        if constexpr (VECTOR > 1) {
                            pair_at(to) = pair;
                        } else {
                            to[0] = static_cast<u16>(pair);
                            if (channel + 1 < shape.channels) to[1] = static_cast<u16>(pair >> 16);
                        }
                    }
                }
            }
        }
    }
}

// Filter maps; `sign` -1 takes the conjugate spectrum. The grid is (blocks of channels, images).
KERNEL filter_maps(const u16* x, const Complex* weight, u16* y, const uint4* basis_h,
                   const uint4* basis_w, int height, int width, int channels, float sign) {
    SHARED_MEMORY();
    u16* tile = reinterpret_cast<u16*>(shared);
    int* shifts = reinterpret_cast<int*>(tile + TILE);
    const Shape shape = {height, width, channels};
    const long long image = static_cast<long long>(blockIdx.y) * height * width * channels;
    const int shift = load_parts(tile, x + image, shape, reinterpret_cast<u32*>(shifts));
    transform_rows(tile, basis_w);
    for (int group = warp(); group < GROUPS; group += WARPS) {
        const int own = filter_group(tile, basis_h, weight, sign, group, shape);
        if (lane() == 0) shifts[group] = own;
    }
    __syncthreads();
    // Every value of the spectrum stands for its conjugate, too.
    const float norm = 2 / (static_cast<float>(height) * width);
    restore_rows(tile, basis_w, shifts, shift, norm, y + image, shape);
}

#else

// Store the gradients of the two factors of a slot.
DEVICE void store_gradients(Complex* grad, const Slot& slot, int group, const Complex& first,
                            const Complex& second, const Shape& shape) {
    const int mirror = slot.u0 ? shape.height / 2 : shape.height - slot.u;
    const bool has_mirror = !slot.u0 || shape.height % 2 == 0;
    Complex* at = grad + place(slot.u, slot.v, slot.channel, shape);
    Complex* at_mirror = grad + place(mirror, slot.v, slot.channel, shape);
    if (holds_zero_column(group) && slot.v0) {
        // The transpose of `hermitian`.
        const auto store = [&](int column, const Complex& value) {
            const float re = 0.5f * value.re, im = 0.5f * value.im;
            at[column] = slot.u0 ? Complex{value.re, 0} : Complex{re, im};
            if (has_mirror) at_mirror[column] = slot.u0 ? Complex{value.im, 0} : Complex{re, -im};
        };
        store(0, first);
        if (shape.width % 2 == 0) store(shape.width / 2 * shape.channels, second);
    } else {
        *at = first;
        if (has_mirror) *at_mirror = second;
    }
}

// Make the gradient of the spectrum, `(images, H, W / 2 + 1, C)`, of each image. The grid is (blocks
// of channels, images). Both maps use the tile, one after the other; meanwhile registers keep the
// coefficients of the first.
KERNEL correlate_maps(const u16* g, const u16* x, Complex* grad, const uint4* basis_h,
                      const uint4* basis_w, int height, int width, int channels) {
    SHARED_MEMORY();
    u16* tile = reinterpret_cast<u16*>(shared);
    u32* scratch = reinterpret_cast<u32*>(tile + TILE);
    const Shape shape = {height, width, channels};
    const long long image = static_cast<long long>(blockIdx.y) * height * channels;
    grad += image * (width / 2 + 1);
    constexpr int OWN = (GROUPS + WARPS - 1) / WARPS;  // groups of a warp
    Packed packed[OWN];
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
            Coefficients coefficients;
            transform_columns(coefficients, tile, basis_h, group, block);
            of_blocks[block] = pack_block(packed[i][block], coefficients);
        }
        shifts[i] = of_x + align_blocks(packed[i], of_blocks);
    }
    __syncthreads();
    const int of_g = load_parts(tile, g + image * width, shape, scratch);
    transform_rows(tile, basis_w);
    // Every value of the spectrum stands for its conjugate, too.
    const float norm = 2 / (static_cast<float>(height) * width);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int group = i * WARPS + warp();
        if (GROUPS % WARPS && group >= GROUPS) break;
        const int shift = shifts[i] + of_g;
        const float scale_1 = power_of_two(-(shift / 2));
        const float scale_2 = power_of_two(shift / 2 - shift) * norm;
#pragma unroll
        for (int block = 0; block < BLOCKS_H; ++block) {
            Coefficients y;
            transform_columns(y, tile, basis_h, group, block);
#pragma unroll
            for (int eight = 0; eight < PARTS_H; ++eight) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const Slot slot = slot_of(group, block, eight, r, shape);
                    if (!slot.inside) continue;
                    constexpr int SINE = PARTS_H - 1;
                    const int k = PARTS_H == 1 ? 1 : eight;
                    const auto value = [&](int w, int part, int k) {
                        const u32 pair = packed[i][block][w][part][k][r / 2];
                        return from_float16(static_cast<u16>(r % 2 ? pair >> 16 : pair)) * scale_1;
                    };
                    Complex of_x[2], of_g[2];
                    to_values(value(0, 0, eight), value(0, SINE, k), value(1, 0, eight),
                              value(1, SINE, k), slot.u0, slot.v0, of_x[0], of_x[1]);
                    const float scale = slot.corner ? 0.5f * scale_2 : scale_2;
                    to_values(y[0][0][eight][r] * scale, y[0][SINE][k][r] * scale,
                              y[1][0][eight][r] * scale, y[1][SINE][k][r] * scale, slot.u0,
                              slot.v0, of_g[0], of_g[1]);
                    store_gradients(grad, slot, group,
                                    conjugate_product(of_x[0], of_g[0], slot.corner),
                                    conjugate_product(of_x[1], of_g[1], slot.corner), shape);
                }
            }
        }
    }
}

#endif
