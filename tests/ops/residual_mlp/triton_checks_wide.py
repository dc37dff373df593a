"""What wide blocks must do, between whose products kernels run; ``triton_checks.py`` runs these."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton_truth import (
    DEVICE,
    NAMES,
    OPTIONS,
    close_second_derivatives,
    drawn,
    eager,
    evaluated,
    over_fp32,
    same,
    theirs,
)

from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.gpu import wide

__all__ = ["broad"]


def check_wide_blocks() -> dict[str, float]:
    found = {}
    for norm, kind, biases in (("layer", "gelu", True), ("rms", "silu", True), (None, "tanh", False)):
        options = (norm, kind, 0.7, 1e-5, "features")
        worst = over_fp32(drawn(9, 300, 70, norm=norm, biases=biases), options, run=wide.run)
        found |= {f"{norm} {kind} {name}": value for name, value in worst.items()}
        for dtype, products, least in (
            (torch.float32, "fp32", 2**-22), (torch.float16, "fp16", 2**-10), (torch.float32, "fp16", 2**-11),
        ):  # fmt: skip
            tensors = [
                None if t is None else t.to(dtype) for t in drawn(9, 300, 70, norm=norm, biases=biases)
            ]
            with torch.no_grad():
                got = wide.run(Call(*tensors, *options), products)  # type: ignore[arg-type]  # never None
            assert got.dtype == dtype
            want = theirs(options)(*[None if t is None else t.double() for t in tensors])
            found[f"{norm} {kind} {dtype} {products}"] = float(
                (got.double() - want).norm() / want.norm() / least
            )
    return found


def broad(products: str) -> Callable[..., Tensor]:
    return lambda *tensors: wide.run(Call(*tensors, *OPTIONS), products)  # type: ignore[arg-type]  # never None


def check_wide_gradients_in_half() -> dict[str, float]:
    tensors = [None if t is None else t.half() for t in drawn(43, 300, 130)]
    truth = evaluated(theirs(), tensors, torch.float64)
    with mock.patch.object(wide, "_PARTS", 5):  # several rows in each
        own, got = (evaluated(run, tensors, torch.float16) for run in (eager, broad("fp16")))
        # As under autocast: the rows and their gradient stay in fp32.
        mixed = evaluated(broad("fp16"), [None if t is None else t.float() for t in tensors], torch.float32)
    assert all(t.dtype == torch.float32 for t in mixed.values())
    found = {}
    for name, want in truth.items():
        difference = (own[name].double() - want).norm()
        # Both round as often: what is left is chance.
        found[name] = float((got[name].double() - want).norm() / difference) / 1.05
        found[f"{name}, fp32 rows"] = float((mixed[name].double() - want).norm() / difference) / 1.05
    return found


def check_wide_gradients_only_where_wanted() -> dict[str, bool]:
    tensors = drawn(9, 260, 24)
    everything = evaluated(broad("fp32"), tensors, torch.float32)
    found = {}
    for at, name in enumerate(NAMES[1:]):
        leaves = [t.clone().requires_grad_(at == k) for k, t in enumerate(tensors)]  # type: ignore[union-attr]
        y = broad("fp32")(*leaves)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y))
        got = leaves[at].grad
        # Without the norm's gradients dy is added up in another order.
        found[name] = torch.allclose(got, everything[name], rtol=1e-6, atol=1e-5 if name == "b2" else 0.0)  # type: ignore[arg-type]
        found[f"{name} alone"] = sum(t.grad is not None for t in leaves) == 1
    return found


def check_wide_in_the_rest_of_torch() -> dict[str, bool]:
    tensors = drawn(12, 260, 24)
    x = tensors[0].view(3, 4, 260)  # type: ignore[union-attr]  # never None
    plain, found = evaluated(broad("fp32"), tensors, torch.float32), {}
    again = evaluated(broad("fp32"), tensors, torch.float32)
    found |= {f"again {name}": value for name, value in same(plain, again).items()}
    again = evaluated(lambda *t: checkpoint(broad("fp32"), *t, use_reentrant=False), tensors, torch.float32)
    found |= {f"checkpoint {name}": value for name, value in same(plain, again).items()}
    for name, view in {"transposed": x.transpose(0, 1), "every other": x[:, ::2], "none": x[:0]}.items():
        dense = view.clone(memory_format=torch.contiguous_format)
        outcomes = [evaluated(broad("fp32"), [each, *tensors[1:]], torch.float32) for each in (view, dense)]
        found |= {f"{name}: {key}": value for key, value in same(*outcomes).items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found |= {
            f"autocast {key}": value
            for key, value in same(plain, evaluated(broad("fp32"), tensors, torch.float32)).items()
        }
    found["second derivatives"] = close_second_derivatives(broad("fp32"), tensors)
    # Views whose memory has the other sign.
    negated = [*tensors[:2], *(torch._neg_view(-t) for t in tensors[2:])]  # type: ignore[operator]  # as above
    with torch.no_grad():
        found["negated"] = torch.equal(broad("fp32")(*negated), plain["y"])
    torch._dynamo.reset()
    graph = torch.compile(broad("fp32"), fullgraph=True, backend="eager")
    with torch.no_grad():
        found["in one graph"] = torch.allclose(graph(*tensors), plain["y"], rtol=1e-5, atol=1e-5)
    return found
