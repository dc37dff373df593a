# Device sources compiled for this processor on the fibre shim, and their tests. kernels.cu only includes the others.
file(GLOB shim_sources CONFIGURE_DEPENDS csrc/cuda/shim/*.cpp)
file(GLOB device_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
list(REMOVE_ITEM device_sources ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/kernels.cu)
file(GLOB planted CONFIGURE_DEPENDS csrc/cuda/tests/*.cu)
list(APPEND device_sources ${planted})
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

# The library that stands for CUDA's driver and runs the kernels; tests/cuda/emulated.py builds it.
set(registered "")
foreach(source IN LISTS device_sources)
  get_filename_component(name "${source}" NAME_WE)
  set(out "${CMAKE_CURRENT_BINARY_DIR}/registered/${name}.cpp")
  add_custom_command(OUTPUT "${out}"
    COMMAND "${CMAKE_COMMAND}" "-DCOMPILER=${CMAKE_CXX_COMPILER}" "-DSOURCE=${source}" "-DOUT=${out}"
      "-DINCLUDE=${CMAKE_CURRENT_SOURCE_DIR}/csrc" -P "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/shim/register.cmake"
    DEPENDS "${source}" csrc/cuda/shim/register.cmake DEPFILE "${out}.d" VERBATIM)
  list(APPEND registered "${out}")
endforeach()
file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/registered")
add_library(rgfast_fake_cuda SHARED EXCLUDE_FROM_ALL csrc/driver/tests/fake.cpp ${shim_sources} ${registered})
target_include_directories(rgfast_fake_cuda PRIVATE csrc)
target_link_libraries(rgfast_fake_cuda PRIVATE Threads::Threads)
target_compile_options(rgfast_fake_cuda PRIVATE -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off)
set_target_properties(rgfast_fake_cuda PROPERTIES CXX_VISIBILITY_PRESET default SUFFIX .so)
