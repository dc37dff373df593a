"""What the Triton block must do; ``triton_process.py`` runs it in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from guards import Waits
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from triton_checks_wide import broad
from triton_truth import (
    DEVICE,
    NAMES,
    OPTIONS,
    UNIT,
    Tensors,
    close_second_derivatives,
    drawn,
    eager,
    evaluated,
    layers_of,
    ours,
    over_fp32,
    same,
    stream,
    theirs,
)

from rgfast.ops.residual_mlp.call import Call, StackCall
from rgfast.ops.residual_mlp.gpu import answers, contract, launch
from rgfast.ops.residual_mlp.gpu.launch import forward, packed, ready, through, tile_for
from rgfast.ops.residual_mlp.impl import triton
from rgfast.ops.residual_mlp.reference import ACTIVATIONS


def check_fp32_keeps_its_budget() -> dict[str, float]:
    kinds = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
    norms = ("layer", "rms", None)
    shapes = [
        (1, 16, 16), (2, 17, 9), (3, 8, 33), (47, 31, 65), (65, 64, 129), (66, 63, 100), (64, 100, 32),
        (33, 128, 97), (70, 130, 70), (65, 256, 96), (17, 200, 31), (5, 65, 300), (64, 24, 8), (80, 97, 64),
        (9, 48, 77),
    ]  # fmt: skip
    found = {}
    if DEVICE == "cuda":  # where each takes seconds to compile
        shapes = shapes[::4]
    for at, shape in enumerate(shapes):
        norm, kind = norms[at % 3], kinds[at % 5]
        tensors = drawn(*shape, norm=norm, biases=at % 4 != 3, seed=at)
        worst = over_fp32(tensors, (norm, kind, 0.7 if at % 2 else 1.0, 1e-5, "features"))
        found |= {f"{shape} {norm} {kind} {name}": value for name, value in worst.items()}
    return found


def check_fp32_at_every_magnitude() -> dict[str, float]:
    found = {}
    for x, up, down in (
        (1e18, 1, 1), (1e-18, 1, 1), (1, 1e15, 1), (1, 1e-18, 1), (1, 1, 1e18), (1, 1, 1e-18),
        (1e-15, 1e15, 1e-15),
    ):  # fmt: skip
        for norm in ("layer", None):
            tensors = drawn(20, 24, 40, norm=norm, biases=False)
            for at, factor in ((0, x), (1, up), (3, down)):
                tensors[at] = tensors[at] * factor  # type: ignore[operator]  # never None
            worst = over_fp32(tensors, (norm, "gelu", 0.7, 1e-5, "features"))
            found |= {f"{x} {up} {down} {norm} {name}": value for name, value in worst.items()}
    return found


def check_fp32_beside_outliers() -> dict[str, float]:
    found = {}
    for name, place in {
        "x": (0, (slice(None), 3)),
        "one of x": (0, (5, 3)),
        "row of w1": (1, (7,)),
        "w2": (3, (2, 9)),
    }.items():
        for norm in ("layer", None):
            tensors = drawn(20, 24, 40, norm=norm)
            tensors[place[0]][place[1]] *= 1e5  # type: ignore[index]  # never None
            worst = over_fp32(tensors, (norm, "gelu", 0.7, 1e-5, "features"))
            found |= {f"{name} {norm} {each}": value for each, value in worst.items()}
    tensors = drawn(20, 24, 40)
    tensors[0] = tensors[0] + 1e4  # type: ignore[operator]  # as above
    return found | over_fp32(tensors)


def check_half_is_no_worse_than_eager() -> dict[str, float]:
    found = {}
    for shape in ((65, 64, 128), (33, 33, 100), (17, 200, 96)):
        tensors = [None if t is None else t.half() for t in drawn(*shape)]

        truth = evaluated(theirs(), tensors, torch.float64)
        own = evaluated(eager, tensors, torch.float16)
        got = evaluated(ours("fp16"), tensors, torch.float16)
        for name, want in truth.items():
            error, allowed = ((each[name].double() - want).norm() for each in (got, own))
            found[f"{shape} {name}"] = float(error / allowed)
    return found


def _rounded(t: Tensor) -> Tensor:
    """As cuBLAS rounds operands of TF32: to 10 bits, half away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def check_tf32_is_no_worse_than_eager() -> dict[str, float]:
    found = {}
    for shape in ((300, 64, 256), (200, 128, 200), (100, 256, 300)):
        tensors = drawn(*shape)
        x, w1, b1, w2, b2, weight, bias = tensors
        assert x is not None
        normed = F.layer_norm(x, x.shape[-1:], weight, bias)
        hidden = F.gelu(F.linear(_rounded(normed), _rounded(w1), b1))  # type: ignore[arg-type]  # never None
        own = x + 0.7 * F.linear(_rounded(hidden), _rounded(w2), b2)  # type: ignore[arg-type]  # as above
        truth = theirs()(*[None if t is None else t.double() for t in tensors])
        got = forward([Call(*tensors, *OPTIONS)], "tf32")  # type: ignore[arg-type]  # as above
        # Both round as often and as finely: what is left is chance.
        found[str(shape)] = float((got.double() - truth).norm() / (own.double() - truth).norm()) / 1.02
    return found


def check_tf32_gradients() -> dict[str, float]:
    truth = evaluated(theirs(), drawn(70, 200, 70), torch.float64)
    got = evaluated(ours("tf32"), drawn(70, 200, 70), torch.float32)
    return {
        name: float((got[name].double() - want).norm() / want.norm()) / 2**-10 for name, want in truth.items()
    }


def check_stacks_keep_their_budget() -> dict[str, float]:
    found = {}
    for depth, rows, d, h, norm, kind in (
        (3, 33, 17, 40, "layer", "gelu"), (2, 130, 64, 65, "rms", "silu"), (3, 7, 128, 100, None, "tanh"),
        (2, 129, 100, 33, "layer", "gelu_tanh"), (5, 1, 8, 8, "layer", "relu"),
    ):  # fmt: skip
        layers = layers_of(depth, rows, d, h, (norm, kind, 0.7, 1e-5, "features"))
        states = torch.full((depth, rows, d), torch.nan, device=DEVICE)
        through(ready(layers, "fp32"), layers[0].x, states, every_layer=True)
        truth, single = stream(layers, torch.float64), stream(layers, torch.float32)
        for at, (got, want, own) in enumerate(zip(states, truth, single, strict=True)):
            allowed = 2 * (own.double() - want).norm() + 4 * UNIT * want.norm()
            found[f"{(depth, rows, d, h)} {at}"] = float((got.double() - want).norm() / allowed)
    return found


def check_stacks_in_fp16_and_tf32() -> dict[str, float]:
    found = {}
    for products, dtype, least in (
        ("fp16", torch.float16, 2**-9), ("tf32", torch.float32, 2**-10), ("fp16", torch.float32, 2**-10),
    ):  # fmt: skip
        layers = [call.to(dtype) for call in layers_of(3, 50, 72, 90)]
        got, want = forward(layers, products), stream(layers, torch.float64)[-1]
        assert got.dtype == dtype
        found[f"{products} {dtype}"] = float((got.double() - want).norm() / want.norm() / least)
    return found


def check_stacks_are_the_same_in_any_tile() -> dict[str, bool]:
    found = {}
    layers = [
        call._replace(x=layers_of(1, 66, 24, 40)[0].x.view(11, 6, 24)) for call in layers_of(3, 66, 24, 40)
    ]
    views = {"dense": layers[0].x, "transposed": layers[0].x.transpose(0, 1), "none": layers[0].x[:0]}
    for name, x in views.items():
        here = tuple(call._replace(x=x) for call in layers)
        want = triton.STACK.run(StackCall(here))
        for tile in (4, 100):
            seen = torch.full((4, *x.shape), torch.nan, device=DEVICE)

            def put(first: int, states: Tensor, seen: Tensor = seen) -> None:
                seen[:, first : first + states.size(1)] = states

            got = triton.STACK.run(StackCall(here, put, tile))
            found[f"{name} {tile}"] = torch.equal(got, want)
            found[f"{name} {tile}, layers"] = torch.equal(seen[0], x) and torch.equal(seen[-1], want)
    return found


def check_known_answers() -> dict[str, float]:
    there, allowed = torch.device(DEVICE), answers.PRECISIONS["split"].allowed
    found = {"wide": float(answers.try_wide(there)) / allowed}
    found["wide, gradient"] = float(answers.try_wide_gradient(there).max()) / allowed
    for form, how in answers.PRECISIONS.items():
        if form == "plain":  # the interpreter does not multiply in bf16
            how = how._replace(products="fp16", dtype=torch.float16)
        runs = (answers.try_forward, answers.try_gradient, answers.try_stack)
        for run in runs if form == "split" else runs[:1]:
            worst = float(run(64, how, torch.device(DEVICE)).max())
            found[f"{form} {run.__name__}"] = worst / how.allowed
    return found


def check_any_layout() -> dict[str, bool]:
    tensors = drawn(30, 16, 24)
    x = tensors[0].view(5, 6, 16)  # type: ignore[union-attr]  # never None
    views = {
        "transposed": x.transpose(0, 1),
        "features apart": torch.stack([x, x], -1)[..., 0],
        "rows apart": torch.cat([x, x], -1)[..., :16],
        "every other row": x[:, ::2],
        "expanded row": x[:1, :1].expand(4, 3, -1),
        "expanded features": x[..., :1].expand(-1, -1, 16),
        "negated": torch._neg_view(x),
        "one row": x[0, 0],
        "no rows": x[:0],
    }
    found = {}
    for name, view in views.items():
        dense = view.clone(memory_format=torch.contiguous_format)
        outcomes = [evaluated(ours("fp32"), [each, *tensors[1:]], torch.float32) for each in (view, dense)]
        found |= {f"{name}: {key}": value for key, value in same(*outcomes).items()}
    for products, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        dense_w = [None if t is None else t.to(dtype) for t in drawn(9, 16, 64)]
        odd = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in dense_w]
        odd[1] = dense_w[1].t().contiguous().t()  # type: ignore[union-attr]  # never None
        found |= same(*(evaluated_as_given(ours(products), each) for each in (odd, dense_w)))
    return found


def evaluated_as_given(block: Callable[..., Tensor], tensors: Tensors) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"weights": block(*tensors)}


def check_weights_are_read_where_they_lie() -> dict[str, bool]:
    tensors = [None if t is None else t.half() for t in drawn(40, 64, 128)]
    call = Call(*tensors, *OPTIONS)  # type: ignore[arg-type]  # never None
    padded = [None if t is None else t.half() for t in drawn(40, 64, 100)]
    return {
        "fits": packed([call], "fp16", 64).up.data_ptr() == call.w1.data_ptr(),
        "does not": packed([Call(*padded, *OPTIONS)], "fp16", 64).up.shape == (1, 128, 64),  # type: ignore[arg-type]
        "nor in fp32": packed([call], "fp32", 64).by_unit,
    }


def check_pointers_and_descriptors_bring_the_same() -> dict[str, bool]:
    found = {}
    for depth, shape, products, dtype in (
        (1, (33, 9, 17), "fp32", torch.float32), (1, (20, 130, 70), "fp32", torch.float32),
        (1, (17, 200, 33), "tf32", torch.float32), (1, (40, 64, 128), "fp16", torch.float16),
        (3, (20, 100, 70), "fp32", torch.float32), (2, (20, 17, 33), "fp16", torch.float16),
    ):  # fmt: skip
        layers = [call.to(dtype) for call in layers_of(depth, *shape)]
        outcomes = []
        for described in (False, True):
            with mock.patch.object(
                launch, "tile_for", lambda *of, tma=described: tile_for(*of)._replace(tma=tma)
            ):
                outcomes.append(forward(layers, products))
        found[f"{depth} {shape} {products}"] = torch.equal(*outcomes)
    return found


def check_weights_that_start_anywhere() -> dict[str, bool]:
    tensors = [None if t is None else t.half() for t in drawn(20, 64, 128)]
    shifted = list(tensors)
    for at in (1, 3):
        given = tensors[at]
        assert given is not None
        memory = torch.empty(given.numel() + 1, dtype=given.dtype, device=DEVICE)
        shifted[at] = memory[1:].view(given.shape).copy_(given)
    return same(*(evaluated_as_given(ours("fp16"), each) for each in (shifted, tensors)))


def check_every_output_is_written() -> dict[str, bool]:
    torch.use_deterministic_algorithms(True)  # new tensors then start as NaN
    try:
        found = {"poisoned": bool(torch.empty(3, device=DEVICE).isnan().all())}
        for shape in ((1, 17, 9), (65, 33, 70), (0, 16, 16)):
            outcome = evaluated(ours("fp32"), drawn(*shape), torch.float32)
            found |= {f"{shape} {name}": bool(torch.isfinite(t).all()) for name, t in outcome.items()}
        return found
    finally:
        torch.use_deterministic_algorithms(False)


def check_nan_stays_in_its_row() -> dict[str, bool]:
    found = {}
    for kind in ACTIVATIONS:
        for norm in ("layer", None):
            tensors, options = drawn(20, 16, 64, norm=norm), (norm, kind, 1.0, 1e-5, "features")
            clean = forward([Call(*tensors, *options)], "fp32")  # type: ignore[arg-type]  # never None
            tensors[0][7, 3] = float("nan")  # type: ignore[index]  # as above
            got = forward([Call(*tensors, *options)], "fp32")  # type: ignore[arg-type]  # as above
            keep = torch.arange(20, device=DEVICE) != 7
            found[f"{kind} {norm}"] = bool(got[7].isnan().all()) and torch.equal(got[keep], clean[keep])
    return found


def check_gradients_only_where_wanted() -> dict[str, bool]:
    tensors = drawn(30, 16, 24)
    everything = evaluated(lambda *t: ours("fp32")(*t), tensors, torch.float32)
    found = {}
    for at, name in enumerate(NAMES[1:]):
        leaves = [t.clone().requires_grad_(at == k) for k, t in enumerate(tensors)]  # type: ignore[union-attr]
        y = ours("fp32")(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
        y.backward(dy)
        found[name] = torch.equal(leaves[at].grad, everything[name])  # type: ignore[arg-type]  # it has one
        found[f"{name} alone"] = sum(t.grad is not None for t in leaves) == 1
    return found


def check_the_same_in_one_graph() -> dict[str, bool]:
    found, tensors = {}, drawn(30, 16, 24)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()

        def traced(*given: Any) -> Tensor:
            call = Call(*given, *OPTIONS)
            return contract.run(call, call.products())

        graph = torch.compile(traced, fullgraph=True, backend=backend)
        found |= same(*(evaluated(each, tensors, torch.float32) for each in (graph, traced)))
    return found


def check_operators() -> dict[str, bool]:
    tensors = [None if t is None else t.requires_grad_() for t in drawn(6, 16, 24)]
    op = torch.ops.rgfast.residual_mlp_gpu.default
    opcheck(op, (*tensors, *OPTIONS, "fp32"))
    opcheck(op, (*[None if t is None else t.detach() for t in tensors], *OPTIONS, "tf32"))
    wanted = [True, True, False, True, True, True, False]
    bare = [None if t is None else t.detach() for t in tensors]
    opcheck(
        torch.ops.rgfast.residual_mlp_gpu_backward.default,
        (torch.ones(6, 16, device=DEVICE), *bare, *OPTIONS, "fp32", wanted),
    )
    return {"opcheck": True}


class _Module(torch.nn.Module):
    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for name, t in zip(NAMES[2:], tensors[1:], strict=True):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros_like(t)))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return ours("fp32")(x, *(getattr(self, name) for name in NAMES[2:]))


def check_functional_calls() -> dict[str, bool]:
    tensors = drawn(9, 16, 24)
    module = _Module(tensors)

    def called(x: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(NAMES[2:], rest, strict=True))
        y: Tensor = torch.func.functional_call(module, given, (x,))
        return y

    return same(*(evaluated(each, tensors, torch.float32) for each in (ours("fp32"), called)))


def check_nothing_is_waited_for() -> dict[str, bool]:
    """As a CUDA graph, too, asks for: no value is read and nothing copied between devices."""
    layers = layers_of(3, 9, 16, 24)

    def graded(block: Callable[..., Tensor], d: int) -> Callable[[], object]:
        leaves = [t.requires_grad_() for t in drawn(9, d, 24) if t is not None]

        def run() -> object:
            y = block(*leaves)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

        return run

    calls: dict[str, Callable[[], object]] = {
        "block": graded(ours("fp32"), 16),
        "wide": graded(broad("fp32"), 260),
        "stack": lambda: triton.STACK.run(StackCall(tuple(layers), lambda first, states: None, 4)),
    }
    found = {}
    for name, call in calls.items():
        call()
        with Waits() as waits:
            call()
        found[f"{name}: {waits.found}"] = waits.found == []
    return found


def check_in_the_rest_of_torch() -> dict[str, bool]:
    tensors = drawn(30, 16, 24)
    plain = evaluated(ours("fp32"), tensors, torch.float32)
    found = {}
    again = evaluated(lambda *t: checkpoint(ours("fp32"), *t, use_reentrant=False), tensors, torch.float32)
    found |= {f"checkpoint {name}": value for name, value in same(plain, again).items()}
    # Autocast ends before the backward pass, and does not reach the kernels' helpers.
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found |= {
            f"autocast {k}": v
            for k, v in same(plain, evaluated(ours("fp32"), tensors, torch.float32)).items()
        }
        found["autocast is followed"] = Call(*tensors, *OPTIONS).products() == "bf16"  # type: ignore[arg-type]
    found["second derivatives"] = close_second_derivatives(ours("fp32"), tensors)
    return found


def _memory(count: int, folder: str) -> Tensor:
    """So many fp16 numbers; on the CPU of a sparse file, whose pages take memory once they are touched."""
    if DEVICE == "cuda":
        return torch.empty(count, dtype=torch.float16, device=DEVICE)
    return torch.from_file(f"{folder}/far", shared=True, size=count, dtype=torch.float16)


def check_offsets_beyond_32_bits() -> dict[str, bool]:
    tensors = [None if t is None else t.half() for t in drawn(2, 32, 32)]
    stride = 2**31 + 8
    with tempfile.TemporaryDirectory() as folder:
        x = _memory(stride + 32, folder).as_strided((2, 32), (stride, 1))
        x.copy_(tensors[0])  # type: ignore[arg-type]  # never None
        got = forward([Call(x, *tensors[1:], *OPTIONS)], "fp16")  # type: ignore[arg-type]  # as above
        want = forward([Call(*tensors, *OPTIONS)], "fp16")  # type: ignore[arg-type]  # as above
        return {"rows far apart": torch.equal(got, want)}
