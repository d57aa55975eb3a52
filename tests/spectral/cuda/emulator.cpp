// The kernels of filter.cu, emulated, with C functions that launch them.
#include "emulator.h"
#include SOURCE

#if CORRELATE
extern "C" void launch_correlate_maps(int x, int y, int threads, size_t bytes, const u16* g,
                                      const u16* map, Complex* gradient, const uint4* basis_h,
                                      const uint4* basis_w, int height, int width, int channels) {
    emulated::launch(x, y, threads, bytes, [=] {
        correlate_maps(g, map, gradient, basis_h, basis_w, height, width, channels);
    });
}
#else
extern "C" void launch_filter_maps(int x, int y, int threads, size_t bytes, const u16* map,
                                   const Complex* weight, u16* result, const uint4* basis_h,
                                   const uint4* basis_w, int height, int width, int channels,
                                   float sign) {
    emulated::launch(x, y, threads, bytes, [=] {
        filter_maps(map, weight, result, basis_h, basis_w, height, width, channels, sign);
    });
}
#endif
