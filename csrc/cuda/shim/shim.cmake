# Device sources compiled for this processor on the fibre shim, and their tests. kernels.cu only includes the others.
file(GLOB shim_sources CONFIGURE_DEPENDS csrc/cuda/shim/*.cpp)
file(GLOB device_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
list(REMOVE_ITEM device_sources ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/kernels.cu)
file(GLOB planted CONFIGURE_DEPENDS csrc/cuda/tests/*.cu)
list(APPEND device_sources ${planted})
file(GLOB device_tests CONFIGURE_DEPENDS csrc/cuda/tests/*.cpp)
# CMake would ask for nvcc, and the compiler would take .cu for an object file.
set_source_files_properties(${device_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")

set(shim_options -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off)
add_executable(rgfast_cuda_tests ${device_tests} ${shim_sources} ${device_sources})
target_include_directories(rgfast_cuda_tests PRIVATE csrc)
target_link_libraries(rgfast_cuda_tests PRIVATE Threads::Threads)
target_compile_options(rgfast_cuda_tests PRIVATE ${shim_options})
add_test(NAME cuda_shim COMMAND rgfast_cuda_tests)

# A planted fault is reported if a process that runs it says so; `program` has the sanitizer that should.
function(rgfast_planted program fault)
  add_test(NAME fault_${fault} COMMAND ${program} ${fault})
  set_tests_properties(fault_${fault} PROPERTIES
    PASS_REGULAR_EXPRESSION "${ARGN}" SKIP_REGULAR_EXPRESSION "${no_tsan_here}")
endfunction()

# What TSan says where the kernel of the machine lays out memory as it does not expect.
set(no_tsan_here "FATAL: ThreadSanitizer: unexpected memory mapping")

if(RGFAST_SANITIZE)
  target_compile_options(rgfast_cuda_tests PRIVATE
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1)
  target_link_options(rgfast_cuda_tests PRIVATE -fsanitize=address,undefined)
  rgfast_planted(rgfast_cuda_tests out_of_bounds "heap-buffer-overflow.*in rgfast_fault_out_of_bounds .*faults.cu")

  # TSan takes fibers for threads that only barriers put in order. It watches kernels and not the shim, whose
  # accesses to threads' values are the hardware's.
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_FLAGS -fsanitize=thread)
  check_cxx_source_compiles("int main() { return 0; }" RGFAST_HAS_TSAN)
  unset(CMAKE_REQUIRED_FLAGS)
  if(RGFAST_HAS_TSAN)
    add_library(rgfast_shim_for_races OBJECT ${shim_sources})
    target_include_directories(rgfast_shim_for_races PRIVATE csrc)
    target_compile_options(rgfast_shim_for_races PRIVATE ${shim_options} -DRGFAST_TSAN -g1 -O2)
    # Mathematics by itself runs no threads.
    list(FILTER device_tests EXCLUDE REGEX "_math.cpp$")
    add_executable(rgfast_cuda_races ${device_tests} ${device_sources})
    target_include_directories(rgfast_cuda_races PRIVATE csrc)
    target_compile_options(rgfast_cuda_races PRIVATE
      ${shim_options} -DRGFAST_TSAN -fsanitize=thread -fno-omit-frame-pointer -g1 -O1)
    target_link_libraries(rgfast_cuda_races PRIVATE rgfast_shim_for_races Threads::Threads)
    target_link_options(rgfast_cuda_races PRIVATE -fsanitize=thread)
    add_test(NAME cuda_races COMMAND rgfast_cuda_races)
    add_test(NAME fault_none COMMAND rgfast_cuda_races none)
    set_tests_properties(cuda_races fault_none PROPERTIES SKIP_REGULAR_EXPRESSION "${no_tsan_here}")
    foreach(fault missing_barrier missing_warp_barrier late_barrier early_read race)
      rgfast_planted(rgfast_cuda_races ${fault} "ThreadSanitizer: data race.*#0 rgfast_fault_${fault} .*faults.cu")
    endforeach()
  else()
    message(STATUS "rgfast: no tests for races, since the compiler has no -fsanitize=thread")
  endif()
endif()

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
