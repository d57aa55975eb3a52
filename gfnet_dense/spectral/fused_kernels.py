"""Triton kernels of the global filter. Only :mod:`.fused` imports them, when it runs one.

An axis of n cells is folded about its centre: mirrored cells become their sum, the even part, and
their difference, the odd part, of ceil(n / 2) values each. The even part has cosine coefficients
alone, the odd part sine coefficients alone, so that two products with square matrices of that size
make the real Fourier transform, and two with the same matrices undo it. Slot k of either kind is
frequency k. Slot 0 of the sines, which frequency 0 has no use for, is the Nyquist frequency of an
even axis: nothing is stored or computed twice. That the origin lies at the centre turns the phase
of every frequency; the way back takes that out.

A map is four tiles, its parts, and so is its spectrum. Names say W first, then H: e(ven) or o(dd)
of a map, c(osine) or s(ine) of a spectrum; tuples hold `ee, eo, oe, oo` and so on. Matrix products
see a tile as `((i c), j)`: rows run over one axis and the channels, columns over the axis that is
transformed.

Factors of products are rounded to float16. Parts are scaled by a power of two, which is exact, so
that the largest value lies within [2**6, 2**7): sums over 256 slots stay within the range, and
values a million times smaller keep their precision. What is true is `stored * 2**exponent`.

`shape` is `(H, W, C)` everywhere, `c` the channels of a block; constants in capitals are powers of
two. `HALF_H` and `HALF_W` are sizes of the tiles that hold half an axis, `SLOTS_H` and `SLOTS_W` of
those that hold some of its slots.
"""

import triton
import triton.language as tl

_TARGET = tl.constexpr(6)
_MARGIN = tl.constexpr(9)  # products with any finite spectrum, divided by 2**9, are finite
_NONE = tl.constexpr(-1000)  # the exponent of what there is none of


@triton.jit
def _power(exponent):
    """Return 2 to an integer; to the nearest one that float32 has, without subnormal ones."""
    exponent = tl.minimum(tl.maximum(exponent, -126), 127)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale(x, exponent):
    """Multiply by 2 to an integer, in two steps: a single factor could overflow."""
    first = exponent // 2
    return x * _power(first) * _power(exponent - first)


@triton.jit
def _align(x, exponent, largest):
    """Bring values of several exponents, none above `largest`, to that one."""
    return x * _power(exponent - largest)


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    none = tl.zeros((ROWS, COLUMNS), tl.float32)
    return none, none, none, none


@triton.jit
def _times(parts, factor):
    return parts[0] * factor, parts[1] * factor, parts[2] * factor, parts[3] * factor


@triton.jit
def _plus(parts, more):
    return parts[0] + more[0], parts[1] + more[1], parts[2] + more[2], parts[3] + more[3]


@triton.jit
def _headroom(parts):
    """Return the exponent of the power of two that brings the largest value to the target."""
    first = tl.maximum(tl.abs(parts[0]), tl.abs(parts[1]))
    second = tl.maximum(tl.abs(parts[2]), tl.abs(parts[3]))
    largest = tl.max(tl.maximum(first, second))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(-exponent + _TARGET, 126)


@triton.jit
def _half(size, HALF: tl.constexpr, MIRRORED: tl.constexpr):
    """Return the cells of one half of an axis, from its border inwards, and which there are.

    The middle cell of an odd axis is its own mirror image and belongs to the first half alone.
    """
    index = tl.arange(0, HALF)
    if MIRRORED:
        return size - 1 - index, index < size // 2
    return index, index < (size + 1) // 2


@triton.jit
def _places(i, in_i, stride_i, j, in_j, stride_j, c, channels):
    """Return the offsets of a tile `(i, j, c)`, and what of it there is."""
    offsets = i[:, None, None] * stride_i + j[None, :, None] * stride_j + c[None, None, :]
    return offsets, in_i[:, None, None] & in_j[None, :, None] & (c < channels)[None, None, :]


@triton.jit
def _corner(
    shape,
    c,
    HALF_H: tl.constexpr,
    HALF_W: tl.constexpr,
    BOTTOM: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """Return the places `(w, h, c)` of a quarter of a map."""
    h, in_h = _half(shape[0], HALF_H, BOTTOM)
    w, in_w = _half(shape[1], HALF_W, RIGHT)
    return _places(w, in_w, shape[2], h, in_h, shape[1] * shape[2], c, shape[2])


@triton.jit
def _load(ptr, places):
    offsets, there = places
    return tl.load(ptr + offsets, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, places, x, CHANNELS: tl.constexpr):
    """Store `((i c), j)` in the places of a tile `(j, i, c)`."""
    offsets, there = places
    x = tl.reshape(x.to(ptr.dtype.element_ty), (x.shape[0] // CHANNELS, CHANNELS, x.shape[1]))
    tl.store(ptr + offsets, tl.permute(x, (2, 0, 1)), mask=there)


@triton.jit
def _operand(tile):
    """Round a tile `(j, i, c)` to an operand `((i c), j)`."""
    tile = tl.permute(tile.to(tl.float16), (1, 2, 0))
    return tl.reshape(tile, (tile.shape[0] * tile.shape[1], tile.shape[2]))


@triton.jit
def _operands(parts):
    return _operand(parts[0]), _operand(parts[1]), _operand(parts[2]), _operand(parts[3])


@triton.jit
def _turn(x, CHANNELS: tl.constexpr):
    """Round `((i c), j)` to an operand `((j c), i)`."""
    x = tl.reshape(x.to(tl.float16), (x.shape[0] // CHANNELS, CHANNELS, x.shape[1]))
    x = tl.permute(x, (2, 1, 0))
    return tl.reshape(x, (x.shape[0] * CHANNELS, x.shape[2]))


@triton.jit
def _turns(parts, CHANNELS: tl.constexpr):
    first, second = _turn(parts[0], CHANNELS), _turn(parts[1], CHANNELS)
    return first, second, _turn(parts[2], CHANNELS), _turn(parts[3], CHANNELS)


@triton.jit
def _transform(
    first,
    second,
    sums,
    basis_ptr,
    slot,
    HALF: tl.constexpr,
    SLOTS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Turn even and odd part `(rows, HALF)` into cosine and sine coefficients `(rows, SLOTS)`.

    They are those from `slot` on; the inverse returns what they add to the two parts. Either is
    added to `sums`. The basis `(2, HALF, HALF)` holds cosines and sines of slot x cell. Where
    `HALF < 16`, `SLOTS == HALF`.
    """
    INNER: tl.constexpr = SLOTS if INVERSE else HALF
    OUTER: tl.constexpr = HALF if INVERSE else SLOTS
    if HALF >= 16:
        inner, outer = tl.arange(0, INNER)[:, None], tl.arange(0, OUTER)[None, :]
        if INVERSE:
            entries = basis_ptr + (slot + inner) * HALF + outer
        else:
            entries = basis_ptr + (slot + outer) * HALF + inner
        cosines, sines = tl.load(entries), tl.load(entries + HALF * HALF)
        return tl.dot(first, cosines, sums[0]), tl.dot(second, sines, sums[1])
    # Tensor cores sum up 16 products or more: here those of both parts, interleaved, with a matrix
    # that keeps them apart.
    inner, outer = tl.arange(0, 2 * INNER)[:, None], tl.arange(0, 2 * OUTER)[None, :]
    if INVERSE:
        entries = basis_ptr + inner // 2 * HALF + outer // 2
    else:
        entries = basis_ptr + outer // 2 * HALF + inner // 2
    alike = inner % 2 == outer % 2
    matrix = tl.load(entries + inner % 2 * HALF * HALF, mask=alike, other=0.0)
    both = tl.dot(tl.interleave(first, second), matrix)
    both = tl.split(tl.reshape(both, (both.shape[0], OUTER, 2)))
    return sums[0] + both[0], sums[1] + both[1]


@triton.jit
def _transform_width(
    parts,
    sums,
    basis_ptr,
    slot,
    HALF_W: tl.constexpr,
    SLOTS_W: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Transform the parts along W, whose letter stands first, and add them to `sums`."""
    one, two = (sums[0], sums[2]), (sums[1], sums[3])
    first, third = _transform(parts[0], parts[2], one, basis_ptr, slot, HALF_W, SLOTS_W, INVERSE)
    second, fourth = _transform(parts[1], parts[3], two, basis_ptr, slot, HALF_W, SLOTS_W, INVERSE)
    return first, second, third, fourth


@triton.jit
def _transform_height(
    parts,
    sums,
    basis_ptr,
    slot,
    HALF_H: tl.constexpr,
    SLOTS_H: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Transform the parts along H, whose letter stands second, and add them to `sums`."""
    one, two = (sums[0], sums[1]), (sums[2], sums[3])
    first, second = _transform(parts[0], parts[1], one, basis_ptr, slot, HALF_H, SLOTS_H, INVERSE)
    third, fourth = _transform(parts[2], parts[3], two, basis_ptr, slot, HALF_H, SLOTS_H, INVERSE)
    return first, second, third, fourth


@triton.jit
def _load_plane(ptr, shape, c, HALF_H: tl.constexpr, HALF_W: tl.constexpr):
    """Return the parts of a map as operands `((h c), w)`, and their exponent."""
    # A quarter of each, so that a sum of four of the largest values of bfloat16 stays finite.
    top_left = 0.25 * _load(ptr, _corner(shape, c, HALF_H, HALF_W, False, False))
    top_right = 0.25 * _load(ptr, _corner(shape, c, HALF_H, HALF_W, False, True))
    bottom_left = 0.25 * _load(ptr, _corner(shape, c, HALF_H, HALF_W, True, False))
    bottom_right = 0.25 * _load(ptr, _corner(shape, c, HALF_H, HALF_W, True, True))
    top_even, top_odd = top_left + top_right, top_left - top_right
    bottom_even, bottom_odd = bottom_left + bottom_right, bottom_left - bottom_right
    parts = (
        top_even + bottom_even,
        top_even - bottom_even,
        top_odd + bottom_odd,
        top_odd - bottom_odd,
    )
    shift = _headroom(parts)
    return _operands(_times(parts, _power(shift))), 2 - shift  # 2**2 for the quarter


# At slot (u, v) four coefficients stand for two complex values of the spectrum, at the frequencies
# (u, v) and (-u, v). `inner_u` is 0 in the slots u = 0 and 1 elsewhere. In the former the second
# value belongs to the Nyquist frequency; it is off by a factor that the way back takes out.


@triton.jit
def _frequencies(parts, inner_u):
    """Return real and imaginary part at (u, v) and at (-u, v)."""
    cc, cs, sc, ss = parts
    return cc - inner_u * ss, -sc - inner_u * cs, inner_u * cc + ss, cs - inner_u * sc


@triton.jit
def _respond(parts, inner_u, weight):
    """Multiply by a spectrum, given at (u, v) and (-u, v), and return `cc, cs` of the product.

    Its `sc, ss` are what this returns for `sc, ss, -cc, -cs`: the sines along W are the cosines of
    the spectrum times i.
    """
    re, im, re_2, im_2 = _frequencies(parts, inner_u)
    k_re, k_im, k_re_2, k_im_2 = weight
    y_re, y_im = k_re * re - k_im * im, k_re * im + k_im * re
    y_re_2, y_im_2 = k_re_2 * re_2 - k_im_2 * im_2, k_re_2 * im_2 + k_im_2 * re_2
    return y_re + inner_u * y_re_2, y_im_2 - inner_u * y_im


@triton.jit
def _correlate(parts, inner_u, g_c, g_s):
    """Return the gradient of :func:`_respond` with respect to the weight, of which g comes back."""
    re, im, re_2, im_2 = _frequencies(parts, inner_u)
    inner_c, inner_s = inner_u * g_c, inner_u * g_s
    first = re * g_c - im * inner_s, -im * g_c - re * inner_s
    return first[0], first[1], re_2 * inner_c + im_2 * g_s, re_2 * g_s - im_2 * inner_c


@triton.jit
def _cosines(parts, inner_v):
    """Return what :func:`_respond` takes for `cc, cs`.

    In the slots v = 0 cosines and sines are separate frequencies, zero and Nyquist; `inner_v` is 0
    there and 1 elsewhere.
    """
    return parts[0], parts[1], inner_v * parts[2], inner_v * parts[3]


@triton.jit
def _sines(parts, inner_v):
    """Return what :func:`_respond` takes for `sc, ss`."""
    return parts[2], parts[3], -inner_v * parts[0], -inner_v * parts[1]


@triton.jit
def _slots(first, size, SLOTS: tl.constexpr):
    """Return some slots of an axis, which there are, and 0 for slot 0 or 1 for another."""
    slot = first + tl.arange(0, SLOTS)
    return slot, slot < (size + 1) // 2, tl.where(slot == 0, 0.0, 1.0)


@triton.jit
def _rows(x, CHANNELS: tl.constexpr):
    """Repeat a value of every slot v for the rows `((v c), 1)`."""
    x = tl.broadcast_to(x[:, None], (x.shape[0], CHANNELS))
    return tl.reshape(x, (x.shape[0] * CHANNELS, 1))


@triton.jit
def _mirror(u, height):
    """Return the rows of the spectrum for the frequencies -u: Nyquist for u = 0."""
    return tl.where(u == 0, height // 2, height - u)


@triton.jit
def _frequency_places(u, in_u, v, in_v, first_c, shape, CHANNELS: tl.constexpr):
    """Return places `(u, v, (c 2))` in a spectrum `(H, W // 2 + 1, C, 2)`."""
    c, column = 2 * first_c + tl.arange(0, 2 * CHANNELS), 2 * shape[2]
    row = (shape[1] // 2 + 1) * column
    return _places(u, in_u, row, v, in_v, column, c, column)


@triton.jit
def _load_complex(ptr, places, CHANNELS: tl.constexpr):
    """Load real and imaginary part, in the order of memory, as `((v c), u)`."""
    x = _load(ptr, places)
    x = tl.reshape(x, (x.shape[0], x.shape[1], CHANNELS, 2))
    x = tl.permute(x, (1, 2, 0, 3))
    return tl.split(tl.reshape(x, (x.shape[0] * CHANNELS, x.shape[2], 2)))


@triton.jit
def _store_complex(ptr, places, real, imag, CHANNELS: tl.constexpr):
    """Store what :func:`_load_complex` loads."""
    x = tl.join(real, imag)
    x = tl.reshape(x, (x.shape[0] // CHANNELS, CHANNELS, x.shape[1], 2))
    x = tl.permute(x, (2, 0, 1, 3))
    offsets, there = places
    tl.store(ptr + offsets, tl.reshape(x, offsets.shape), mask=there)


@triton.jit
def _load_weight(ptr, u, in_u, v, in_v, first_c, shape, sign, CHANNELS: tl.constexpr):
    """Return a spectrum, conjugate where `sign` is -1, as :func:`_respond` takes it."""
    places = _frequency_places(u, in_u, v, in_v, first_c, shape, CHANNELS)
    re, im = _load_complex(ptr, places, CHANNELS)
    u = _mirror(u, shape[0])
    places = _frequency_places(u, in_u, v, in_v, first_c, shape, CHANNELS)
    re_2, im_2 = _load_complex(ptr, places, CHANNELS)
    return re, sign * im, re_2, sign * im_2


@triton.jit
def _repeat(x, SLOTS: tl.constexpr):
    x = tl.broadcast_to(x[None, :, :], (SLOTS, x.shape[0], x.shape[1]))
    return tl.reshape(x, (SLOTS * x.shape[1], x.shape[2]))


@triton.jit
def _spread(parts, SLOTS: tl.constexpr):
    """Repeat `(c, u)` for every slot v, to `((v c), u)`."""
    first, second = _repeat(parts[0], SLOTS), _repeat(parts[1], SLOTS)
    return first, second, _repeat(parts[2], SLOTS), _repeat(parts[3], SLOTS)


@triton.jit
def _filter_height(
    parts,
    weight_ptr,
    basis_ptr,
    shape,
    sign,
    first_v,
    first_c,
    HALF_H: tl.constexpr,
    SLOTS_H: tl.constexpr,
    SLOTS_W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Transform `((v c), h)` along H, multiply by the spectrum over 2**_MARGIN, transform back.

    Some frequencies at a time, so that the spectrum takes few registers. What they give is added to
    the sums in place, which is why the exponent, returned with them, is the same for all.
    """
    v, in_v, inner_v = _slots(first_v, shape[1], SLOTS_W)
    inner_v = _rows(inner_v, CHANNELS)
    sums, exponent = _zeros(SLOTS_W * CHANNELS, HALF_H), tl.full((), _NONE, tl.int32)
    # Where one round is all there is, compilers shall know.
    slots = HALF_H if HALF_H == SLOTS_H else (shape[0] + 1) // 2
    for first_u in tl.range(0, slots, SLOTS_H, disable_licm=True):
        none = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
        x = _transform_height(parts, none, basis_ptr, first_u, HALF_H, SLOTS_H, False)
        # Frequencies v > 0 stand for -v, too.
        x = _times(x, (1.0 + inner_v) / (shape[0] * shape[1] << _MARGIN))
        u, in_u, inner_u = _slots(first_u, shape[0], SLOTS_H)
        inner_u = inner_u[None, :]
        k = _load_weight(weight_ptr, u, in_u, v, in_v, first_c, shape, sign, CHANNELS)
        cc, cs = _respond(_cosines(x, inner_v), inner_u, k)
        column = tl.full((1,), 0, tl.int32)
        nyquist, is_there = column + shape[1] // 2, column + first_v == 0
        k_n = _load_weight(weight_ptr, u, in_u, nyquist, is_there, first_c, shape, sign, CHANNELS)
        k = _plus(_times(k, inner_v), _times(_spread(k_n, SLOTS_W), 1.0 - inner_v))
        sc, ss = _respond(_sines(x, inner_v), inner_u, k)
        x = cc, cs, sc, ss
        common = tl.maximum(exponent, -_headroom(x))
        x = _times(x, _power(-common))
        x = x[0].to(tl.float16), x[1].to(tl.float16), x[2].to(tl.float16), x[3].to(tl.float16)
        sums = _times(sums, _power(exponent - common))
        sums = _transform_height(x, sums, basis_ptr, first_u, HALF_H, SLOTS_H, True)
        exponent = common
    return sums, exponent + _MARGIN


def _fitting(configs, arguments, HALF_H, SLOTS_W, **_):
    """Keep the blocks of which every thread holds 32 or 64 values of `SLOTS_W` columns.

    Four parts of them in float32 and the spectrum fit in its 255 registers.
    """
    area = 4 * HALF_H * SLOTS_W
    return [
        config
        for config in configs
        if area * config.kwargs['CHANNELS'] in (1024 * config.num_warps, 2048 * config.num_warps)
    ]


# Channels and warps. With few channels several programs share a multiprocessor, and one computes
# while another waits for memory; with many, memory is read in longer pieces. Where kernels are
# interpreted there is nothing to time.
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
    """Filter maps that fit on the chip; grid `(blocks of channels, images)`."""
    shape = height, width, channels
    first_c = tl.program_id(0) * CHANNELS
    c = first_c + tl.arange(0, CHANNELS)
    image = tl.program_id(1).to(tl.int64) * (height * width * channels)
    x_ptr, y_ptr = x_ptr + image, y_ptr + image
    x, x_exponent = _load_plane(x_ptr, shape, c, HALF_H, HALF_W)
    filtered, exponents = (), (tl.full((), _NONE, tl.int32),)
    for first_v in tl.static_range(0, HALF_W, SLOTS_W):
        none = _zeros(HALF_H * CHANNELS, SLOTS_W)
        some = _transform_width(x, none, basis_w_ptr, first_v, HALF_W, SLOTS_W, False)
        y, exponent = _filter_height(
            _turns(some, CHANNELS),
            weight_ptr,
            basis_h_ptr,
            shape,
            sign,
            first_v,
            first_c,
            HALF_H,
            SLOTS_H,
            SLOTS_W,
            CHANNELS,
        )
        common = tl.maximum(exponents[-1], exponent - _headroom(y))
        filtered += (_turns(_times(y, _power(exponent - common)), CHANNELS),)
        exponents += (common,)
    y = _zeros(HALF_H * CHANNELS, HALF_W)
    for i in tl.static_range(HALF_W // SLOTS_W):
        y = _times(y, _power(exponents[i] - exponents[i + 1]))
        y = _transform_width(filtered[i], y, basis_w_ptr, i * SLOTS_W, HALF_W, SLOTS_W, True)
    ee, eo, oe, oo = y
    exponent = x_exponent + exponents[-1]
    corner = _corner(shape, c, HALF_H, HALF_W, False, False)
    _store(y_ptr, corner, _scale(ee + eo + oe + oo, exponent), CHANNELS)
    corner = _corner(shape, c, HALF_H, HALF_W, False, True)
    _store(y_ptr, corner, _scale(ee + eo - oe - oo, exponent), CHANNELS)
    corner = _corner(shape, c, HALF_H, HALF_W, True, False)
    _store(y_ptr, corner, _scale(ee - eo + oe - oo, exponent), CHANNELS)
    corner = _corner(shape, c, HALF_H, HALF_W, True, True)
    _store(y_ptr, corner, _scale(ee - eo - oe + oo, exponent), CHANNELS)


# Larger maps pass through memory as `z (B, 2, ceil(W / 2), H, C)` in float16, cosine and sine
# coefficients along W. With it go exponents, `(B, blocks along H or W, blocks of channels)`. Grids
# are `(blocks of channels, images, blocks along H or W)`.


@triton.jit
def _exponents(ptr, image, block, blocks):
    """Return pointers to the exponents of blocks along H or W, of which there are `blocks`."""
    return ptr + (image * blocks + block) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _strides(shape):
    """Return the strides in `z` of images, of sines from cosines, and of columns."""
    column = shape[0] * shape[2]
    sines = (shape[1] + 1) // 2 * column
    return 2 * sines, sines, column


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
    in_h, row = h < height, width * channels
    x_ptr += image.to(tl.int64) * (height * row)
    w, in_w = _half(width, HALF_W, False)
    left = 0.5 * _load(x_ptr, _places(w, in_w, channels, h, in_h, row, c, channels))
    w, in_w = _half(width, HALF_W, True)
    right = 0.5 * _load(x_ptr, _places(w, in_w, channels, h, in_h, row, c, channels))
    even, odd = left + right, left - right
    shift = _headroom((even, even, odd, odd))
    scale = _power(shift)
    even, odd = _operand(scale * even), _operand(scale * odd)
    tl.store(_exponents(exponents_ptr, image, block, tl.num_programs(2)), 1 - shift)

    stride, sines, column = _strides(shape)
    z_ptr += image.to(tl.int64) * stride
    none = tl.zeros((ROWS * CHANNELS, SLOTS_W), tl.float32)
    slots = (width + 1) // 2
    for slot in range(0, slots, SLOTS_W):
        v = slot + tl.arange(0, SLOTS_W)
        places = _places(v, v < slots, column, h, in_h, channels, c, channels)
        cosine, sine = _transform(
            even, odd, (none, none), basis_w_ptr, slot, HALF_W, SLOTS_W, False
        )
        _store(z_ptr, places, cosine, CHANNELS)
        _store(z_ptr + sines, places, sine, CHANNELS)


@triton.jit
def _load_columns(
    z_ptr,
    exponents_ptr,
    image,
    first_v,
    c,
    shape,
    HALF_H: tl.constexpr,
    SLOTS_W: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the parts of transformed rows as operands `((v c), h)`, and their exponent."""
    top, in_top = _half(shape[0], HALF_H, False)
    bottom, in_bottom = _half(shape[0], HALF_H, True)
    blocks = tl.cdiv(shape[0], ROWS)
    of_top = _exponents(exponents_ptr, image, top // ROWS, blocks)
    of_top = tl.load(of_top, mask=in_top, other=_NONE)
    of_bottom = _exponents(exponents_ptr, image, bottom // ROWS, blocks)
    of_bottom = tl.load(of_bottom, mask=in_bottom, other=_NONE)
    exponent = tl.maximum(tl.max(of_top), tl.max(of_bottom))
    of_top, of_bottom = of_top[:, None, None], of_bottom[:, None, None]

    stride, sines, column = _strides(shape)
    z_ptr += tl.cast(image, tl.int64) * stride
    v = first_v + tl.arange(0, SLOTS_W)
    in_v = v < (shape[1] + 1) // 2
    places = _places(top, in_top, shape[2], v, in_v, column, c, shape[2])
    c_top = _align(_load(z_ptr, places), of_top, exponent)
    s_top = _align(_load(z_ptr + sines, places), of_top, exponent)
    places = _places(bottom, in_bottom, shape[2], v, in_v, column, c, shape[2])
    c_bottom = _align(_load(z_ptr, places), of_bottom, exponent)
    s_bottom = _align(_load(z_ptr + sines, places), of_bottom, exponent)
    parts = c_top + c_bottom, c_top - c_bottom, s_top + s_bottom, s_top - s_bottom
    shift = _headroom(parts)
    return _operands(_times(parts, _power(shift))), exponent - shift


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
    first_c = tl.program_id(0) * CHANNELS
    c = first_c + tl.arange(0, CHANNELS)
    image, block = tl.program_id(1), tl.program_id(2)
    first_v = block * SLOTS_W
    x, exponent = _load_columns(
        z_ptr, exponents_ptr, image, first_v, c, shape, HALF_H, SLOTS_W, ROWS
    )
    y, own = _filter_height(
        x,
        weight_ptr,
        basis_h_ptr,
        shape,
        sign,
        first_v,
        first_c,
        HALF_H,
        SLOTS_H,
        SLOTS_W,
        CHANNELS,
    )
    shift = _headroom(y)
    pointer = _exponents(y_exponents_ptr, image, block, tl.num_programs(2))
    tl.store(pointer, exponent + own - shift)
    ce, co, se, so = _times(y, _power(shift))

    stride, sines, column = _strides(shape)
    z_ptr += image.to(tl.int64) * stride
    v = first_v + tl.arange(0, SLOTS_W)
    in_v = v < (width + 1) // 2
    h, in_h = _half(height, HALF_H, False)
    places = _places(h, in_h, channels, v, in_v, column, c, channels)
    _store(z_ptr, places, ce + co, CHANNELS)
    _store(z_ptr + sines, places, se + so, CHANNELS)
    h, in_h = _half(height, HALF_H, True)
    places = _places(h, in_h, channels, v, in_v, column, c, channels)
    _store(z_ptr, places, ce - co, CHANNELS)
    _store(z_ptr + sines, places, se - so, CHANNELS)


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
    """Transform `ROWS` rows back, of which every `COLUMNS` columns share an exponent."""
    shape = height, width, channels
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(1)
    h = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    in_h, row = h < height, width * channels
    slots = (width + 1) // 2
    blocks = tl.cdiv(slots, COLUMNS)
    every = tl.arange(0, HALF_W)
    exponents = _exponents(exponents_ptr, image, every // COLUMNS, blocks)
    exponent = tl.max(tl.load(exponents, mask=every < slots, other=_NONE))

    stride, sines, column = _strides(shape)
    z_ptr += image.to(tl.int64) * stride
    none = tl.zeros((ROWS * CHANNELS, HALF_W), tl.float32)
    even, odd = none, none
    for slot in range(0, slots, SLOTS_W):
        v = slot + tl.arange(0, SLOTS_W)
        of_v = _exponents(exponents_ptr, image, v // COLUMNS, blocks)
        of_v = tl.load(of_v, mask=v < slots, other=_NONE)[:, None, None]
        places = _places(v, v < slots, column, h, in_h, channels, c, channels)
        cosine = _operand(_align(_load(z_ptr, places), of_v, exponent))
        sine = _operand(_align(_load(z_ptr + sines, places), of_v, exponent))
        even, odd = _transform(cosine, sine, (even, odd), basis_w_ptr, slot, HALF_W, SLOTS_W, True)

    y_ptr += image.to(tl.int64) * (height * row)
    w, in_w = _half(width, HALF_W, False)
    places = _places(w, in_w, channels, h, in_h, row, c, channels)
    _store(y_ptr, places, _scale(even + odd, exponent), CHANNELS)
    w, in_w = _half(width, HALF_W, True)
    places = _places(w, in_w, channels, h, in_h, row, c, channels)
    _store(y_ptr, places, _scale(even - odd, exponent), CHANNELS)


# The gradient of the spectrum is a sum over images. A program sums up a share of them, one after
# the other; the sums of the shares are added up afterwards. Grids are `(blocks of channels, blocks
# of slots, shares)`.


@triton.jit
def _share(batch):
    """Return the first image of a program's share, and the first after it."""
    share = tl.cdiv(batch, tl.num_programs(2))
    first = tl.program_id(2) * share
    return first, tl.minimum(first + share, batch)


@triton.jit
def _first_slots(height, SLOTS_H: tl.constexpr, SLOTS_W: tl.constexpr):
    """Return the first slots of a program along H and W."""
    blocks = tl.cdiv((height + 1) // 2, SLOTS_H)
    return tl.program_id(1) % blocks * SLOTS_H, tl.program_id(1) // blocks * SLOTS_W


@triton.jit
def _correlate_height(
    x,
    g,
    exponent,
    basis_ptr,
    slot,
    inner_u,
    inner_v,
    HALF_H: tl.constexpr,
    SLOTS_H: tl.constexpr,
):
    """Return what an image adds to the gradient.

    In the slots v = 0 the spectrum is that of real values, and what holds at -u follows from u. The
    first two of the four values stand for frequency zero there, the others for Nyquist, at -u. At
    u = 0 all is real, and the imaginary parts' places hold what belongs to the Nyquist frequency of
    H, or of the others to zero.
    """
    none = _zeros(x[0].shape[0], SLOTS_H)
    x = _transform_height(x, none, basis_ptr, slot, HALF_H, SLOTS_H, False)
    g = _transform_height(g, none, basis_ptr, slot, HALF_H, SLOTS_H, False)
    first = exponent // 2
    x, g = _times(x, _power(first)), _times(g, _power(exponent - first))
    cosines = _correlate(_cosines(x, inner_v), inner_u, g[0], g[1])
    sines = _correlate(_sines(x, inner_v), inner_u, g[2], g[3])
    corner = (1.0 - inner_u) * (1.0 - inner_v)
    return (
        cosines[0] + inner_v * sines[0],
        cosines[1] + inner_v * sines[1] + corner * cosines[2],
        sines[2] + inner_v * cosines[2],
        sines[3] + inner_v * cosines[3] + corner * sines[0],
    )


@triton.jit
def _real_column(first, second, inner_u):
    """Return the gradient at u and -u from one of the pairs of :func:`_correlate_height`."""
    imag = inner_u * second
    return first, imag, inner_u * first + (1.0 - inner_u) * second, -imag


@triton.jit
def _store_weight(ptr, value, u, in_u, v, in_v, first_c, shape, CHANNELS: tl.constexpr):
    """Store what :func:`_load_weight` loads; a Nyquist frequency, where the size is even."""
    places = _frequency_places(u, in_u, v, in_v, first_c, shape, CHANNELS)
    _store_complex(ptr, places, value[0], value[1], CHANNELS)
    in_u = in_u & ((u > 0) | (shape[0] % 2 == 0))
    u = _mirror(u, shape[0])
    places = _frequency_places(u, in_u, v, in_v, first_c, shape, CHANNELS)
    _store_complex(ptr, places, value[2], value[3], CHANNELS)


@triton.jit
def _store_gradient(
    ptr,
    sums,
    first_u,
    first_v,
    first_c,
    shape,
    SLOTS_H: tl.constexpr,
    SLOTS_W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Store the sum of a share in its own spectrum `(H, W // 2 + 1, C, 2)`."""
    height, width, channels = shape
    ptr += tl.program_id(2).to(tl.int64) * (height * (width // 2 + 1) * channels * 2)
    u, in_u, inner_u = _slots(first_u, height, SLOTS_H)
    v, in_v, inner_v = _slots(first_v, width, SLOTS_W)
    inner_u, inner_v = inner_u[None, :], _rows(inner_v, CHANNELS)
    sums = _times(sums, (1.0 + inner_v) / (height * width))
    zero = _real_column(sums[0], sums[1], inner_u)
    value = _plus(_times(sums, inner_v), _times(zero, 1.0 - inner_v))
    _store_weight(ptr, value, u, in_u, v, in_v, first_c, shape, CHANNELS)
    re_2, im_2, re, im = _real_column(sums[2], sums[3], inner_u)
    nyquist, is_zero = tl.full((SLOTS_W,), 0, tl.int32) + width // 2, (v == 0) & (width % 2 == 0)
    value = re, im, re_2, im_2
    _store_weight(ptr, value, u, in_u, nyquist, is_zero, first_c, shape, CHANNELS)


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def correlate_planes(
    g_ptr,
    x_ptr,
    weight_ptr,
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
    """Sum up the gradient of the spectrum over maps that fit on the chip."""
    shape = height, width, channels
    first_c = tl.program_id(0) * CHANNELS
    c = first_c + tl.arange(0, CHANNELS)
    first_u, first_v = _first_slots(height, SLOTS_H, SLOTS_W)
    _, _, inner_u = _slots(first_u, height, SLOTS_H)
    _, _, inner_v = _slots(first_v, width, SLOTS_W)
    inner_u, inner_v = inner_u[None, :], _rows(inner_v, CHANNELS)
    sums = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
    first, last = _share(batch)
    for image in tl.range(first, last, disable_licm=True):
        none = _zeros(HALF_H * CHANNELS, SLOTS_W)
        offset = tl.cast(image, tl.int64) * (height * width * channels)
        x, x_exponent = _load_plane(x_ptr + offset, shape, c, HALF_H, HALF_W)
        x = _transform_width(x, none, basis_w_ptr, first_v, HALF_W, SLOTS_W, False)
        x = _turns(x, CHANNELS)
        g, g_exponent = _load_plane(g_ptr + offset, shape, c, HALF_H, HALF_W)
        g = _transform_width(g, none, basis_w_ptr, first_v, HALF_W, SLOTS_W, False)
        more = _correlate_height(
            x,
            _turns(g, CHANNELS),
            x_exponent + g_exponent,
            basis_h_ptr,
            first_u,
            inner_u,
            inner_v,
            HALF_H,
            SLOTS_H,
        )
        sums = _plus(sums, more)
    _store_gradient(
        weight_ptr,
        sums,
        first_u,
        first_v,
        first_c,
        shape,
        SLOTS_H,
        SLOTS_W,
        CHANNELS,
    )


@triton.jit(do_not_specialize=['batch', 'height', 'width'])
def correlate_columns(
    g_ptr,
    g_exponents_ptr,
    x_ptr,
    x_exponents_ptr,
    weight_ptr,
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
    """Sum up the gradient of the spectrum over maps whose rows are transformed."""
    shape = height, width, channels
    first_c = tl.program_id(0) * CHANNELS
    c = first_c + tl.arange(0, CHANNELS)
    first_u, first_v = _first_slots(height, SLOTS_H, SLOTS_W)
    _, _, inner_u = _slots(first_u, height, SLOTS_H)
    _, _, inner_v = _slots(first_v, width, SLOTS_W)
    inner_u, inner_v = inner_u[None, :], _rows(inner_v, CHANNELS)
    sums = _zeros(SLOTS_W * CHANNELS, SLOTS_H)
    first, last = _share(batch)
    for image in tl.range(first, last, disable_licm=True):
        x, x_exponent = _load_columns(
            x_ptr, x_exponents_ptr, image, first_v, c, shape, HALF_H, SLOTS_W, ROWS
        )
        g, g_exponent = _load_columns(
            g_ptr, g_exponents_ptr, image, first_v, c, shape, HALF_H, SLOTS_W, ROWS
        )
        more = _correlate_height(
            x,
            g,
            x_exponent + g_exponent,
            basis_h_ptr,
            first_u,
            inner_u,
            inner_v,
            HALF_H,
            SLOTS_H,
        )
        sums = _plus(sums, more)
    _store_gradient(
        weight_ptr,
        sums,
        first_u,
        first_v,
        first_c,
        shape,
        SLOTS_H,
        SLOTS_W,
        CHANNELS,
    )
