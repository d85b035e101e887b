// Every CPU operation with random sizes, from several threads at once, for the sanitizers: buffers end where a kernel
// may read or write last, and each result on several threads must have the bits of that on one. A seed and a number of
// calls a thread are the arguments; tools/sanitize runs it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "fastdiff.h"

using namespace fastdiff;

namespace {

constexpr int kThreads = 4, kCallers = 4;

// Memory of its own for each tensor, so that AddressSanitizer's red zones lie at both of its ends.
struct Random {
    std::mt19937_64 engine;
    std::vector<std::unique_ptr<char[]>> held;

    int64_t in(int64_t low, int64_t high) { return low + static_cast<int64_t>(engine() % (high - low + 1)); }
    bool chance(int percent) { return in(1, 100) <= percent; }
    int64_t size() { return chance(20) ? in(0, 3) : chance(80) ? in(1, 300) : in(300, 70000); }

    float* floats(int64_t count) {
        float* at = static_cast<float*>(bytes(count * 4));
        for (int64_t i = 0; i < count; ++i) at[i] = static_cast<float>(in(-4000, 4000)) / 1000;
        return at;
    }
    // Numbers of a dtype: all bit patterns of a moderate size.
    void* numbers(int64_t count, int dtype) {
        if (dtype == kFloat32) return floats(count);
        uint16_t* at = static_cast<uint16_t*>(bytes(count * 2));
        for (int64_t i = 0; i < count; ++i)
            at[i] =
                static_cast<uint16_t>((dtype == kFloat16 ? 0x3000 : 0x3f00) + in(0, 0x3ff) + (chance(50) ? 0x8000 : 0));
        return at;
    }
    void* bytes(int64_t count) {
        held.emplace_back(new char[count]);
        std::memset(held.back().get(), 0xee, count);
        return held.back().get();
    }
    int64_t* seeds(int64_t batch, int64_t below) {
        int64_t* at = static_cast<int64_t*>(bytes(batch * 8));
        for (int64_t b = 0; b < batch; ++b) at[b] = in(0, below);
        return at;
    }
    NoiseKey key(int64_t batch) {
        if (chance(50)) return NoiseKey{nullptr, nullptr, static_cast<uint64_t>(engine()), in(0, 1000)};
        return NoiseKey{seeds(batch, INT64_MAX - 1), seeds(batch, 1 << 30), 0, 0};
    }
    // The strides of [batch, n]: dense, with gaps, or with two dimensions exchanged as channels_last has them.
    View strides(int64_t n) {
        View v;
        v.dtype = static_cast<int>(in(0, 2));
        v.inner = n > 0 ? n : 1, v.inner_stride = 1, v.batch_stride = n;
        if (n > 1 && n % 2 == 0 && chance(30)) v.inner = n / 2, v.inner_stride = 2, v.outer_stride = 1;
        if (chance(30)) v.inner_stride *= 2, v.outer_stride *= 2, v.batch_stride = 2 * n + 3;
        return v;
    }
    int64_t extent(const View& v, int64_t batch, int64_t n) {
        if (batch == 0 || n == 0) return 0;
        return (batch - 1) * v.batch_stride + (n - 1) / v.inner * v.outer_stride +
               (v.inner < n ? v.inner - 1 : n - 1) * v.inner_stride + 1;
    }
    View view(int64_t batch, int64_t n) {
        View v = strides(n);
        v.data = numbers(extent(v, batch, n), v.dtype);
        return v;
    }
};

// A buffer that a kernel writes, twice: once by one thread, once by several.
struct Output {
    char* data;
    int64_t bytes;
};

struct Call {
    const char* name;
    std::function<void(int)> run;
    std::vector<Output> outputs;
};

int width(int dtype) { return dtype == kFloat32 ? 4 : 2; }

View written(Random& r, Call& call, int64_t batch, int64_t n) {
    View v = r.view(batch, n);
    call.outputs.push_back({static_cast<char*>(v.data), r.extent(v, batch, n) * width(v.dtype)});
    return v;
}

float* written_floats(Random& r, Call& call, int64_t count) {
    float* at = r.floats(count);
    call.outputs.push_back({reinterpret_cast<char*>(at), count * 4});
    return at;
}

Call randn_call(Random& r) {
    Call call{"randn", {}, {}};
    RandnParams p;
    p.batch = r.in(0, 3), p.n = r.size();
    p.out = written(r, call, p.batch, p.n);
    p.key = r.key(p.batch), p.draw = static_cast<uint32_t>(r.engine()), p.stream = static_cast<uint32_t>(r.in(0, 5));
    call.run = [p](int threads) { randn_cpu(p, threads); };
    return call;
}

Call add_noise_call(Random& r) {
    Call call{"add_noise", {}, {}};
    AddNoiseParams p;
    p.batch = r.in(0, 3), p.n = r.size(), p.T = r.in(1, 9);
    p.x0 = r.view(p.batch, p.n);
    p.out = written(r, call, p.batch, p.n);
    if (r.chance(50)) p.noise = r.view(p.batch, p.n);
    if (r.chance(50)) p.noise_out = written(r, call, p.batch, p.n);
    p.coefficients = r.floats(2 * p.T);
    p.timestep = r.in(-1, p.T);
    if (r.chance(50)) p.timesteps = r.seeds(p.batch, p.T);
    p.key = r.key(p.batch);
    call.run = [p](int threads) { add_noise_cpu(p, threads); };
    return call;
}

Call update_call(Random& r) {
    Call call{"update", {}, {}};
    UpdateParams p;
    p.batch = r.in(0, 3), p.n = r.size(), p.row = r.in(0, 2);
    const int64_t all = p.batch * p.n;
    float* table = r.floats(3 * 48);
    for (int row = 0; row < 3; ++row) {
        float* at = table + 48 * row;
        for (int term = 9; term < 36; ++term)
            if (r.chance(50)) at[term] = 0;
        at[7] = r.chance(50) ? INFINITY : 1.0f;
        for (int i = 0; i < 3; ++i) at[36 + i] = static_cast<float>(r.in(0, 3));
        at[39] = static_cast<float>(r.in(-1, 3)), at[40] = static_cast<float>(r.in(0, 1));
        at[41] = -9, at[42] = -1, at[45] = static_cast<float>(row), at[46] = 1, at[47] = 1;
    }
    p.table = table;
    p.n_outputs = static_cast<int>(r.in(1, 3));
    for (int i = 0; i < p.n_outputs; ++i) p.outputs[i] = r.view(p.batch, p.n);
    if (r.chance(30)) p.variance = r.view(p.batch, p.n);
    p.x = r.floats(all), p.anchor = r.floats(all), p.gradient = r.floats(all);
    for (auto& slot : p.slots) slot = r.floats(all);
    if (r.chance(50)) p.noise = r.floats(all);
    if (r.chance(30)) p.gain = r.floats(p.batch);
    if (r.chance(30)) p.clip = r.floats(2 * p.batch);
    if (r.chance(30)) p.mask = r.floats(all), p.known = r.floats(all);
    if (p.mask && r.chance(50)) p.known_noise = r.floats(all);
    p.x_out = written_floats(r, call, all);
    p.anchor_out = written_floats(r, call, all);
    for (auto& slot : p.slots_out) slot = written_floats(r, call, all);
    if (r.chance(50)) p.x0_out = written_floats(r, call, all);
    if (r.chance(50)) p.model_input = written(r, call, p.batch, p.n);
    p.key = r.key(p.batch);
    if (r.chance(50)) {
        p.nonfinite = r.seeds(1, 9);
        call.outputs.push_back({reinterpret_cast<char*>(p.nonfinite), 8});
    }
    if (r.chance(50)) p.deviance = written_floats(r, call, 3 * p.batch * ((p.n + kDevianceBlock - 1) / kDevianceBlock));
    call.run = [p](int threads) { update_cpu(p, threads); };
    return call;
}

Call group_norm_silu_call(Random& r) {
    Call call{"group_norm_silu", {}, {}};
    GroupNormSiluParams p;
    p.batch = r.in(1, 3), p.pixels = r.chance(50) ? r.in(1, 70) : r.in(1, 1100), p.groups = r.in(1, 4);
    const int64_t channels = p.groups * r.in(1, 9);
    p.channels2 = r.chance(30) ? r.in(0, channels - 1) : 0, p.channels = channels - p.channels2;
    p.dtype = static_cast<int>(r.in(0, 2)), p.channels_last = r.chance(50), p.silu = r.chance(50);
    const auto planes = [&](int64_t count) {
        Planes at;
        at.data = r.numbers(p.batch * count * p.pixels, p.dtype);
        at.batch_stride = count * p.pixels;
        at.channel_stride = p.channels_last ? 1 : p.pixels, at.pixel_stride = p.channels_last ? count : 1;
        return at;
    };
    p.x = planes(p.channels), p.out = planes(channels);
    if (p.channels2) p.x2 = planes(p.channels2);
    const auto numbers = [&](int64_t rows) {
        Channels at;
        at.dtype = r.chance(50) ? kFloat32 : p.dtype;
        at.data = r.numbers(rows * channels, at.dtype), at.batch_stride = rows > 1 ? channels : 0;
        return at;
    };
    if (r.chance(50)) p.weight = numbers(1);
    if (r.chance(50)) p.bias = numbers(1);
    if (r.chance(50)) p.add = numbers(r.chance(50) ? p.batch : 1);
    call.outputs.push_back({static_cast<char*>(p.out.data), p.batch * channels * p.pixels * width(p.dtype)});
    call.run = [p](int threads) { group_norm_silu_cpu(p, threads); };
    return call;
}

Call conv_epilogue_call(Random& r) {
    Call call{"conv_epilogue", {}, {}};
    ConvEpilogueParams p;
    p.batch = r.in(0, 3), p.rows = r.in(1, 40), p.length = r.chance(90) ? r.in(1, 70) : r.in(1, 3000);
    p.channels_last = r.chance(50), p.scale = 0.75f;
    const int64_t channels = p.channels_last ? p.length : p.rows, all = p.batch * p.rows * p.length;
    const int dtype = static_cast<int>(r.in(0, 2));
    const auto rows = [&] {
        View v;
        v.dtype = dtype, v.data = r.numbers(all, dtype);
        v.batch_stride = p.rows * p.length, v.outer_stride = p.length, v.inner_stride = 1;
        if (r.chance(30)) v.outer_stride = 1, v.inner_stride = p.rows;
        return v;
    };
    p.x = rows(), p.out = rows();
    if (r.chance(50)) p.residual = rows();
    if (r.chance(50)) {
        const bool each = r.chance(50) && p.batch > 1;
        p.shift = r.floats((each ? p.batch : 1) * channels), p.shift_stride = each ? channels : 0;
    }
    call.outputs.push_back({static_cast<char*>(p.out.data), all * width(dtype)});
    call.run = [p](int threads) { conv_epilogue_cpu(p, threads); };
    return call;
}

Call winograd_conv_call(Random& r) {
    Call call{"winograd_conv", {}, {}};
    WinogradConvParams p;
    p.batch = r.in(1, 2), p.height = r.in(1, 11), p.width = r.in(1, 11);
    p.dtype = static_cast<int>(r.in(0, 2)), p.upsample = r.chance(50);
    p.pairs = p.dtype == kBFloat16 && r.chance(50);
    p.channels = 16 * (p.pairs ? 2 : 1) * r.in(1, 10), p.features = 16 * r.in(1, 5);
    const int64_t panels = (p.features + 31) / 32, points = p.upsample ? 9 : 16, up = p.upsample ? 4 : 1;
    p.weights = p.pairs ? r.numbers(panels * points * 2 * p.channels * 16, kBFloat16)
                        : r.numbers(panels * p.channels * 9 * 32, kFloat32);
    const int64_t pixels = p.batch * p.height * p.width, results = up * pixels * p.features;
    p.x = r.numbers(pixels * p.channels, p.dtype);
    if (r.chance(50)) p.bias = r.floats(p.features);
    if (r.chance(50)) p.residual = r.numbers(results, p.dtype);
    p.out = r.numbers(results, p.dtype);
    call.outputs.push_back({static_cast<char*>(p.out), results * width(p.dtype)});
    call.run = [p](int threads) { winograd_conv_cpu(p, threads); };
    return call;
}

Call attention_call(Random& r) {
    Call call{"attention", {}, {}};
    AttentionParams p;
    p.batch = r.in(1, 2), p.heads = r.in(1, 3), p.channels = r.in(1, 70);
    p.queries = r.in(1, 130), p.keys = r.in(1, 200), p.dtype = static_cast<int>(r.in(0, 2)), p.scale = 0.1f;
    const auto heads = [&](int64_t rows) {
        const int64_t row = p.heads * p.channels;
        return Heads{r.numbers(p.batch * rows * row, p.dtype), rows * row, p.channels, row};
    };
    p.q = heads(p.queries), p.k = heads(p.keys), p.v = heads(p.keys), p.out = heads(p.queries);
    call.outputs.push_back({static_cast<char*>(p.out.data), p.batch * p.out.batch_stride * width(p.dtype)});
    call.run = [p](int threads) { attention_cpu(p, threads); };
    return call;
}

// One random call on one thread and on several; false where their bits differ.
bool agrees(uint64_t seed) {
    Random r;
    r.engine.seed(seed);
    Call (*const calls[])(Random&) = {randn_call,         add_noise_call,     update_call,   group_norm_silu_call,
                                      conv_epilogue_call, winograd_conv_call, attention_call};
    const Call call = calls[r.in(0, 6)](r);
    std::vector<std::vector<char>> before, alone;
    for (const Output& o : call.outputs) before.emplace_back(o.data, o.data + o.bytes);
    call.run(1);
    for (size_t i = 0; i < call.outputs.size(); ++i) {
        const Output& o = call.outputs[i];
        alone.emplace_back(o.data, o.data + o.bytes);
        std::copy(before[i].begin(), before[i].end(), o.data);
    }
    call.run(kThreads);
    for (size_t i = 0; i < call.outputs.size(); ++i)
        if (!std::equal(alone[i].begin(), alone[i].end(), call.outputs[i].data)) {
            std::printf("%s on %d threads differs from one: seed %llu\n", call.name, kThreads,
                        (unsigned long long)seed);
            return false;
        }
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device{}();
    const int64_t calls = count > 2 ? std::atoll(arguments[2]) : 1000;
    std::printf("stress: seed %llu, %lld calls on each of %d threads\n", (unsigned long long)seed, (long long)calls,
                kCallers);
    std::fflush(stdout);
    bool right = true;
    for (const char* simd : {"portable", "avx2", "avx512"}) {
        if (!set_cpu_simd(simd)) continue;
        bool agreed[kCallers] = {};
        std::vector<std::thread> callers;
        for (int caller = 0; caller < kCallers; ++caller)
            callers.emplace_back([&, caller] {
                bool all = true;
                for (int64_t i = 0; i < calls / 3; ++i) all = agrees(seed + (caller * calls + i) * 2654435761u) && all;
                agreed[caller] = all;
            });
        for (std::thread& caller : callers) caller.join();
        for (const bool one : agreed) right = right && one;
        std::printf("%s: %s\n", simd, right ? "right" : "wrong");
    }
    return right ? 0 : 1;
}
