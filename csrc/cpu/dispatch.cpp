// The widest kernels that this CPU runs, chosen once.
#include <atomic>
#include <cstring>

#include "cpu/entry.h"

#ifdef FASTDIFF_X86
#include <cpuid.h>
#endif

namespace fastdiff {
namespace {

struct Kernels {
    const char* name;
    void (*randn)(const RandnParams&, int);
    void (*add_noise)(const AddNoiseParams&, int);
    void (*update)(const UpdateParams&, int);
    void (*group_norm_silu)(const GroupNormSiluParams&, int);
    void (*conv_epilogue)(const ConvEpilogueParams&, int);
    void (*winograd_conv)(const WinogradConvParams&, int);
    bool (*runs_here)();
};

const Kernels kernels[] = {
#ifdef FASTDIFF_X86
    {"avx512", avx512::randn, avx512::add_noise, avx512::update, avx512::group_norm_silu, avx512::conv_epilogue,
     avx512::winograd_conv,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", avx2::randn, avx2::add_noise, avx2::update, avx2::group_norm_silu, avx2::conv_epilogue,
     avx2::winograd_conv,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"portable", portable::randn, portable::add_noise, portable::update, portable::group_norm_silu,
     portable::conv_epilogue, portable::winograd_conv, [] { return true; }},
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

void randn_cpu(const RandnParams& params, int threads) { chosen().load()->randn(params, threads); }
void add_noise_cpu(const AddNoiseParams& params, int threads) { chosen().load()->add_noise(params, threads); }
void update_cpu(const UpdateParams& params, int threads) { chosen().load()->update(params, threads); }
void group_norm_silu_cpu(const GroupNormSiluParams& params, int threads) {
    chosen().load()->group_norm_silu(params, threads);
}
void conv_epilogue_cpu(const ConvEpilogueParams& params, int threads) {
    chosen().load()->conv_epilogue(params, threads);
}

void winograd_conv_cpu(const WinogradConvParams& params, int threads) {
    chosen().load()->winograd_conv(params, threads);
}

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
