"""Recorded calls of the residual block, the stack, the masked-token model, chains and masking."""

import tempfile

import torch
from calls_ops import short
from registry import FP32, FP32_MODEL, add, call, filled, normal

import rgfast
from rgfast.masking import balanced_mask, corrupt, exact_mask, iid_mask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What is rounded once at the end may fall on the other side: one unit in the last place of the type.
TOLS = {torch.float64: 1e-12, torch.float32: FP32, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def parameters(width, hidden, features, dtype, bias=True):
    """w1, b1, w2, b2 and the weight and bias of a norm over ``features``."""
    w1, w2 = normal(80, hidden, width) / width**0.5, normal(81, width, hidden) / hidden**0.5
    b1, b2 = (normal(82, hidden), normal(83, width)) if bias else (None, None)
    scale, shift = 1 + 0.1 * normal(84, features), normal(85, features)
    return [None if t is None else t.to(dtype) for t in (w1, b1, w2, b2, scale, shift)]


def block(shape, hidden, dtype, impl="auto", gradients=False, bias=True, **options):
    """The block's output, and the gradients of all tensors if wanted."""
    across = options.get("across", "features")
    width = shape[-2] if across == "positions" else shape[-1]
    w1, b1, w2, b2, scale, shift = parameters(width, hidden, shape[-1], dtype, bias)
    if options.get("norm", "layer") is None or not bias:
        scale = shift = None
    x = normal(86, *shape, dtype=dtype)
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "scale": scale, "shift": shift}
    if gradients:
        for tensor in tensors.values():
            if tensor is not None:
                tensor.requires_grad_()
    y = rgfast.residual_mlp(x, w1, b1, w2, b2, norm_weight=scale, norm_bias=shift, impl=impl, **options)
    if not gradients:
        return y
    (y.double() * normal(87, *shape)).sum().backward()
    return {"y": y, **{name: t.grad for name, t in tensors.items() if t is not None}}


for dtype in DTYPES:
    for across in ("features", "positions"):
        for shape, hidden in (((5, 3, 16), 64), ((33, 7, 24), 17)):
            add(
                f"block/{'x'.join(map(str, shape))}/{across}/{short(dtype)}",
                lambda dtype=dtype, across=across, shape=shape, hidden=hidden: {
                    "plain": block(shape, hidden, dtype, across=across, bias=False),
                    "gradients": block(shape, hidden, dtype, across=across, gradients=True),
                },
                TOLS[dtype],
            )
for impl in ("native", "reference"):
    for norm in ("layer", "rms", None):
        add(
            f"block/{impl}/{norm}",
            lambda impl=impl, norm=norm: {
                activation: block(
                    (19, 20), 40, torch.float32, impl, True, norm=norm, activation=activation, eps=1e-3
                )
                for activation in ("gelu", "gelu_tanh", "relu", "silu", "tanh")
            },
            FP32,
        )
add("block/scale", lambda: block((4, 6, 8), 32, torch.float32, residual_scale=-0.25), FP32)
add("block/empty", lambda: [block((0, 8), 32, torch.float32), block((8,), 3, torch.float32)], FP32)
add("block/wide", lambda: block((300, 256), 512, torch.float32, gradients=True), FP32)


@call("block/mixed", 2**-7)
def mixed():
    w1, b1, w2, b2, scale, shift = parameters(16, 32, 16, torch.float32)
    x = normal(88, 9, 16, dtype=torch.bfloat16)
    named = {"norm_weight": scale, "norm_bias": shift.half()}
    return rgfast.residual_mlp(x, w1, b1.bfloat16(), w2, b2, **named)


def stack_of(layers, width, hidden, dtype):
    sizes = ((hidden, width), (hidden,), (width, hidden), (width,))
    return [
        [0.3 * normal(89 + 7 * k + i, *s, dtype=dtype) for k in range(layers)] for i, s in enumerate(sizes)
    ]


for dtype in DTYPES:
    for impl in ("auto", "reference"):

        def stacked(dtype=dtype, impl=impl):
            states = []

            def keep(first, part):
                states.append((first, part.clone()))

            x = normal(90, 45, 3, 16, dtype=dtype)
            given = stack_of(4, 16, 40, dtype)
            plain = rgfast.residual_stack(x, *given, norm="rms", impl=impl)
            watched = rgfast.residual_stack(x, *given, norm="rms", impl=impl, consumer=keep, tile=20)
            return {"plain": plain, "watched": watched, "states": states}

        add(f"stack/{short(dtype)}/{impl}", stacked, 4 * TOLS[dtype])


@call("stack/gradients", FP32_MODEL)
def stack_gradients():
    given = [[t.requires_grad_() for t in part] for part in stack_of(3, 12, 20, torch.float32)]
    x = normal(91, 21, 12, dtype=torch.float32).requires_grad_()
    y = rgfast.residual_stack(x, *given, activation="silu")
    y.square().sum().backward()
    return {"y": y, "x": x.grad, "parameters": [[t.grad for t in part] for part in given]}


for mixing in ("none", "flat", "mixer"):
    for dtype in (torch.float64, torch.float32):

        def module(mixing=mixing, dtype=dtype):
            stack = filled(rgfast.ResidualStack(8, 3, mixing=mixing, length=5).to(dtype))
            x, seen = normal(92, 30, 5, 8, dtype=dtype), []
            with torch.no_grad():
                plain = stack(x)
                handle = stack.watch(lambda first, states: seen.append((first, states.clone())), tile=16)
                stack(x)
                handle.remove()
            return {"plain": plain, "traced": stack(x), "states": seen}

        add(f"module/{mixing}/{short(dtype)}", module, 1e-11 if dtype == torch.float64 else FP32_MODEL)


@call("model", FP32_MODEL)
def masked_token_model():
    found = {}
    tokens = torch.from_numpy(normal(93, 11, 6).numpy().view("uint64") % 6).long()
    for mixing in ("mixer", "flat", "window", "none"):
        model = filled(rgfast.MaskedTokenModel(5, 6, 8, 2, mixing=mixing, norm="rms"))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save(folder)
            found[mixing] = [model(tokens), rgfast.MaskedTokenModel.load(folder)(tokens)]
    return found


@call("model/drawn", FP32)
def drawn_model():
    generator = torch.Generator().manual_seed(4)
    model = rgfast.MaskedTokenModel(5, 6, 8, 2, w2_scale=0.5, generator=generator)
    return dict(model.state_dict())


KINDS = ("two-scale", "two-scale:r=30,K=2", "lazy", "ring-heat", "cyclic", "random-reversible:seed=3", "iid")
for label in KINDS:

    def chain(label=label):
        chain = rgfast.MarkovChain.from_label(label, 7.0, states=8)
        tokens = chain.sample(40, 9, torch.Generator().manual_seed(5))
        hidden = exact_mask(40, 9, 3, torch.Generator().manual_seed(6))
        found = {
            "transition": chain.transition,
            "stationary": chain.stationary,
            "moduli": chain.eigenvalues.abs(),
            "lengths": [chain.correlation_length, chain.relaxation_time],
            "information": [chain.mutual_information(lag) for lag in (1, 5)],
            "modes": [[space.modulus, space.multiplicity, space.projector] for space in chain.eigenspaces()],
            "powers": chain.power(3).transition,
            "tokens": tokens,
            "posterior": chain.bayes_posterior(tokens, hidden),
            "near": chain.bayes_posterior(tokens, hidden, radius=1),
        }
        if label != "iid":
            found["autocorrelation"] = chain.autocorrelation([0, 1, 7])
            found["observed"] = chain.autocorrelation([0, 1, 7], normal(94, 8))
        return found

    add(f"chain/{label}", chain, 1e-9)
add("chain/matrix", lambda: rgfast.MarkovChain([[0.9, 0.1], [0.3, 0.7]]).eigenvalues.real, 1e-12)


@call("masking")
def masks():
    found = []
    for n, length in ((1, 1), (37, 12), (200, 5)):
        generator = torch.Generator().manual_seed(n)
        found += [
            iid_mask(n, length, 0.2, generator),
            exact_mask(n, length, length // 2, generator),
            balanced_mask(n, length, 0.3, generator),
        ]
        tokens = torch.arange(n * length).reshape(n, length) % 7
        found += [corrupt(tokens, found[-1], 7, 7, scheme, generator) for scheme in ("mask", "bert")]
    return found
