// Compiles what stands between the two macros for more than the baseline CPU.
#pragma once

#define FFN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FFN_TARGET_BEGIN(features) \
    FFN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FFN_TARGET_END _Pragma("clang attribute pop")
#else
#define FFN_TARGET_BEGIN(features) \
    _Pragma("GCC push_options") FFN_PRAGMA(GCC target(features))
#define FFN_TARGET_END _Pragma("GCC pop_options")
#endif
