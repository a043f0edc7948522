// Which instruction sets this processor has. Each of them is one unit of isa_*.cpp.
#if defined(OWNLM_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(OWNLM_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"

namespace ownlm {

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
#ifdef OWNLM_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        found.push_back(&avx512_kernels);
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avxvnni_kernels);
    if (avx2) found.push_back(&avx2_kernels);
#endif
#ifdef OWNLM_ARM
#if defined(__linux__)
    const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP, bf16 = getauxval(AT_HWCAP2) & HWCAP2_BF16;
#elif defined(__APPLE__)
    const auto has = [](const char* name) {
        int there = 0;
        size_t size = sizeof there;
        return sysctlbyname(name, &there, &size, nullptr, 0) == 0 && there;
    };
    const bool dot = has("hw.optional.arm.FEAT_DotProd"), bf16 = has("hw.optional.arm.FEAT_BF16");
#else
    const bool dot = false, bf16 = false;
#endif
    if (dot && bf16) found.push_back(&neonbf16_kernels);
    if (dot) found.push_back(&neondot_kernels);
    found.push_back(&neon_kernels);
#endif
    found.push_back(&plain_kernels);
    return found;
}

}  // namespace ownlm
