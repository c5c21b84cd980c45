// Vectors of floats of one instruction set, and functions of them. Included once for each, inside its namespace.
//
// LANES is defined by the including file. All loads may be unaligned.

using vf = float __attribute__((vector_size(LANES * 4)));
using vi = int32_t __attribute__((vector_size(LANES * 4)));

inline vf load(const float* from) {
  vf v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, vf v) { __builtin_memcpy(to, &v, sizeof v); }

/// The first `count` < LANES numbers, then zeros.
inline vf load_some(const float* from, int64_t count) {
  vf v = {};
  __builtin_memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void store_some(float* to, vf v, int64_t count) { __builtin_memcpy(to, &v, count * sizeof(float)); }

inline vf fill(float x) { return x - vf{}; }

inline vf min(vf a, vf b) { return a < b ? a : b; }
inline vf max(vf a, vf b) { return a > b ? a : b; }

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) {
    total += v[i];
  }
  return total;
}

inline float largest(vf v) {
  float most = v[0];
  for (int i = 1; i < LANES; i++) {
    most = v[i] > most ? v[i] : most;
  }
  return most;
}

/// e^x, relative error 2e-7; 0 below -87.3, and infinity above 88.7. NaN stays NaN.
inline vf exp(vf x) {
  const vf clamped = max(min(x, fill(88.72f)), fill(-87.33f));
  const vf shifted = clamped * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer
  const vf n = shifted - 12582912.f;
  const vf r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const vi bits = (__builtin_convertvector(n, vi) << 23) + (vi)p;
  const vf y = x < fill(-87.33f) ? vf{} : (vf)bits;
  return x > fill(88.72f) ? fill(__builtin_inff()) : x == x ? y : x;
}

inline vf sigmoid(vf x) { return 1.f / (1.f + exp(-x)); }

/// `y`, an odd function of x limited to `c`; 1 or -1 beyond. NaN stays NaN.
inline vf saturated(vf x, vf c, vf y) {
  const vf bounded = x > c ? fill(1.f) : x < c ? fill(-1.f) : y;
  return x == x ? bounded : x;
}

/// Rational approximation (Eigen's), error 2 ulp.
inline vf tanh(vf x) {
  const vf c = max(min(x, fill(7.90531110763549805f)), fill(-7.90531110763549805f));
  const vf q = c * c;
  vf p = fill(-2.76076847742355e-16f);
  p = p * q + 2.00018790482477e-13f;
  p = p * q + -8.60467152213735e-11f;
  p = p * q + 5.12229709037114e-08f;
  p = p * q + 1.48572235717979e-05f;
  p = p * q + 6.37261928875436e-04f;
  p = p * q + 4.89352455891786e-03f;
  vf d = fill(1.19825839466702e-06f);
  d = d * q + 1.18534705686654e-04f;
  d = d * q + 2.26843463243900e-03f;
  d = d * q + 4.89352518554385e-03f;
  return saturated(x, c, c * p / d);
}

/// Rational approximation (Eigen's), absolute error 2e-7.
inline vf erf(vf x) {
  const vf c = max(min(x, fill(4.f)), fill(-4.f));
  const vf q = c * c;
  vf p = fill(-2.72614225801306e-10f);
  p = p * q + 2.77068142495902e-08f;
  p = p * q + -2.10102402082508e-06f;
  p = p * q + -5.69250639462346e-05f;
  p = p * q + -7.34990630326855e-04f;
  p = p * q + -2.95459980854025e-03f;
  p = p * q + -1.60960333262415e-02f;
  vf d = fill(-1.45660718464996e-05f);
  d = d * q + -2.13374055278905e-04f;
  d = d * q + -1.68282697438203e-03f;
  d = d * q + -7.37332916720468e-03f;
  d = d * q + -1.42647390514189e-02f;
  return saturated(x, c, c * p / d);
}
