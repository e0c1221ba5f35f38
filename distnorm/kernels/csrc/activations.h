/* Formulas of activations in float32. Written from kernels/gpu/activations.py, which explains them, by
   python -m tests.support.activations_header. */

#include <math.h>

#include "exponential.h"

typedef struct {
    float value, gradient;
} activated_t;

static inline float logistic(float z)
{
    return 1.0f / (1.0f + exponential(-z));
}

static inline float exp_less_1(float z)
{
    float rest = 1.0f + z * 0.25f * (1.0f + z * 0.2f * (1.0f + z * 0.16666667f * (1.0f + z * 0.14285714f)));
    float series = z * (1.0f + z * 0.5f * (1.0f + z * 0.33333333f * rest));
    return (fabsf(z) < 0.3f ? series : exponential(z) - 1.0f);
}

static inline float normal_above(float z)
{
    float t = 1.0f / (1.0f + 0.475f * z);
    float high = 0.272025114f + t * (-0.423736051f + t * (0.218926189f + t * -0.041533397f));
    return t * (0.189325636f + t * (0.196668191f + t * (0.0883243308f + t * high))) * exponential(z * z * -0.5f);
}

static inline activated_t relu6(float z, float dy, float a)
{
    (void)a;
    return (activated_t){(z < 0.0f ? 0.0f : (z > 6.0f ? 6.0f : z)), (z <= 0.0f ? 0.0f : (z >= 6.0f ? 0.0f : dy))};
}

static inline activated_t leaky_relu(float z, float dy, float a)
{
    return (activated_t){(z > 0.0f ? z : z * a), (z > 0.0f ? dy : dy * a)};
}

static inline activated_t elu(float z, float dy, float a)
{
    return (activated_t){(z <= 0.0f ? a * exp_less_1(z) : z), (z <= 0.0f ? dy * (a * exponential(z)) : dy)};
}

static inline activated_t sigmoid(float z, float dy, float a)
{
    (void)a;
    float s = logistic(z);
    return (activated_t){s, dy * (s * (1.0f - s))};
}

static inline activated_t silu(float z, float dy, float a)
{
    (void)a;
    float s = logistic(z);
    return (activated_t){z * s, dy * (s * (1.0f + z * (1.0f - s)))};
}

static inline activated_t mish(float z, float dy, float a)
{
    (void)a;
    float e = exponential((z > 20.0f ? 20.0f : z));
    float n = e * (e + 2.0f);
    float t = n / (n + 2.0f);
    return (activated_t){z * t, dy * (t + z * (e / (1.0f + e)) * (1.0f - t * t))};
}

static inline activated_t gelu(float z, float dy, float a)
{
    (void)a;
    float above = normal_above(fabsf(z));
    float p = (z < 0.0f ? above : 1.0f - above);
    return (activated_t){z * p, dy * (p + z * (0.3989422804f * exponential(z * z * -0.5f)))};
}

static inline activated_t gelu_tanh(float z, float dy, float a)
{
    (void)a;
    float s = logistic(1.5957691216f * z * (1.0f + 0.044715f * z * z));
    return (activated_t){z * s, dy * (s + z * s * (1.0f - s) * (1.5957691216f * (1.0f + 0.134145f * z * z)))};
}

static inline activated_t hardsigmoid(float z, float dy, float a)
{
    (void)a;
    float h = (z < -3.0f ? 0.0f : (z > 3.0f ? 6.0f : z + 3.0f));
    return (activated_t){h * 0.16666667f, (z > -3.0f ? (z < 3.0f ? dy * 0.16666667f : 0.0f) : 0.0f)};
}

static inline activated_t hardswish(float z, float dy, float a)
{
    (void)a;
    float h = (z < -3.0f ? 0.0f : (z > 3.0f ? 6.0f : z + 3.0f));
    return (activated_t){z * h * 0.16666667f, (z <= -3.0f ? 0.0f : (z >= 3.0f ? dy : dy * (z * 0.33333333f + 0.5f)))};
}

/* In the order of their numbers, which begin behind that of ReLU. */
#define FORMULAS_OF_ACTIVATIONS(F) \
    F(relu6) F(leaky_relu) F(elu) F(sigmoid) F(silu) F(mish) F(gelu) F(gelu_tanh) F(hardsigmoid) F(hardswish)
