"""Checks that public functions share: one sentence naming the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad
from torch.masked import MaskedTensor

__all__ = [
    "FLOATS",
    "as_bool_mask",
    "as_floats",
    "as_real_tensor",
    "as_tensor",
    "check_choice",
    "check_integer",
    "check_number",
    "check_positive_int",
    "check_readable",
    "from_array",
    "is_shared",
    "kind_and_way",
    "kind_of",
    "ordinary",
    "refuse_masked",
]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# The dtypes that torch shares with numpy, by kind and size.
_SHARED = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1,), "b": (1,), "c": (8, 16)}


def as_real_tensor(value: Any, name: str, *, min_dim: int = 0) -> Tensor:
    """``value`` as a real floating tensor of at least ``min_dim`` dimensions; see :func:`from_array`.

    Raises TypeError for anything but a floating tensor or array, ValueError for too few dimensions or masked
    values.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f" or value.dtype.itemsize not in _SHARED["f"]:
            raise TypeError(f"{name} must be one of {_float_names()}, got {value.dtype.name}")
        value = from_array(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or numpy array, got {kind_and_way(value)}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be one of {_float_names()}, got {str(value.dtype).removeprefix('torch.')}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one (take its parts one by one)")
    if value.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimensions, got shape {tuple(value.shape)}")
    # Kernels read the memory, which holds the negative where this lazy bit is set.
    return value.resolve_neg() if not torch.compiler.is_compiling() and value.is_neg() else value


def as_tensor(value: Any, name: str) -> Tensor:
    """``value``, a tensor, an array or nested lists of numbers, as a tensor; see :func:`from_array`.

    ``torch.as_tensor`` would round floats to the default dtype, and move even tensors to the default device.

    Raises TypeError for anything else, ValueError for rows of different lengths or masked values.
    """
    if isinstance(value, Tensor):
        return value
    refuse_masked(value, name)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor, an array or nested lists of numbers of one length, got "
            f"{type(value).__name__} ({error})"
        ) from None
    return from_array(array, name)


def check_readable(value: Tensor, name: str, *, differentiable: bool = False) -> None:
    """Raise TypeError unless the numbers of ``value`` can be read, and are all that it stands for.

    Tensors that ``torch.func`` hands to a function stand for others, and tangents of forward-mode autograd
    would be lost: only what is ``differentiable`` by torch's own operators has derivatives there.
    """
    if torch.compiler.is_compiling():
        return
    if _batched(value) or not (differentiable or ordinary(value)):
        raise TypeError(
            f"{name} must be an ordinary tensor, got one of a transform of torch.func or of forward-mode "
            "autograd: leading dimensions take the place of vmap, and torch.autograd differentiates"
        )
    if isinstance(value, MaskedTensor):
        raise TypeError(f"{name} must be a dense tensor, got a MaskedTensor (leave rows out, or fill them)")


def ordinary(value: Tensor) -> bool:
    """Whether neither a transform of ``torch.func`` nor forward-mode autograd has to do with ``value``."""
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    tangent = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return tangent is None


def _batched(value: Tensor) -> bool:
    of = torch._C._functorch
    while of.is_functorch_wrapped_tensor(value):
        if of.is_batchedtensor(value):
            return True
        value = of.get_unwrapped(value)
    return False


def as_bool_mask(value: Any, name: str) -> Tensor:
    """``value``, a bool tensor or array, as a tensor. Raises TypeError for another kind or dtype."""
    if isinstance(value, np.ndarray):
        value = from_array(value, name)
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {kind_of(value)}")
    return value


def as_floats(value: Any, name: str) -> NDArray[np.float64]:
    """``value``, a tensor or whatever numpy takes, as an fp64 array.

    Raises TypeError for what is not real numbers, ValueError for rows of different lengths or masked values.
    """
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
        value = value.detach().to("cpu", torch.float64).resolve_neg().numpy()
    refuse_masked(value, name)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be an array of real numbers, got {type(value).__name__} ({error})"
        ) from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    return array.astype(np.float64, copy=False)


def from_array(value: NDArray[Any], name: str, *, writable: bool = False) -> Tensor:
    """A numpy array as a tensor, over the same memory where torch can share it (see :func:`is_shared`).

    Copied are foreign byte orders and negative strides, unsigned integers wider than a byte (as int64, since
    torch computes little with them) and, if the tensor is to be ``writable``, read-only arrays. Raises
    TypeError for a dtype that torch lacks, ValueError for masked values and numbers beyond int64.
    """
    kind = value.dtype
    if kind.kind == "u" and kind.itemsize > 1:
        refuse_masked(value, name)
        if value.size and int(value.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"{name} must lie in the range of int64, got {int(value.max())}")
        return torch.from_numpy(np.array(value, dtype=np.int64))
    if kind.itemsize not in _SHARED.get(kind.kind, ()):
        raise TypeError(f"{name} must hold numbers or bool of a dtype that torch has, got dtype {kind}")
    refuse_masked(value, name)
    value = np.asarray(value)  # np.matrix and other subclasses
    if not kind.isnative:
        value = value.astype(kind.newbyteorder("="))
    if any(step < 0 or step % kind.itemsize for step in value.strides) or (
        writable and not value.flags.writeable
    ):
        value = value.copy()
    if not value.flags.writeable:
        # torch warns of every read-only array; nobody writes to this one.
        value = np.asarray(_Writable(value))
    return torch.from_numpy(value)


def is_shared(value: NDArray[Any]) -> bool:
    """Whether :func:`from_array` takes ``value`` without a copy and may write to it."""
    kind = value.dtype
    return (
        kind.itemsize in _SHARED.get(kind.kind, ())
        and kind.isnative
        and value.flags.writeable
        and all(step >= 0 and step % kind.itemsize == 0 for step in value.strides)
    )


def refuse_masked(value: Any, name: str) -> None:
    """Raise ValueError if an array, or one in nested lists, has masked values: numpy would drop the mask."""
    if isinstance(value, (list, tuple)):
        for item in value:
            refuse_masked(item, name)
    elif isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        hidden = np.ma.getmaskarray(value).sum()
        raise ValueError(
            f"{name} must have no masked values, got {int(hidden)} (leave their rows out, or fill them)"
        )


class _Writable:
    """What numpy needs to see the memory of a read-only array as writable."""

    def __init__(self, array: NDArray[Any]) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self._array = array  # keeps the memory


def _float_names() -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in FLOATS)


def kind_and_way(value: Any) -> str:
    """The type of ``value`` for a message, and how a table of another library becomes an array."""
    way = " (take its .to_numpy())" if hasattr(value, "to_numpy") else ""
    return f"{type(value).__name__}{way}"


def check_choice(value: Any, name: str, choices: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(value: Any, name: str, *, least: int, most: int | None = None) -> None:
    """Raise TypeError unless ``value`` is a whole number, ValueError unless in ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_number(value: Any, name: str) -> None:
    """Raise TypeError unless ``value`` is one real number of Python's or numpy's."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_positive_int(value: Any, name: str) -> None:
    """Raise unless ``value`` is a whole number of at least 1 (TypeError for what is no whole number)."""
    check_integer(value, name, least=1)


def kind_of(value: Any) -> str:
    """What ``value`` is, for a message: the dtype of a tensor, else the type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
