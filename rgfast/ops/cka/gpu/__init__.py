"""CKA in single precision on NVIDIA GPUs: kernels in Triton, their tiles, and their launches."""
