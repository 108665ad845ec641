// The vectors of vectors.h in C++ alone: arrays. They are for processors without a better header,
// and what the other headers are compared with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Floats {
  float v[16];
};
struct Ints {
  int32_t v[16];
};
struct Lanes {
  bool v[16];
};

// y with y.v[i] = function(i) for each lane.
template <typename Y, typename Function>
inline Y lanes_of(Function function) {
  Y y;
  for (int i = 0; i < 16; i++) y.v[i] = function(i);
  return y;
}

// Combines lanes i and i + 8, then i and i + 4, then i and i + 2, then i and i + 1.
template <typename X, typename Combine>
inline auto reduce(X x, Combine combine) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x.v[i] = combine(x.v[i], x.v[i + half]);
  return x.v[0];
}

inline uint32_t bits(Lanes lanes) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= (uint32_t)lanes.v[i] << i;
  return bits;
}

inline Floats broadcast(float x) {
  return lanes_of<Floats>([&](int) { return x; });
}
inline Floats operator+(const Floats& a, const Floats& b) {
  return lanes_of<Floats>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats operator-(const Floats& a, const Floats& b) {
  return lanes_of<Floats>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats operator*(const Floats& a, const Floats& b) {
  return lanes_of<Floats>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(const Floats& a, const Floats& b) {
  return lanes_of<Floats>([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats operator-(const Floats& a) {
  return lanes_of<Floats>([&](int i) { return -a.v[i]; });
}
// The product is exact in float64. Rounding the sum to float64, then to float32, gives another
// number than rounding it once in about one of 2²⁹ cases; std::fma would call a function for each.
inline Floats fma(const Floats& a, const Floats& b, const Floats& sum) {
  return lanes_of<Floats>([&](int i) { return (float)((double)a.v[i] * b.v[i] + sum.v[i]); });
}
inline Floats max(const Floats& a, const Floats& b) {
  return lanes_of<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats min(const Floats& a, const Floats& b) {
  return lanes_of<Floats>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes operator<(const Floats& a, const Floats& b) {
  return lanes_of<Lanes>([&](int i) { return a.v[i] < b.v[i]; });
}
inline Lanes operator<=(const Floats& a, const Floats& b) {
  return lanes_of<Lanes>([&](int i) { return a.v[i] <= b.v[i]; });
}
inline Lanes operator==(const Floats& a, const Floats& b) {
  return lanes_of<Lanes>([&](int i) { return a.v[i] == b.v[i]; });
}
inline Floats round(const Floats& x) {
  return lanes_of<Floats>([&](int i) { return std::nearbyintf(x.v[i]); });
}
inline float first_lane(const Floats& x) { return x.v[0]; }
inline float reduce_add(const Floats& x) {
  return reduce(x, [](float a, float b) { return a + b; });
}
inline float reduce_max(const Floats& x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
inline float reduce_min(const Floats& x) {
  return reduce(x, [](float a, float b) { return a < b ? a : b; });
}

inline Ints broadcast_int(int32_t x) {
  return lanes_of<Ints>([&](int) { return x; });
}
// Without a sign, as numbers with one must not overflow.
inline Ints operator+(const Ints& a, const Ints& b) {
  return lanes_of<Ints>([&](int i) { return (uint32_t)a.v[i] + (uint32_t)b.v[i]; });
}
inline Ints operator-(const Ints& a, const Ints& b) {
  return lanes_of<Ints>([&](int i) { return (uint32_t)a.v[i] - (uint32_t)b.v[i]; });
}
inline Ints operator*(const Ints& a, const Ints& b) {
  return lanes_of<Ints>([&](int i) { return (uint32_t)a.v[i] * (uint32_t)b.v[i]; });
}
inline Ints operator&(const Ints& a, const Ints& b) {
  return lanes_of<Ints>([&](int i) { return a.v[i] & b.v[i]; });
}
inline Ints operator|(const Ints& a, const Ints& b) {
  return lanes_of<Ints>([&](int i) { return a.v[i] | b.v[i]; });
}
inline Ints operator^(const Ints& a, const Ints& b) {
  return lanes_of<Ints>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline Ints operator<<(const Ints& x, int n) {
  return lanes_of<Ints>([&](int i) { return (uint32_t)x.v[i] << n; });
}
inline Ints operator>>(const Ints& x, int n) {
  return lanes_of<Ints>([&](int i) { return x.v[i] >> n; });
}
inline Ints shift_right_logical(const Ints& x, int n) {
  return lanes_of<Ints>([&](int i) { return (uint32_t)x.v[i] >> n; });
}
inline Ints max(const Ints& a, const Ints& b) {
  return lanes_of<Ints>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline int32_t reduce_add(const Ints& x) {
  return reduce(x, [](int32_t a, int32_t b) { return a + b; });
}
inline int32_t reduce_max(const Ints& x) {
  return reduce(x, [](int32_t a, int32_t b) { return a > b ? a : b; });
}
inline int32_t reduce_min(const Ints& x) {
  return reduce(x, [](int32_t a, int32_t b) { return a < b ? a : b; });
}

template <typename X>
inline X select(const Lanes& lanes, const X& yes, const X& no) {
  return lanes_of<X>([&](int i) { return lanes.v[i] ? yes.v[i] : no.v[i]; });
}
inline Ints bits_of(const Floats& x) {
  Ints y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline Floats floats_of_bits(const Ints& x) {
  Floats y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline Floats to_floats(const Ints& x) {
  return lanes_of<Floats>([&](int i) { return (float)x.v[i]; });
}
inline Ints to_ints(const Floats& x) {  // as x86 does, INT32_MIN for numbers that do not fit
  return lanes_of<Ints>([&](int i) {
    const float near = std::nearbyintf(x.v[i]);
    return near >= -0x1p31f && near < 0x1p31f ? (int32_t)near : INT32_MIN;
  });
}

inline Floats load(const float* x) {
  Floats y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
inline void store(float* y, const Floats& x) { std::memcpy(y, &x, sizeof x); }
inline Ints load_bits(const void* x) {
  Ints y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
inline void store_bits(void* y, const Ints& x) { std::memcpy(y, &x, sizeof x); }
inline Ints load_bytes(const uint8_t* x) {
  return lanes_of<Ints>([&](int i) { return x[i]; });
}
inline void store_bytes(int8_t* y, const Ints& x) {
  for (int i = 0; i < 16; i++) y[i] = (int8_t)x.v[i];
}
inline Ints load_shorts(const uint16_t* x) {
  return lanes_of<Ints>([&](int i) { return x[i]; });
}
inline void store_shorts(uint16_t* y, const Ints& x) {
  for (int i = 0; i < 16; i++) y[i] = (uint16_t)x.v[i];
}
inline Ints pack_shorts(const Ints& low, const Ints& high) {
  uint16_t shorts[32];
  store_shorts(shorts, low);
  store_shorts(shorts + 16, high);
  return load_bits(shorts);
}

// A float16 number has 5 bits of exponent and 10 of fraction; float32 has 8 and 23. Numbers below
// 2⁻¹⁴ are multiples of 2⁻²⁴.
inline Floats load_float16(const void* x) {
  return lanes_of<Floats>([&](int i) {
    uint16_t half;
    std::memcpy(&half, (const char*)x + 2 * i, sizeof half);
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 0   ? std::ldexp((float)fraction, -24)
                       : exponent < 31 ? std::ldexp((float)(1024 + fraction), exponent - 25)
                       : fraction == 0 ? INFINITY
                                       : NAN;
    return half & 0x8000 ? -size : size;
  });
}
inline void store_float16(void* y, const Floats& x) {
  for (int i = 0; i < 16; i++) {
    const float size = std::fabs(x.v[i]);
    uint16_t half;
    if (!(size < 65520)) {  // halfway between the largest number and the next power of two
      half = std::isnan(size) ? 0x7e00 : 0x7c00;
    } else {
      // Multiples of the distance between float16 numbers of this size.
      const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
      half = (exponent + 14) * 1024 + (int)std::nearbyintf(std::ldexp(size, 10 - exponent));
    }
    half |= std::signbit(x.v[i]) << 15;
    std::memcpy((char*)y + 2 * i, &half, sizeof half);
  }
}

inline Floats horizontal_sums(Floats* x) {
  return lanes_of<Floats>([&](int i) { return reduce_add(x[i]); });
}
template <int size>
inline void transpose(Ints* x) {
  for (int i = 0; i < size; i++)
    for (int j = 0; j < i; j++) {
      const int32_t other = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = other;
    }
}

inline Ints look_up(const uint8_t* table, const Ints& x) {
  return lanes_of<Ints>([&](int i) {
    uint32_t y = 0;
    for (int shift = 0; shift < 32; shift += 8) y |= (uint32_t)table[x.v[i] >> shift & 15] << shift;
    return y;
  });
}

template <int bits, int count, int vectors>
inline void dot_values(const Ints* values, const int8_t* const* x, Ints* sums) {
  for (int n = 0; n < count; n++) {
    sums[n] = {};
    for (int i = 0; i < vectors; i++)
      for (int byte = 0; byte < 4; byte++)
        for (int lane = 0; lane < 16; lane++)
          sums[n].v[lane] += (values[i].v[lane] >> 8 * byte & 255) * x[n][4 * i + byte];
  }
}

constexpr int SUMS = 4;
constexpr int DOT_BITS = 8;
constexpr int64_t TILE_ROWS = 4, TILE_COLUMNS = 16;

inline void store_tile_rows(void* y, const Ints& x, int64_t part) {
  std::memcpy(y, x.v + part * TILE_ROWS, TILE_ROWS * sizeof(int32_t));
}

}  // namespace
