// The part of the CUDA driver's binary interface that rgfast calls, so that building needs no CUDA headers
// and the module links no CUDA library. abi_check.cpp compares it with cuda.h if the build finds one.
//
// The functions are a list: the loader resolves each by cuGetProcAddress in the version named here, and a
// library that stands for the driver in tests exports cuGetProcAddress_v2 alone, over the same list.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rgfast::driver {

using Device = int;
using Context = struct ContextHandle*;
using Library = struct LibraryHandle*;
using Kernel = struct KernelHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;

// Those of the driver's codes that rgfast has a sentence of its own for.
enum Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kStubLibrary = 34,
  kDeviceUnavailable = 46,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kUnsupportedPtxVersion = 222,
  kNotFound = 500,
  kIllegalAddress = 700,
  kLaunchOutOfResources = 701,
  kLaunchFailed = 719,
  kNotSupported = 801,
  kSystemDriverMismatch = 803,
  kCompatNotSupported = 804,
  kStreamCaptureUnsupported = 900,
  kStreamCaptureImplicit = 906,
};

enum DeviceAttribute : int {
  kMultiprocessorCount = 16,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kSingleToDoubleRatio = 87,
  kMaxSharedPerBlockOptin = 97,
};

enum FunctionAttribute : int {
  kMaxThreadsPerBlock = 0,
  kStaticSharedBytes = 1,
  kLocalBytes = 3,
  kRegisters = 4,
  kMaxDynamicSharedBytes = 8,
  kNonPortableClusterSizeAllowed = 14,
};

enum CaptureStatus : int { kNotCapturing = 0, kCapturing = 1, kCaptureInvalidated = 2 };

enum LaunchAttributeId : int { kClusterDimension = 4 };

struct LaunchAttribute {
  LaunchAttributeId id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
  } value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

enum ProcAddressStatus : int { kProcFound = 0, kProcNotFound = 1, kProcVersionNotSufficient = 2 };

// Of the handles of default streams, torch's 0 is the legacy one.
constexpr std::uint64_t kLegacyStream = 1;

using GetProcAddress = Result (*)(const char* symbol, void** function, int version, std::uint64_t flags,
                                  ProcAddressStatus* status);
constexpr const char* kGetProcAddress = "cuGetProcAddress_v2";

// Our name, the driver's, the CUDA version of its interface, parameters; each returns a Result.
#define RGFAST_DRIVER_FUNCTIONS(X)                                                                        \
  X(init, cuInit, 2000, (unsigned flags))                                                                 \
  X(driver_version, cuDriverGetVersion, 2020, (int* version))                                             \
  X(error_name, cuGetErrorName, 6000, (Result code, const char** name))                                   \
  X(error_string, cuGetErrorString, 6000, (Result code, const char** text))                               \
  X(device_count, cuDeviceGetCount, 2000, (int* count))                                                   \
  X(device, cuDeviceGet, 2000, (Device * device, int ordinal))                                            \
  X(device_name, cuDeviceGetName, 2000, (char* name, int length, Device device))                          \
  X(device_attribute, cuDeviceGetAttribute, 2000, (int* value, DeviceAttribute attribute, Device device)) \
  X(retain_primary, cuDevicePrimaryCtxRetain, 7000, (Context * context, Device device))                   \
  X(push_context, cuCtxPushCurrent, 4000, (Context context))                                              \
  X(pop_context, cuCtxPopCurrent, 4000, (Context * context))                                              \
  X(load_library, cuLibraryLoadData, 12000,                                                               \
    (Library * library, const void* code, int* jit_options, void** jit_values, unsigned jit_count,        \
     int* options, void** values, unsigned count))                                                        \
  X(library_kernel, cuLibraryGetKernel, 12000, (Kernel * kernel, Library library, const char* name))      \
  X(kernel_function, cuKernelGetFunction, 12000, (Function * function, Kernel kernel))                    \
  X(function_attribute, cuFuncGetAttribute, 2020,                                                         \
    (int* value, FunctionAttribute attribute, Function function))                                         \
  X(set_function_attribute, cuFuncSetAttribute, 9000,                                                     \
    (Function function, FunctionAttribute attribute, int value))                                          \
  X(is_capturing, cuStreamIsCapturing, 10000, (Stream stream, CaptureStatus * status))                    \
  X(active_clusters, cuOccupancyMaxActiveClusters, 11080,                                                 \
    (int* clusters, Function function, const LaunchConfig* config))                                       \
  X(launch, cuLaunchKernelEx, 11080,                                                                      \
    (const LaunchConfig* config, Function function, void** parameters, void** extra))

// What an older driver may lack; its member of Api is then null.
#define RGFAST_DRIVER_OPTIONAL_FUNCTIONS(X)        \
  X(function_parameter, cuFuncGetParamInfo, 12040, \
    (Function function, std::size_t index, std::size_t* offset, std::size_t* size))

struct Api {
#define RGFAST_DRIVER_MEMBER(name, symbol, version, parameters) Result(*name) parameters = nullptr;
  RGFAST_DRIVER_FUNCTIONS(RGFAST_DRIVER_MEMBER)
  RGFAST_DRIVER_OPTIONAL_FUNCTIONS(RGFAST_DRIVER_MEMBER)
#undef RGFAST_DRIVER_MEMBER
};

}  // namespace rgfast::driver
