"""Triton kernels of the global filter.

They compute on tiles what :mod:`.folded` computes on whole maps. Read that first: parts,
coefficients, slots and values have the same names here.

A map is four tiles, its parts, and so is its spectrum; tuples hold `ee, eo, oe, oo` or `cc, cs, sc,
ss`. Matrix products take a tile as `((i c), j)`: rows run over one axis and the channels, columns
over the axis that is transformed.

Factors of matrix products are rounded to float16. Before that the parts are scaled by a power of
two, which is exact, so that the largest value lies between 2**6 and 2**7. So sums over 256 slots do
not overflow, and values a million times smaller keep their precision. Each block has an exponent of
its own: the true value is `stored * 2**exponent`.

`shape` is `(H, W, C)` everywhere and `c` are the channels of a block. Arguments in capitals are
constants, which only kernels have to declare as `tl.constexpr`; sizes are powers of two. `HALF_H`
and `HALF_W` are the sizes of tiles that hold half an axis, `SLOTS_H` and `SLOTS_W` of those that
hold some of its slots.
"""

import triton
import triton.language as tl

_TARGET = tl.constexpr(6)  # the exponent that the largest value is scaled to
_MARGIN = tl.constexpr(9)  # divided by 2**9, products with any finite spectrum are finite
_ABSENT = tl.constexpr(-1000)  # the exponent of a block outside of the map


@triton.jit
def _power_of_two(exponent):
    """Return `2**exponent`, clamped to the normal numbers of float32."""
    exponent = tl.minimum(tl.maximum(exponent, -126), 127)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale(x, exponent):
    """Multiply by `2**exponent`, in two steps because a single factor could overflow."""
    first = exponent // 2
    return x * _power_of_two(first) * _power_of_two(exponent - first)


@triton.jit
def _align(x, exponent, largest):
    """Rescale values from their own exponents to the common exponent `largest`."""
    return x * _power_of_two(exponent - largest)


@triton.jit
def _zeros(ROWS, COLUMNS):
    zeros = tl.zeros((ROWS, COLUMNS), tl.float32)
    return zeros, zeros, zeros, zeros


@triton.jit
def _multiply(parts, factor):
    return parts[0] * factor, parts[1] * factor, parts[2] * factor, parts[3] * factor


@triton.jit
def _add(parts, more):
    return parts[0] + more[0], parts[1] + more[1], parts[2] + more[2], parts[3] + more[3]


@triton.jit
def _find_shift(parts):
    """Return the exponent of the power of two that scales the largest value to the target."""
    first = tl.maximum(tl.abs(parts[0]), tl.abs(parts[1]))
    second = tl.maximum(tl.abs(parts[2]), tl.abs(parts[3]))
    largest = tl.max(tl.maximum(first, second))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(-exponent + _TARGET, 126)


@triton.jit
def _half_axis(size, HALF, MIRRORED):
    """Return the cells of one half of an axis, from its border inwards, and a mask of them.

    The middle cell of an odd axis belongs to the first half alone.
    """
    index = tl.arange(0, HALF)
    if MIRRORED:
        return size - 1 - index, index < size // 2
    return index, index < (size + 1) // 2


@triton.jit
def _places(i, in_i, stride_i, j, in_j, stride_j, c, channels):
    """Return the offsets of a tile `(i, j, c)`, and its mask."""
    offsets = i[:, None, None] * stride_i + j[None, :, None] * stride_j + c[None, None, :]
    return offsets, in_i[:, None, None] & in_j[None, :, None] & (c < channels)[None, None, :]


@triton.jit
def _half_rows(h, in_h, c, shape, HALF_W, RIGHT):
    """Return the places `(w, h, c)` of one half of some rows of a map."""
    w, in_w = _half_axis(shape[1], HALF_W, RIGHT)
    return _places(w, in_w, shape[2], h, in_h, shape[1] * shape[2], c, shape[2])


@triton.jit
def _quarter(shape, c, HALF_H, HALF_W, BOTTOM, RIGHT):
    """Return the places `(w, h, c)` of a quarter of a map."""
    h, in_h = _half_axis(shape[0], HALF_H, BOTTOM)
    return _half_rows(h, in_h, c, shape, HALF_W, RIGHT)


@triton.jit
def _load(ptr, places):
    offsets, mask = places
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, places, x, CHANNELS):
    """Store a tile `((i c), j)` at the places of `(j, i, c)`."""
    offsets, mask = places
    x = tl.reshape(x.to(ptr.dtype.element_ty), (x.shape[0] // CHANNELS, CHANNELS, x.shape[1]))
    tl.store(ptr + offsets, tl.permute(x, (2, 0, 1)), mask=mask)


@triton.jit
def _operand(tile):
    """Round a tile `(j, i, c)` to a factor `((i c), j)`."""
    tile = tl.permute(tile.to(tl.float16), (1, 2, 0))
    return tl.reshape(tile, (tile.shape[0] * tile.shape[1], tile.shape[2]))


@triton.jit
def _operand_parts(parts):
    return _operand(parts[0]), _operand(parts[1]), _operand(parts[2]), _operand(parts[3])


@triton.jit
def _transpose(x, CHANNELS):
    """Round a tile `((i c), j)` to a factor `((j c), i)`."""
    x = tl.reshape(x.to(tl.float16), (x.shape[0] // CHANNELS, CHANNELS, x.shape[1]))
    x = tl.permute(x, (2, 1, 0))
    return tl.reshape(x, (x.shape[0] * CHANNELS, x.shape[2]))


@triton.jit
def _transpose_parts(parts, CHANNELS):
    first, second = _transpose(parts[0], CHANNELS), _transpose(parts[1], CHANNELS)
    return first, second, _transpose(parts[2], CHANNELS), _transpose(parts[3], CHANNELS)


@triton.jit
def _transform(first, second, sums, basis_ptr, slot, HALF, SLOTS, INVERSE):
    """Add cosine and sine coefficients `(rows, SLOTS)` of even and odd part `(rows, HALF)` to sums.

    The coefficients start at `slot`. The inverse adds to the two parts what these coefficients
    contribute. The basis `(2, HALF, HALF)` holds cosines and sines of slot x cell. Where
    `HALF < 16`, `SLOTS == HALF`.
    """
    INNER: tl.constexpr = SLOTS if INVERSE else HALF
    OUTER: tl.constexpr = HALF if INVERSE else SLOTS
    if HALF >= 16:
        inner, outer = tl.arange(0, INNER)[:, None], tl.arange(0, OUTER)[None, :]
        row, cell = (inner, outer) if INVERSE else (outer, inner)
        entries = basis_ptr + (slot + row) * HALF + cell
        cosines, sines = tl.load(entries), tl.load(entries + HALF * HALF)
        return tl.dot(first, cosines, sums[0]), tl.dot(second, sines, sums[1])
    # Tensor cores sum 16 products or more. So both parts are interleaved, and the matrix has zeros
    # where they would mix.
    inner, outer = tl.arange(0, 2 * INNER)[:, None], tl.arange(0, 2 * OUTER)[None, :]
    row, cell = (inner, outer) if INVERSE else (outer, inner)
    entries = basis_ptr + row // 2 * HALF + cell // 2
    alike = inner % 2 == outer % 2
    matrix = tl.load(entries + inner % 2 * HALF * HALF, mask=alike, other=0.0)
    both = tl.dot(tl.interleave(first, second), matrix)
    both = tl.split(tl.reshape(both, (both.shape[0], OUTER, 2)))
    return sums[0] + both[0], sums[1] + both[1]


@triton.jit
def _transform_width(parts, sums, basis_ptr, slot, HALF_W, SLOTS_W, INVERSE):
    """Transform the parts along W, the first letter, and add the results to `sums`."""
    one, two = (sums[0], sums[2]), (sums[1], sums[3])
    first, third = _transform(parts[0], parts[2], one, basis_ptr, slot, HALF_W, SLOTS_W, INVERSE)
    second, fourth = _transform(parts[1], parts[3], two, basis_ptr, slot, HALF_W, SLOTS_W, INVERSE)
    return first, second, third, fourth


@triton.jit
def _transform_height(parts, sums, basis_ptr, slot, HALF_H, SLOTS_H, INVERSE):
    """Transform the parts along H, the second letter, and add the results to `sums`."""
    one, two = (sums[0], sums[1]), (sums[2], sums[3])
    first, second = _transform(parts[0], parts[1], one, basis_ptr, slot, HALF_H, SLOTS_H, INVERSE)
    third, fourth = _transform(parts[2], parts[3], two, basis_ptr, slot, HALF_H, SLOTS_H, INVERSE)
    return first, second, third, fourth


@triton.jit
def _load_plane(ptr, shape, c, HALF_H, HALF_W):
    """Return the parts of a map as factors `((h c), w)`, and their exponent."""
    quarters = (
        _load(ptr, _quarter(shape, c, HALF_H, HALF_W, False, False)),
        _load(ptr, _quarter(shape, c, HALF_H, HALF_W, False, True)),
        _load(ptr, _quarter(shape, c, HALF_H, HALF_W, True, False)),
        _load(ptr, _quarter(shape, c, HALF_H, HALF_W, True, True)),
    )
    shift = _find_shift(quarters) - 2  # for sums of four
    top_left, top_right, bottom_left, bottom_right = _multiply(quarters, _power_of_two(shift))
    top_even, top_odd = top_left + top_right, top_left - top_right
    bottom_even, bottom_odd = bottom_left + bottom_right, bottom_left - bottom_right
    parts = (
        top_even + bottom_even,
        top_even - bottom_even,
        top_odd + bottom_odd,
        top_odd - bottom_odd,
    )
    return _operand_parts(parts), -shift


# The values of a slot. `inner_u` and `inner_v` are 0 in slot 0 and 1 elsewhere; `corner` is where
# both are 0.


@triton.jit
def _frequencies(parts, inner_u, inner_v):
    """Return real and imaginary part of the two values of a slot, from its four coefficients."""
    cc, cs, sc, ss = parts
    inner, outer_v = inner_u * inner_v, 1.0 - inner_v
    return (
        cc - inner * ss,
        -(inner + outer_v) * cs - inner_v * sc,
        inner * cc + outer_v * sc + inner_v * ss,
        inner_v * cs - inner * sc - outer_v * ss,
    )


@triton.jit
def _coefficients(values, inner_u, inner_v):
    """Return the transpose of :func:`_frequencies`."""
    re, im, re_2, im_2 = values
    inner, outer_v = inner_u * inner_v, 1.0 - inner_v
    return (
        re + inner * re_2,
        inner_v * im_2 - (inner + outer_v) * im,
        outer_v * re_2 - inner_v * im - inner * im_2,
        inner_v * re_2 - outer_v * im_2 - inner * re,
    )


@triton.jit
def _multiply_complex(re, im, k_re, k_im, corner):
    """Multiply complex values; in the corner the real and the imaginary parts."""
    cross = tl.where(corner, 0.0, k_im)
    return k_re * re - cross * im, tl.where(corner, k_im, k_re) * im + cross * re


@triton.jit
def _multiply_conjugate(re, im, g_re, g_im, corner):
    """Multiply by the conjugate of the first factor; in the corner the real and imaginary parts."""
    both = im * g_im
    return re * g_re + tl.where(corner, 0.0, both), tl.where(corner, both, re * g_im - im * g_re)


@triton.jit
def _hermitian(k, inner_u):
    """Return the Hermitian part of a spectrum, given at u and -u, in a zero or Nyquist column."""
    re, im, re_2, im_2 = k
    is_zero = inner_u == 0
    first = tl.where(is_zero, re, 0.5 * re + 0.5 * re_2)
    return first, tl.where(is_zero, re_2, 0.5 * im - 0.5 * im_2)


@triton.jit
def _hermitian_grad(re, im, inner_u):
    """Return the gradient at u and -u from the gradient of :func:`_hermitian`."""
    half = 0.5 * inner_u
    return (1.0 - half) * re, half * im, half * re + (1.0 - inner_u) * im, -half * im


@triton.jit
def _slots(first, size, SLOTS):
    """Return some slots of an axis, their mask, and `inner`: 0 for slot 0 and 1 for all others."""
    slot = first + tl.arange(0, SLOTS)
    return slot, slot < (size + 1) // 2, tl.where(slot == 0, 0.0, 1.0)


@triton.jit
def _repeat_channels(x, CHANNELS):
    """Repeat one value for each slot v as rows `((v c), 1)`."""
    x = tl.broadcast_to(x[:, None], (x.shape[0], CHANNELS))
    return tl.reshape(x, (x.shape[0] * CHANNELS, 1))


@triton.jit
def _mirror(u, height):
    """Return the rows of the spectrum that hold -u; for u = 0 Nyquist."""
    return tl.where(u == 0, height // 2, height - u)


@triton.jit
def _frequency_places(u, in_u, v, in_v, shape, CHANNELS):
    """Return the places `(u, v, (c 2))` of a program in a spectrum `(H, W // 2 + 1, C, 2)`."""
    c, column = 2 * CHANNELS * tl.program_id(0) + tl.arange(0, 2 * CHANNELS), 2 * shape[2]
    row = (shape[1] // 2 + 1) * column
    return _places(u, in_u, row, v, in_v, column, c, column)


@triton.jit
def _load_complex(ptr, places, CHANNELS):
    """Load real and imaginary part as tiles `((v c), u)`."""
    x = _load(ptr, places)
    x = tl.reshape(x, (x.shape[0], x.shape[1], CHANNELS, 2))
    x = tl.permute(x, (1, 2, 0, 3))
    return tl.split(tl.reshape(x, (x.shape[0] * CHANNELS, x.shape[2], 2)))


@triton.jit
def _store_complex(ptr, places, real, imag, CHANNELS):
    """Store what :func:`_load_complex` loads."""
    x = tl.join(real, imag)
    x = tl.reshape(x, (x.shape[0] // CHANNELS, CHANNELS, x.shape[1], 2))
    x = tl.permute(x, (2, 0, 1, 3))
    offsets, mask = places
    tl.store(ptr + offsets, tl.reshape(x, offsets.shape), mask=mask)


@triton.jit
def _load_weight(ptr, u, in_u, v, in_v, shape, sign, CHANNELS):
    """Return a spectrum at u and -u, its conjugate if `sign` is -1."""
    places = _frequency_places(u, in_u, v, in_v, shape, CHANNELS)
    re, im = _load_complex(ptr, places, CHANNELS)
    u = _mirror(u, shape[0])
    places = _frequency_places(u, in_u, v, in_v, shape, CHANNELS)
    re_2, im_2 = _load_complex(ptr, places, CHANNELS)
    return re, sign * im, re_2, sign * im_2


@triton.jit
def _repeat_slots(x, SLOTS):
    """Repeat `(c, u)` for each slot v as `((v c), u)`."""
    x = tl.broadcast_to(x[None, :, :], (SLOTS, x.shape[0], x.shape[1]))
    return tl.reshape(x, (SLOTS * x.shape[1], x.shape[2]))


@triton.jit
def _filter_height(
    parts, weight_ptr, basis_ptr, shape, sign, first_v, HALF_H, SLOTS_H, SLOTS_W, CHANNELS
):
    """Transform `((v c), h)` along H, multiply by the spectrum over 2**_MARGIN, transform back.

    It takes some frequencies at a time, so that the spectrum needs few registers, and adds their
    results to sums, which are returned with their common exponent.
    """
    v, in_v, inner_v = _slots(first_v, shape[1], SLOTS_W)
    inner_v = _repeat_channels(inner_v, CHANNELS)
    sums, exponent = _zeros(SLOTS_W * CHANNELS, HALF_H), tl.full((), _ABSENT, tl.int32)
    # The number of rounds is a constant, for the compiler, unless a size may need fewer.
    slots = HALF_H if HALF_H <= 2 * SLOTS_H else (shape[0] + 1) // 2
    for first_u in range(0, slots, SLOTS_H):
        zeros = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
        x = _transform_height(parts, zeros, basis_ptr, first_u, HALF_H, SLOTS_H, False)
        u, in_u, inner_u = _slots(first_u, shape[0], SLOTS_H)
        inner_u = inner_u[None, :]
        corner = inner_u + inner_v == 0
        # Outside the corner a value stands for its conjugate, too.
        norm = tl.where(corner, 1.0, 2.0) / (shape[0] * shape[1] << _MARGIN)
        x = _frequencies(_multiply(x, norm), inner_u, inner_v)
        k = _load_weight(weight_ptr, u, in_u, v, in_v, shape, sign, CHANNELS)
        re, im = _hermitian(k, inner_u)
        re, im = tl.where(inner_v == 0, re, k[0]), tl.where(inner_v == 0, im, k[1])
        re, im = _multiply_complex(x[0], x[1], re, im, corner)
        column = tl.full((1,), 0, tl.int32)
        nyquist, is_there = column + shape[1] // 2, column + first_v == 0
        n = _load_weight(weight_ptr, u, in_u, nyquist, is_there, shape, sign, CHANNELS)
        n_re, n_im = _hermitian(n, inner_u)
        re_2 = tl.where(inner_v == 0, _repeat_slots(n_re, SLOTS_W), k[2])
        im_2 = tl.where(inner_v == 0, _repeat_slots(n_im, SLOTS_W), k[3])
        re_2, im_2 = _multiply_complex(x[2], x[3], re_2, im_2, corner)
        x = _coefficients((re, im, re_2, im_2), inner_u, inner_v)
        common = tl.maximum(exponent, -_find_shift(x))
        x = _multiply(x, _power_of_two(-common))
        x = x[0].to(tl.float16), x[1].to(tl.float16), x[2].to(tl.float16), x[3].to(tl.float16)
        sums = _multiply(sums, _power_of_two(exponent - common))
        sums = _transform_height(x, sums, basis_ptr, first_u, HALF_H, SLOTS_H, True)
        exponent = common
    return sums, exponent + _MARGIN


def _fitting(configs, arguments, HALF_H, SLOTS_W, **_):
    """Keep the block sizes that give each thread 32 or 64 values of `SLOTS_W` columns.

    Then the four parts in float32 and the spectrum fit in its 255 registers.
    """
    area = 4 * HALF_H * SLOTS_W
    return [
        config
        for config in configs
        if area * config.kwargs['CHANNELS'] in (1024 * config.num_warps, 2048 * config.num_warps)
    ]


# Channels and warps to choose from. With few channels several programs share a multiprocessor, so
# one computes while another waits for memory. With many, memory is read in longer pieces. The
# interpreter has nothing to time.
_BLOCKS = ((8, 4), (8, 8), (16, 4), (16, 8), (32, 4), (32, 8))


@triton.autotune(
    [triton.Config({'CHANNELS': c}, num_warps=warps, num_stages=1) for c, warps in _BLOCKS]
    if not triton.knobs.runtime.interpret
    else [triton.Config({'CHANNELS': 16})],
    key=['HALF_H', 'HALF_W'],
    prune_configs_by={'early_config_prune': _fitting},
    cache_results=True,
)
@triton.jit(do_not_specialize=['height', 'width'])
def filter_planes(
    x_ptr,
    weight_ptr,
    y_ptr,
    basis_h_ptr,
    basis_w_ptr,
    height,
    width,
    channels,
    sign,
    HALF_H: tl.constexpr,
    HALF_W: tl.constexpr,
    SLOTS_H: tl.constexpr,
    SLOTS_W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Filter maps that fit on the chip. The grid is `(blocks of channels, images)`."""
    shape = height, width, channels
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(1).to(tl.int64) * (height * width * channels)
    x_ptr, y_ptr = x_ptr + image, y_ptr + image
    x, x_exponent = _load_plane(x_ptr, shape, c, HALF_H, HALF_W)
    common = tl.full((), _ABSENT, tl.int32)
    filtered, exponents = (), ()
    for first_v in tl.static_range(0, HALF_W, SLOTS_W):
        zeros = _zeros(HALF_H * CHANNELS, SLOTS_W)
        some = _transform_width(x, zeros, basis_w_ptr, first_v, HALF_W, SLOTS_W, False)
        some = _transpose_parts(some, CHANNELS)
        y, exponent = _filter_height(
            some, weight_ptr, basis_h_ptr, shape, sign, first_v, HALF_H, SLOTS_H, SLOTS_W, CHANNELS
        )
        common = tl.maximum(common, exponent - _find_shift(y))
        filtered += (_transpose_parts(_multiply(y, _power_of_two(exponent - common)), CHANNELS),)
        exponents += (common,)
    zeros = _zeros(HALF_H * CHANNELS, HALF_W)
    y = _transform_width(filtered[0], zeros, basis_w_ptr, 0, HALF_W, SLOTS_W, True)
    for i in tl.static_range(1, HALF_W // SLOTS_W):
        y = _multiply(y, _power_of_two(exponents[i - 1] - exponents[i]))
        y = _transform_width(filtered[i], y, basis_w_ptr, i * SLOTS_W, HALF_W, SLOTS_W, True)
    ee, eo, oe, oo = y
    exponent = x_exponent + common
    quarter = _quarter(shape, c, HALF_H, HALF_W, False, False)
    _store(y_ptr, quarter, _scale(ee + eo + oe + oo, exponent), CHANNELS)
    quarter = _quarter(shape, c, HALF_H, HALF_W, False, True)
    _store(y_ptr, quarter, _scale(ee + eo - oe - oo, exponent), CHANNELS)
    quarter = _quarter(shape, c, HALF_H, HALF_W, True, False)
    _store(y_ptr, quarter, _scale(ee - eo + oe - oo, exponent), CHANNELS)
    quarter = _quarter(shape, c, HALF_H, HALF_W, True, True)
    _store(y_ptr, quarter, _scale(ee - eo - oe + oo, exponent), CHANNELS)


# Larger maps pass through memory as `z (B, 2, ceil(W / 2), H, C)`: cosine and sine coefficients
# along W in float16. Their exponents are `(B, blocks along H or W, blocks of channels)`. The grids
# are `(blocks of channels, images, blocks along H or W)`.


@triton.jit
def _exponent_ptrs(ptr, image, block, blocks):
    """Return pointers to the exponents of a block along H or W, one of `blocks`."""
    return ptr + (image * blocks + block) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _coefficients_of(z_ptr, image, shape):
    """Return pointers to the cosines and to the sines of an image, and the stride of columns."""
    column = shape[0] * shape[2]
    sines = (shape[1] + 1) // 2 * column
    z_ptr += tl.cast(image, tl.int64) * (2 * sines)
    return z_ptr, z_ptr + sines, column


@triton.jit
def _half_columns(first_v, c, shape, HALF_H, SLOTS_W, BOTTOM):
    """Return the places `(h, v, c)` of one half of some columns of `z`."""
    h, in_h = _half_axis(shape[0], HALF_H, BOTTOM)
    v, column = first_v + tl.arange(0, SLOTS_W), shape[0] * shape[2]
    return _places(h, in_h, shape[2], v, v < (shape[1] + 1) // 2, column, c, shape[2])


@triton.jit(do_not_specialize=['height', 'width'])
def transform_rows(
    x_ptr,
    z_ptr,
    exponents_ptr,
    basis_w_ptr,
    height,
    width,
    channels,
    HALF_W: tl.constexpr,
    SLOTS_W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Transform `ROWS` rows along W."""
    shape = height, width, channels
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image, block = tl.program_id(1), tl.program_id(2)
    h = block * ROWS + tl.arange(0, ROWS)
    in_h = h < height
    x_ptr += image.to(tl.int64) * (height * width * channels)
    left = _load(x_ptr, _half_rows(h, in_h, c, shape, HALF_W, False))
    right = _load(x_ptr, _half_rows(h, in_h, c, shape, HALF_W, True))
    shift = _find_shift((left, left, right, right)) - 1  # for sums of two
    left, right = left * _power_of_two(shift), right * _power_of_two(shift)
    even, odd = _operand(left + right), _operand(left - right)
    tl.store(_exponent_ptrs(exponents_ptr, image, block, tl.num_programs(2)), -shift)

    cosines_ptr, sines_ptr, column = _coefficients_of(z_ptr, image, shape)
    zeros = tl.zeros((ROWS * CHANNELS, SLOTS_W), tl.float32)
    slots = (width + 1) // 2
    for slot in range(0, slots, SLOTS_W):
        v = slot + tl.arange(0, SLOTS_W)
        places = _places(v, v < slots, column, h, in_h, channels, c, channels)
        cosine, sine = _transform(
            even, odd, (zeros, zeros), basis_w_ptr, slot, HALF_W, SLOTS_W, False
        )
        _store(cosines_ptr, places, cosine, CHANNELS)
        _store(sines_ptr, places, sine, CHANNELS)


@triton.jit
def _load_columns(z_ptr, exponents_ptr, image, first_v, c, shape, HALF_H, SLOTS_W, ROWS):
    """Return the parts along H of transformed rows as factors `((v c), h)`, and their exponent."""
    top, in_top = _half_axis(shape[0], HALF_H, False)
    bottom, in_bottom = _half_axis(shape[0], HALF_H, True)
    blocks = tl.cdiv(shape[0], ROWS)
    of_top = _exponent_ptrs(exponents_ptr, image, top // ROWS, blocks)
    of_top = tl.load(of_top, mask=in_top, other=_ABSENT)
    of_bottom = _exponent_ptrs(exponents_ptr, image, bottom // ROWS, blocks)
    of_bottom = tl.load(of_bottom, mask=in_bottom, other=_ABSENT)
    exponent = tl.maximum(tl.max(of_top), tl.max(of_bottom))
    of_top, of_bottom = of_top[:, None, None], of_bottom[:, None, None]

    cosines_ptr, sines_ptr, _ = _coefficients_of(z_ptr, image, shape)
    places = _half_columns(first_v, c, shape, HALF_H, SLOTS_W, False)
    c_top = _align(_load(cosines_ptr, places), of_top, exponent)
    s_top = _align(_load(sines_ptr, places), of_top, exponent)
    places = _half_columns(first_v, c, shape, HALF_H, SLOTS_W, True)
    c_bottom = _align(_load(cosines_ptr, places), of_bottom, exponent)
    s_bottom = _align(_load(sines_ptr, places), of_bottom, exponent)
    parts = c_top + c_bottom, c_top - c_bottom, s_top + s_bottom, s_top - s_bottom
    shift = _find_shift(parts)
    return _operand_parts(_multiply(parts, _power_of_two(shift))), exponent - shift


@triton.jit(do_not_specialize=['height', 'width'])
def filter_columns(
    z_ptr,
    exponents_ptr,
    weight_ptr,
    y_exponents_ptr,
    basis_h_ptr,
    height,
    width,
    channels,
    sign,
    HALF_H: tl.constexpr,
    SLOTS_H: tl.constexpr,
    SLOTS_W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Filter `SLOTS_W` columns of `z` in place."""
    shape = height, width, channels
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image, block = tl.program_id(1), tl.program_id(2)
    first_v = block * SLOTS_W
    x, exponent = _load_columns(
        z_ptr, exponents_ptr, image, first_v, c, shape, HALF_H, SLOTS_W, ROWS
    )
    y, own = _filter_height(
        x, weight_ptr, basis_h_ptr, shape, sign, first_v, HALF_H, SLOTS_H, SLOTS_W, CHANNELS
    )
    shift = _find_shift(y)
    pointer = _exponent_ptrs(y_exponents_ptr, image, block, tl.num_programs(2))
    tl.store(pointer, exponent + own - shift)
    ce, co, se, so = _multiply(y, _power_of_two(shift))

    cosines_ptr, sines_ptr, _ = _coefficients_of(z_ptr, image, shape)
    places = _half_columns(first_v, c, shape, HALF_H, SLOTS_W, False)
    _store(cosines_ptr, places, ce + co, CHANNELS)
    _store(sines_ptr, places, se + so, CHANNELS)
    places = _half_columns(first_v, c, shape, HALF_H, SLOTS_W, True)
    _store(cosines_ptr, places, ce - co, CHANNELS)
    _store(sines_ptr, places, se - so, CHANNELS)


@triton.jit(do_not_specialize=['height', 'width'])
def restore_rows(
    z_ptr,
    exponents_ptr,
    y_ptr,
    basis_w_ptr,
    height,
    width,
    channels,
    HALF_W: tl.constexpr,
    SLOTS_W: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Transform `ROWS` rows back along W; each block of `COLUMNS` columns has an exponent."""
    shape = height, width, channels
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(1)
    h = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    in_h = h < height
    slots = (width + 1) // 2
    blocks = tl.cdiv(slots, COLUMNS)
    every = tl.arange(0, HALF_W)
    exponents = _exponent_ptrs(exponents_ptr, image, every // COLUMNS, blocks)
    exponent = tl.max(tl.load(exponents, mask=every < slots, other=_ABSENT))

    cosines_ptr, sines_ptr, column = _coefficients_of(z_ptr, image, shape)
    zeros = tl.zeros((ROWS * CHANNELS, HALF_W), tl.float32)
    even, odd = zeros, zeros
    for slot in range(0, slots, SLOTS_W):
        v = slot + tl.arange(0, SLOTS_W)
        of_v = _exponent_ptrs(exponents_ptr, image, v // COLUMNS, blocks)
        of_v = tl.load(of_v, mask=v < slots, other=_ABSENT)[:, None, None]
        places = _places(v, v < slots, column, h, in_h, channels, c, channels)
        cosine = _operand(_align(_load(cosines_ptr, places), of_v, exponent))
        sine = _operand(_align(_load(sines_ptr, places), of_v, exponent))
        even, odd = _transform(cosine, sine, (even, odd), basis_w_ptr, slot, HALF_W, SLOTS_W, True)

    y_ptr += image.to(tl.int64) * (height * width * channels)
    left = _half_rows(h, in_h, c, shape, HALF_W, False)
    _store(y_ptr, left, _scale(even + odd, exponent), CHANNELS)
    right = _half_rows(h, in_h, c, shape, HALF_W, True)
    _store(y_ptr, right, _scale(even - odd, exponent), CHANNELS)


# The gradient of the spectrum is a sum over images. Each program sums a share of the images one by
# one and writes a spectrum of its own; the host adds these up. The grids are `(blocks of channels,
# blocks of slots, shares)`.


@triton.jit
def _image_range(batch):
    """Return the range of images of a program: the first one and the first after the last."""
    share = tl.cdiv(batch, tl.num_programs(2))
    first = tl.program_id(2) * share
    return first, tl.minimum(first + share, batch)


@triton.jit
def _program_slots(shape, SLOTS_H, SLOTS_W, CHANNELS):
    """Return the first slots of a program along H and W, and `inner` of all of them."""
    blocks = tl.cdiv((shape[0] + 1) // 2, SLOTS_H)
    first_u, first_v = tl.program_id(1) % blocks * SLOTS_H, tl.program_id(1) // blocks * SLOTS_W
    _, _, inner_u = _slots(first_u, shape[0], SLOTS_H)
    _, _, inner_v = _slots(first_v, shape[1], SLOTS_W)
    return first_u, first_v, inner_u[None, :], _repeat_channels(inner_v, CHANNELS)


@triton.jit
def _correlate(x, g, exponent, inner_u, inner_v):
    """Return the contribution of an image to the gradient, from the coefficients of both maps."""
    first = exponent // 2
    x = _frequencies(_multiply(x, _power_of_two(first)), inner_u, inner_v)
    g = _frequencies(_multiply(g, _power_of_two(exponent - first)), inner_u, inner_v)
    corner = inner_u + inner_v == 0
    re, im = _multiply_conjugate(x[0], x[1], g[0], g[1], corner)
    re_2, im_2 = _multiply_conjugate(x[2], x[3], g[2], g[3], corner)
    return re, im, re_2, im_2


@triton.jit
def _store_grad(ptr, value, u, in_u, v, in_v, shape, CHANNELS):
    """Store a gradient where :func:`_load_weight` loads; Nyquist only if the size is even."""
    places = _frequency_places(u, in_u, v, in_v, shape, CHANNELS)
    _store_complex(ptr, places, value[0], value[1], CHANNELS)
    in_u = in_u & ((u > 0) | (shape[0] % 2 == 0))
    u = _mirror(u, shape[0])
    places = _frequency_places(u, in_u, v, in_v, shape, CHANNELS)
    _store_complex(ptr, places, value[2], value[3], CHANNELS)


@triton.jit
def _store_grads(ptr, sums, shape, SLOTS_H, SLOTS_W, CHANNELS):
    """Store the sums of a program in its own spectrum `(H, W // 2 + 1, C, 2)`."""
    height, width, channels = shape
    ptr += tl.program_id(2).to(tl.int64) * (height * (width // 2 + 1) * channels * 2)
    first_u, first_v, inner_u, inner_v = _program_slots(shape, SLOTS_H, SLOTS_W, CHANNELS)
    u, in_u, _ = _slots(first_u, height, SLOTS_H)
    v, in_v, _ = _slots(first_v, width, SLOTS_W)
    sums = _multiply(sums, tl.where(inner_u + inner_v == 0, 1.0, 2.0) / (height * width))
    zero = _hermitian_grad(sums[0], sums[1], inner_u)
    value = _add(_multiply(sums, inner_v), _multiply(zero, 1.0 - inner_v))
    _store_grad(ptr, value, u, in_u, v, in_v, shape, CHANNELS)
    value = _hermitian_grad(sums[2], sums[3], inner_u)
    nyquist, is_zero = tl.full((SLOTS_W,), 0, tl.int32) + width // 2, (v == 0) & (width % 2 == 0)
    _store_grad(ptr, value, u, in_u, nyquist, is_zero, shape, CHANNELS)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def correlate_planes(
    g_ptr,
    x_ptr,
    grad_ptr,
    basis_h_ptr,
    basis_w_ptr,
    batch,
    height,
    width,
    channels,
    HALF_H: tl.constexpr,
    HALF_W: tl.constexpr,
    SLOTS_H: tl.constexpr,
    SLOTS_W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum the gradient of the spectrum over maps that fit on the chip."""
    shape = height, width, channels
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first_u, first_v, inner_u, inner_v = _program_slots(shape, SLOTS_H, SLOTS_W, CHANNELS)
    sums = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
    first, last = _image_range(batch)
    for image in range(first, last):
        zeros = _zeros(HALF_H * CHANNELS, SLOTS_W)
        offset = tl.cast(image, tl.int64) * (height * width * channels)
        x, x_exponent = _load_plane(x_ptr + offset, shape, c, HALF_H, HALF_W)
        x = _transform_width(x, zeros, basis_w_ptr, first_v, HALF_W, SLOTS_W, False)
        x = _transpose_parts(x, CHANNELS)
        g, g_exponent = _load_plane(g_ptr + offset, shape, c, HALF_H, HALF_W)
        g = _transform_width(g, zeros, basis_w_ptr, first_v, HALF_W, SLOTS_W, False)
        g = _transpose_parts(g, CHANNELS)
        zeros = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
        x = _transform_height(x, zeros, basis_h_ptr, first_u, HALF_H, SLOTS_H, False)
        g = _transform_height(g, zeros, basis_h_ptr, first_u, HALF_H, SLOTS_H, False)
        sums = _add(sums, _correlate(x, g, x_exponent + g_exponent, inner_u, inner_v))
    _store_grads(grad_ptr, sums, shape, SLOTS_H, SLOTS_W, CHANNELS)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def correlate_columns(
    g_ptr,
    g_exponents_ptr,
    x_ptr,
    x_exponents_ptr,
    grad_ptr,
    basis_h_ptr,
    batch,
    height,
    width,
    channels,
    HALF_H: tl.constexpr,
    SLOTS_H: tl.constexpr,
    SLOTS_W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum the gradient of the spectrum over maps whose rows are transformed."""
    shape = height, width, channels
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first_u, first_v, inner_u, inner_v = _program_slots(shape, SLOTS_H, SLOTS_W, CHANNELS)
    sums = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
    first, last = _image_range(batch)
    for image in range(first, last):
        x, x_exponent = _load_columns(
            x_ptr, x_exponents_ptr, image, first_v, c, shape, HALF_H, SLOTS_W, ROWS
        )
        zeros = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
        x = _transform_height(x, zeros, basis_h_ptr, first_u, HALF_H, SLOTS_H, False)
        g, g_exponent = _load_columns(
            g_ptr, g_exponents_ptr, image, first_v, c, shape, HALF_H, SLOTS_W, ROWS
        )
        g = _transform_height(g, zeros, basis_h_ptr, first_u, HALF_H, SLOTS_H, False)
        sums = _add(sums, _correlate(x, g, x_exponent + g_exponent, inner_u, inner_v))
    _store_grads(grad_ptr, sums, shape, SLOTS_H, SLOTS_W, CHANNELS)
