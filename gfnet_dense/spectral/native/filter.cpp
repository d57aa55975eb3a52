// The global filter y = F^-1(K . F x) of channels-last maps, and its gradients, on a CPU.
//
// Every SIMD register holds the same cell of neighbouring channels, so a plain Fourier transform
// over cells keeps all lanes busy and needs no shuffles. A unit of work is one image and one
// register's width of channels ("block"):
//
//   1. Rows.     Two real rows a, b go through one complex transform of a + i b. Their half spectra
//                fall out of its sum and difference with its own mirror image.
//   2. Columns.  Of the half spectrum: transform, multiply by K, transform back.
//   3. Rows.     Back, two at a time.
//
// The gradient of the map is the filter with the conjugate of K. The gradient of K is the product
// of two half spectra, summed over the batch.
//
// An inverse transform is a forward one with the real and imaginary parts of its input and output
// exchanged. That costs nothing here, so only forward transforms exist. No transform is scaled:
// one factor, applied with K, stands for all.
//
// Results do not depend on the number of threads: it only decides who computes a unit.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>

namespace {

using Index = std::ptrdiff_t;

// ---------------------------------------------------------------------------------------------
// Vectors: GCC's vector types, which clang has, too. No intrinsics: one source for all processors.

#ifndef VECTOR_BYTES
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#endif

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

template <class T>
constexpr int lanes = VECTOR_BYTES / sizeof(T);

// A complex number in every lane.
template <class T>
struct Cell {
  Vector<T, lanes<T>> re, im;
};

template <class T>
INLINE Cell<T> operator+(Cell<T> a, Cell<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
INLINE Cell<T> operator-(Cell<T> a, Cell<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
INLINE Cell<T> multiply(Cell<T> a, T re, T im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

// Reads or writes `count` channels, at most a register full. Memory need not be aligned.
template <class V>
INLINE V load(const void* from, Index bytes) {
  V v;
  if (bytes >= Index(sizeof v)) {
    std::memcpy(&v, from, sizeof v);
  } else {
    v = V{};
    std::memcpy(&v, from, bytes);
  }
  return v;
}
template <class V>
INLINE void store(void* to, V v, Index bytes) {
  if (bytes >= Index(sizeof v))
    std::memcpy(to, &v, sizeof v);
  else
    std::memcpy(to, &v, bytes);
}

template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

// ---------------------------------------------------------------------------------------------
// Types of maps: how lanes are read and written. 16-bit types are computed in float.

struct BFloat16 {
  std::uint16_t value;
};
struct Float16 {
  std::uint16_t value;
};
constexpr int N32 = lanes<float>;
using F32 = Vector<float, N32>;
using U32 = Vector<std::uint32_t, N32>;
using U16 = Vector<std::uint16_t, N32>;

template <class S, class T>
struct Storage {  // the type computed in
  static INLINE Vector<T, lanes<T>> read(const S* p, Index count) {
    return load<Vector<T, lanes<T>>>(p, count * sizeof(S));
  }
  static INLINE void write(S* p, Vector<T, lanes<T>> v, Index count) {
    store(p, v, count * sizeof(S));
  }
};

template <>
struct Storage<BFloat16, float> {
  static INLINE F32 read(const BFloat16* p, Index count) {
    return bits<F32>(__builtin_convertvector(load<U16>(p, count * 2), U32) << 16);
  }
  static INLINE void write(BFloat16* p, F32 v, Index count) {  // to nearest, ties to even
    const U32 u = bits<U32>(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const U32 nan = (u >> 16) | 0x40;
    const U32 result = (u & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    store(p, __builtin_convertvector(result, U16), count * 2);
  }
};

template <>
struct Storage<Float16, float> {
  static INLINE F32 read(const Float16* p, Index count) {
    const U32 h = __builtin_convertvector(load<U16>(p, count * 2), U32);
    const F32 finite = bits<F32>((h & 0x7fff) << 13) * 0x1p112f;  // right for subnormals, too
    const U32 special = (h & 0x7c00) == 0x7c00 ? U32{} + 0x7f800000u : U32{};
    return bits<F32>(bits<U32>(finite) | special | (h & 0x8000) << 16);
  }
  static INLINE void write(Float16* p, F32 v, Index count) {  // to nearest, ties to even
    const U32 u = bits<U32>(v), magnitude = u & 0x7fffffff;
    const U32 normal = (magnitude - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    // An addition rounds a subnormal: its unit in the last place is that of 0.5 in float.
    const U32 subnormal = bits<U32>(bits<F32>(magnitude) + 0.5f) - bits<U32>(F32{} + 0.5f);
    U32 h = magnitude < (113u << 23) ? subnormal : normal;
    h = magnitude >= bits<std::uint32_t>(65520.0f) ? U32{} + 0x7c00 : h;
    h = magnitude > 0x7f800000 ? U32{} + 0x7e00 : h;
    store(p, __builtin_convertvector(h | (u >> 16 & 0x8000), U16), count * 2);
  }
};

// Interleaved real and imaginary parts, as spectra lie in memory.
#ifdef __clang__
template <int From, int Step, class V, int... I>
INLINE V pick(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (Step == 2 ? 2 * I + From : I / 2 + I % 2 * n + From)...);
}
#else
template <int From, int Step, class V, int... I>
INLINE V pick(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  using Int = std::conditional_t<sizeof(a[0]) == 4, std::int32_t, std::int64_t>;
  const Vector<Int, n> order = {(Step == 2 ? 2 * I + From : I / 2 + I % 2 * n + From)...};
  return __builtin_shuffle(a, b, order);
}
#endif

template <class T>
INLINE Cell<T> load_interleaved(const T* p, Index count) {
  using V = Vector<T, lanes<T>>;
  constexpr auto all = std::make_integer_sequence<int, lanes<T>>();
  constexpr Index n = lanes<T>;
  const V a = load<V>(p, 2 * count * sizeof(T));
  const V b = 2 * count > n ? load<V>(p + n, (2 * count - n) * sizeof(T)) : V{};
  return {pick<0, 2>(a, b, all), pick<1, 2>(a, b, all)};
}
template <class T>
INLINE void store_interleaved(T* p, Cell<T> c, Index count) {
  constexpr auto all = std::make_integer_sequence<int, lanes<T>>();
  constexpr Index n = lanes<T>;
  store(p, pick<0, 1>(c.re, c.im, all), 2 * count * sizeof(T));
  if (2 * count > n) store(p + n, pick<n / 2, 1>(c.re, c.im, all), (2 * count - n) * sizeof(T));
}

// ---------------------------------------------------------------------------------------------
// Butterflies: the transform of P cells in registers.

constexpr double sine(double x) {  // to the last digits of a double for |x| <= pi
  double term = x, sum = x;
  for (int i = 1; i < 20; i++) {
    term *= -x * x / ((2 * i) * (2 * i + 1));
    sum += term;
  }
  return sum;
}
constexpr double PI = 3.141592653589793238462643383279502884;

// exp(-2 pi i j / P), known to the compiler.
template <int P>
struct Roots {
  double re[P], im[P];
  constexpr Roots() : re(), im() {
    for (int j = 0; j < P; j++) {
      const int k = 2 * j < P ? j : j - P;
      re[j] = sine(PI / 2 - 2 * PI * (k < 0 ? -k : k) / P);
      im[j] = -sine(2 * PI * k / P);
    }
  }
};
template <int P>
constexpr Roots<P> roots{};

template <int P, class T>
INLINE void butterfly(Cell<T>* u);

template <class T>
INLINE void butterfly2(Cell<T>* u) {
  const Cell<T> t = u[0] - u[1];
  u[0] = u[0] + u[1];
  u[1] = t;
}

template <class T>
INLINE void butterfly4(Cell<T>* u) {
  const Cell<T> a = u[0] + u[2], b = u[0] - u[2], c = u[1] + u[3], d = u[1] - u[3];
  u[0] = a + c;
  u[1] = {b.re + d.im, b.im - d.re};
  u[2] = a - c;
  u[3] = {b.re - d.im, b.im + d.re};
}

// An odd number of cells: sums and differences of mirror images, half the products.
template <int P, class T>
INLINE void butterfly_odd(Cell<T>* u) {
  constexpr int H = P / 2;
  Cell<T> sum[H + 1], difference[H + 1], total = u[0];
  UNROLL for (int j = 1; j <= H; j++) {
    sum[j] = u[j] + u[P - j];
    difference[j] = u[j] - u[P - j];
    total = total + sum[j];
  }
  UNROLL for (int k = 1; k <= H; k++) {
    Cell<T> even = u[0], odd = {};
    UNROLL for (int j = 1; j <= H; j++) {
      const T c = T(roots<P>.re[j * k % P]), s = T(roots<P>.im[j * k % P]);
      even.re += sum[j].re * c;
      even.im += sum[j].im * c;
      odd.re -= difference[j].im * s;
      odd.im += difference[j].re * s;
    }
    u[k] = even + odd;
    u[P - k] = even - odd;
  }
  u[0] = total;
}

// A x B cells: A-point transforms, rotations by constants, B-point transforms.
template <int A, int B, class T>
INLINE void butterfly_composite(Cell<T>* u) {
  constexpr int P = A * B;
  Cell<T> v[B][A];
  UNROLL for (int j = 0; j < B; j++) {
    UNROLL for (int i = 0; i < A; i++) v[j][i] = u[B * i + j];
    butterfly<A>(v[j]);
    UNROLL for (int i = 1; i < A; i++) {
      if (4 * i * j == P)
        v[j][i] = {v[j][i].im, -v[j][i].re};
      else if (j)
        v[j][i] = multiply(v[j][i], T(roots<P>.re[i * j]), T(roots<P>.im[i * j]));
    }
  }
  UNROLL for (int i = 0; i < A; i++) {
    Cell<T> w[B];
    UNROLL for (int j = 0; j < B; j++) w[j] = v[j][i];
    butterfly<B>(w);
    UNROLL for (int j = 0; j < B; j++) u[i + A * j] = w[j];
  }
}

template <int P, class T>
INLINE void butterfly(Cell<T>* u) {
  if constexpr (P == 2)
    butterfly2(u);
  else if constexpr (P == 4)
    butterfly4(u);
  else if constexpr (P % 4 == 0)
    butterfly_composite<4, P / 4>(u);
  else if constexpr (P % 2 == 0)
    butterfly_composite<2, P / 2>(u);
  else
    butterfly_odd<P>(u);
}

// ---------------------------------------------------------------------------------------------
// Transforms of any length, a pass for each factor. They work in place, where a small transform
// fits the first cache, and do not sort: frequencies come out in an order of their own, and the way
// back takes them in that order.

template <class T>
struct Pass {
  Index radix;
  Index length;             // of the transforms that it takes apart, each into `radix` shorter ones
  std::vector<T> twiddles;  // (length / radix, radix, 2)
  std::vector<T> matrix;    // of a large radix
};

// A larger radix is a product with the matrix of its transform, OUTPUTS results at a time.
constexpr Index LARGEST_BUTTERFLY = 13, OUTPUTS = 4;

// A plan is made anew for every call: that takes a microsecond for some thirty cells, more for
// large prime factors, and spares a lock that a forked process could find locked for ever.
template <class T>
struct Plan {
  std::vector<Pass<T>> passes;
  std::vector<Index> position;  // of a frequency, after the transform in frequency

  explicit Plan(Index n) {
    std::vector<T> roots(2 * n);  // of unity
    for (Index j = 0; j < n; j++) {
      roots[2 * j] = T(std::cos(2 * PI * double(j) / double(n)));
      roots[2 * j + 1] = T(-std::sin(2 * PI * double(j) / double(n)));
    }
    for (Index length = n; length > 1;) {
      const Index radix = next_radix(length), rest = length / radix;
      Pass<T> pass{radix, length, {}, {}};
      for (Index q = 0; q < rest; q++)
        for (Index j = 0; j < radix; j++)
          for (int part = 0; part < 2; part++)
            pass.twiddles.push_back(roots[2 * q * j * (n / length) + part]);
      if (radix > LARGEST_BUTTERFLY) pass.matrix = matrix_of(radix, roots.data(), n / radix);
      passes.push_back(std::move(pass));
      length = rest;
    }
    for (Index k = 0; k < n; k++) {
      Index digits = k, at = 0;
      for (const Pass<T>& pass : passes) {
        at += digits % pass.radix * (pass.length / pass.radix);
        digits /= pass.radix;
      }
      position.push_back(at);
    }
  }

  // Half the matrix of an odd radix: for OUTPUTS frequencies at a time, for every element, their
  // cosines and sines. `roots` has those of the radix at every `step`.
  static std::vector<T> matrix_of(Index radix, const T* roots, Index step) {
    const Index half = radix / 2;
    std::vector<T> matrix((half + OUTPUTS - 1) / OUTPUTS * half * 2 * OUTPUTS);
    T* to = matrix.data();
    for (Index first = 1; first <= half; first += OUTPUTS) {
      Index power[OUTPUTS] = {};  // j * (first + o) modulo radix
      for (Index j = 1; j <= half; j++, to += 2 * OUTPUTS)
        for (Index o = 0; o < OUTPUTS; o++) {
          power[o] += first + o;
          power[o] -= power[o] >= radix ? radix : 0;
          to[o] = roots[2 * power[o] * step];
          to[OUTPUTS + o] = roots[2 * power[o] * step + 1];
        }
    }
    return matrix;
  }

  // Powers of two in eights as far as possible without a two, then the odd primes.
  static Index next_radix(Index n) {
    int twos = 0;
    while (n % (Index(2) << twos) == 0) twos++;
    if (twos) return twos % 3 == 0 ? 8 : twos >= 2 ? 4 : 2;
    Index p = 3;
    while (n % p) p += 2;
    return p;
  }
};

// In frequency: from elements in order to frequencies in their positions. In time: from
// frequencies' positions to elements in order, by the same steps transposed, last one first. Both
// are F.
enum class Decimation { in_frequency, in_time };

// Memory to bring into the cache beside a transform, two lines for each of its cells: the strides
// are too long for the processor to foresee, and many lines at once make it wait.
struct Fetch {
  const void* of_first[2] = {};  // the lines of the first cell
  Index step = 0, across = 0;    // bytes from element to element, and across `width` transforms

  // Fetches the lines of one cell.
  template <bool to_write>
  INLINE void ahead(Index element, Index i) const {
    for (const void* line : of_first)
      if (line)
        __builtin_prefetch(static_cast<const char*>(line) + element * step + i * across, to_write);
  }

  // The share of a pass: the first two fetch one line each.
  Fetch of_pass(Index i, Index passes) const {
    if (passes == 1) return *this;
    return {{i < 2 ? of_first[i] : nullptr, nullptr}, step, across};
  }
};

// Element e stands for `width` transforms side by side, from x + e * pitch on.
template <int P, Decimation decimation, class T>
void run_pass(const Pass<T>& pass, Cell<T>* x, Index length, Index pitch, Index width,
              const Fetch& fetch) {
  constexpr bool in_time = decimation == Decimation::in_time;
  const Index rest = pass.length / P, step = rest * pitch;
  const auto sweep = [&](Index q, auto has_twiddles) ALWAYS_INLINE {
    const T* twiddle = pass.twiddles.data() + 2 * q * P;
    for (Index first = q; first < length; first += pass.length) {
      for (Index i = 0; i < width; i++) {
        // On the way there most lines are read next, on the way back all are written.
        for (int j = 0; j < P; j++) fetch.template ahead<in_time>(first + j * rest, i);
        Cell<T>* at = x + first * pitch + i;
        Cell<T> u[P];
        UNROLL for (int j = 0; j < P; j++) {
          u[j] = at[j * step];
          if (in_time && has_twiddles && j)
            u[j] = multiply(u[j], twiddle[2 * j], twiddle[2 * j + 1]);
        }
        butterfly<P>(u);
        UNROLL for (int j = 0; j < P; j++) {
          if (!in_time && has_twiddles && j)
            u[j] = multiply(u[j], twiddle[2 * j], twiddle[2 * j + 1]);
          at[j * step] = u[j];
        }
      }
    }
  };
  sweep(0, std::false_type());
  for (Index q = 1; q < rest; q++) sweep(q, std::true_type());
}

// The same for an odd radix beyond the butterflies. `scratch` has room for `radix` cells, and the
// memory before it belongs to the same block.
template <Decimation decimation, class T>
void run_large_pass(const Pass<T>& pass, Cell<T>* x, Index length, Index pitch, Index width,
                    const Fetch& fetch, Cell<T>* scratch) {
  constexpr bool in_time = decimation == Decimation::in_time;
  const Index radix = pass.radix, half = radix / 2, rest = pass.length / radix;
  const Index step = rest * pitch;
  Cell<T>*const sum = scratch - 1, *const difference = sum + half;  // from 1 to half
  const auto apply = [&](Index q, Index element, Index i) ALWAYS_INLINE {
    Cell<T>* const at = x + element * pitch + i;
    const auto turned = [&](Index j, Cell<T> value) ALWAYS_INLINE {
      const T* twiddle = pass.twiddles.data() + 2 * (q * radix + j);
      return multiply(value, twiddle[0], twiddle[1]);
    };
    const Cell<T> zeroth = at[0];
    Cell<T> total = zeroth;
    for (Index j = 1; j <= half; j++) {
      Cell<T> a = at[j * step], b = at[(radix - j) * step];
      if (in_time) a = turned(j, a), b = turned(radix - j, b);
      sum[j] = a + b;
      difference[j] = a - b;
      total = total + sum[j];
    }
    const auto emit = [&](Index j, Cell<T> value) ALWAYS_INLINE {
      fetch.template ahead<in_time>(element + j * rest, i);
      at[j * step] = in_time ? value : turned(j, value);
    };
    const T* root = pass.matrix.data();
    for (Index first = 1; first <= half; first += OUTPUTS) {
      Cell<T> even[OUTPUTS], odd[OUTPUTS] = {};
      UNROLL for (int o = 0; o < OUTPUTS; o++) even[o] = zeroth;
      for (Index j = 1; j <= half; j++, root += 2 * OUTPUTS) {
        const Cell<T> s = sum[j], d = difference[j];
        UNROLL for (int o = 0; o < OUTPUTS; o++) {
          even[o].re += s.re * root[o];
          even[o].im += s.im * root[o];
          odd[o].re -= d.im * root[OUTPUTS + o];
          odd[o].im += d.re * root[OUTPUTS + o];
        }
      }
      for (int o = 0; o < OUTPUTS && first + o <= half; o++) {
        emit(first + o, even[o] + odd[o]);
        emit(radix - first - o, even[o] - odd[o]);
      }
    }
    emit(0, total);
  };
  for (Index q = 0; q < rest; q++)
    for (Index first = q; first < length; first += pass.length)
      for (Index i = 0; i < width; i++) apply(q, first, i);
}

template <Decimation decimation, class T>
void transform(const Plan<T>& plan, Cell<T>* x, Index pitch, Index width, Cell<T>* scratch,
               const Fetch& fetch = {}) {
  const Index length = plan.position.size(), passes = plan.passes.size();
  for (Index i = 0; i < passes; i++) {
    const Pass<T>& pass = plan.passes[decimation == Decimation::in_time ? passes - 1 - i : i];
    const Fetch share = fetch.of_pass(i, passes);
    switch (pass.radix) {
#define CASE(P)                                                    \
  case P:                                                          \
    run_pass<P, decimation>(pass, x, length, pitch, width, share); \
    break;
      CASE(2) CASE(3) CASE(4) CASE(5) CASE(7) CASE(8) CASE(11) CASE(13)
#undef CASE
      default:
        run_large_pass<decimation>(pass, x, length, pitch, width, share, scratch);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Threads.

// Starts a parallel region: GOMP_parallel of the OpenMP runtime that torch runs on. May be null.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Calls work(thread, unit) for every unit. Threads take runs of units, ever shorter ones:
// neighbours share blocks of the spectrum or pages of memory, and at the end nobody waits for long.
template <class Work>
void run_units(Parallel parallel, int threads, Index units, const Work& work) {
  struct Shared {
    const Work& work;
    Index units;
    int threads;
    std::atomic<Index> next;
    std::atomic<int> thread;
  } shared{work, units, threads, {0}, {0}};
  void (*const body)(void*) = [](void* argument) {
    Shared& s = *static_cast<Shared*>(argument);
    const int thread = s.thread++;
    for (Index first = s.next; first < s.units;) {
      const Index last = first + (s.units - first) / (2 * s.threads) + 1;
      if (!s.next.compare_exchange_weak(first, last)) continue;  // `first` is what it is by now
      for (Index unit = first; unit < last; unit++) s.work(thread, unit);
      first = s.next;
    }
  };
  if (threads > units) threads = int(units);
  if (threads <= 1) return body(&shared);
  if (parallel) return parallel(body, &shared, threads, 0);
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    while (int(others.size()) < threads - 1) others.emplace_back(body, &shared);
  } catch (const std::exception&) {  // no more threads: those that there are do the work
  }
  body(&shared);
  for (std::thread& other : others) other.join();
}

// Asks for large pages: fewer page faults in new memory, and fewer misses of address translation.
inline void prefer_large_pages(void* memory, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = std::uintptr_t(1) << 21;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + page - 1) / page * page;
  const std::uintptr_t last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Memory for one call. Pages that the system has just handed out cost more than a small filter, so
// the last workspace is kept for the next call, unless it is large. Calls of several threads at
// once find none and make their own.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : block_(spare_.exchange(nullptr)) {
    if (block_ && block_->bytes >= bytes) return;
    std::free(block_);
    constexpr std::size_t page = std::size_t(1) << 21;
    bytes = (bytes + sizeof(Block) + page - 1) / page * page;
    void* memory = std::aligned_alloc(page, bytes);
    if (!memory) throw std::bad_alloc();
    prefer_large_pages(memory, bytes);
    block_ = new (memory) Block{bytes - sizeof(Block)};
  }
  ~Workspace() { std::free(block_->bytes <= LARGEST_SPARE ? spare_.exchange(block_) : block_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return block_ + 1; }

 private:
  static constexpr std::size_t LARGEST_SPARE = std::size_t(1) << 25;
  struct alignas(64) Block {
    std::size_t bytes;
  };
  static std::atomic<Block*> spare_;
  Block* block_;
};
std::atomic<Workspace::Block*> Workspace::spare_{nullptr};

// ---------------------------------------------------------------------------------------------
// The steps of a filter and of its adjoint.

enum class DType : int { float32, float64, bfloat16, float16 };

// A map (B, H, W, C) with channels side by side; the other strides are in values.
struct Map {
  const void* data;
  Index batch, row, column;
};

struct Range {
  Index first, last;
};

template <class T>
struct Steps {
  static constexpr Index N = lanes<T>;

  DType dtype;
  Index batch, height, width, channels;
  Index half = width / 2 + 1;
  Index blocks = (channels + N - 1) / N;
  // Half a spectrum of a block: rows are padded, so that the cells of a column, when their distance
  // is a power of two, do not all fall on the same set of a cache.
  Index pitch = half | 1;
  Index plane = height * pitch;
  // Columns are transformed in groups, as many side by side as take 32 KB; fewer were slower.
  Index group = clamp(32768 / sizeof(Cell<T>) / height, 1, half);
  Index groups = (half + group - 1) / group;
  Index pairs = (height + 1) / 2;  // of rows
  // The sum of a map in bfloat16 can leave the range of float, so it is scaled down and up again.
  T down = dtype == DType::bfloat16 ? T(std::exp2(-std::ceil(std::log2(2.0 * height * width)))) : 1;
  T up = 1 / down;
  Plan<T> rows{width}, columns{height};

  // glibc takes memory above 32 MB from the system in every call. With small pages, page faults took
  // a quarter of the time there.
  void prepare_result(void* y) const {
    const std::size_t value = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
    const std::size_t bytes = batch * height * width * channels * value;
    if (bytes > std::size_t(1) << 25) prefer_large_pages(y, bytes);
  }

  static Index clamp(Index value, Index low, Index high) {
    return value < low ? low : value > high ? high : value;
  }
  Index channels_of(Index block) const { return clamp(channels - block * N, 0, N); }
  Range columns_of(Index g) const {
    return {g * group, clamp((g + 1) * group, 0, half)};
  }
  // The last row of an odd number is its own pair: computed twice, to the same result.
  Range pair_of(Index p) const { return {2 * p, clamp(2 * p + 1, 0, height - 1)}; }

  // Of one thread: a pair of rows and scratch for their transform, or scratch for one of columns.
  Index buffer_cells() const { return width + (height > width ? height : width); }

  template <class Use>
  void with_storage(const Use& use) const {
    if constexpr (std::is_same<T, double>::value)
      use(double());
    else if (dtype == DType::float32)
      use(float());
    else if (dtype == DType::bfloat16)
      use(BFloat16());
    else
      use(Float16());
  }

  // Twice the half spectra of a pair of rows of a map. Both are of one image: of two maps, the
  // rounding errors of the larger would drown the smaller.
  void forward_rows(const Map& x, Cell<T>* z, Index pair, Index image, Index block,
                    Cell<T>* buffer) const {
    const Range h = pair_of(pair), next = pair_of(clamp(pair + 1, 0, pairs - 1));
    with_storage([&](auto storage) {
      using S = decltype(storage);
      const Index n = channels_of(block);
      const S* const p = static_cast<const S*>(x.data) + image * x.batch + block * N;
      for (Index w = 0; w < width; w++) {
        Cell<T> cell = {Storage<S, T>::read(p + h.first * x.row + w * x.column, n),
                        Storage<S, T>::read(p + h.last * x.row + w * x.column, n)};
        if (std::is_same<S, BFloat16>::value) cell = {cell.re * down, cell.im * down};
        buffer[w] = cell;
      }
      transform<Decimation::in_frequency>(
          rows, buffer, 1, 1, buffer + width,
          {{p + next.first * x.row, p + next.last * x.row}, x.column * Index(sizeof(S)), 0});
    });
    Cell<T>*const to_a = z + h.first * pitch, *const to_b = z + h.last * pitch;
    const Index* const position = rows.position.data();  // read once, not after every store
    for (Index k = 0; k < half; k++) {
      const Cell<T> p = buffer[position[k]], q = buffer[position[k ? width - k : 0]];
      to_a[k] = {p.re + q.re, p.im - q.im};
      to_b[k] = {p.im + q.im, q.re - p.re};
    }
  }

  // Two real rows of a map from their half spectra, which are exchanged (see above).
  void inverse_rows(const Cell<T>* z, void* map, Index pair, Index image, Index block,
                    Cell<T>* buffer) const {
    const Range h = pair_of(pair);
    const Cell<T>*const from_a = z + h.first * pitch, *const from_b = z + h.last * pitch;
    const Index* const position = rows.position.data();
    for (Index k = 0; k < half; k++) {
      const Cell<T> a = from_a[k], b = from_b[k];
      if (k == 0 || 2 * k == width) {
        // Such a column is its own mirror image: the imaginary part of the spectrum does not act.
        buffer[position[k]] = {b.im, a.im};
      } else {
        buffer[position[k]] = {b.im + a.re, a.im - b.re};
        buffer[position[width - k]] = {b.im - a.re, a.im + b.re};
      }
    }
    with_storage([&](auto storage) {
      using S = decltype(storage);
      const Index n = channels_of(block), row = width * channels;
      S* const p = static_cast<S*>(map) + image * height * row + block * N;
      transform<Decimation::in_time>(
          rows, buffer, 1, 1, buffer + width,
          {{p + h.first * row, p + h.last * row}, channels * Index(sizeof(S)), 0});
      const T factor = std::is_same<S, BFloat16>::value ? up : T(1);
      // One row after the other: cells of both would often fall on the same set of the cache.
      for (Index w = 0; w < width; w++)
        Storage<S, T>::write(p + h.first * row + w * channels, buffer[w].im * factor, n);
      for (Index w = 0; w < width; w++)
        Storage<S, T>::write(p + h.last * row + w * channels, buffer[w].re * factor, n);
    });
  }

  // Columns k of a plane, in place.
  template <Decimation decimation>
  void transform_columns(Cell<T>* z, Range k, Cell<T>* buffer, const Fetch& fetch = {}) const {
    transform<decimation>(columns, z + k.first, pitch, k.last - k.first, buffer, fetch);
  }

  Index weight_at(Index h, Index k, Index block) const {
    return ((h * half + k) * channels + block * N) * 2;
  }

  // Columns k of a spectrum.
  Fetch fetch_of(const T* weight, Range k, Index block) const {
    const T* const p = weight + weight_at(0, k.first, block);
    const Index across = channels * 2 * Index(sizeof(T));
    return {{p, p + N}, half * across, across};
  }

  // K z or conj(K) z, exchanged, in place. `kept`, unless null, is where K of the block lies,
  // scaled, in the order of its use; it is filled here if not `is_kept`. The product is one line of
  // code for both, so that it rounds alike.
  void multiply(Cell<T>* z, Range k, const T* weight, bool conjugate, Index block,
                Cell<T>* kept = nullptr, bool is_kept = false) const {
    const T scale = 1 / (T(2) * T(height) * T(width)), scale_im = conjugate ? -scale : scale;
    const Index n = channels_of(block);
    if (kept) kept += k.first * height;
    for (Index h = 0; h < height; h++) {
      Cell<T>* const c = z + columns.position[h] * pitch;
      for (Index i = k.first; i < k.last; i++) {
        Cell<T> w;
        if (is_kept) {
          w = *kept++;
        } else {
          w = load_interleaved(weight + weight_at(h, i, block), n);
          w = {w.re * scale, w.im * scale_im};
          if (kept) *kept++ = w;
        }
        const Cell<T> v = c[i];
        c[i] = {v.re * w.im + v.im * w.re, v.re * w.re - v.im * w.im};
      }
    }
  }

  // Adds F g . conj(F x) to `sum`, which starts with the first image; with the last it is scaled
  // and goes to `gweight`.
  void correlate(const Cell<T>* g, const Cell<T>* x, Cell<T>* sum, T* gweight, Range k,
                 Index image, Index block) const {
    const Index n = channels_of(block);
    for (Index h = 0; h < height; h++)
      for (Index i = k.first; i < k.last; i++) {
        const Index at = columns.position[h] * pitch + i;
        const Cell<T> a = g[at], b = x[at];
        Cell<T> total = {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
        if (image > 0) total = total + sum[at];
        if (image + 1 < batch) {
          sum[at] = total;
          continue;
        }
        // Both factors are doubled. A column counts twice unless it is its own mirror image.
        const T multiplicity = i == 0 || 2 * i == width ? 1 : 2;
        const T scale = multiplicity / (T(4) * T(height) * T(width)) * up * up;
        store_interleaved(gweight + weight_at(h, i, block), {total.re * scale, total.im * scale},
                          n);
      }
  }
};

// ---------------------------------------------------------------------------------------------
// Sharing out the work.
//
// A unit is a chunk of blocks that lie side by side, so that lines and pages of memory serve
// several of them once they are found, of one image or of all. Larger chunks are faster for maps
// that come from memory, smaller ones leave room in a cache for maps that are there, as those of a
// few images often are. With fewer units than threads, the threads take parts of the rows and
// columns of a unit, step by step.

struct Split {
  Index blocks, chunk, units, parts;

  // `images` is the batch if a unit is a chunk of one image, 1 if it is a chunk of all.
  Split(Index blocks, Index images, Index batch, int threads) : blocks(blocks), chunk(1) {
    const Index largest = (batch < 8 ? 128 : 256) / VECTOR_BYTES;
    Index least = blocks * images;
    for (Index c = 1; c <= largest; c++) {
      const Index rounds = ((blocks + c - 1) / c * images + threads - 1) / threads;
      if (rounds * c <= least) least = rounds * c, chunk = c;
    }
    units = (blocks + chunk - 1) / chunk * images;
    parts = units && units < threads ? (threads + units - 1) / units : 1;
  }
  // How many units have their planes in the workspace at a time.
  Index places(int threads) const { return parts == 1 ? threads : units; }
  Range blocks_of(Index i) const {
    return {i * chunk, (i + 1) * chunk < blocks ? (i + 1) * chunk : blocks};
  }
  template <class Use>
  void for_part(Index n, Index part, const Use& use) const {
    for (Index i = n * part / parts; i < n * (part + 1) / parts; i++) use(i);
  }
};

// Calls step(i, thread, place, unit, part) for steps i of all parts of all units, in order. `place`
// says which of as many places as threads is the unit's own until its last step.
template <class Step>
void run_steps(Parallel parallel, int threads, const Split& split, Index steps, const Step& step) {
  if (split.parts == 1)
    return run_units(parallel, threads, split.units, [&](int thread, Index unit) {
      for (Index i = 0; i < steps; i++) step(i, thread, thread, unit, 0);
    });
  for (Index i = 0; i < steps; i++)
    run_units(parallel, threads, split.units * split.parts, [&](int thread, Index n) {
      step(i, thread, n / split.parts, n / split.parts, n % split.parts);
    });
}

struct Sizes {
  Index batch, height, width, channels;
};

// A filter as three steps; z holds the spectrum of a unit.
template <class T>
void filter(Parallel parallel, int threads, DType dtype, Sizes sizes, const Map& x,
            const void* spectrum, bool conjugate, void* y) {
  const Steps<T> s{dtype, sizes.batch, sizes.height, sizes.width, sizes.channels};
  const T* const weight = static_cast<const T*>(spectrum);
  const Split split(s.blocks, s.batch, s.batch, threads);
  const Index planes = split.chunk * s.plane, places = split.places(threads);
  // A thread that filters several images with the same blocks of the spectrum keeps them in the
  // order of their use: in memory they are scattered. For fewer images the copy would not pay.
  const bool keeps = split.parts == 1 && s.batch >= 2 * threads;
  std::vector<Index> kept_chunk(keeps ? threads : 0, -1);
  const Index kept_plane = keeps ? s.height * s.half : 0;
  const Index own = split.chunk * kept_plane + s.buffer_cells();  // of a thread
  const Workspace workspace((places * planes + threads * own) * sizeof(Cell<T>));
  Cell<T>* const cells = static_cast<Cell<T>*>(workspace.data());
  s.prepare_result(y);

  run_steps(parallel, threads, split, 3, [&](Index step, int thread, Index place, Index unit,
                                             Index part) {
    const Index chunk = unit / s.batch, image = unit % s.batch;
    Cell<T>* const buffer = cells + places * planes + thread * own;
    Cell<T>* const kept = buffer + s.buffer_cells();
    const auto for_blocks = [&](const auto& use) {
      const Range blocks = split.blocks_of(chunk);
      for (Index block = blocks.first; block < blocks.last; block++)
        use(block, cells + place * planes + (block - blocks.first) * s.plane,
            keeps ? kept + (block - blocks.first) * kept_plane : nullptr);
    };
    if (step == 0) {
      split.for_part(s.pairs, part, [&](Index pair) {
        for_blocks([&](Index block, Cell<T>* z, Cell<T>*) {
          s.forward_rows(x, z, pair, image, block, buffer);
        });
      });
    } else if (step == 1) {
      const bool is_kept = keeps && kept_chunk[thread] == chunk;
      split.for_part(s.groups, part, [&](Index group) {
        for_blocks([&](Index block, Cell<T>* z, Cell<T>* kept) {
          const Range k = s.columns_of(group);
          s.template transform_columns<Decimation::in_frequency>(
              z, k, buffer, is_kept ? Fetch() : s.fetch_of(weight, k, block));
          s.multiply(z, k, weight, conjugate, block, kept, is_kept);
          s.template transform_columns<Decimation::in_time>(z, k, buffer);
        });
      });
      if (keeps && !is_kept) kept_chunk[thread] = chunk;
    } else {
      split.for_part(s.pairs, part, [&](Index pair) {
        for_blocks([&](Index block, Cell<T>* z, Cell<T>*) {
          s.inverse_rows(z, y, pair, image, block, buffer);
        });
      });
    }
  });
}

// The same three steps for every image, one after the other; here a unit is a chunk of all images.
// Without gx only the gradient of the spectrum is computed.
template <class T>
void adjoint(Parallel parallel, int threads, DType dtype, Sizes sizes, const Map& g, const Map& x,
             const void* spectrum, void* gx, void* gspectrum) {
  const Steps<T> s{dtype, sizes.batch, sizes.height, sizes.width, sizes.channels};
  const T* const weight = static_cast<const T*>(spectrum);
  T* const gweight = static_cast<T*>(gspectrum);
  if (s.batch == 0) std::memset(gweight, 0, s.weight_at(s.height, 0, 0) * sizeof(T));
  const Split split(s.blocks, 1, s.batch, threads);
  const Index planes = split.chunk * 3 * s.plane, places = split.places(threads);
  const Workspace workspace((places * planes + threads * s.buffer_cells()) * sizeof(Cell<T>));
  Cell<T>* const cells = static_cast<Cell<T>*>(workspace.data());
  if (gx) s.prepare_result(gx);

  run_steps(parallel, threads, split, 3 * s.batch, [&](Index step, int thread, Index place,
                                                       Index unit, Index part) {
    const Index image = step / 3;
    Cell<T>* const buffer = cells + places * planes + thread * s.buffer_cells();
    const auto for_blocks = [&](const auto& use) {
      const Range blocks = split.blocks_of(unit);
      for (Index block = blocks.first; block < blocks.last; block++)
        use(block, cells + place * planes + (block - blocks.first) * 3 * s.plane);
    };
    if (step % 3 == 0) {
      split.for_part(s.pairs, part, [&](Index pair) {
        for_blocks([&](Index block, Cell<T>* z) {
          s.forward_rows(g, z, pair, image, block, buffer);
          s.forward_rows(x, z + s.plane, pair, image, block, buffer);
        });
      });
    } else if (step % 3 == 1) {
      split.for_part(s.groups, part, [&](Index group) {
        for_blocks([&](Index block, Cell<T>* z) {
          const Range k = s.columns_of(group);
          s.template transform_columns<Decimation::in_frequency>(
              z, k, buffer, gx ? s.fetch_of(weight, k, block) : Fetch());
          s.template transform_columns<Decimation::in_frequency>(
              z + s.plane, k, buffer,
              image + 1 == s.batch ? s.fetch_of(gweight, k, block) : Fetch());
          s.correlate(z, z + s.plane, z + 2 * s.plane, gweight, k, image, block);
          if (!gx) return;
          s.multiply(z, k, weight, true, block);
          s.template transform_columns<Decimation::in_time>(z, k, buffer);
        });
      });
    } else if (gx) {
      split.for_part(s.pairs, part, [&](Index pair) {
        for_blocks([&](Index block, Cell<T>* z) {
          s.inverse_rows(z, gx, pair, image, block, buffer);
        });
      });
    }
  });
}

template <class Run>
int guarded(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// What Python calls. Both return 0, or 1 if there is not enough memory.

extern "C" int gfnet_dense_filter(Parallel parallel, int threads, int dtype, Index batch,
                                  Index height, Index width, Index channels, const void* x,
                                  Index x_batch, Index x_row, Index x_column, const void* weight,
                                  int conjugate, void* y) {
  return guarded([&] {
    const auto run = DType(dtype) == DType::float64 ? filter<double> : filter<float>;
    run(parallel, threads, DType(dtype), {batch, height, width, channels},
        {x, x_batch, x_row, x_column}, weight, conjugate, y);
  });
}

// `weight` and `gx` may both be null: then only the gradient of the spectrum is computed.
extern "C" int gfnet_dense_adjoint(Parallel parallel, int threads, int dtype, Index batch,
                                   Index height, Index width, Index channels, const void* g,
                                   Index g_batch, Index g_row, Index g_column, const void* x,
                                   Index x_batch, Index x_row, Index x_column, const void* weight,
                                   void* gx, void* gweight) {
  return guarded([&] {
    const auto run = DType(dtype) == DType::float64 ? adjoint<double> : adjoint<float>;
    run(parallel, threads, DType(dtype), {batch, height, width, channels},
        {g, g_batch, g_row, g_column}, {x, x_batch, x_row, x_column}, weight, gx, gweight);
  });
}
