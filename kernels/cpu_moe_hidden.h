// The activations of experts on vectors of floats: what s2o_inductor/moe_spec.py says of them.

#pragma once

#include <cmath>
#include <cstdint>

#include "cpu_vectors.h"

namespace s2o {

// In the order of moe_spec.Activation and moe_spec.Gate, whose positions arrive here.
enum class Activation : int64_t { kIdentity, kRelu, kRelu2, kSilu, kGelu, kGeluTanh };
enum class Gate : int64_t { kNone, kHalf, kHalfSwapped, kInterleaved, kSeparate };

// Filled by kernels/moe_cpu_native.py.
struct Formula {
  Activation activation;
  Gate gate;
  double alpha, limit, shift;  // a limit of infinity is none
};

inline Vec magnitude_of(Vec x) { return (Vec)((Bits)x & 0x7fffffff); }

// 1 / (1 + exp(-x)), from the exponential of a number that is not positive.
inline Vec sigmoid(Vec x) {
  const Vec e = exp2_of(magnitude_of(x) * -1.44269504f);
  return (x < Vec{} ? e : splat(1.0f)) / (e + 1.0f);
}

// 2 * (the normal distribution up to x) = erfc(-x / sqrt 2), where erfc(z) = t exp(P(t) - z^2), t = 1 / (1 + 0.4 z) for
// z > 0. P is fitted to 9e-8; with its rounding the result is off by 4e-7 at most.
inline Vec twice_normal(Vec x) {
  const Vec z = magnitude_of(x) * 0.707106781f, t = 1.0f / (z * 0.4f + 1.0f);
  Vec p = splat(-2.059327821e-1f);
  p = p * t + 9.165687541e-1f;
  p = p * t - 1.468190023f;
  p = p * t + 9.773168703e-1f;
  p = p * t - 4.272099976e-1f;
  p = p * t + 2.929162710e-1f;
  p = p * t + 4.018339593e-1f;
  p = p * t + 1.001388628f;
  p = p * t - 1.488691766f;
  const Vec tail = t * exp2_of((p - z * z) * 1.44269504f);
  return x < Vec{} ? tail : 2.0f - tail;
}

template <Activation A>
inline Vec activate(Vec x, float alpha) {
  if constexpr (A == Activation::kRelu) return x < Vec{} ? Vec{} : x;  // NaN stays
  if constexpr (A == Activation::kRelu2) return x < Vec{} ? Vec{} : x * x;
  if constexpr (A == Activation::kSilu) return x * sigmoid(x * alpha);
  if constexpr (A == Activation::kGelu) return 0.5f * x * twice_normal(x);
  if constexpr (A == Activation::kGeluTanh) return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  return x;
}

// The derivative of `activate`.
template <Activation A>
inline Vec slope(Vec x, float alpha) {
  const Vec one = splat(1.0f);
  if constexpr (A == Activation::kRelu) return x <= Vec{} ? Vec{} : one;
  if constexpr (A == Activation::kRelu2) return x <= Vec{} ? Vec{} : 2.0f * x;
  if constexpr (A == Activation::kSilu) {
    const Vec s = sigmoid(x * alpha);
    return s * (1.0f + x * alpha * (1.0f - s));
  }
  if constexpr (A == Activation::kGelu)  // the distribution, and x times the density
    return 0.5f * twice_normal(x) + x * 0.398942280f * exp2_of(x * x * -0.721347520f);
  if constexpr (A == Activation::kGeluTanh) {
    const Vec s = sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    return s + x * s * (1.0f - s) * (1.59576912f + 0.214064448f * x * x);
  }
  return one;
}

// act(min(gate, limit)) * (clamp(up, -limit, limit) + shift), or without the second factor.
template <Activation A>
class Expert {
 public:
  explicit Expert(const Formula& f)
      : limit_(splat(static_cast<float>(f.limit))), alpha_(static_cast<float>(f.alpha)),
        shift_(static_cast<float>(f.shift)) {}
  Vec operator()(Vec gate) const { return activate<A>(gate > limit_ ? limit_ : gate, alpha_); }
  Vec operator()(Vec gate, Vec up) const {
    return (*this)(gate) * ((up > limit_ ? limit_ : up < -limit_ ? -limit_ : up) + shift_);
  }
  // Turns gate and up, before any limit, into the gradients of both, for that of the result.
  void differentiate(Vec grad, Vec* gate, Vec* up) const {
    const Vec inner = *gate > limit_ ? limit_ : *gate;
    const Vec outer = *up > limit_ ? limit_ : *up < -limit_ ? -limit_ : *up;
    *up = magnitude_of(*up) > limit_ ? Vec{} : grad * activate<A>(inner, alpha_);
    *gate = differentiate(grad * (outer + shift_), *gate);
  }
  Vec differentiate(Vec grad, Vec gate) const {
    return gate > limit_ ? Vec{} : grad * slope<A>(gate, alpha_);
  }

 private:
  Vec limit_;
  float alpha_, shift_;
};

// Calls work with the Expert of a formula.
template <class Work>
void with_expert(const Formula& f, const Work& work) {
  switch (f.activation) {
    case Activation::kRelu: return work(Expert<Activation::kRelu>(f));
    case Activation::kRelu2: return work(Expert<Activation::kRelu2>(f));
    case Activation::kSilu: return work(Expert<Activation::kSilu>(f));
    case Activation::kGelu: return work(Expert<Activation::kGelu>(f));
    case Activation::kGeluTanh: return work(Expert<Activation::kGeluTanh>(f));
    default: return work(Expert<Activation::kIdentity>(f));
  }
}

}  // namespace s2o
