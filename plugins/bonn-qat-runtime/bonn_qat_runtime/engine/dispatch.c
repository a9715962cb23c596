/* Which instruction sets this machine runs, and the run of a plan with one of them. */

#include "bonn_qat_runtime.h"

#include <stddef.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

typedef void Run(const bonn_qat_plan *plan, const float *images, float *results, void *arena);

#if defined(__x86_64__)
Run run_plain, run_v3, run_v4;
#define ALL(set, bits) (((set) & (bits)) == (bits))

static int level(void) {
    unsigned eax, ebx, ecx, edx, basic, extended, state, unused;
    if (!__get_cpuid(1, &eax, &ebx, &basic, &edx) || !__get_cpuid(0x80000001, &eax, &ebx, &extended, &edx)) return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    /* fma, movbe, osxsave, avx, f16c; lzcnt; bmi1, avx2, bmi2: x86-64-v3, but for what every CPU with AVX has. */
    if (!ALL(basic, 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29) || !ALL(extended, 1u << 5)) return 0;
    if (!ALL(ebx, 1u << 3 | 1u << 5 | 1u << 8)) return 0;
    /* The system has to save these registers too. */
    __asm__("xgetbv" : "=a"(state), "=d"(unused) : "c"(0));
    if (!ALL(state, 0x06)) return 0;
    /* avx512f, dq, cd, bw, vl: x86-64-v4; vpopcntdq. */
    unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    return ALL(state, 0xe6) && ALL(ebx, avx512) && ALL(ecx, 1u << 14) ? 2 : 1;
}

const char *bonn_qat_cpus(void) {
    static const char *const names[] = {"plain", "v3 plain", "v4 v3 plain"};
    return names[level()];
}
#elif defined(__aarch64__)
Run run_neon;
static int level(void) { return 0; }
const char *bonn_qat_cpus(void) { return "neon"; }
#else
Run run_plain;
static int level(void) { return 0; }
const char *bonn_qat_cpus(void) { return "plain"; }
#endif

struct bonn_qat_cpu {
    const char *name;
    Run *run;
    int64_t layout;
};

/* In the order of bonn_qat_cpus(), the fastest last. */
static const bonn_qat_cpu all[] = {
#if defined(__aarch64__)
    {"neon", run_neon, BONN_QAT_WORDS},
#else
    {"plain", run_plain, BONN_QAT_WORDS},
#endif
#if defined(__x86_64__)
    {"v3", run_v3, BONN_QAT_NIBBLES},
    {"v4", run_v4, BONN_QAT_WORDS},
#endif
};

static int is_name(const char *given, const char *name) {
    while (*given && *given == *name) given++, name++;
    return *given == *name;
}

const bonn_qat_cpu *bonn_qat_find_cpu(const char *name) {
    for (int i = 0; i <= level(); i++)
        if (is_name(name, all[i].name)) return all + i;
    return NULL;
}

int64_t bonn_qat_layout(const bonn_qat_cpu *cpu) { return cpu->layout; }

int bonn_qat_run(const bonn_qat_plan *plan, const bonn_qat_cpu *cpu, const float *images, int64_t count, float *results,
                 void *arena) {
    if (!cpu || cpu->layout != plan->layout) return BONN_QAT_BAD_CPU;
    if ((uintptr_t)arena % 64 || (uintptr_t)plan->constants % 64) return BONN_QAT_BAD_POINTER;
    for (int64_t i = 0; i < count; i++) cpu->run(plan, images + i * plan->inputs, results + i * plan->outputs, arena);
    return BONN_QAT_OK;
}

uint32_t bonn_qat_sources(void) { return SOURCES; }
int64_t bonn_qat_row_size(void) { return sizeof(bonn_qat_row); }

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
