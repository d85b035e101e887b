// csrc/cpu/parallel.cpp behind a C function, for tests/native/test_parallel.py.
#include "cpu/parallel.cpp"

struct Counts {
    int* counts;
    int milliseconds;
};

// Adds 1 to counts[0] … counts[units - 1]; a unit takes so long.
extern "C" void count(int64_t units, int64_t grain, int threads, int milliseconds, int* counts) {
    const auto add = [](const void* context, int64_t begin, int64_t end) {
        const Counts& work = *static_cast<const Counts*>(context);
        for (int64_t i = begin; i < end; ++i) {
            ++work.counts[i];
            if (work.milliseconds) std::this_thread::sleep_for(std::chrono::milliseconds(work.milliseconds));
        }
    };
    const Counts work{counts, milliseconds};
    fastdiff::parallel_for(units, grain, threads, add, &work);
}
