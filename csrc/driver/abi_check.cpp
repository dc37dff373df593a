// Compares abi.hpp with cuda.h, if the build finds it; there is nothing else here.
#if __has_include(<cuda.h>)

#include "driver/abi.hpp"

#include <cuda.h>

#include <type_traits>

namespace rgfast::driver {
namespace {

template <class A, class B>
constexpr bool alike() {
  return sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B> &&
         std::is_enum_v<A> == std::is_enum_v<B>;
}

template <class A, class B>
struct Same : std::false_type {};

template <class A, class... As, class B, class... Bs>
struct Same<A(As...), B(Bs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(As) == sizeof...(Bs))
      return alike<A, B>() && (alike<As, Bs>() && ...);
    else
      return false;
  }();
};

template <class F>
using Called = std::remove_pointer_t<F>;

#define RGFAST_CHECK(name, symbol, version, parameters) \
  static_assert(version <= CUDA_VERSION);               \
  static_assert(Same<Called<decltype(Api::name)>, decltype(::symbol)>::value, #symbol);
RGFAST_DRIVER_FUNCTIONS(RGFAST_CHECK)
RGFAST_DRIVER_OPTIONAL_FUNCTIONS(RGFAST_CHECK)
#undef RGFAST_CHECK

static_assert(Same<Called<GetProcAddress>, decltype(::cuGetProcAddress)>::value);
static_assert(kLegacyStream == CU_GET_PROC_ADDRESS_LEGACY_STREAM);
static_assert(sizeof(Device) == sizeof(CUdevice));

static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));

#define RGFAST_EQUAL(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs)
RGFAST_EQUAL(kClusterDimension, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
RGFAST_EQUAL(kCapturing, CU_STREAM_CAPTURE_STATUS_ACTIVE);
RGFAST_EQUAL(kCaptureInvalidated, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
RGFAST_EQUAL(kProcNotFound, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
RGFAST_EQUAL(kProcVersionNotSufficient, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);

RGFAST_EQUAL(kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
RGFAST_EQUAL(kComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
RGFAST_EQUAL(kComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
RGFAST_EQUAL(kSingleToDoubleRatio, CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO);
RGFAST_EQUAL(kMaxSharedPerBlockOptin, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
RGFAST_EQUAL(kMaxThreadsPerBlock, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
RGFAST_EQUAL(kStaticSharedBytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
RGFAST_EQUAL(kLocalBytes, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
RGFAST_EQUAL(kRegisters, CU_FUNC_ATTRIBUTE_NUM_REGS);
RGFAST_EQUAL(kMaxDynamicSharedBytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
RGFAST_EQUAL(kNonPortableClusterSizeAllowed, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);

RGFAST_EQUAL(kInvalidValue, CUDA_ERROR_INVALID_VALUE);
RGFAST_EQUAL(kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
RGFAST_EQUAL(kNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
RGFAST_EQUAL(kStubLibrary, CUDA_ERROR_STUB_LIBRARY);
RGFAST_EQUAL(kDeviceUnavailable, CUDA_ERROR_DEVICE_UNAVAILABLE);
RGFAST_EQUAL(kNoDevice, CUDA_ERROR_NO_DEVICE);
RGFAST_EQUAL(kInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
RGFAST_EQUAL(kInvalidImage, CUDA_ERROR_INVALID_IMAGE);
RGFAST_EQUAL(kInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
RGFAST_EQUAL(kNoBinaryForGpu, CUDA_ERROR_NO_BINARY_FOR_GPU);
RGFAST_EQUAL(kUnsupportedPtxVersion, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
RGFAST_EQUAL(kNotFound, CUDA_ERROR_NOT_FOUND);
RGFAST_EQUAL(kIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
RGFAST_EQUAL(kLaunchOutOfResources, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
RGFAST_EQUAL(kLaunchFailed, CUDA_ERROR_LAUNCH_FAILED);
RGFAST_EQUAL(kNotSupported, CUDA_ERROR_NOT_SUPPORTED);
RGFAST_EQUAL(kSystemDriverMismatch, CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
RGFAST_EQUAL(kCompatNotSupported, CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE);
RGFAST_EQUAL(kStreamCaptureUnsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
RGFAST_EQUAL(kStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
#undef RGFAST_EQUAL

}  // namespace
}  // namespace rgfast::driver

#endif
