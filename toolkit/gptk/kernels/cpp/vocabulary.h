// Passes over the logits of a vocabulary, and the random noise by which tokens are drawn. All
// numbers are float32.
#pragma once

#include <numeric>
#include <random>

#include "common.h"

namespace {

// -log(1 - u) of each lane for 0 < u < 1, with a relative error of at most 2e-7: a number of the
// exponential distribution from one of the uniform distribution.
inline __m512 exponential_of(__m512 u) {
  const __m512 one = _mm512_set1_ps(1), rest = _mm512_sub_ps(one, u);
  // 1 - u = m 2ⁿ with m from 3/4 to 3/2, and log m = 2 artanh s with s = (m - 1) / (m + 1).
  const __m512 n = _mm512_getexp_ps(_mm512_mul_ps(rest, _mm512_set1_ps(4.0f / 3)));
  const __m512 m = _mm512_scalef_ps(rest, _mm512_sub_ps(_mm512_setzero_ps(), n));
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 y = _mm512_set1_ps(2.0f / 11);
  for (float factor : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
    y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(factor));
  y = _mm512_fmadd_ps(n, _mm512_set1_ps(0.693147181f), _mm512_mul_ps(y, s));
  // The rounding error of 1 - u, to first order.
  const __m512 lost = _mm512_sub_ps(_mm512_sub_ps(one, rest), u);
  return _mm512_sub_ps(_mm512_sub_ps(_mm512_setzero_ps(), y), _mm512_div_ps(lost, rest));
}

// x xor (x >> bits), a step of hash functions.
inline __m512i xor_shifted(__m512i x, int bits) {
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, bits));
}

// The 16 integers from `first` on.
inline __m512i consecutive_from(int32_t first) {
  return _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                          _mm512_set1_epi32(first));
}

// gptk.session.random.exponential for 16 tokens, by a key of two numbers for each lane. The random
// bits are the same; the logarithm may differ in its last digit or two.
inline __m512 exponential_noise(__m512i tokens, __m512i key_0, __m512i key_1) {
  __m512i x = _mm512_add_epi32(_mm512_mullo_epi32(tokens, _mm512_set1_epi32(0x9e3779b1)), key_0);
  x = _mm512_mullo_epi32(xor_shifted(x, 16), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_mullo_epi32(xor_shifted(_mm512_xor_si512(x, key_1), 15),
                         _mm512_set1_epi32(0x846ca68b));
  x = _mm512_xor_si512(x, _mm512_srai_epi32(x, 16));
  x = _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff));
  const __m512 scale = _mm512_set1_ps(0x1p-31f * (1 - 0x1p-23f));
  const __m512 u =
      _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(x), scale), _mm512_set1_ps(0x1p-32f));
  return exponential_of(u);
}

// y (count): exponential noise for tokens (count), each by its key of two numbers, keys (count, 2)
// with `stride` numbers from one to the next; or all by the one key (2), with a stride of 0.
void exponential(const int32_t* keys, int64_t stride, const int32_t* tokens, float* y,
                 int64_t count) {
#pragma omp parallel for schedule(static) if (count > PARALLEL_FROM)
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    __m512i key_0 = _mm512_set1_epi32(keys[0]), key_1 = _mm512_set1_epi32(keys[1]);
    if (stride) {
      const __m512i offsets = _mm512_mullo_epi32(consecutive_from(0), _mm512_set1_epi32(stride));
      key_0 = _mm512_mask_i32gather_epi32(key_0, lanes, offsets, keys + i * stride, 4);
      key_1 = _mm512_mask_i32gather_epi32(key_1, lanes, offsets, keys + i * stride + 1, 4);
    }
    const __m512i token = _mm512_maskz_loadu_epi32(lanes, tokens + i);
    _mm512_mask_storeu_ps(y + i, lanes, exponential_noise(token, key_0, key_1));
  }
}

// Each function from here on takes a row of `count` numbers, one for each token: its logits, or
// keys by which tokens are ordered.

// The numbers of 16 tokens from `first` on; -inf for tokens beyond the last.
inline __m512 load_tokens(const float* x, int64_t first, int64_t count) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  return count - first >= 16 ? _mm512_loadu_ps(x + first)
                             : _mm512_mask_loadu_ps(none, (1u << (count - first)) - 1, x + first);
}

// The highest number, NaN left aside; -inf if there is none.
float highest_of(const float* x, int64_t count) {
  __m512 highest = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < count; i += 16)
    highest = _mm512_max_ps(load_tokens(x, i, count), highest);
  return _mm512_reduce_max_ps(highest);
}

// What the softmax of logits x and its entropy are made of, with the weights exp(x - highest): the
// sum of weights, and the sum of weight · (x - highest).
struct SoftmaxSums {
  float highest;
  double weight = 0, weighted = 0;

  SoftmaxSums(const float* x, int64_t count) : highest(highest_of(x, count)) {
    const __m512 shift = softmax_shift(highest), zero = _mm512_setzero_ps();
    // In float32 for 1024 tokens at a time, and in float64 over these.
    for (int64_t start = 0; start < count; start += 1024) {
      __m512 sum = zero, weighted_sum = zero;
      for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
        const __m512 below = _mm512_sub_ps(load_tokens(x, i, count), shift), w = exp(below);
        sum = _mm512_add_ps(sum, w);
        const __mmask16 used = _mm512_cmp_ps_mask(w, zero, _CMP_NEQ_UQ);  // 0 · -inf is 0 here
        weighted_sum = _mm512_mask3_fmadd_ps(w, below, weighted_sum, used);
      }
      weight += _mm512_reduce_add_ps(sum);
      weighted += _mm512_reduce_add_ps(weighted_sum);
    }
  }
};

// A token's key, and its weight exp(logit - shift).
struct WeightedKey {
  float key, weight;
};

// Collects in `found`, which has room for all, the tokens whose keys are at least `least`.
struct Collected {
  int64_t count = 0;
  double mass = 0;  // the sum of their weights

  Collected(const float* keys, const float* logits, int64_t size, float least, __m512 shift,
            WeightedKey* found) {
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 key = load_tokens(keys, i, size);
      const __mmask16 high = _mm512_cmp_ps_mask(key, _mm512_set1_ps(least), _CMP_GE_OQ);
      if (!high) continue;
      alignas(64) float lane_keys[16], weights[16];
      _mm512_store_ps(lane_keys, key);
      _mm512_store_ps(weights, exp(_mm512_sub_ps(load_tokens(logits, i, size), shift)));
      for (unsigned left = high; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        if (i + lane >= size) break;
        found[count++] = {lane_keys[lane], weights[lane]};
        mass += weights[lane];
      }
    }
  }
};

// The key at which tokens, in the order of falling keys, together reach a mass; the lowest key if
// they do not. By a quickselect, which reorders the tokens.
float key_reaching(WeightedKey* const begin, WeightedKey* const end, double mass) {
  auto from = begin, to = end;
  double before = 0;
  const auto mass_of = [](auto first, auto last) {
    double sum = 0;
    for (; first < last; first++) sum += first->weight;
    return sum;
  };
  while (to - from > 32) {
    float three[3] = {from->key, from[(to - from) / 2].key, to[-1].key};
    std::sort(three, three + 3);
    const float pivot = three[1];
    const auto above = std::partition(from, to, [=](auto& token) { return token.key > pivot; });
    const auto equal = std::partition(above, to, [=](auto& token) { return token.key == pivot; });
    const double higher = before + mass_of(from, above),
                 with_pivot = higher + mass_of(above, equal);
    if (higher >= mass && above != from) {
      to = above;
    } else if (with_pivot >= mass || equal == end) {
      return pivot;
    } else {
      before = with_pivot;
      from = equal;
    }
  }
  std::sort(from, to, [](auto& token, auto& other) { return token.key > other.key; });
  for (; from < to; from++)
    if ((before += from->weight) >= mass) return from->key;
  return begin == end ? -INFINITY : to[-1].key;
}

// The key at which tokens, in the order of falling keys, reach the probability p under
// softmax(logits); the lowest key if rounding keeps them short of it. scratch: (count).
float last_key(const float* keys, const float* logits, int64_t count, double p,
               WeightedKey* scratch) {
  const SoftmaxSums sums(logits, count);
  // Keys are log-probabilities or distances of these, in nats: most often the tokens with keys
  // within 8 of the highest suffice.
  const float highest = keys == logits ? sums.highest : highest_of(keys, count);
  const __m512 shift = softmax_shift(sums.highest);
  Collected found(keys, logits, count, highest - 8, shift, scratch);
  double mass = p * sums.weight;
  if (!(found.mass >= mass)) {
    found = Collected(keys, logits, count, -INFINITY, shift, scratch);
    mass = p * found.mass;
  }
  return key_reaching(scratch, scratch + found.count, mass);
}

// values, tokens (k): the k largest numbers in falling order, of equal numbers that of the lowest
// token first, and their tokens. Returns false, and leaves them unfinished, if a number is NaN.
bool top(const float* x, int64_t count, int64_t k, float* values, int64_t* tokens) {
  for (int64_t found = 0, i = 0; i < count && k > 0; i += 16) {
    const __m512 numbers = load_tokens(x, i, count);
    if (_mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q)) return false;
    unsigned left = first_lanes(count - i);
    if (found == k) left = _mm512_cmp_ps_mask(numbers, _mm512_set1_ps(values[k - 1]), _CMP_GT_OQ);
    for (; left; left &= left - 1) {
      const int64_t token = i + __builtin_ctz(left);
      const float value = x[token];
      if (found == k && !(value > values[k - 1])) continue;
      int64_t place = found < k ? found++ : k - 1;
      for (; place && values[place - 1] < value; place--) {
        values[place] = values[place - 1];
        tokens[place] = tokens[place - 1];
      }
      values[place] = value;
      tokens[place] = token;
    }
  }
  return true;
}

// Draws a token with probability softmax(x) by an exponential race: the token with the smallest
// noise / weight, where the noise is that of `exponential` for the key (2). Returns the token's
// log-probability.
float draw(const float* x, int64_t count, const int32_t* key, int64_t* token) {
  const float highest = highest_of(x, count);
  const __m512 shift = softmax_shift(highest), none = _mm512_set1_ps(-INFINITY);
  __m512 best = _mm512_set1_ps(INFINITY);
  __m512i best_tokens = _mm512_setzero_si512(), tokens = consecutive_from(0);
  double total = 0;
  for (int64_t start = 0; start < count; start += 1024) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
      const __m512 logits = load_tokens(x, i, count);
      if (_mm512_cmp_ps_mask(logits, none, _CMP_NLE_UQ)) {
        const __m512 weight = exp(_mm512_sub_ps(logits, shift));
        const __m512i key_0 = _mm512_set1_epi32(key[0]), key_1 = _mm512_set1_epi32(key[1]);
        const __m512 race = _mm512_div_ps(exponential_noise(tokens, key_0, key_1), weight);
        const __mmask16 won = _mm512_cmp_ps_mask(race, best, _CMP_LT_OQ);
        best = _mm512_mask_mov_ps(best, won, race);
        best_tokens = _mm512_mask_mov_epi32(best_tokens, won, tokens);
        sum = _mm512_add_ps(sum, weight);
      }
      tokens = _mm512_add_epi32(tokens, _mm512_set1_epi32(16));
    }
    total += _mm512_reduce_add_ps(sum);
  }
  const __mmask16 won =
      _mm512_cmp_ps_mask(best, _mm512_set1_ps(_mm512_reduce_min_ps(best)), _CMP_EQ_OQ);
  *token = _mm512_mask_reduce_min_epi32(won, best_tokens);
  return x[*token] - highest - (float)std::log(total);
}

// y (count): the first numbers of PyTorch's random permutation of 0 to size - 1 on a CPU. Its
// shuffle settles them one by one, by the 32-bit numbers of a Mersenne Twister.
inline void permutation(uint32_t seed, int64_t size, int64_t count, int32_t* y) {
  const Memory<int32_t> numbers(size);
  std::iota(numbers.get(), numbers.get() + size, 0);
  std::mt19937 generator(seed);
  for (int64_t i = 0; i < count; i++) {
    if (i < size - 1) std::swap(numbers[i], numbers[i + generator() % (uint32_t)(size - i)]);
    y[i] = numbers[i];
  }
}

}  // namespace
