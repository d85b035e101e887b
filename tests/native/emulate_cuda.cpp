// Runs what the CUDA kernels' threads do, on the CPU: the same functions over the same numbering of quads, a block at a
// time. tests/native/test_cuda_emulated.py compares the results with the CPU kernels, bit for bit.
#include <vector>

#include "cuda/update_quad.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;

template <bool kPlain, bool kWide, bool kDeviance>
void update_grid(const UpdateLaunch& u, int quads_per_thread) {
    const int64_t index = u.p.step ? *u.p.step : u.p.row;
    const Row row = reinterpret_cast<const Row*>(u.p.table)[index];
    const int64_t per_block = int64_t{kThreads} * quads_per_thread;
    std::vector<UpdateInputs<kPlain>> in(per_block);
    alignas(16) float block[kDevianceBlock];
    for (int64_t first = 0; first < u.grid.units; first += per_block) {
        bool bad = false;
        for (int64_t k = 0; k < per_block; ++k)
            if (first + k < u.grid.units) load_update<kPlain, kWide, kDeviance>(u, first + k, in[k]);
        for (int64_t k = 0; k < per_block; ++k) {
            if (first + k >= u.grid.units) continue;
            Float4& deviance = reinterpret_cast<Float4*>(block)[k % kThreads];
            bad |= finish_update<kPlain, kWide, kDeviance>(u, row, in[k], deviance);
            if (!kDeviance || k % kThreads != kThreads - 1 || !reads_z(row)) continue;
            const Quad& at = in[k - kThreads + 1].at;
            for (int half = kDevianceBlock / 2; half > 0; half /= 2)
                for (int i = 0; i < half; ++i) block[i] = block[i] + block[i + half];
            u.p.deviance[(index * u.p.batch + at.b) * (u.grid.quads / kThreads) + at.e / kDevianceBlock] = block[0];
        }
        if (bad && u.p.nonfinite && *u.p.nonfinite > index) *u.p.nonfinite = index;
    }
}

template <bool kDeviance>
void update_all(const UpdateLaunch& u, bool general) {
    const bool plain = !general && is_plain(u.p), wide = u.wide_state && has_wide_views(u.p);
    if (plain)
        wide ? update_grid<true, true, kDeviance>(u, 2) : update_grid<true, false, kDeviance>(u, 2);
    else
        wide ? update_grid<false, true, kDeviance>(u, 1) : update_grid<false, false, kDeviance>(u, 1);
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

// general and narrow ask for a kernel that the launcher would not have chosen; it must give the same bits.
extern "C" {

void emulate_randn(const RandnParams* p, bool narrow) {
    const Grid grid = Grid::of(p->batch, p->n);
    const bool wide = !narrow && is_wide(p->out, p->n);
    for (int64_t unit = grid.units - 1; unit >= 0; --unit)
        wide ? randn_quad<true>(*p, locate(grid, unit)) : randn_quad<false>(*p, locate(grid, unit));
}

void emulate_add_noise(const AddNoiseParams* p, bool narrow) {
    const Grid grid = Grid::of(p->batch, p->n);
    const bool wide = !narrow && has_wide_views(*p);
    for (int64_t unit = grid.units - 1; unit >= 0; --unit)
        wide ? add_noise_quad<true>(*p, locate(grid, unit)) : add_noise_quad<false>(*p, locate(grid, unit));
}

void emulate_update(const UpdateParams* p, bool general, bool narrow) {
    const UpdateLaunch u{*p, Grid::of(p->batch, p->n, p->deviance ? kThreads : 1), !narrow && is_wide_state(*p)};
    p->deviance ? update_all<true>(u, general) : update_all<false>(u, general);
}

// sample, first element and count of a quad, where no memory could hold the tensor
void emulate_locate(int64_t batch, int64_t n, int64_t unit, int64_t* out) {
    const Quad at = locate(Grid::of(batch, n), unit);
    out[0] = at.b;
    out[1] = at.e;
    out[2] = at.count;
    out[3] = at.flat;
}

int64_t size_of(int which) {
    const int64_t sizes[] = {sizeof(RandnParams), sizeof(AddNoiseParams), sizeof(UpdateParams)};
    return sizes[which];
}
}
