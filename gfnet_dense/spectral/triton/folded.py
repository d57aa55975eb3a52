"""The folded Fourier transform of the kernels in plain torch: a model to read and to test against.

An axis of n cells is folded about its centre. Mirrored cells become their sum, the even part, and
their difference, the odd part, of ceil(n / 2) values each. An even axis is on the left, an odd one,
whose middle cell is its own mirror image, on the right:

    cells       a b c d e f                  a b c d e
    even part   a+f  b+e  c+d                a+d  b+e  c      multiplied by cosines
    odd part    a-f  b-e  c-d                a-d  b-e  c      multiplied by sines (0 for c)

The even part has only cosine coefficients, the odd part only sine coefficients. So two products
with square matrices of half the size make the real transform, and the same matrices undo it:

          map                         parts                    coefficients
    +------+------+              +------+------+              +------+------+
    |      |      |  fold W, H   |  ee  |  oe  |  cos | sin   |  cc  |  sc  |
    +------+------+ -----------> +------+------+ -----------> +------+------+
    |      |      |              |  eo  |  oo  |  W, then H   |  cs  |  ss  |
    +------+------+              +------+------+              +------+------+

The first letter belongs to W, the second to H: e(ven) or o(dd), c(osine) or s(ine). Slot k of both
kinds is frequency k. Frequency 0 has no sine, so slot 0 of the sines holds the Nyquist frequency of
an even axis, and zeros for an odd one: nothing is stored or computed twice. The origin is at the
centre, which turns the phase of every frequency; the way back turns it back.

Four coefficients at slot (u, v) are two complex values of the spectrum, `first` and `second`:

                 first                        second
    u, v > 0     (u, v)                       (-u, v)
    u = 0 < v    (0, v)                       (Nyquist, v)
    v = 0 < u    (u, 0)                       (u, Nyquist)
    u = v = 0    (0, 0), (Nyquist, 0)         (0, Nyquist), (Nyquist, Nyquist)

In the corner u = v = 0 all four values are real. They stand in the real and imaginary parts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..resize import hermitian_part

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def basis(size: int, device: torch.device | str = 'cpu') -> Tensor:
    """Return cosines and sines of slot x cell of an axis, `(2, n, n)` with n = ceil(size / 2)."""
    slot = torch.arange((size + 1) // 2, device=device)
    nyquist = size // 2 if size % 2 == 0 else 0
    frequency = torch.stack([slot, torch.where(slot == 0, nyquist, slot)])
    # Twice the distance from the centre; the remainder, exact in integers, keeps angles small.
    angle = (frequency[..., None] * (2 * slot - size + 1)).remainder(2 * size)
    cosines, sines = angle.double() * (math.pi / size)
    return torch.stack([cosines.cos(), sines.sin()])


def transform(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine coefficients `(..., ceil(n / 2))` of an axis `(..., n)`."""
    size = x.shape[-1]
    half = x[..., : (size + 1) // 2]
    mirrored = F.pad(x.flip(-1)[..., : size // 2], (0, size % 2))
    cosines, sines = basis(size)
    return (half + mirrored) @ cosines.T, (half - mirrored) @ sines.T


def restore(cosine: Tensor, sine: Tensor, size: int) -> Tensor:
    """Return the transpose of :func:`transform`."""
    cosines, sines = basis(size)
    even, odd = cosine @ cosines, sine @ sines
    return torch.cat([even + odd, (even - odd)[..., : size // 2].flip(-1)], dim=-1)


def frequencies(parts: Parts, inner_u: Tensor, inner_v: Tensor) -> Parts:
    """Return real and imaginary part of `first` and `second`; `inner` is 0 in slot 0, else 1."""
    cc, cs, sc, ss = parts
    inner, outer_v = inner_u * inner_v, 1 - inner_v
    return (
        cc - inner * ss,
        -(inner + outer_v) * cs - inner_v * sc,
        inner * cc + outer_v * sc + inner_v * ss,
        inner_v * cs - inner * sc - outer_v * ss,
    )


def coefficients(values: Parts, inner_u: Tensor, inner_v: Tensor) -> Parts:
    """Return the transpose of :func:`frequencies`."""
    re, im, re_2, im_2 = values
    inner, outer_v = inner_u * inner_v, 1 - inner_v
    return (
        re + inner * re_2,
        inner_v * im_2 - (inner + outer_v) * im,
        outer_v * re_2 - inner_v * im - inner * im_2,
        inner_v * re_2 - outer_v * im_2 - inner * re,
    )


def _multiply(
    re: Tensor, im: Tensor, kernel: Tensor, nyquist: Tensor, corner: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiply complex values; in the corner the real and the imaginary part by a factor each."""
    cross = torch.where(corner, 0.0, kernel.imag)
    factor = torch.where(corner, nyquist, kernel.real)
    return kernel.real * re - cross * im, factor * im + cross * re


def filter_columns(
    cosine: Tensor, sine: Tensor, weight: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Filter the coefficients along W `(B, C, H, ceil(W / 2))` of a map with its spectrum."""
    height = cosine.shape[2]
    parts = *transform(cosine.mT), *transform(sine.mT)  # (B, C, v, u)
    u, v = (torch.arange((size + 1) // 2) for size in (height, width))
    inner_u, inner_v = (u > 0).double(), (v > 0).double()[:, None]
    corner = inner_u + inner_v == 0
    re, im, re_2, im_2 = frequencies(parts, inner_u, inner_v)

    kernel = torch.view_as_complex(hermitian_part(weight, width).contiguous()).permute(2, 1, 0)
    mirrored_u = torch.where(u == 0, height // 2, height - u)
    first = kernel[:, : len(v), : len(u)]
    second = torch.cat([kernel[:, width // 2 :, u][:, :1], kernel[:, 1 : len(v), mirrored_u]], 1)
    nyquist = kernel[:, :, height // 2, None, None].real  # multiplies the imaginary part there
    re, im = _multiply(re, im, first, nyquist[:, 0], corner)
    re_2, im_2 = _multiply(re_2, im_2, second, nyquist[:, width // 2], corner)

    # Outside the corner a value stands for its conjugate too.
    norm = (2 - corner.double()) / (height * width)
    values = coefficients((re, im, re_2, im_2), inner_u, inner_v)
    cc, cs, sc, ss = (norm * part for part in values)
    return restore(cc, cs, height).mT, restore(sc, ss, height).mT


def folded_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Filter a float64 map `(B, H, W, C)` on the CPU with a spectrum `(H, W // 2 + 1, C, 2)`."""
    cosine, sine = transform(x.permute(0, 3, 1, 2))
    cosine, sine = filter_columns(cosine, sine, weight, x.shape[2])
    return restore(cosine, sine, x.shape[2]).permute(0, 2, 3, 1)
