// Every kernel of the package in one translation unit, which becomes rgfast/_kernels.fatbin.
#include "cka.cu"
#include "fill.cu"
#include "moments.cu"
#include "moments_centered.cu"
#include "moments_pooled.cu"
#include "spectrum.cu"
#include "spectrum_ranks.cu"
#include "spectrum_stages.cu"
