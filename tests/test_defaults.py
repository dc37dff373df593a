"""PyTorch's default dtype and device decide about the parameters of new models, and about nothing else."""

import ast
from pathlib import Path

import pytest

import rgfast

PACKAGE = Path(rgfast.__file__).parent

# What makes a tensor of the default dtype, or on the default device, unless both are named.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "frombuffer", "full",
    "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm",
    "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
MODULES = {"BatchNorm1d", "Conv1d", "Embedding", "LayerNorm", "Linear", "RMSNorm"}
# Constructors that know neither, and what asks for the defaults.
FORBIDDEN = {
    "BoolTensor", "DoubleTensor", "FloatTensor", "HalfTensor", "IntTensor", "LongTensor", "Tensor",
    "get_default_device", "get_default_dtype", "set_default_device", "set_default_dtype",
    "set_default_tensor_type",
}  # fmt: skip


def faults(source):
    """Line and text of every call in ``source`` that leaves a dtype or a device to the defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        named = {keyword.arg for keyword in node.keywords}
        makes = (owner == "torch" and name in FACTORIES) or (owner.endswith("nn") and name in MODULES)
        if (
            (makes and not {"dtype", "device"} <= named)
            or (owner == "torch" and name in FORBIDDEN)
            or (owner == "torch" and name == "finfo" and not node.args)
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    ("call", "faulty"),
    [
        ("torch.empty(3)", True),
        ("torch.arange(3, device='cpu')", True),
        ("torch.zeros(3, dtype=torch.int64)", True),
        ("torch.Tensor(3)", True),
        ("torch.finfo()", True),
        ("nn.Linear(3, 4)", True),
        ("nn.Linear(3, 4, dtype=dtype, device=device)", False),
        ("torch.zeros(3, dtype=torch.int64, device=x.device)", False),
        ("x.new_empty(3)", False),
        ("torch.finfo(x.dtype)", False),
        ("np.empty(3)", False),
    ],
)
def test_the_walk_finds_calls_that_leave_it_to_the_defaults(call, faulty):
    assert bool(faults(f"def f():\n    return [{call}]")) == faulty


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_new_tensor_names_its_dtype_and_device(path):
    assert faults(path.read_text(encoding="utf-8")) == []
