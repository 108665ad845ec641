// Passes over a vocabulary, and the noise that tokens are drawn by.
#pragma once

#include <numeric>
#include <random>

#include "common.h"

namespace {

// -log(1 - u) for 0 < u < 1, to 2e-7 of it.
inline __m512 exponential_of(__m512 u) {
  const __m512 one = _mm512_set1_ps(1), rest = _mm512_sub_ps(one, u);
  const __m512 exponent = _mm512_getexp_ps(_mm512_mul_ps(rest, _mm512_set1_ps(4.0f / 3)));
  const __m512 m = _mm512_scalef_ps(rest, _mm512_sub_ps(_mm512_setzero_ps(), exponent));
  // log m = 2 artanh s, for m from 3/4 to 3/2.
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 y = _mm512_set1_ps(2.0f / 11);
  for (float factor : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
    y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(factor));
  y = _mm512_fmadd_ps(exponent, _mm512_set1_ps(0.693147181f), _mm512_mul_ps(y, s));
  // What was lost when u was taken from 1.
  const __m512 lost = _mm512_sub_ps(_mm512_sub_ps(one, rest), u);
  return _mm512_sub_ps(_mm512_sub_ps(_mm512_setzero_ps(), y), _mm512_div_ps(lost, rest));
}

inline __m512i fold(__m512i x, int bits) { return _mm512_xor_si512(x, _mm512_srli_epi32(x, bits)); }

inline __m512i lanes_from(int32_t first) {
  return _mm512_add_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(first));
}

// gptk.random.exponential: the same bits, and the logarithm to the last digit or two.
inline __m512 noise(__m512i tokens, __m512i first, __m512i second) {
  __m512i x = _mm512_add_epi32(_mm512_mullo_epi32(tokens, _mm512_set1_epi32(0x9e3779b1)), first);
  x = _mm512_mullo_epi32(fold(x, 16), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_mullo_epi32(fold(_mm512_xor_si512(x, second), 15), _mm512_set1_epi32(0x846ca68b));
  x = _mm512_xor_si512(x, _mm512_srai_epi32(x, 16));
  x = _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff));
  const __m512 scale = _mm512_set1_ps(0x1p-31f * (1 - 0x1p-23f));
  const __m512 u =
      _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(x), scale), _mm512_set1_ps(0x1p-32f));
  return exponential_of(u);
}

void exponential(const int32_t* keys, int64_t stride, const int32_t* tokens, float* y,
                 int64_t count) {
#pragma omp parallel for schedule(static) if (count > FEW)
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = lanes_of(count - i);
    __m512i first = _mm512_set1_epi32(keys[0]), second = _mm512_set1_epi32(keys[1]);
    if (stride) {
      const __m512i at = _mm512_mullo_epi32(lanes_from(0), _mm512_set1_epi32(stride));
      first = _mm512_mask_i32gather_epi32(first, lanes, at, keys + i * stride, 4);
      second = _mm512_mask_i32gather_epi32(second, lanes, at, keys + i * stride + 1, 4);
    }
    const __m512i token = _mm512_maskz_loadu_epi32(lanes, tokens + i);
    _mm512_mask_storeu_ps(y + i, lanes, noise(token, first, second));
  }
}

// What follows takes rows of numbers by token: logits, or keys to order tokens by.

inline __m512 tokens_from(const float* x, int64_t at, int64_t count) {  // -inf beyond the end
  const __m512 none = _mm512_set1_ps(-INFINITY);
  return count - at >= 16 ? _mm512_loadu_ps(x + at)
                          : _mm512_mask_loadu_ps(none, (1u << (count - at)) - 1, x + at);
}

float highest_of(const float* x, int64_t count) {  // of those that are numbers
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < count; i += 16) most = _mm512_max_ps(tokens_from(x, i, count), most);
  return _mm512_reduce_max_ps(most);
}

// Of weights exp(x - highest): their sum, and that of weight times x - highest.
struct Sums {
  float highest;
  double weight = 0, weighted = 0;

  Sums(const float* x, int64_t count) : highest(highest_of(x, count)) {
    const __m512 unit = unit_of(highest), zero = _mm512_setzero_ps();
    for (int64_t start = 0; start < count; start += 1024) {
      __m512 some = zero, more = zero;
      for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
        const __m512 below = _mm512_sub_ps(tokens_from(x, i, count), unit), one = exp(below);
        some = _mm512_add_ps(some, one);
        const __mmask16 seen = _mm512_cmp_ps_mask(one, zero, _CMP_NEQ_UQ);  // 0 · -inf is 0 here
        more = _mm512_mask3_fmadd_ps(one, below, more, seen);
      }
      weight += _mm512_reduce_add_ps(some);
      weighted += _mm512_reduce_add_ps(more);
    }
  }
};

struct Weighed {
  float key, weight;
};

// The tokens whose keys are at least `least`, with exp(logit - unit); returns their mass.
double gather(const float* keys, const float* logits, int64_t count, float least, __m512 unit,
              std::vector<Weighed>& to) {
  double mass = 0;
  to.clear();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 key = tokens_from(keys, i, count);
    const __mmask16 near = _mm512_cmp_ps_mask(key, _mm512_set1_ps(least), _CMP_GE_OQ);
    if (!near) continue;
    alignas(64) float found[16], weights[16];
    _mm512_store_ps(found, key);
    _mm512_store_ps(weights, exp(_mm512_sub_ps(tokens_from(logits, i, count), unit)));
    for (unsigned left = near; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (i + lane >= count) break;
      to.push_back({found[lane], weights[lane]});
      mass += weights[lane];
    }
  }
  return mass;
}

// The key at which tokens in the order of falling keys reach a mass together, or the lowest.
float key_at(std::vector<Weighed>& tokens, double mass) {
  auto from = tokens.begin(), to = tokens.end();
  double before = 0;
  const auto mass_of = [](auto first, auto last) {
    double sum = 0;
    for (; first < last; first++) sum += first->weight;
    return sum;
  };
  while (to - from > 32) {
    float some[3] = {from->key, from[(to - from) / 2].key, to[-1].key};
    std::sort(some, some + 3);
    const float pivot = some[1];
    const auto above = std::partition(from, to, [=](auto& one) { return one.key > pivot; });
    const auto upto = std::partition(above, to, [=](auto& one) { return one.key == pivot; });
    const double higher = before + mass_of(from, above), all = higher + mass_of(above, upto);
    if (higher >= mass && above != from) {
      to = above;
    } else if (all >= mass || upto == tokens.end()) {
      return pivot;
    } else {
      before = all;
      from = upto;
    }
  }
  std::sort(from, to, [](auto& one, auto& other) { return one.key > other.key; });
  for (; from < to; from++)
    if ((before += from->weight) >= mass) return from->key;
  return tokens.empty() ? -INFINITY : to[-1].key;
}

float last_key(const float* keys, const float* logits, int64_t count, double p,
               std::vector<Weighed>& scratch) {
  const Sums sums(logits, count);
  // Most often the mass is among tokens whose keys, log-probabilities or distances of such, are
  // near the highest.
  const float highest = keys == logits ? sums.highest : highest_of(keys, count);
  const __m512 unit = unit_of(sums.highest);
  double mass = p * sums.weight;
  if (!(gather(keys, logits, count, highest - 8, unit, scratch) >= mass))
    mass = p * gather(keys, logits, count, -INFINITY, unit, scratch);
  return key_at(scratch, mass);
}

// The k largest numbers, in falling order, the first of equal ones first. False if one is NaN.
bool top(const float* x, int64_t count, int64_t k, float* values, int64_t* tokens) {
  for (int64_t found = 0, i = 0; i < count; i += 16) {
    const __m512 some = tokens_from(x, i, count);
    if (_mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q)) return false;
    unsigned left = lanes_of(count - i);
    if (found == k)
      left = _mm512_cmp_ps_mask(some, _mm512_set1_ps(values[k - 1]), _CMP_GT_OQ);
    for (; left; left &= left - 1) {
      const int64_t token = i + __builtin_ctz(left);
      const float value = x[token];
      if (found == k && !(value > values[k - 1])) continue;
      int64_t to = found < k ? found++ : k - 1;
      for (; to && values[to - 1] < value; to--) {
        values[to] = values[to - 1];
        tokens[to] = tokens[to - 1];
      }
      values[to] = value;
      tokens[to] = token;
    }
  }
  return true;
}

// argmin noise / weight, with gptk_exponential's noise for a key. Returns the log-probability.
float draw(const float* x, int64_t count, const int32_t* key, int64_t* token) {
  const float highest = highest_of(x, count);
  const __m512 unit = unit_of(highest), none = _mm512_set1_ps(-INFINITY);
  __m512 best = _mm512_set1_ps(INFINITY);
  __m512i places = _mm512_setzero_si512(), place = lanes_from(0);
  double total = 0;
  for (int64_t start = 0; start < count; start += 1024) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
      const __m512 some = tokens_from(x, i, count);
      if (_mm512_cmp_ps_mask(some, none, _CMP_NLE_UQ)) {
        const __m512 weight = exp(_mm512_sub_ps(some, unit));
        const __m512i first = _mm512_set1_epi32(key[0]), second = _mm512_set1_epi32(key[1]);
        const __m512 race = _mm512_div_ps(noise(place, first, second), weight);
        const __mmask16 won = _mm512_cmp_ps_mask(race, best, _CMP_LT_OQ);
        best = _mm512_mask_mov_ps(best, won, race);
        places = _mm512_mask_mov_epi32(places, won, place);
        sum = _mm512_add_ps(sum, weight);
      }
      place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
    total += _mm512_reduce_add_ps(sum);
  }
  const __mmask16 won =
      _mm512_cmp_ps_mask(best, _mm512_set1_ps(_mm512_reduce_min_ps(best)), _CMP_EQ_OQ);
  *token = _mm512_mask_reduce_min_epi32(won, places);
  return x[*token] - highest - (float)std::log(total);
}

// The first `count` numbers of PyTorch's random permutation of 0 to size - 1 on a CPU: its shuffle
// fixes them one by one, by the generator's numbers of 32 bits.
inline void permutation(uint32_t seed, int64_t size, int64_t count, int32_t* y) {
  std::vector<int32_t> numbers(size);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::mt19937 generator(seed);
  for (int64_t i = 0; i < count; i++) {
    if (i < size - 1) std::swap(numbers[i], numbers[i + generator() % (uint32_t)(size - i)]);
    y[i] = numbers[i];
  }
}

}  // namespace
