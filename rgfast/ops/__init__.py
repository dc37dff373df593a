"""The ops, one room each: moments, spectrum, cka, residual_mlp."""
