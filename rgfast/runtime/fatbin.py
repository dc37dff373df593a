"""What a fat binary holds, read from the file itself: images by architecture, and the compiler's release."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

__all__ = ["Images", "read"]

_MAGIC = 0xBA55ED50
_PTX, _CUBIN = 1, 2
_RELEASE = re.compile(rb"Cuda compilation tools, release (\d+)\.(\d+)")


class Images(NamedTuple):
    """Architectures with machine code and with PTX (90 for ``sm_90``), nvcc's release or (0, 0)."""

    cubins: tuple[int, ...]
    ptx: tuple[int, ...]
    release: tuple[int, int]

    def __str__(self) -> str:
        parts = [f"sm_{each}" for each in self.cubins] + [f"PTX of sm_{each}" for each in self.ptx]
        return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "none"

    def serving(self, capability: tuple[int, int]) -> str | None:
        """Which image a GPU of this compute capability runs, None if there is none for it.

        Machine code runs on its own major version from its minor one on, PTX on all that is not older.
        """
        major, minor = capability
        wanted = 10 * major + minor
        fit = [each for each in self.cubins if each // 10 == major and each <= wanted]
        if fit:
            return f"sm_{max(fit)}"
        fit = [each for each in self.ptx if each <= wanted]
        return f"PTX of sm_{max(fit)}" if fit else None


def read(image: bytes) -> Images:
    """What ``image`` holds. Raises ValueError if it is no fat binary, or ends too early."""
    if len(image) < 16 or struct.unpack_from("<I", image)[0] != _MAGIC:
        raise ValueError("the file is no fat binary")
    header, size = struct.unpack_from("<HQ", image, 6)
    end = header + size
    if end > len(image):
        raise ValueError(f"the fat binary must have {end} bytes, got {len(image)}")
    found: dict[int, set[int]] = {_PTX: set(), _CUBIN: set()}
    at = header
    while at + 32 <= end:
        kind, _, before, length = struct.unpack_from("<HHIQ", image, at)
        (architecture,) = struct.unpack_from("<I", image, at + 28)
        if kind in found:
            found[kind].add(architecture)
        at += before + length
    told = _RELEASE.search(image)
    release = (int(told[1]), int(told[2])) if told else (0, 0)
    return Images(tuple(sorted(found[_CUBIN])), tuple(sorted(found[_PTX])), release)
