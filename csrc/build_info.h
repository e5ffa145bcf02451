// What a compiled library says of itself, for build_info_cpu.cpp and build_info_cuda.cu. lfm_torch/ops/_extension.py
// finds the text in the file, so that a library that does not load, or must not be loaded, tells its origin as well.
// setup.py writes lfm_torch_build.h, which defines LFM_BUILD: the digest of csrc and what was asked for.
#pragma once

#define LFM_TEXT_OF(x) #x
#define LFM_TEXT(x) LFM_TEXT_OF(x)
#define LFM_EXPORT extern "C" __attribute__((visibility("default"), used))
