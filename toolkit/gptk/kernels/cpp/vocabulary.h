// Passes over the logits of a vocabulary, and the random noise by which tokens are drawn. All
// numbers are float32.
#pragma once

#include <numeric>
#include <random>

#include "common.h"

namespace {

// -log(1 - u) of each lane for 0 < u < 1, with a relative error of at most 2e-7: a number of the
// exponential distribution from one of the uniform distribution.
inline Floats exponential_of(Floats u) {
  const Floats one = broadcast(1), rest = one - u;
  // 1 - u = m 2ⁿ with m from 3/4 to 3/2, and log m = 2 artanh s with s = (m - 1) / (m + 1).
  const Floats n = exponent_of(rest * broadcast(4.0f / 3));
  const Floats m = scale_by_power(rest, -n);
  const Floats s = (m - one) / (m + one);
  const Floats square = s * s;
  Floats y = broadcast(2.0f / 11);
  for (float factor : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
    y = fma(y, square, broadcast(factor));
  y = fma(n, broadcast(0.693147181f), y * s);
  // The rounding error of 1 - u, to first order.
  const Floats lost = one - rest - u;
  return -y - lost / rest;
}

// x xor (x >> bits), a step of hash functions.
inline Ints xor_shifted(Ints x, int bits) { return x ^ shift_right_logical(x, bits); }

// The 16 integers from `first` on.
inline Ints consecutive_from(int32_t first) {
  static constexpr int32_t LANES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_bits(LANES) + broadcast_int(first);
}

// gptk.session.random.exponential for 16 tokens, by a key of two numbers for each lane. The random
// bits are the same; the logarithm may differ in its last digit or two.
inline Floats exponential_noise(Ints tokens, Ints key_0, Ints key_1) {
  Ints x = tokens * broadcast_int(0x9e3779b1) + key_0;
  x = xor_shifted(x, 16) * broadcast_int(0x7feb352d);
  x = xor_shifted(x ^ key_1, 15) * broadcast_int(0x846ca68b);
  x = x ^ (x >> 16);
  x = x & broadcast_int(0x7fffffff);
  const Floats scale = broadcast(0x1p-31f * (1 - 0x1p-23f));
  const Floats u = fma(to_floats(x), scale, broadcast(0x1p-32f));
  return exponential_of(u);
}

// y (count): exponential noise for tokens (count), each by its key of two numbers, keys (count, 2);
// or all by one key (2), unless `key_of_each`.
void exponential(const int32_t* keys, bool key_of_each, const int32_t* tokens, float* y,
                 int64_t count) {
#pragma omp parallel for schedule(static) if (count > PARALLEL_FROM)
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t tokens_here = std::min<int64_t>(16, count - i);
    Ints key_0 = broadcast_int(keys[0]), key_1 = broadcast_int(keys[1]);
    if (key_of_each) {
      int32_t pairs[16][2] = {}, of_lanes[2][16];
      std::memcpy(pairs, keys + 2 * i, tokens_here * sizeof pairs[0]);
      for (int lane = 0; lane < 16; lane++)
        of_lanes[0][lane] = pairs[lane][0], of_lanes[1][lane] = pairs[lane][1];
      key_0 = load_bits(of_lanes[0]), key_1 = load_bits(of_lanes[1]);
    }
    int32_t sixteen[16] = {};
    std::memcpy(sixteen, tokens + i, tokens_here * sizeof sixteen[0]);
    store_first(y + i, count - i, exponential_noise(load_bits(sixteen), key_0, key_1));
  }
}

// Each function from here on takes a row of `count` numbers, one for each token: its logits, or
// keys by which tokens are ordered.

// The numbers of 16 tokens from `first` on; -inf for tokens beyond the last.
inline Floats load_tokens(const float* x, int64_t first, int64_t count) {
  if (count - first >= 16) return load(x + first);
  return select(first_lanes(count - first), load_first(x + first, count - first),
                broadcast(-INFINITY));
}

// The highest number, NaN left aside; -inf if there is none.
float highest_of(const float* x, int64_t count) {
  Floats highest = broadcast(-INFINITY);
  for (int64_t i = 0; i < count; i += 16) highest = max(load_tokens(x, i, count), highest);
  return reduce_max(highest);
}

// What the softmax of logits x and its entropy are made of, with the weights exp(x - highest): the
// sum of weights, and the sum of weight · (x - highest).
struct SoftmaxSums {
  float highest;
  double weight = 0, weighted = 0;

  SoftmaxSums(const float* x, int64_t count) : highest(highest_of(x, count)) {
    const Floats shift = softmax_shift(highest), zero = Floats{};
    // In float32 for 1024 tokens at a time, and in float64 over these.
    for (int64_t start = 0; start < count; start += 1024) {
      Floats sum = zero, weighted_sum = zero;
      for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
        const Floats below = load_tokens(x, i, count) - shift, w = exp(below);
        sum = sum + w;
        // 0 · -inf is 0 here.
        weighted_sum = select(w == zero, weighted_sum, fma(w, below, weighted_sum));
      }
      weight += reduce_add(sum);
      weighted += reduce_add(weighted_sum);
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

  Collected(const float* keys, const float* logits, int64_t size, float least, Floats shift,
            WeightedKey* found) {
    for (int64_t i = 0; i < size; i += 16) {
      const Floats key = load_tokens(keys, i, size);
      const uint32_t high = bits(broadcast(least) <= key);
      if (!high) continue;
      alignas(64) float lane_keys[16], weights[16];
      store(lane_keys, key);
      store(weights, exp(load_tokens(logits, i, size) - shift));
      for (uint32_t left = high; left; left &= left - 1) {
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
  const Floats shift = softmax_shift(sums.highest);
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
    const Floats numbers = load_tokens(x, i, count);
    if (!all(numbers == numbers)) return false;
    uint32_t left = bits(first_lanes(count - i));
    if (found == k) left = bits(broadcast(values[k - 1]) < numbers);
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
  const Floats shift = softmax_shift(highest), none = broadcast(-INFINITY);
  Floats best = broadcast(INFINITY);
  Ints best_tokens{}, tokens = consecutive_from(0);
  double total = 0;
  for (int64_t start = 0; start < count; start += 1024) {
    Floats sum{};
    for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
      const Floats logits = load_tokens(x, i, count);
      if (!all(logits <= none)) {
        const Floats weight = exp(logits - shift);
        const Ints key_0 = broadcast_int(key[0]), key_1 = broadcast_int(key[1]);
        const Floats race = exponential_noise(tokens, key_0, key_1) / weight;
        const Lanes won = race < best;
        best = select(won, race, best);
        best_tokens = select(won, tokens, best_tokens);
        sum = sum + weight;
      }
      tokens = tokens + broadcast_int(16);
    }
    total += reduce_add(sum);
  }
  const Lanes won = best == broadcast(reduce_min(best));
  *token = reduce_min(select(won, best_tokens, broadcast_int(INT32_MAX)));
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
