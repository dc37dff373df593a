# Device sources compiled for this processor on the fibre shim, and their tests. kernels.cu only includes the others.
file(GLOB shim_sources CONFIGURE_DEPENDS csrc/cuda/shim/*.cpp)
file(GLOB device_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
list(REMOVE_ITEM device_sources ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/kernels.cu)
file(GLOB device_tests CONFIGURE_DEPENDS csrc/cuda/tests/*.cpp)
# CMake would ask for nvcc, and the compiler would take .cu for an object file.
set_source_files_properties(${device_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")

add_executable(rgfast_cuda_tests ${device_tests} ${shim_sources} ${device_sources})
target_include_directories(rgfast_cuda_tests PRIVATE csrc)
target_link_libraries(rgfast_cuda_tests PRIVATE Threads::Threads)
target_compile_options(rgfast_cuda_tests PRIVATE -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off)
if(RGFAST_SANITIZE)
  target_compile_options(rgfast_cuda_tests PRIVATE
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1)
  target_link_options(rgfast_cuda_tests PRIVATE -fsanitize=address,undefined)
endif()
add_test(NAME cuda_shim COMMAND rgfast_cuda_tests)
