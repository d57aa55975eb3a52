// Instructions of NVIDIA GPUs, by what they do.
// tests/spectral/cuda/emulator.h has the same functions for CPUs.
//
// A source with a KERNEL is given WARPS (of a block of threads) and RESIDENT (how many blocks a
// multiprocessor has room for).

#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
#define SHARED_MEMORY() extern __shared__ __align__(16) unsigned char shared[]

DEVICE u32 address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Add the product of a 16x16 and a 16x8 matrix of float16 to a 16x8 matrix of float32.
DEVICE void multiply_add(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Load four 8x8 matrices of 16 bits, transposed; lane i points to row i % 8 of matrix i / 8.
DEVICE uint4 load_transposed(const u16* p) {
    uint4 r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(address(p))
                 : "memory");
    return r;
}

DEVICE u32 largest_of_warp(u32 x) { return __reduce_max_sync(~0u, x); }

// Return the value of the lane whose number differs in these bits.
DEVICE float of_lane_xor(float x, int bits) { return __shfl_xor_sync(~0u, x, bits); }

DEVICE u32 pack(float low, float high) {  // to float16
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

DEVICE u32 pack_bfloat16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

DEVICE float from_float16(u16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}

DEVICE u32 multiply_pair(u32 x, u32 y) {  // of float16
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}

// Copy 16 bytes to shared memory without waiting, or fill with zeros.
DEVICE void copy_async(void* to, const void* from, bool exists) {
    const int size = exists ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from),
                 "r"(size)
                 : "memory");
}

DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DEVICE u32 larger_pair(u32 x, u32 y) { return __vmaxu2(x, y); }  // of unsigned 16-bit integers

DEVICE float bits_to_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }
#endif

DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }
