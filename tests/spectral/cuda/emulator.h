// CUDA on a CPU, as much of it as the kernels need: each thread of a block is a fibre.
#define EMULATED
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define DEVICE inline
#define KERNEL extern "C" void
#define SHARED_MEMORY() unsigned char* shared = emulated::memory

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct Index {
    int x, y;
};
static Index threadIdx, blockIdx, gridDim;

namespace emulated {
unsigned char* memory;

// What the lanes of a warp hand each other; two in turn, because no lane is two steps ahead.
struct Meeting {
    uint64_t given[2][32];
    int arrived = 0, count = 0;
};

std::vector<ucontext_t> fibres;
std::vector<Meeting> warps;
int running, block_arrived, block_count;

// Where each fibre goes on, and the one that runs them. Unlike swapcontext, this needs no system calls.
struct Place {
    jmp_buf at;
};

std::vector<Place> places;
Place main_place;

void yield() {
    if (!_setjmp(places[running].at)) _longjmp(main_place.at, 1);
}

const uint64_t* exchange(uint64_t value) {
    Meeting& warp = warps[running / 32];
    const int count = warp.count;
    warp.given[count % 2][running % 32] = value;
    if (++warp.arrived == 32) {
        warp.arrived = 0, ++warp.count;
    } else {
        while (warp.count == count) yield();
    }
    return warp.given[count % 2];
}

float from_half(unsigned bits) {
    const uint16_t x = bits;
    _Float16 y;
    memcpy(&y, &x, 2);
    return y;
}

unsigned to_half(float x) {
    const _Float16 y = x;
    uint16_t bits;
    memcpy(&bits, &y, 2);
    return bits;
}
}  // namespace emulated

inline void __syncthreads() {
    using namespace emulated;
    const int count = block_count;
    if (++block_arrived == static_cast<int>(fibres.size())) {
        block_arrived = 0, ++block_count;
    } else {
        while (block_count == count) yield();
    }
}

inline void __syncwarp() { emulated::exchange(0); }

template <class T>
inline T __ldg(const T* p) { return *p; }

inline float bits_to_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}

inline unsigned float_to_bits(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

inline unsigned pack(float low, float high) {
    return emulated::to_half(high) << 16 | emulated::to_half(low);
}

inline unsigned bfloat16(float x) {
    const unsigned bits = float_to_bits(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline unsigned pack_bfloat16(float low, float high) { return bfloat16(high) << 16 | bfloat16(low); }

inline float from_float16(unsigned short x) { return emulated::from_half(x); }

inline unsigned multiply_pair(unsigned x, unsigned y) {
    using emulated::from_half;
    return pack(from_half(x & 0xffff) * from_half(y & 0xffff), from_half(x >> 16) * from_half(y >> 16));
}

inline unsigned largest_of_warp(unsigned x) {
    const uint64_t* given = emulated::exchange(x);
    uint64_t largest = 0;
    for (int i = 0; i < 32; ++i) largest = given[i] > largest ? given[i] : largest;
    return largest;
}

inline float of_lane_xor(float x, int bits) {
    const uint64_t* given = emulated::exchange(float_to_bits(x));
    return bits_to_float(given[emulated::running % 32 ^ bits]);
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline unsigned larger_pair(unsigned x, unsigned y) {
    const unsigned low = (x & 0xffff) > (y & 0xffff) ? x : y, high = x >> 16 > y >> 16 ? x : y;
    return (high & 0xffff0000) | (low & 0xffff);
}

inline void copy_async(void* to, const void* from, bool exists) {
    // Fails, as a GPU would, where an address is not a multiple of the size.
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) abort();
    if (exists) {
        memcpy(to, from, 16);
    } else {
        memset(to, 0, 16);
    }
}

inline void wait_for_copies() {}

// Fragments by the PTX ISA: lane = 4 * row + column / 2 in 8x8 matrices of 16 bits.
inline uint4 load_transposed(const unsigned short* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) abort();
    const uint64_t* rows = emulated::exchange(reinterpret_cast<uint64_t>(p));
    const int lane = emulated::running % 32;
    unsigned r[4];
    for (int m = 0; m < 4; ++m) {
        const auto* low = reinterpret_cast<const unsigned short*>(rows[8 * m + lane % 4 * 2]);
        const auto* high = reinterpret_cast<const unsigned short*>(rows[8 * m + lane % 4 * 2 + 1]);
        r[m] = static_cast<unsigned>(high[lane / 4]) << 16 | low[lane / 4];
    }
    // Nobody writes before everybody has read.
    emulated::exchange(0);
    return {r[0], r[1], r[2], r[3]};
}

inline void multiply_add(float (&d)[4], const uint4& a, unsigned b0, unsigned b1) {
    using emulated::from_half;
    const int lane = emulated::running % 32;
    static float left[64][16][16], right[64][16][8];
    const int warp = emulated::running / 32;
    const unsigned regs[4] = {a.x, a.y, a.z, a.w}, of_b[2] = {b0, b1};
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
        left[warp][row][column] = from_half(regs[i] & 0xffff);
        left[warp][row][column + 1] = from_half(regs[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
        const int row = lane % 4 * 2 + i * 8, column = lane / 4;
        right[warp][row][column] = from_half(of_b[i] & 0xffff);
        right[warp][row + 1][column] = from_half(of_b[i] >> 16);
    }
    emulated::exchange(0);
    for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        for (int k = 0; k < 16; ++k) d[r] += left[warp][row][k] * right[warp][k][column];
    }
    emulated::exchange(0);
}

namespace emulated {
void (*entry)(void*);
void* arguments;
std::vector<char> done;

// Whether threads take turns in any order, some more often than others, as they may on a GPU.
bool is_shuffled = false;
uint64_t state;

// Return a number below a bound (Lehmer's generator, as std::minstd_rand).
int random_below(int bound) {
    state = state * 48271 % 2147483647;
    return state % bound;
}

void start() {
    entry(arguments);
    done[running] = 1;
    _longjmp(main_place.at, 1);
}

// Run a fibre until it yields or ends.
void resume(bool has_begun) {
    if (_setjmp(main_place.at)) return;
    if (has_begun) _longjmp(places[running].at, 1);
    setcontext(&fibres[running]);
}

// Run a kernel with a grid of x * y blocks; shared memory is full of NaN before.
template <class Kernel>
void launch(int x, int y, int threads, size_t bytes, Kernel kernel) {
    constexpr size_t STACK = 1 << 17;
    std::vector<unsigned char> storage(bytes + 16);
    memory = storage.data() + 16 - reinterpret_cast<uintptr_t>(storage.data()) % 16;
    char* stacks = new char[threads * STACK];
    fibres.resize(threads), places.resize(threads), done.resize(threads), warps.assign(threads / 32, {});
    std::vector<int> order(threads);
    std::vector<char> begun(threads);
    for (int i = 0; i < threads; ++i) order[i] = i;
    gridDim = {x, y};
    entry = [](void* p) { (*static_cast<Kernel*>(p))(); };
    arguments = &kernel;
    for (int block = 0; block < x * y; ++block) {
        blockIdx = {block % x, block / x};
        memset(memory, 0xff, bytes);
        block_arrived = 0;
        for (int i = 0; i < threads; ++i) {
            done[i] = begun[i] = 0;
            getcontext(&fibres[i]);
            fibres[i].uc_stack.ss_sp = &stacks[i * STACK];
            fibres[i].uc_stack.ss_size = STACK;
            fibres[i].uc_link = nullptr;
            makecontext(&fibres[i], start, 0);
        }
        const int slow = random_below(threads / 32);  // a warp that others overtake
        for (int left = threads; left > 0;) {
            for (int i = threads - 1; is_shuffled && i > 0; --i) {
                std::swap(order[i], order[random_below(i + 1)]);
            }
            for (int next = 0; next < threads; ++next) {
                running = order[next];
                if (done[running]) continue;
                if (is_shuffled && random_below(running / 32 == slow ? 30 : 3)) continue;
                threadIdx = {running, 0};
                resume(begun[running]);
                begun[running] = 1, left -= done[running];
            }
        }
    }
    delete[] stacks;
}
}  // namespace emulated

extern "C" void shuffle(unsigned seed) {
    emulated::is_shuffled = seed > 0;
    emulated::state = seed;
}
