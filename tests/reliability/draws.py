"""Random data for the fuzzer: values of every difficulty, in every memory layout, and masks."""

import numpy as np
import torch

COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 65, 97, 130)
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
KINDS = (
    "plain", "plain", "plain", "decaying", "offset", "constant columns", "duplicates", "zero", "constant",
    "rank one", "rank one and noise", "tiny", "huge", "integers", "one outlier",
)  # fmt: skip
LAYOUTS = ("contiguous", "contiguous", "transposed", "strided", "padded", "expanded", "odd", "numpy")


class Draw:
    """All random choices of one case, from its own generator."""

    def __init__(self, seed, case):
        self.rng = np.random.default_rng([seed, case])
        self._defaults = np.random.default_rng([seed, case, 1])  # so that they leave the other draws alone

    def chance(self, probability):
        return self.rng.random() < probability

    def choose(self, options):
        return options[int(self.rng.integers(len(options)))]

    def count(self, most=10**9):
        return self.choose([c for c in COUNTS if c <= most])

    def lead(self):
        return tuple(self.choose((1, 2, 3)) for _ in range(self.choose((0, 0, 1, 1, 2))))

    def dtype(self):
        return self.choose(DTYPES)

    def defaults(self):
        """A dtype and a device for PyTorch to make new tensors with; nothing may depend on them."""
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        return dtypes[self._defaults.integers(4)], "meta" if self._defaults.random() < 0.25 else "cpu"

    def normal(self, *shape):
        return self.rng.standard_normal(shape)

    def values(self, shape, dtype, kind=None):
        """``shape[..., n, d]`` of a dtype, finite, and the kind of difficulty that it has."""
        kind = self.choose(KINDS) if kind is None else kind
        x = self.normal(*shape)
        n, d = shape[-2:]
        half = dtype in (torch.bfloat16, torch.float16)
        if kind == "decaying":
            x = x / np.arange(1, d + 1) ** self.choose((1, 2, 4))
        elif kind == "offset":
            x = x + self.choose((30.0, 1e4))
        elif kind == "constant columns":
            x[..., self.rng.random(d) < 0.5] = self.choose((0.0, 1.0, 0.1, -1e3))
        elif kind == "duplicates":
            x = x[..., self.rng.integers(0, d, d)][..., self.rng.integers(0, n, n), :]
        elif kind == "zero":
            x = np.zeros(shape)
        elif kind == "constant":
            x = np.broadcast_to(x[..., :1, :], shape).copy()
        elif kind in ("rank one", "rank one and noise"):
            noise = 0.0 if kind == "rank one" else self.choose((1e-3, 1e-5, 1e-9))
            x = x[..., :1] * self.normal(d) + noise * x
        elif kind in ("tiny", "huge") and not half:
            power = 150 if dtype == torch.float64 else 18
            x = x * 10.0 ** (power if kind == "huge" else -power)
        elif kind == "integers":
            x = np.round(2 * x)
        elif kind == "one outlier":
            x[..., 0, :] = 100.0
        limit = 6e4 if half else np.inf
        return torch.from_numpy(np.clip(x, -limit, limit)).to(dtype), kind

    def laid_out(self, x):
        """``x``, or a part of it repeated, in some memory layout; what lies between its numbers is NaN."""
        layout = self.choose(LAYOUTS)
        *lead, n, d = x.shape
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "strided":
            step = self.choose((2, 3))
            store = x.new_full((*lead, step * n, 2 * d), torch.nan)
            store[..., ::step, 1::2] = x
            return store[..., ::step, 1::2]
        if layout == "padded":
            store = x.new_full((*lead, n + 3, d + 5), torch.nan)
            store[..., 1 : n + 1, 2 : d + 2] = x
            return store[..., 1 : n + 1, 2 : d + 2]
        if layout == "expanded":
            which = self.choose(("rows", "columns", "lead"))
            if which == "lead" and lead:
                return x[:1].expand(x.shape)
            return (x[..., :1, :] if which == "rows" else x[..., :1]).expand(x.shape)
        if layout == "odd":  # strides of dimensions of size one may be anything
            sizes = zip(x.shape, x.stride(), strict=True)
            strides = [s if size > 1 else self.choose((0, 7, 1001)) for size, s in sizes]
            return x.as_strided(x.shape, strides)
        if layout == "numpy" and x.dtype != torch.bfloat16:
            return x.numpy()
        return x

    def mask(self, shape):
        """``[*shape]`` bool: none, all, few or most of the rows at each position."""
        density = self.choose((0.0, 0.2, 0.7, 0.9, 1.0))
        mask = self.rng.random(shape) < density
        if shape[:-1] and self.chance(0.3):
            mask[(0,) * (len(shape) - 1)] = False
        return torch.from_numpy(mask)


def layers_of(draw, most=4):
    """Layers ``[*lead, n, d_l]`` of one dtype, each in its own layout, mostly correlated; and whether one of
    them is so far from 1 that a product of four of its values is no fp64 number."""
    lead, n, dtype = draw.lead(), draw.count(), draw.dtype()
    first, kind = draw.values((*lead, n, draw.count(65)), dtype)
    layers, kinds = [first], {kind}
    for _ in range(draw.choose(range(1, most))):
        last = layers[-1].double()
        scale = last.abs().max().item() or 1.0
        if draw.chance(0.7):
            step = scale * draw.choose((1e-9, 1e-4, 0.3)) * torch.from_numpy(draw.normal(*last.shape))
            limit = torch.finfo(dtype).max / 2
            layers.append((last + step).clamp(-limit, limit).to(dtype))
        else:
            other, kind = draw.values((*lead, n, draw.count(65)), dtype)
            layers.append(other)
            kinds.add(kind)
    return [draw.laid_out(x) for x in layers], bool(kinds & {"tiny", "huge"})
