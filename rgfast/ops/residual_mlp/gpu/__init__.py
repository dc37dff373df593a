"""The residual block on a GPU, in Triton: nothing here imports Triton until a block is computed."""
