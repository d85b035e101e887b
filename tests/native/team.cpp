// A stand-in for torch's OpenMP team, built as libtorch_cpu.so: it counts what it is asked for, and can come late.
// tests/native/test_parallel.py loads it.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

static std::atomic<int> calls{0}, late_by_ms{0};

extern "C" int team_calls() { return calls; }
extern "C" void come_late(int milliseconds) { late_by_ms = milliseconds; }

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    ++calls;
    std::vector<std::thread> members;
    for (unsigned i = 1; i < threads; ++i) members.emplace_back(body, data);
    body(data);
    for (std::thread& member : members) member.join();
    std::this_thread::sleep_for(std::chrono::milliseconds(late_by_ms));
}
