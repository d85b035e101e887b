// Work is handed to torch's own OpenMP team, whose threads are awake while a network runs: no second pool spins beside
// it. Where torch has no such team, and in a forked child, which has none of its parent's threads, a small pool of
// helpers that sleep between jobs takes its place.
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastdiff {
namespace {

struct Job {
    RangeFunction function;
    const void* context;
    int64_t units, chunk;
    int helpers_wanted;      // guarded by the pool's mutex
    int helpers_inside = 0;  // guarded by the pool's mutex
    std::atomic<int64_t> next{0};

    void work() {
        for (;;) {
            const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= units) return;
            function(context, begin, std::min(begin + chunk, units));
        }
    }
};

// The entry point of OpenMP's runtime (GNU's, or another that speaks its language) which torch has loaded.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

ParallelRegion torchs_team() {
    static const ParallelRegion found = [] {
        void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        return reinterpret_cast<ParallelRegion>(torch ? dlsym(torch, "GOMP_parallel") : nullptr);
    }();
    return found;
}

// The caller works too, and waits only for chunks that a helper has begun.
class Pool {
  public:
    void run(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (helpers_ < job.helpers_wanted && start_helper()) ++helpers_;
            jobs_.push_back(&job);
        }
        for (int i = 0; i < job.helpers_wanted; ++i) wake_.notify_one();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        const auto mine = std::find(jobs_.begin(), jobs_.end(), &job);
        if (mine != jobs_.end()) jobs_.erase(mine);
        done_.wait(lock, [&] { return job.helpers_inside == 0; });
    }

  private:
    bool start_helper() {
        try {
            std::thread([this] { help(); }).detach();
            return true;
        } catch (const std::system_error&) {
            return false;  // no thread to be had: the caller does the work
        }
    }

    void help() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return !jobs_.empty(); });
            Job& job = *jobs_.front();
            ++job.helpers_inside;
            if (--job.helpers_wanted == 0) jobs_.pop_front();
            lock.unlock();
            job.work();
            lock.lock();
            if (--job.helpers_inside == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Job*> jobs_;
    int helpers_ = 0;
};

// Never destroyed: helpers may sleep in it while the process ends.
std::atomic<Pool*> pool{new Pool};
std::atomic<bool> forked{false};
const int in_children = pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    pool = new Pool;
});

}  // namespace

void parallel_for(int64_t units, int64_t grain, int threads, RangeFunction function, const void* context) {
    const int64_t useful = std::min<int64_t>(threads, (units + grain - 1) / grain);
    if (useful <= 1) {
        if (units > 0) function(context, 0, units);
        return;
    }
    // Eight chunks a thread: what the last one leaves to wait for is small.
    const int64_t chunk = std::max<int64_t>(1, units / (useful * 8));
    Job job{function, context, units, chunk, static_cast<int>(useful) - 1};
    const ParallelRegion team = forked ? nullptr : torchs_team();
    if (team)
        team([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(useful), 0);
    else
        pool.load()->run(job);
}

}  // namespace fastdiff
