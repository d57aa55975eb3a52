// The kernel NAME of a source, emulated, with a C function that launches it as CUDA's driver does.
#include "emulator.h"
#include SOURCE

template <class... Arguments, size_t... I>
void launch_with(void (*kernel)(Arguments...), std::index_sequence<I...>, int x, int y, int threads,
                 size_t bytes, void** pointers) {
    emulated::launch(x, y, threads, bytes, [=] {
        kernel(*static_cast<std::remove_cv_t<Arguments>*>(pointers[I])...);
    });
}

template <class... Arguments>
void launch_kernel(void (*kernel)(Arguments...), int x, int y, int threads, size_t bytes,
                   void** pointers) {
    launch_with(kernel, std::index_sequence_for<Arguments...>(), x, y, threads, bytes, pointers);
}

extern "C" void launch(int x, int y, int threads, size_t bytes, void** pointers) {
    launch_kernel(NAME, x, y, threads, bytes, pointers);
}
