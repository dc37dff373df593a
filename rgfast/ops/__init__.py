"""The ops, one room each: moments, spectrum, cka, similarity, intrinsic_dimension, residual_mlp."""
