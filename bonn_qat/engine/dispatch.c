/* Which variants of kernels.c this machine runs. Compiled for every machine of its architecture. */

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* A checksum of the C sources that this library was compiled from. */
EXPORT uint32_t sources(void) { return SOURCES; }

#if defined(__x86_64__)
#define ALL(set, bits) (((set) & (bits)) == (bits))

/* The suffixes of the variants, the fastest first, with a space between them. */
EXPORT const char *variants(void) {
    unsigned eax, ebx, ecx, edx, basic, extended, state, unused;
    if (!__get_cpuid(1, &eax, &ebx, &basic, &edx) || !__get_cpuid(0x80000001, &eax, &ebx, &extended, &edx)) return "";
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return "";
    /* fma, movbe, osxsave, avx, f16c; lzcnt; bmi1, avx2, bmi2: together x86-64-v3, but for what every CPU with AVX has. */
    if (!ALL(basic, 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29) || !ALL(extended, 1u << 5)) return "";
    if (!ALL(ebx, 1u << 3 | 1u << 5 | 1u << 8)) return "";
    /* The system has to save these registers too. */
    __asm__("xgetbv" : "=a"(state), "=d"(unused) : "c"(0));
    if (!ALL(state, 0x06)) return "";
    /* avx512f, dq, cd, bw, vl: x86-64-v4; vpopcntdq. */
    unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    return ALL(state, 0xe6) && ALL(ebx, avx512) && ALL(ecx, 1u << 14) ? "v4 v3" : "v3";
}

/* Whether it multiplies bfloat16 in tiles (AMX). */
EXPORT int has_tiles(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx >> 22 & 1;
}
#else
EXPORT const char *variants(void) { return "neon"; }
EXPORT int has_tiles(void) { return 0; }
#endif

#if defined(_WIN32)
/* All that the library needs of the C library, which zig would compile for minutes. */
void *memcpy(void *restrict to, const void *restrict from, size_t size) {
    for (size_t i = 0; i < size; i++) ((volatile char *)to)[i] = ((const char *)from)[i];
    return to;
}

void *memset(void *to, int value, size_t size) {
    for (size_t i = 0; i < size; i++) ((volatile char *)to)[i] = (char)value;
    return to;
}

int DllMainCRTStartup(void *library, unsigned reason, void *reserved) {
    (void)library, (void)reason, (void)reserved;
    return 1;
}
#endif
