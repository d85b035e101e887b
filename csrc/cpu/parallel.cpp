// Work is handed to torch's own OpenMP team, whose threads are awake while a network runs: it begins and ends in 2 to 3
// microseconds, and no second pool spins beside it. But its closing barrier waits for every member to be scheduled,
// some 10 ms where another process has the core: a team that came late is left alone for a second. Work then, and where
// torch has no such team or in a forked child, which has none of its parent's threads, goes to a small pool of our own,
// which takes 30 to 60 microseconds to wake, and longer while torch's team spins.
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastdiff {
namespace {

// A team is late whose beginning and end take longer than kLate and what the caller itself worked for; it is then left
// alone for so long. Nanoseconds.
constexpr int64_t kLate = 2'000'000, kLeftAlone = 1'000'000'000;

int64_t nanoseconds() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

struct Job {
    RangeFunction function;
    const void* context;
    int64_t units, chunk;
    int helpers_wanted;      // guarded by the pool's mutex
    int helpers_inside = 0;  // guarded by the pool's mutex
    std::atomic<int64_t> next{0};
    const pthread_t caller = pthread_self();
    int64_t worked = 0;  // nanoseconds of the caller, in a team

    void work() {
        for (;;) {
            const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= units) return;
            function(context, begin, std::min(begin + chunk, units));
        }
    }

    void work_in_team() {
        const int64_t begin = pthread_equal(pthread_self(), caller) ? nanoseconds() : 0;
        work();
        if (begin) worked = nanoseconds() - begin;
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

std::atomic<int64_t> left_alone_until{0};

// Helpers that sleep between jobs. The caller works too, and waits only for chunks that a helper has begun: one that
// wakes late, or whose core is taken by another process or by torch's spinning team, costs nothing but its help.
class Pool {
  public:
    void run(Job& job) {
        const int wanted = job.helpers_wanted;  // helpers lower the job's own number as soon as it is in the queue
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (helpers_.size() < static_cast<size_t>(wanted) && start_helper()) caller_cpu_ = -1;
            jobs_.push_back(&job);
            keep_off_my_core();
        }
        for (int i = 0; i < wanted; ++i) wake_.notify_one();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        const auto mine = std::find(jobs_.begin(), jobs_.end(), &job);
        if (mine != jobs_.end()) jobs_.erase(mine);
        done_.wait(lock, [&] { return job.helpers_inside == 0; });
    }

  private:
    bool start_helper() {
        try {
            std::thread helper([this] { help(); });
            helpers_.push_back(helper.native_handle());
            helper.detach();
            return true;
        } catch (const std::system_error&) {
            return false;  // no thread to be had: the caller does the work
        }
    }

    // A helper that wakes while torch's team spins on every other core is put behind the caller, on the caller's own,
    // and the caller does all the work. So helpers may use any core but that one.
    void keep_off_my_core() {
#ifdef __linux__
        const int cpu = sched_getcpu();
        if (cpu == caller_cpu_) return;
        caller_cpu_ = cpu;
        cpu_set_t allowed;
        if (cpu < 0 || pthread_getaffinity_np(pthread_self(), sizeof(allowed), &allowed) != 0) return;
        if (CPU_COUNT(&allowed) > 1) CPU_CLR(cpu, &allowed);
        for (const pthread_t helper : helpers_) pthread_setaffinity_np(helper, sizeof(allowed), &allowed);
#endif
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
    std::vector<pthread_t> helpers_;
    int caller_cpu_ = -1;
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
    const int64_t begin = team ? nanoseconds() : 0;
    if (team && begin >= left_alone_until.load(std::memory_order_relaxed)) {
        team([](void* data) { static_cast<Job*>(data)->work_in_team(); }, &job, static_cast<unsigned>(useful), 0);
        const int64_t end = nanoseconds();
        if (end - begin > kLate + 2 * job.worked) left_alone_until.store(end + kLeftAlone, std::memory_order_relaxed);
        return;
    }
    pool.load()->run(job);
}

}  // namespace fastdiff
