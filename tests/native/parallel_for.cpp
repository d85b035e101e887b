// csrc/cpu/parallel.cpp behind a C function, for tests/native/test_parallel.py.
#include "cpu/parallel.cpp"

// Adds 1 to counts[0] … counts[units - 1].
extern "C" void count(int64_t units, int64_t grain, int threads, int* counts) {
    const auto add = [](const void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++(*static_cast<int* const*>(context))[i];
    };
    fastdiff::parallel_for(units, grain, threads, add, &counts);
}
