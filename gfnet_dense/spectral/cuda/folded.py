"""The folded Fourier transform of `tiles.h` in plain torch: a model to read and to test against.

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

Four coefficients at slot (u, v) make two complex values of the spectrum, `first` and `second`. Real
and imaginary parts are signed sums of the coefficients:

                 first                        second
    u, v > 0     (u, v)                       (-u, v)
    u = 0 < v    (0, v)                       (Nyquist, v)
    v = 0 < u    (u, 0)                       (u, Nyquist)
    u = v = 0    (0, 0), (Nyquist, 0)         (0, Nyquist), (Nyquist, Nyquist)

In the corner u = v = 0 all four values are real. They stand in the real and imaginary parts.
"""

import torch
from torch import Tensor

from ..resize import hermitian_part

Coefficients = tuple[Tensor, Tensor]  # of the cosines and of the sines


def basis(size: int, device: torch.device | str = 'cpu') -> Tensor:
    """Return cosines and sines of slot x cell of an axis, `(2, n, n)` with n = ceil(size / 2)."""
    slot = torch.arange((size + 1) // 2, device=device)
    frequency = torch.stack([slot, torch.where(slot == 0, 0 if size % 2 else size // 2, slot)])
    # Twice the distance from the centre; the remainder, exact in integers, keeps angles small.
    angle = (frequency[..., None] * (2 * slot - size + 1) % (2 * size)).double() * (torch.pi / size)
    return torch.stack([angle[0].cos(), angle[1].sin()])


def transform(x: Tensor) -> Coefficients:
    """Return cosine and sine coefficients `(..., ceil(n / 2))` of an axis `(..., n)`."""
    size = x.shape[-1]
    half = x[..., : (size + 1) // 2]
    mirrored = torch.nn.functional.pad(x.flip(-1)[..., : size // 2], (0, size % 2))
    cosines, sines = basis(size)
    return (half + mirrored) @ cosines.T, (half - mirrored) @ sines.T


def restore(cosine: Tensor, sine: Tensor, size: int) -> Tensor:
    """Return the transpose of :func:`transform`."""
    cosines, sines = basis(size)
    even, odd = cosine @ cosines, sine @ sines
    return torch.cat([even + odd, (even - odd)[..., : size // 2].flip(-1)], dim=-1)


def filter_columns(cosine: Tensor, sine: Tensor, weight: Tensor, width: int) -> Coefficients:
    """Filter the coefficients along W `(B, C, H, ceil(W / 2))` of a map with its spectrum."""
    height = cosine.shape[2]
    u, v = torch.arange((height + 1) // 2), torch.arange((width + 1) // 2)[:, None]

    def to_values(cosine: Tensor, sine: Tensor) -> Tensor:  # (B, C, v, u, 2)
        (cc, cs), (sc, ss) = transform(cosine.mT), transform(sine.mT)
        c, s = torch.complex(cc, -cs), torch.complex(sc, -ss)
        first = torch.where(u == 0, torch.complex(cc, -sc), c - 1j * s)
        second = torch.where(u == 0, torch.complex(ss, cs), c.conj() - 1j * s.conj())
        return torch.stack([torch.where(v == 0, c, first), torch.where(v == 0, s, second)], -1)

    # The way back is the transpose, which autograd finds.
    values, transpose = torch.func.vjp(to_values, cosine, sine)  # type: ignore[misc]
    spectrum = torch.view_as_complex(hermitian_part(weight, width).contiguous()).permute(2, 0, 1)
    second_u = torch.where(v == 0, u, torch.where(u == 0, height // 2, height - u))
    second_v = torch.where(v == 0, width // 2, v)
    kernel = torch.stack([spectrum[:, u, v], spectrum[:, second_u, second_v]], dim=-1)
    # In the corner the imaginary part is the real value of another frequency. Outside of it a value
    # stands for its conjugate too.
    nyquist = spectrum[:, height // 2, torch.stack([v, second_v], dim=-1)]
    apart = torch.complex(kernel.real * values.real, nyquist.real * values.imag)
    values = torch.where((u + v == 0)[..., None], apart, 2 * kernel * values)
    return transpose(values / (height * width))


def folded_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Filter a float64 map `(B, H, W, C)` on the CPU with a spectrum `(H, W // 2 + 1, C, 2)`."""
    columns = filter_columns(*transform(x.permute(0, 3, 1, 2)), weight, x.shape[2])
    return restore(*columns, x.shape[2]).permute(0, 2, 3, 1)
