#include "kernels/residual_mlp_vector-inl.hpp"

#include "kernels/residual_mlp_activation-inl.hpp"
#include "kernels/residual_mlp_product-inl.hpp"

#include "kernels/residual_mlp-inl.hpp"
#include "kernels/residual_mlp_backward-inl.hpp"
#include "kernels/residual_mlp_few-inl.hpp"
#include "kernels/residual_mlp_library-inl.hpp"
