// x times a packed weight on a CPU, dequantized in registers: see native.py, which compiles this file.
//
// Every number of rows takes the same steps. Columns come in segments, whole groups or equal parts of one. Within a
// segment a row of x is multiplied by `code - midpoint`, a small whole number, exact in bfloat16; then the sum is
// multiplied by the scale. What a zero point adds is the same for all codes: the sum of the segment of x, times
// `(midpoint - zero) * scale`. So the rounding is that of float32 sums alone, and a row's result does not depend on
// the rows beside it, nor on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define WQ_BFLOAT16 1
#else
#define WQ_BFLOAT16 0
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 16;             // rows of W whose words lie side by side
constexpr int PARTS = BLOCK / LANES;  // vectors in a block
// For many rows, so many of x times so many vectors of outputs at once: sums, weights and one x fill the registers.
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr int WIDE = 3;
constexpr int SEGMENT = 512;        // columns, at most
constexpr int64_t PANEL = 96;       // steps, if segments are shorter: it fits in the first cache beside x
constexpr int64_t CHUNK = 512;      // rows of x that are worked on at once
constexpr int64_t GRAIN = 1 << 17;  // products for which a thread is worth waking
constexpr int DIMENSIONS = 8;       // of x, at most

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

[[gnu::always_inline]] inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// --- x and y: float32, float16, or the bits of bfloat16 ---

[[gnu::always_inline]] inline Floats widen(const float* x) { return load<Floats>(x); }

[[gnu::always_inline]] inline Floats widen(const uint16_t* x) {
  return (Floats)(__builtin_convertvector(load<Halves>(x), Words) << 16);
}

[[gnu::always_inline]] inline Floats widen(const _Float16* x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)load<Halves>(x));
#else
  Floats wide;
  for (int i = 0; i < LANES; ++i) wide[i] = static_cast<float>(x[i]);
  return wide;
#endif
}

[[gnu::always_inline]] inline void narrow(Floats x, float* to) { std::memcpy(to, &x, sizeof x); }

[[gnu::always_inline]] inline void narrow(Floats x, uint16_t* to) {  // to the nearest, of two to the even
  const Words bits = (Words)x;
  const Words nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const Halves half = __builtin_convertvector(x == x ? nearest : bits >> 16 | 64, Halves);
  std::memcpy(to, &half, sizeof half);
}

[[gnu::always_inline]] inline void narrow(Floats x, _Float16* to) {
#if defined(__AVX512F__)
  const Halves half = (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &half, sizeof half);
#else
  for (int i = 0; i < LANES; ++i) to[i] = static_cast<_Float16>(x[i]);
#endif
}

// --- weights ---

// Words that hold whole codes, and how many of them. But for 3 bits, even columns are in the low half of a word and odd
// ones in the high half.
template <int BITS>
struct Unit {
  static constexpr int words = BITS == 3 ? 3 : 1;
  static constexpr int columns = 32 * words / BITS;
  static constexpr int midpoint = 1 << (BITS - 1);
};

// The code of a column in the low bits; others may be above it.
template <int BITS>
inline Words code(const Words* words, int column) {
  const int bit = BITS == 3 ? 3 * column : 16 * (column % 2) + BITS * (column / 2);
  const int word = bit / 32, shift = bit % 32;
  const Words low = words[word] >> shift;
  return shift + BITS > 32 ? low | words[word + 1] << (32 - shift) : low;
}

// One column at a time, in float32.
struct Single {
  using Element = float;  // of x
  using Weight = Floats;
  static constexpr int columns = 1;

  template <int BITS>
  static Weight weight(const Words* words, int step) {
    const Words found = code<BITS>(words, step);
#if defined(__AVX512F__)
    if constexpr (BITS <= 4) {  // a lookup that reads four bits
      Floats table;
      for (int i = 0; i < 16; ++i) table[i] = static_cast<float>(i % (1 << BITS) - Unit<BITS>::midpoint);
      return (Floats)_mm512_permutexvar_ps((__m512i)found, (__m512)table);
    }
#endif
    return __builtin_convertvector((Ints)(found & ((1u << BITS) - 1)) - Unit<BITS>::midpoint, Floats);
  }

  [[gnu::always_inline]] static void add(Floats& sum, Weight weight, const float* x) {
    sum = multiply_add(weight, Floats{} + *x, sum);
  }
};

#if WQ_BFLOAT16
#if defined(__AVX512VBMI__)
constexpr uint64_t EVERY_OTHER_BYTE = 0xAAAAAAAAAAAAAAAA;

// The bytes of `code - 128` in bfloat16.
struct Halved {
  uint8_t bytes[256];

  constexpr explicit Halved(int shift) : bytes{} {
    for (int i = 0; i < 256; ++i)
      bytes[i] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, static_cast<float>(i - 128)) >> shift);
  }

  [[gnu::always_inline]] static __m512i look(const Halved& table, Words at) {
    const __m512i index = (__m512i)at;
    const auto quarter = [&](int i) { return _mm512_load_si512(table.bytes + 64 * i); };
    const __m512i below = _mm512_permutex2var_epi8(quarter(0), index, quarter(1));
    const __m512i above = _mm512_permutex2var_epi8(quarter(2), index, quarter(3));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), below, above);
  }

  static const Halved low, high;
};
alignas(64) constexpr Halved Halved::low{16}, Halved::high{24};
#endif

// Two columns at a time, in bfloat16, added up in float32.
struct Pair {
  using Element = uint16_t;
  using Weight = __m512i;
  static constexpr int columns = 2;

  template <int BITS>
  static __m512i table() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(i % (1 << BITS) - Unit<BITS>::midpoint);
      values[i] = static_cast<uint16_t>(load<uint32_t>(&value) >> 16);
    }
    return _mm512_load_si512(values);
  }

  template <int BITS>
  static Weight weight(const Words* words, int step) {
    if constexpr (BITS == 8) {
#if defined(__AVX512VBMI__)  // both halves of a weight by lookups, those of four columns at once
      const __m512i low = Halved::look(Halved::low, words[0]), high = Halved::look(Halved::high, words[0]);
      if (step == 0) return _mm512_mask_blend_epi8(EVERY_OTHER_BYTE, low, _mm512_slli_epi16(high, 8));
      return _mm512_mask_blend_epi8(EVERY_OTHER_BYTE, _mm512_srli_epi16(low, 8), high);
#else
      const __m512i codes = _mm512_and_si512(_mm512_srli_epi16((__m512i)words[0], 8 * step), _mm512_set1_epi16(255));
      const __m512i both = _mm512_sub_epi16(codes, _mm512_set1_epi16(128));
      const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16), odd = _mm512_srai_epi32(both, 16);
      const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(even));
      const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(odd));
      return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(low, 16), high);
#endif
    } else {
      __m512i index;  // of which the lookup reads five bits: the table repeats itself
      if constexpr (BITS == 3) {
        index = (__m512i)((code<3>(words, 2 * step) & 7) | code<3>(words, 2 * step + 1) << 16);
      } else {
        index = _mm512_srli_epi16((__m512i)words[0], BITS * step);
      }
      return _mm512_permutexvar_epi16(index, table<BITS>());
    }
  }

  [[gnu::always_inline]] static void add(Floats& sum, Weight weight, const uint16_t* x) {
    const __m512i both = _mm512_set1_epi32(load<int>(x));
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)both);
  }
};
#endif

// --- scales and zero points: of a block of rows and a group, 16 scales and then, if there are any, 16 bytes ---

struct Grid {
  const uint8_t* bytes;
  int64_t blocks, groups, size;
  bool wide, zeros;  // wide: scales in float32, else bfloat16

  const uint8_t* at(int64_t group, int64_t block) const { return bytes + (block * groups + group) * size; }

  Floats scale(const uint8_t* here, int part) const {
    return wide ? load<Floats>(here + 4 * LANES * part) : widen(reinterpret_cast<const uint16_t*>(here) + LANES * part);
  }

  template <int BITS>
  Floats below(const uint8_t* here, int part) const {  // how far the zero point is below the midpoint
    const Halves half = __builtin_convertvector(load<Bytes>(here + (wide ? 64 : 32) + LANES * part), Halves);
    return __builtin_convertvector(Unit<BITS>::midpoint - (Ints)__builtin_convertvector(half, Words), Floats);
  }
};

struct Problem {
  const uint32_t* packed;  // [blocks, words, 16]
  Grid grid;
  int64_t columns, words;
  int64_t segment, segments, per_group;  // columns in a segment, segments, segments in a group
};

// --- products ---

// What makes of a segment's products its share of the outputs of a vector.
struct Affine {
  Floats scale, base;
};

template <int BITS>
[[gnu::always_inline]] inline Affine affine(const Problem& p, int64_t segment, int64_t vector) {
  const uint8_t* here = p.grid.at(segment / p.per_group, vector / PARTS);
  const Floats scale = p.grid.scale(here, vector % PARTS);
  return {scale, p.grid.zeros ? p.grid.template below<BITS>(here, vector % PARTS) * scale : Floats{}};
}

// Adds it for M rows. sums: of the segment of x, for each row.
template <int M>
[[gnu::always_inline]] inline void finish(const Affine& by, bool zeros, const Floats* part, const float* sums,
                                          Floats* sum) {
  if (zeros) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      sum[m] = multiply_add(part[m], by.scale, multiply_add(by.base, Floats{} + sums[m], sum[m]));
  } else {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m] = multiply_add(part[m], by.scale, sum[m]);
  }
}

// M rows of x, of which the last may stand for rows that are not there.
template <class T, int M>
struct Rows {
  const T* at[M];
  int count;

  Rows(const T* x, int64_t columns, int64_t rows) : count(static_cast<int>(std::min<int64_t>(M, rows))) {
    for (int m = 0; m < M; ++m) at[m] = x + std::min(m, count - 1) * columns;
  }
};

// Few rows: M of them times N vectors of outputs; weights go from words to products in registers.
template <class How, int BITS, int M, int N>
void few(const Problem& p, const Rows<typename How::Element, M>& x, const float* sums, int64_t vector, Floats* out) {
  using U = Unit<BITS>;
  constexpr int steps = U::columns / How::columns;
  Floats sum[N][M] = {};
  const uint32_t* from[N];
  for (int n = 0; n < N; ++n)
    from[n] = p.packed + (vector + n) / PARTS * p.words * BLOCK + (vector + n) % PARTS * LANES;
  const int64_t next = p.words * N / PARTS;  // words until what is read after this
  int64_t column = 0;
  for (int64_t segment = 0; segment < p.segments; ++segment) {
    Floats part[N][M] = {};
    for (const int64_t end = column + p.segment; column < end; column += U::columns) {
      Words words[N][U::words];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
#pragma GCC unroll 3
        for (int w = 0; w < U::words; ++w) {
          words[n][w] = load<Words>(from[n] + w * BLOCK);
          __builtin_prefetch(from[n] + (next + w) * BLOCK);  // runs are too short for the processor to see the next
        }
        from[n] += U::words * BLOCK;
      }
#pragma GCC unroll 32
      for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          const auto weight = How::template weight<BITS>(words[n], step);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) How::add(part[n][m], weight, x.at[m] + column + step * How::columns);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      finish<M>(affine<BITS>(p, segment, vector + n), p.grid.zeros, part[n], sums + segment * M, sum[n]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) out[n * M + m] = sum[n][m];
}

template <class How>
inline int64_t panel_segments(const Problem& p) {
  return std::max<int64_t>(1, PANEL * How::columns / p.segment);
}

// Many rows: a run of segments of N vectors of outputs is dequantized once into a panel that stays in the core's cache.
template <class How, int BITS, int N>
void fill(const Problem& p, int64_t segment, int64_t vector, typename How::Weight* panel) {
  using U = Unit<BITS>;
  constexpr int steps = U::columns / How::columns;
  const int64_t units = p.segment / U::columns;
  for (int n = 0; n < N; ++n) {
    const uint32_t* from = p.packed + ((vector + n) / PARTS * p.words + segment * units * U::words) * BLOCK +
                           (vector + n) % PARTS * LANES;
    auto* to = panel + n;
    for (int64_t unit = 0; unit < units; ++unit, from += U::words * BLOCK) {
      Words words[U::words];
      for (int w = 0; w < U::words; ++w) words[w] = load<Words>(from + w * BLOCK);
#pragma GCC unroll 32
      for (int step = 0; step < steps; ++step, to += N) *to = How::template weight<BITS>(words, step);
    }
  }
}

template <class How, int BITS, int N>
void many(const Problem& p, const typename How::Element* x, int64_t rows, const float* sums, int64_t vector,
          typename How::Weight* panel, Floats* sum) {
  const int64_t steps = p.segment / How::columns, high = panel_segments<How>(p);
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  Affine by[PANEL * 2 / 32 * N];
  for (int64_t i = 0; i < blocks * N * ROWS; ++i) sum[i] = Floats{};
  for (int64_t first = 0; first < p.segments; first += high) {
    const int64_t last = std::min(first + high, p.segments);
    for (int64_t segment = first; segment < last; ++segment) {
      fill<How, BITS, N>(p, segment, vector, panel + (segment - first) * steps * N);
      for (int n = 0; n < N; ++n) by[(segment - first) * N + n] = affine<BITS>(p, segment, vector + n);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const Rows<typename How::Element, ROWS> here(x + block * ROWS * p.columns, p.columns, rows - block * ROWS);
      const auto* weight = panel;
      int64_t column = first * p.segment;
      for (int64_t segment = first; segment < last; ++segment) {
        Floats part[N][ROWS] = {};
        for (const int64_t end = column + p.segment; column < end; column += How::columns, weight += N) {
#pragma GCC unroll 8
          for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) How::add(part[n][m], weight[n], here.at[m] + column);
          }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          finish<ROWS>(by[(segment - first) * N + n], p.grid.zeros, part[n],
                       sums + (block * p.segments + segment) * ROWS, sum + (block * N + n) * ROWS);
        asm volatile("" ::: "memory");  // or GCC keeps a second copy of the sums, on the stack
      }
    }
  }
}

// --- calls ---

// The sums of the segments of M rows: [segments, M].
template <class T, int M>
void add_up(const Problem& p, const Rows<T, M>& x, float* sums) {
  for (int m = 0; m < x.count; ++m) {
    const T* from = x.at[m];
    for (int64_t segment = 0; segment < p.segments; ++segment, from += p.segment) {
      Floats parts = {};
      for (int64_t i = 0; i < p.segment; i += LANES) parts += widen(from + i);
      float sum = 0;
      for (int i = 0; i < LANES; ++i) sum += parts[i];
      sums[segment * M + m] = sum;
    }
  }
  for (int m = x.count; m < M; ++m)
    for (int64_t segment = 0; segment < p.segments; ++segment) sums[segment * M + m] = 0;
}

// Memory of a thread, kept: to get it anew from the system costs more than to fill it.
template <class T>
T* scratch(int64_t count, int which) {
  struct Free {
    void operator()(uint8_t* at) const { ::operator delete(at, std::align_val_t(64)); }
  };
  struct Kept {
    std::unique_ptr<uint8_t, Free> bytes;
    int64_t size = 0;
  };
  static thread_local Kept kept[4];
  Kept& here = kept[which];
  const int64_t size = count * static_cast<int64_t>(sizeof(T));
  if (here.size < size) {
    here.bytes.reset(static_cast<uint8_t*>(::operator new(size, std::align_val_t(64))));
    here.size = size;
  }
  return reinterpret_cast<T*>(here.bytes.get());
}

template <class How, int BITS, int M, class T>
void multiply_few(const Problem& p, const typename How::Element* given, int64_t rows, T* y) {
  constexpr int wide = M <= 2 ? 4 : M == 4 ? 2 : 1;
  const Rows<typename How::Element, M> x(given, p.columns, rows);
  auto* sums = scratch<float>(p.segments * M, 0);
  if (p.grid.zeros) add_up(p, x, sums);
  const int64_t outputs = p.grid.blocks * BLOCK, grain = std::max<int64_t>(1, GRAIN / (p.columns * BLOCK * M));
  torch::stable::parallel_for(0, p.grid.blocks, grain, [&](int64_t first, int64_t last) {
    Floats out[wide * M];
    const int64_t end = last * PARTS;
    for (int64_t vector = first * PARTS; vector < end;) {
      const int n = static_cast<int>(std::min<int64_t>(wide, end - vector));
      if constexpr (wide >= 4) {
        if (n == 4) few<How, BITS, M, 4>(p, x, sums, vector, out);
        if (n == 3) few<How, BITS, M, 3>(p, x, sums, vector, out);
      }
      if constexpr (wide >= 2) {
        if (n == 2) few<How, BITS, M, 2>(p, x, sums, vector, out);
      }
      if (n == 1) few<How, BITS, M, 1>(p, x, sums, vector, out);
      for (int i = 0; i < n; ++i, ++vector)
        for (int m = 0; m < x.count; ++m) narrow(out[i * M + m], y + m * outputs + vector * LANES);
    }
  });
}

template <class How, int BITS, int N, class T>
void strip(const Problem& p, const typename How::Element* x, int64_t rows, const float* sums, int64_t vector, T* y) {
  const int64_t outputs = p.grid.blocks * BLOCK;
  auto* panel = scratch<typename How::Weight>(panel_segments<How>(p) * p.segment / How::columns * N, 1);
  auto* sum = scratch<Floats>((rows + ROWS - 1) / ROWS * N * ROWS, 2);
  many<How, BITS, N>(p, x, rows, sums, vector, panel, sum);
  for (int64_t m = 0; m < rows; ++m)
    for (int n = 0; n < N; ++n)
      narrow(sum[(m / ROWS * N + n) * ROWS + m % ROWS], y + m * outputs + (vector + n) * LANES);
}

template <class How, int BITS, class T>
void multiply_many(const Problem& p, const typename How::Element* x, int64_t rows, T* y) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  auto* sums = scratch<float>(p.segments * ROWS * blocks, 0);
  if (p.grid.zeros)
    torch::stable::parallel_for(0, blocks, 4, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block)
        add_up(p, Rows<typename How::Element, ROWS>(x + block * ROWS * p.columns, p.columns, rows - block * ROWS),
               sums + block * p.segments * ROWS);
    });
  const int64_t vectors = p.grid.blocks * PARTS, strips = (vectors + WIDE - 1) / WIDE;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t vector = i * WIDE;
      switch (vectors - vector) {
        case 1: strip<How, BITS, 1>(p, x, rows, sums, vector, y); break;
        case 2: strip<How, BITS, 2>(p, x, rows, sums, vector, y); break;
        default: strip<How, BITS, WIDE>(p, x, rows, sums, vector, y);
      }
    }
  });
}

template <class How, int BITS, class T>
void multiply(const Problem& p, const typename How::Element* x, int64_t rows, T* y) {
  if (rows == 1) multiply_few<How, BITS, 1>(p, x, rows, y);
  else if (rows == 2) multiply_few<How, BITS, 2>(p, x, rows, y);
  else if (rows <= 4) multiply_few<How, BITS, 4>(p, x, rows, y);
  else if (rows <= ROWS) multiply_few<How, BITS, ROWS>(p, x, rows, y);
  else multiply_many<How, BITS>(p, x, rows, y);
}

template <class T>
void multiply_chunks(const Problem& p, const Tensor& x, int64_t rows, const Tensor& y) {
  for (int64_t row = 0; row < rows; row += CHUNK) {
    const int64_t count = std::min(CHUNK, rows - row);
    const T* from = static_cast<const T*>(x.data_ptr()) + row * p.columns;
    T* to = static_cast<T*>(y.data_ptr()) + row * p.grid.blocks * BLOCK;
#if WQ_BFLOAT16
    if constexpr (std::is_same_v<T, uint16_t>) {
      multiply<Pair, WQ_BITS>(p, from, count, to);
      continue;
    }
#endif
    if constexpr (std::is_same_v<T, float>) {
      multiply<Single, WQ_BITS>(p, from, count, to);
    } else {
      float* wide = scratch<float>(count * p.columns, 3);
      torch::stable::parallel_for(0, count, std::max<int64_t>(1, GRAIN / p.columns), [&](int64_t first, int64_t last) {
        for (int64_t i = first * p.columns; i < last * p.columns; i += LANES) narrow(widen(from + i), wide + i);
      });
      multiply<Single, WQ_BITS>(p, wide, count, to);
    }
  }
}

int64_t longest_segment(int64_t size) {
  for (int64_t segment = SEGMENT; segment >= 32; segment -= 32)
    if (size % segment == 0) return segment;
  return 0;
}

Tensor linear(const Tensor& given, const Tensor& packed, const Tensor& grid) {
  const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "x must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(packed.dim() == 3 && packed.scalar_type() == ScalarType::Int && packed.is_contiguous() &&
                      packed.size(2) == BLOCK,
                  "packed must be int32 [blocks, words, ", BLOCK, "], contiguous");
  STD_TORCH_CHECK(grid.dim() == 3 && grid.scalar_type() == ScalarType::Byte && grid.is_contiguous(),
                  "grid must be uint8 [blocks, groups, bytes], contiguous");
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= DIMENSIONS, "x has ", x.dim(), " dimensions, not 1 to ", DIMENSIONS);
  const int64_t columns = x.size(x.dim() - 1), blocks = packed.size(0), groups = grid.size(1), bytes = grid.size(2);
  STD_TORCH_CHECK(packed.size(1) * 32 == columns * WQ_BITS, "x has ", columns, " columns, the weight ",
                  packed.size(1) * 32 / WQ_BITS);
  STD_TORCH_CHECK(grid.size(0) == blocks && (bytes == 32 || bytes == 48 || bytes == 64 || bytes == 80),
                  "grid is of another weight: ", grid.size(0), " blocks of ", bytes, " bytes");
  STD_TORCH_CHECK(groups > 0 && columns % groups == 0 && columns / groups % 32 == 0, columns, " columns in ", groups,
                  " groups");
  Problem p;
  p.packed = static_cast<const uint32_t*>(packed.data_ptr());
  p.grid = {static_cast<const uint8_t*>(grid.data_ptr()), blocks, groups, bytes, bytes >= 64, bytes % 32 != 0};
  p.columns = columns;
  p.words = packed.size(1);
  p.segment = longest_segment(columns / groups);
  p.segments = columns / p.segment;
  p.per_group = p.segments / groups;

  int64_t shape[DIMENSIONS], strides[DIMENSIONS];
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= shape[i] = x.size(i);
  shape[x.dim() - 1] = blocks * BLOCK;
  int64_t stride = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) strides[i] = stride, stride *= shape[i];
  AtenTensorHandle made;  // torch::stable::new_empty looks its op up by name, which takes longer than the rest
  int32_t kind, cpu = aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &kind));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), shape, strides, kind, cpu, 0, &made));
  const Tensor y(made);
  if (type == ScalarType::Float) multiply_chunks<float>(p, x, rows, y);
  else if (type == ScalarType::Half) multiply_chunks<_Float16>(p, x, rows, y);
  else multiply_chunks<uint16_t>(p, x, rows, y);
  return y;
}

// --- layouts ---

// Swaps that bring the codes of even columns into the low half of a word: what is `distance` bits above goes where the
// mask is, and back. Hacker's Delight, section 7-2: the perfect unshuffle.
struct Swap {
  int distance;
  uint32_t mask;
};
constexpr Swap SWAPS[] = {{2, 0x0C0C0C0C}, {4, 0x00F000F0}, {8, 0x0000FF00}};

template <bool FORWARD>
inline uint32_t parted(uint32_t word) {  // and, not FORWARD, put together again
  if constexpr (WQ_BITS != 3) {
    for (int i = 0; i < 3; ++i) {
      const Swap swap = SWAPS[FORWARD ? i : 2 - i];
      if (swap.distance < WQ_BITS) continue;
      const uint32_t both = (word >> swap.distance ^ word) & swap.mask;
      word ^= both ^ both << swap.distance;
    }
  }
  return word;
}

// The words of a checkpoint, [rows, words], to the kernel's, [rows / 16, words, 16], or back.
template <bool FORWARD>
void move_words(const uint32_t* from, uint32_t* to, int64_t blocks, int64_t words) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, words * BLOCK));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const uint32_t* const source = from + block * words * BLOCK;
      uint32_t* const made = to + block * words * BLOCK;
      for (int64_t word = 0; word < words; ++word)
        for (int row = 0; row < BLOCK; ++row) {
          const int64_t in_stream = row * words + word, in_block = word * BLOCK + row;
          if constexpr (FORWARD) made[in_block] = parted<true>(source[in_stream]);
          else made[in_stream] = parted<false>(source[in_block]);
        }
    }
  });
}

Tensor lay(const Tensor& given) {
  STD_TORCH_CHECK(given.dim() == 2 && given.scalar_type() == ScalarType::Int && given.size(0) % BLOCK == 0,
                  "words must be int32 [rows, words], and rows a multiple of ", BLOCK);
  const Tensor words = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t blocks = words.size(0) / BLOCK, count = words.size(1);
  Tensor made = torch::stable::new_empty(words, {blocks, count, BLOCK});
  move_words<true>(static_cast<const uint32_t*>(words.data_ptr()), static_cast<uint32_t*>(made.data_ptr()), blocks,
                   count);
  return made;
}

Tensor unlay(const Tensor& given) {
  STD_TORCH_CHECK(given.dim() == 3 && given.scalar_type() == ScalarType::Int && given.size(2) == BLOCK,
                  "packed must be int32 [blocks, words, ", BLOCK, "]");
  const Tensor packed = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t blocks = packed.size(0), count = packed.size(1);
  Tensor made = torch::stable::new_empty(packed, {blocks * BLOCK, count});
  move_words<false>(static_cast<const uint32_t*>(packed.data_ptr()), static_cast<uint32_t*>(made.data_ptr()), blocks,
                    count);
  return made;
}

}  // namespace

STABLE_TORCH_LIBRARY(WQ_NAMESPACE, library) {
  library.def("linear(Tensor x, Tensor packed, Tensor grid) -> Tensor");
  library.def("lay(Tensor words) -> Tensor");
  library.def("unlay(Tensor packed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(WQ_NAMESPACE, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("lay", TORCH_BOX(&lay));
  library.impl("unlay", TORCH_BOX(&unlay));
}
