"""What the residual block is predicted to take on an H100 beside `torch.compile`, and at few rows.

    python benchmarks/gpu_compile.py [--inductor]

No GPU is needed and none is used. `torch.compile`'s code for the block is the library's products and one pass
for each group of operators that its compiler, inductor, makes one kernel of; a pass takes the time of its
bytes and of its error functions, one after the other. The model is compared first with what its forward pass
took on an H100. ``--inductor`` has inductor plan the block here and prints the numbers that its kernels read
and write, which must be as many. Ours are counted beyond D = 256, from the operators that run and the
arguments of kernels.

At 8,192 rows eager PyTorch was measured at up to six times what its kernels take, on a host that was
compiling beside it. It is predicted by launches and without them, as in a captured graph.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import gpu_block
import torch
import torch.nn.functional as F
from gpu_block import NAMES, ROWS, measured, multiply, products
from gpu_clock import LEAST_KERNEL, Clock, Row, print_beside, timed
from torch import Tensor

import rgfast.ops.residual_mlp.gpu as package
from rgfast.ops.device import STREAM
from rgfast.ops.residual_mlp.call import Call
from rgfast.ops.residual_mlp.gpu import wide
from rgfast.ops.residual_mlp.gpu.table import WIDEST, Form

WIDTHS = (64, 128, 256, 512, 1024, 2048)
# Numbers that inductor's kernels between the products read and write, by numbers of the stream, H = 4 D, and
# error functions by hidden unit.
FORWARD = {"norm": (2, 0), "activation": (8, 1), "residual": (3, 0)}
BACKWARD = {
    "gradient of b2": (1, 0), "activation": (12, 1), "gradient of b1": (4, 0), "norm": (4, 0),
    "gradients of the norm's vectors": (2, 0),
}  # fmt: skip
# Of one of the library's products, whose weights are few beside the rows.
PRODUCT = 1 + 4
FEW = 8192
TYPES: dict[Form, torch.dtype] = {
    "plain": torch.bfloat16,
    "single": torch.float32,
    "split": torch.float32,
}


def block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The residual block as one writes it in PyTorch."""
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], weight, bias), w1, b1)), w2, b2)


def given(rows: int, d: int, dtype: torch.dtype, device: str, *, recorded: bool) -> list[Tensor]:
    """Its tensors, without values."""
    shapes = (rows, d), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,)
    return [torch.empty(shape, dtype=dtype, device=device, requires_grad=recorded) for shape in shapes]


def passes(kernels: dict[str, tuple[int, int]], form: Form, d: int) -> float:
    """Seconds of inductor's kernels."""
    stream = gpu_block.stream(form, d)
    erf = gpu_block.ACTIVATION["erf"] * 4 * ROWS * d / gpu_block.LANES
    return sum(
        max(LEAST_KERNEL, numbers * stream / STREAM + units * erf) for numbers, units in kernels.values()
    )


def compiled(form: Form, d: int) -> float:
    """Seconds of the forward pass by `torch.compile`."""
    return products(form, d) + passes(FORWARD, form, d)


def compiled_with_gradients(form: Form, d: int) -> float:
    """Seconds of the forward pass and all gradients by `torch.compile`."""
    return compiled(form, d) + passes(BACKWARD, form, d) + products(form, d) + 2 * multiply(form, d, ROWS)


def traffic_of_compile(recorded: bool) -> int:
    """Numbers that its kernels and products read and write, by numbers of the stream."""
    forward = sum(numbers for numbers, _ in FORWARD.values()) + 2 * PRODUCT
    return forward + recorded * (sum(numbers for numbers, _ in BACKWARD.values()) + 4 * PRODUCT)


class Traffic(Clock):
    """Adds up the bytes that operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0.0

    def kernel(self, name: str, args: Any, kwargs: Any, found: Any) -> float:
        self.moved += self.bytes((args, kwargs)) + self.bytes(found)
        return super().kernel(name, args, kwargs, found)


class _Counted:
    """Triton's kernels in name: a launch adds up the bytes of its arguments."""

    def __init__(self, clock: Traffic) -> None:
        self.clock = clock

    def __getattr__(self, name: str) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            tensors = [each for each in args if isinstance(each, Tensor)]
            if name == "descend":  # its gradient is written where it was read
                tensors.append(args[2])
            self.clock.moved += sum(self.clock.bytes(each) for each in tensors)
            self.clock.cost.kernels += 1

        class Grid:
            def __getitem__(self, grid: Any) -> Any:
                return launch

        return Grid()


def traffic_of_ours(form: Form, d: int, *, recorded: bool, rows: int = ROWS) -> float:
    """Bytes that our operators and kernels for a wide block read and write."""
    tensors = given(rows, d, TYPES[form], "meta", recorded=recorded)
    call = Call(*tensors, "layer", "gelu", 1.0, 1e-5, "features")
    dtypes: dict[Form, str] = {"plain": "bf16", "single": "tf32", "split": "fp32"}
    with Traffic() as clock, counted(clock):
        y = wide.run(call, dtypes[form])
        if recorded:
            dy = torch.empty_like(y)
            torch.autograd.grad(y, tensors, dy)
    moved: float = clock.moved
    return moved


@contextmanager
def counted(clock: Traffic) -> Iterator[None]:
    """Inside, ``clock`` counts launches of the block's kernels, none of which runs."""
    with ExitStack() as stack:
        for name in ("forward", "backward", "passes"):
            stack.enter_context(mock.patch.object(package, name, _Counted(clock), create=True))
        stack.enter_context(mock.patch.object(wide, "is_plain", return_value=True))
        yield


def inductor(d: int = 256, rows: int = FEW) -> list[list[float]]:
    """Numbers that each of inductor's kernels reads and writes, by numbers of the stream: of the graph
    without gradients, and of both graphs with them. They are planned for the CPU and not compiled."""
    from functorch.compile import make_boxed_func
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    found: list[list[float]] = []

    def plan(graph: Any, inputs: Any, **_: Any) -> Any:
        compile_fx.record_original_output_strides(graph)
        fake = compile_fx.fake_tensor_prop(graph, inputs)
        with V.set_fake_mode(fake):
            compile_fx._recursive_post_grad_passes(graph, False)
        lowered = GraphLowering(graph, shape_env=fake.shape_env)
        with (
            V.set_graph_handler(lowered),
            V.set_real_inputs(inputs),
            V.set_debug_handler(DebugContext()),
        ):
            lowered.run(*inputs)
            lowered._update_scheduler()
            kernels = lowered.scheduler.nodes
            found.append([each.get_read_write_buffers_sizes() / (2 * rows * d) for each in kernels])
        return make_boxed_func(graph.forward)

    backend = functools.partial(compile_fx.compile_fx, inner_compile=plan)
    for recorded in (False, True):
        torch._dynamo.reset()
        tensors = given(rows, d, torch.bfloat16, "cpu", recorded=recorded)
        y = torch.compile(block, backend=backend, dynamic=False)(*tensors)
        if recorded:
            torch.autograd.grad(y, tensors, torch.ones_like(y))
    torch._dynamo.reset()
    return found


def few_rows() -> list[str]:
    """Rows of the table of 8,192 rows."""
    lines = []
    for form, name in NAMES.items():
        for d in (64, 128, 256):
            tensors = given(FEW, d, TYPES[form], "meta", recorded=False)
            cost = timed(functools.partial(block, *tensors))
            (seen,) = (us for (of, at), us in measured()["block_eager_few"] if (of, at) == (form, d))
            ours = gpu_block.forward(form, d, FEW)
            # The model has fp32's products for TF32 as well: what was measured of more rows is closer.
            device = products(form, d) * FEW / ROWS + cost.device - _modeled_products(tensors)
            times = [seen * 1e-6, max(cost.host, device), device]
            cells = [name, str(d), f"{1e6 * ours:.1f}"]
            cells += [f"{1e6 * each:.0f} | {each / ours:.1f}" for each in times]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _modeled_products(tensors: list[Tensor]) -> float:
    x, w1, b1, w2, b2, *_ = tensors
    hidden = torch.empty(len(x), len(w1), dtype=x.dtype, device="meta")

    def run() -> None:
        F.linear(x, w1, b1)
        F.linear(hidden, w2, b2)

    return timed(run).device


def beside_compile() -> list[str]:
    """Rows of the table beside `torch.compile`."""
    lines = []
    for form, name in NAMES.items():
        for d in WIDTHS:
            ours, theirs = gpu_block.forward(form, d), compiled(form, d)
            more, others = gpu_block.both(form, d), compiled_with_gradients(form, d)
            cells = [name, str(d), f"{1e6 * theirs:.0f}", f"{theirs / ours:.2f}"]
            cells += [f"{1e6 * others:.0f}", f"{others / more:.2f}"]
            for recorded in (False, True):
                if d <= WIDEST:
                    cells += ["-"]
                    continue
                moved = traffic_of_ours(form, d, recorded=recorded) / gpu_block.stream(form, d)
                cells += [f"{moved:.1f} of {traffic_of_compile(recorded) + _weights(d, recorded):.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _weights(d: int, recorded: bool) -> float:
    """Numbers of weights that products read and write, by numbers of the stream."""
    return (6 if recorded else 2) * 4 * d / ROWS


def validation() -> list[Row]:
    """The forward pass by `torch.compile` as it was measured, and prototypes at 8,192 rows over eager."""
    rows = [
        Row(f"torch.compile, {NAMES[form]}, D={d}", us, 1e6 * compiled(form, d))
        for (form, d), us in measured()["block_compiled"]
    ]
    (eager,) = (us for (form, d), us in measured()["block_eager_few"] if (form, d) == ("plain", 64))
    for (form, d, tile, activation, _, _, count, alongside), us in measured()["block"]:
        if (form, d, count) == ("plain", 64, FEW):
            kernel = gpu_block.Kernel(form, d, gpu_block.Tile(*tile), count, activation, together=alongside)
            rows.append(
                Row("bf16, D=64, 8,192 rows, over measured eager", eager / us, 1e-6 * eager / kernel.seconds)
            )
    return rows


HEAD_FEW = [
    *("products", "D", "ours, us", "eager, measured, us", "over that", "eager by launches, us", "over that"),
    *("eager in a graph, us", "over that"),
]
HEAD = [
    *("products", "D", "compiled forward, us", "over ours", "with gradients, us", "over ours"),
    *("numbers moved, ours of compile's", "with gradients"),
]


def headed(head: list[str], rows: list[str]) -> str:
    """A table."""
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inductor", action="store_true", help="what inductor plans, here")
    if parser.parse_args().inductor:
        for name, kernels in zip(("forward", "forward, recorded", "backward"), inductor(), strict=True):
            print(f"{name}: {sum(kernels):.1f} = {' + '.join(f'{each:.1f}' for each in kernels)}")
        return
    print_beside("measured on an H100, us", validation())
    print("\nPREDICTED, not run on a GPU: the block beside torch.compile, 65,536 rows, H = 4 D\n")
    print(headed(HEAD, beside_compile()))
    print("\nPREDICTED, not run on a GPU: the forward pass at 8,192 rows over eager PyTorch\n")
    print(headed(HEAD_FEW, few_rows()))


if __name__ == "__main__":
    main()
