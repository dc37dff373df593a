"""The ops, one room each: spectrum, cka, residual_mlp."""
