"""The MLP residual stack, its mixing across positions, and the masked-token model around it.

Every block adds to a residual stream ``[B, T, D]``:

    x <- x + MLP_T(norm(x))     across positions, T -> hT -> T      (``mixing="mixer"`` only)
    x <- x + MLP_D(norm(x))     across features,  D -> hD -> D

with ``MLP(z) = W2 act(W1 z + b1) + b2``. With ``mixing="flat"`` the second one acts on all T·D numbers of a
sequence at once; a model with ``mixing="window"`` concatenates the embeddings of the ±w neighbours at its
input, and its stack is then position-wise. W1 ~ N(0, 1/fan_in); W2 ~ N(0, w2_scale²/fan_in), and the default
``w2_scale=0`` starts the stack as the identity. ``initialization="torch"`` starts everything as
``torch.nn.Linear`` does.
"""

from rgfast.ops.residual_mlp.api import ACTIVATIONS, NORMS, Activation
from rgfast.stack.blocks import Block, FeatureMLP, FlatMLP, Initialization, Norm, PositionMLP
from rgfast.stack.model import MODEL_MIXINGS, POSITIONS, MaskedTokenModel, ModelMixing, Positions
from rgfast.stack.residual import INITIALIZATIONS, MIXINGS, Mixing, ResidualStack

__all__ = [
    "ACTIVATIONS",
    "INITIALIZATIONS",
    "MIXINGS",
    "MODEL_MIXINGS",
    "NORMS",
    "POSITIONS",
    "Activation",
    "Block",
    "FeatureMLP",
    "FlatMLP",
    "Initialization",
    "MaskedTokenModel",
    "Mixing",
    "ModelMixing",
    "Norm",
    "PositionMLP",
    "Positions",
    "ResidualStack",
]
