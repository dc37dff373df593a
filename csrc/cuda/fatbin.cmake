# Compiles the kernels for GPUs, csrc/cuda/kernels.cu, into one file that the driver loads: _kernels.fatbin.
#
# nvcc is run as a tool. CMake's language CUDA would link the CUDA runtime, and a package that does that drags
# in a version of it that may not be the one torch came with.
#
# Environment or -D: RGFAST_CUDA_ARCHS=80,90 names the architectures ("none": no kernels), RGFAST_REQUIRE_CUDA=1
# makes it an error if there is no nvcc that can compile for them.
set(rgfast_default_archs 80 90 100)

function(rgfast_without_cuda reason)
  if(RGFAST_REQUIRE_CUDA OR "$ENV{RGFAST_REQUIRE_CUDA}" STREQUAL "1")
    message(FATAL_ERROR "rgfast: the kernels for GPUs cannot be built: ${reason}")
  endif()
  message(STATUS "rgfast: building without kernels for GPUs: ${reason}")
endfunction()

set(archs "$ENV{RGFAST_CUDA_ARCHS}")
if(RGFAST_CUDA_ARCHS)
  set(archs "${RGFAST_CUDA_ARCHS}")
endif()
if(archs STREQUAL "none")
  rgfast_without_cuda("RGFAST_CUDA_ARCHS is 'none'")
  return()
endif()

find_program(RGFAST_NVCC NAMES "$ENV{CUDACXX}" nvcc
  HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT RGFAST_NVCC)
  rgfast_without_cuda("there is no nvcc")
  return()
endif()

# What this nvcc knows, so that one that is older or newer than the list of defaults still builds the rest.
execute_process(COMMAND "${RGFAST_NVCC}" --list-gpu-arch
  OUTPUT_VARIABLE known ERROR_VARIABLE told RESULT_VARIABLE failed)
if(failed)
  rgfast_without_cuda("${RGFAST_NVCC} does not run: ${told}")
  return()
endif()
string(REGEX MATCHALL "compute_[0-9]+" known "${known}")
string(REPLACE "compute_" "" known "${known}")
if(archs)
  string(REGEX REPLACE "[, ]+" ";" archs "${archs}")
  foreach(arch IN LISTS archs)
    if(NOT arch IN_LIST known)
      string(REPLACE ";" ", " known "${known}")
      message(FATAL_ERROR "rgfast: RGFAST_CUDA_ARCHS must name some of ${known}, which ${RGFAST_NVCC} compiles "
        "for, or be 'none', got '${arch}'")
    endif()
  endforeach()
else()
  foreach(arch IN LISTS rgfast_default_archs)
    if(arch IN_LIST known)
      list(APPEND archs ${arch})
    else()
      message(STATUS "rgfast: no kernels for sm_${arch}, which ${RGFAST_NVCC} does not know")
    endif()
  endforeach()
endif()
list(SORT archs COMPARE NATURAL)
list(GET archs 0 lowest)

# With PTX of the lowest, newer GPUs can compile the kernels when they are loaded.
set(code "-gencode=arch=compute_${lowest},code=compute_${lowest}")
foreach(arch IN LISTS archs)
  list(APPEND code "-gencode=arch=compute_${arch},code=sm_${arch}")
endforeach()
set(flags -fatbin -std=c++17 -O3 --no-compress "-I${CMAKE_CURRENT_SOURCE_DIR}/csrc" "-ccbin=${CMAKE_CXX_COMPILER}")

set(probe "${CMAKE_CURRENT_BINARY_DIR}/cuda_probe")
file(WRITE "${probe}.cu" "extern \"C\" __global__ void probe() {}\n")
execute_process(COMMAND "${RGFAST_NVCC}" ${flags} ${code} "${probe}.cu" -o "${probe}.fatbin"
  OUTPUT_VARIABLE told ERROR_VARIABLE told RESULT_VARIABLE failed)
if(failed)
  rgfast_without_cuda("${RGFAST_NVCC} cannot compile: ${told}")
  return()
endif()

set(fatbin "${CMAKE_CURRENT_BINARY_DIR}/_kernels.fatbin")
set(source "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/kernels.cu")
add_custom_command(OUTPUT "${fatbin}"
  COMMAND "${RGFAST_NVCC}" ${flags} ${code} --threads 0 -MD -MF "${fatbin}.d" "${source}" -o "${fatbin}"
  DEPENDS "${source}" DEPFILE "${fatbin}.d" COMMENT "Compiling kernels for sm_${archs}" VERBATIM)
add_custom_target(_kernels ALL DEPENDS "${fatbin}")
install(FILES "${fatbin}" DESTINATION rgfast)
message(STATUS "rgfast: kernels for GPUs by ${RGFAST_NVCC} for ${archs}, PTX of ${lowest}")
