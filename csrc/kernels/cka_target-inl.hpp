#include "kernels/cka_vector-inl.hpp"
// The rest needs what the first one defines.
#include "kernels/cka_pack-inl.hpp"
#include "kernels/cka_product-inl.hpp"
// And the last needs both.
#include "kernels/cka-inl.hpp"

#undef RGFAST_INLINE
#undef RGFAST_TRANSPOSES
