# SPDX-License-Identifier: Apache-2.0
# Compiler options that every target of ours shares.
add_library(kvarn_options INTERFACE)
target_compile_options(kvarn_options INTERFACE
  -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror
  # Encoders are bit-exact across targets: no multiply-add that the source does not write (specification, section 1).
  -ffp-contract=off)
if(KVARN_SANITIZE)
  target_compile_options(kvarn_options INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(kvarn_options INTERFACE -fsanitize=address,undefined)
endif()
if(KVARN_FUZZ)
  target_compile_options(kvarn_options INTERFACE -fsanitize=fuzzer-no-link)  # the library's coverage guides the fuzzer
endif()

# The instruction sets of the SIMD targets. On another architecture the files compile to "not available".
function(kvarn_target_flags)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    return()
  endif()
  # gcc 12 takes the deliberately undefined operands inside its own AVX headers for a mistake of ours (gcc bug 105593).
  set(quiet "$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>")
  set_source_files_properties(src/cpu/avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;${quiet}")
  set_source_files_properties(src/cpu/avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512;${quiet}")
endfunction()
