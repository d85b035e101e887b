// Runs what the CUDA kernels' threads do, on the CPU: the same functions over the same numbering of quads, a block at a
// time. tests/native/test_cuda_emulated.py compares the results with the CPU kernels, bit for bit.
#include <vector>

#include "cuda/update_quad.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;

template <bool kPlain, bool kWide>
void update_grid(const UpdateLaunch& u, int quads_per_thread) {
    const int64_t index = u.p.step ? *u.p.step : u.p.row;
    const Row row = reinterpret_cast<const Row*>(u.p.table)[index];
    const int64_t per_block = int64_t{kThreads} * quads_per_thread;
    std::vector<UpdateInputs<kPlain>> in(per_block);
    for (int64_t first = 0; first < u.grid.units; first += per_block) {
        bool bad = false;
        for (int64_t k = 0; k < per_block; ++k)
            if (first + k < u.grid.units) load_update<kPlain, kWide>(u, first + k, in[k]);
        for (int64_t k = 0; k < per_block; ++k)
            if (first + k < u.grid.units) bad |= finish_update<kPlain, kWide>(u, row, in[k]);
        if (bad && u.p.nonfinite && *u.p.nonfinite > index) *u.p.nonfinite = index;
    }
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
    const UpdateLaunch u{*p, Grid::of(p->batch, p->n), !narrow && is_wide_state(*p)};
    const bool plain = !general && is_plain(*p), wide = u.wide_state && has_wide_views(*p);
    if (plain)
        wide ? update_grid<true, true>(u, 2) : update_grid<true, false>(u, 2);
    else
        wide ? update_grid<false, true>(u, 1) : update_grid<false, false>(u, 1);
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
