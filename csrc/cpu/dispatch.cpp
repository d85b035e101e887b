// The widest kernels that this CPU runs, chosen once.
#include <atomic>
#include <cstring>

#include "cpu/entry.h"

#ifdef FASTDIFF_X86
#include <cpuid.h>
#endif

namespace fastdiff {
namespace {

#define FASTDIFF_MEMBER(op, Params) void (*op)(const Params&, int);
struct Kernels {
    const char* name;
    bool (*runs_here)();
    FASTDIFF_OPERATIONS(FASTDIFF_MEMBER)
};

const Kernels kernels[] = {
#ifdef FASTDIFF_X86
#define FASTDIFF_AVX512(op, Params) avx512::op,
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     FASTDIFF_OPERATIONS(FASTDIFF_AVX512)},
#define FASTDIFF_AVX2(op, Params) avx2::op,
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     FASTDIFF_OPERATIONS(FASTDIFF_AVX2)},
#endif
#define FASTDIFF_PORTABLE(op, Params) portable::op,
    {"portable", [] { return true; }, FASTDIFF_OPERATIONS(FASTDIFF_PORTABLE)},
};

const Kernels* widest() {
    for (const Kernels& k : kernels)
        if (k.runs_here()) return &k;
    return nullptr;  // not reached: portable runs everywhere
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels_in_use{widest()};
    return kernels_in_use;
}

}  // namespace

#define FASTDIFF_DISPATCH(op, Params) \
    void op##_cpu(const Params& params, int threads) { chosen().load()->op(params, threads); }
FASTDIFF_OPERATIONS(FASTDIFF_DISPATCH)

const char* cpu_bfloat16() {
    static const char* const kind = [] {  // asked once: a virtual machine answers slowly
#ifdef FASTDIFF_X86
        unsigned eax, ebx, ecx, edx;
        constexpr unsigned kAmxBFloat16 = 1u << 22;
        if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBFloat16)) return "matrix";
        if (__builtin_cpu_supports("avx512bf16")) return "vector";
#endif
        return "";
    }();
    return kind;
}

const char* cpu_simd() { return chosen().load()->name; }

bool set_cpu_simd(const char* name) {
    for (const Kernels& k : kernels)
        if (std::strcmp(k.name, name) == 0 && k.runs_here()) {
            chosen() = &k;
            return true;
        }
    return false;
}

}  // namespace fastdiff
