# Writes OUT, which includes the device source SOURCE and registers its kernels by name, found by COMPILER -E,
# since many kernels are made by macros. INCLUDE is the folder csrc; OUT.d lists what SOURCE depends on.
execute_process(
  COMMAND "${COMPILER}" -E -P -x c++ -std=c++17 "-I${INCLUDE}" -MD -MF "${OUT}.d" -MT "${OUT}" "${SOURCE}"
  OUTPUT_VARIABLE text RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${COMPILER} does not preprocess ${SOURCE}")
endif()
set(space "[ \t\r\n]")
string(REGEX MATCHALL "extern${space}+\"C\"${space}+void${space}+rgfast_[A-Za-z0-9_]+${space}*\\(" found "${text}")
if(NOT found)
  message(FATAL_ERROR "${SOURCE} has no kernel: extern \"C\" __global__ void rgfast_...")
endif()
set(lines "#include \"${SOURCE}\"\n\n#include \"cuda/shim/emulation.hpp\"\n\n")
foreach(kernel IN LISTS found)
  string(REGEX MATCH "rgfast_[A-Za-z0-9_]+" name "${kernel}")
  string(APPEND lines "RGFAST_REGISTER(${name})\n")
endforeach()
file(WRITE "${OUT}" "${lines}")
