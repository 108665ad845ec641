// Vectors of 16 lanes where registers have fewer: two halves, each of which is a register, or has
// halves itself. What is done with a vector is done with its halves.
#pragma once

namespace {

template <typename Half>
struct Two {
  Half low, high;
};

template <typename Half>
Two(Half, Half) -> Two<Half>;

// clang-format off
template <typename T> auto operator+(Two<T> a, Two<T> b) { return Two{a.low + b.low, a.high + b.high}; }
template <typename T> auto operator-(Two<T> a, Two<T> b) { return Two{a.low - b.low, a.high - b.high}; }
template <typename T> auto operator*(Two<T> a, Two<T> b) { return Two{a.low * b.low, a.high * b.high}; }
template <typename T> auto operator/(Two<T> a, Two<T> b) { return Two{a.low / b.low, a.high / b.high}; }
template <typename T> auto operator&(Two<T> a, Two<T> b) { return Two{a.low & b.low, a.high & b.high}; }
template <typename T> auto operator|(Two<T> a, Two<T> b) { return Two{a.low | b.low, a.high | b.high}; }
template <typename T> auto operator^(Two<T> a, Two<T> b) { return Two{a.low ^ b.low, a.high ^ b.high}; }
template <typename T> auto operator<(Two<T> a, Two<T> b) { return Two{a.low < b.low, a.high < b.high}; }
template <typename T> auto operator<=(Two<T> a, Two<T> b) { return Two{a.low <= b.low, a.high <= b.high}; }
template <typename T> auto operator==(Two<T> a, Two<T> b) { return Two{a.low == b.low, a.high == b.high}; }
template <typename T> auto operator-(Two<T> a) { return Two{-a.low, -a.high}; }
template <typename T> auto operator<<(Two<T> x, int n) { return Two{x.low << n, x.high << n}; }
template <typename T> auto operator>>(Two<T> x, int n) { return Two{x.low >> n, x.high >> n}; }
template <typename T> auto shift_right_logical(Two<T> x, int n) {
  return Two{shift_right_logical(x.low, n), shift_right_logical(x.high, n)};
}
template <typename T> auto fma(Two<T> a, Two<T> b, Two<T> sum) {
  return Two{fma(a.low, b.low, sum.low), fma(a.high, b.high, sum.high)};
}
template <typename T> auto max(Two<T> a, Two<T> b) { return Two{max(a.low, b.low), max(a.high, b.high)}; }
template <typename T> auto min(Two<T> a, Two<T> b) { return Two{min(a.low, b.low), min(a.high, b.high)}; }
template <typename T> auto round(Two<T> x) { return Two{round(x.low), round(x.high)}; }
template <typename T> auto bits_of(Two<T> x) { return Two{bits_of(x.low), bits_of(x.high)}; }
template <typename T> auto floats_of_bits(Two<T> x) { return Two{floats_of_bits(x.low), floats_of_bits(x.high)}; }
template <typename T> auto to_floats(Two<T> x) { return Two{to_floats(x.low), to_floats(x.high)}; }
template <typename T> auto to_ints(Two<T> x) { return Two{to_ints(x.low), to_ints(x.high)}; }
template <typename L, typename T> auto select(Two<L> lanes, Two<T> yes, Two<T> no) {
  return Two{select(lanes.low, yes.low, no.low), select(lanes.high, yes.high, no.high)};
}
template <typename T> auto reduce_add(Two<T> x) { return reduce_add(x.low + x.high); }
template <typename T> auto reduce_max(Two<T> x) { return reduce_max(max(x.low, x.high)); }
template <typename T> auto reduce_min(Two<T> x) { return reduce_min(min(x.low, x.high)); }
// clang-format on

// Transposes a matrix of `size` vectors of as many lanes in place, from transposes of its quarters.
template <int size, typename T>
void transpose(Two<T>* x) {
  T quarters[4][size / 2];
  for (int i = 0; i < size / 2; i++) {
    quarters[0][i] = x[i].low, quarters[1][i] = x[size / 2 + i].low;
    quarters[2][i] = x[i].high, quarters[3][i] = x[size / 2 + i].high;
  }
  for (auto& quarter : quarters) transpose<size / 2>(quarter);
  for (int i = 0; i < size / 2; i++) {
    x[i] = {quarters[0][i], quarters[1][i]};
    x[size / 2 + i] = {quarters[2][i], quarters[3][i]};
  }
}

}  // namespace
