/* exp in float32 that compilers vectorize: without a call, a branch or a table.

   exp(x) = 2^n exp(r) with r = x - n log(2) in [-0.35, 0.35] and its Taylor polynomial; up to 3 units in the last place.
   Below 2^-126.5 it is 0, from 2^127.5 on infinite, as the exponents of 2^-127 and 2^128 are. NaN stays NaN. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float exponential(float x)
{
    const float to_integer = 12582912; /* 1.5 * 2^23: the sum's last bits are the nearest integer */
    float bounded = x < -88 ? -88 : x;
    bounded = bounded > 89 ? 89 : bounded;
    float shifted = bounded * 1.44269504f + to_integer, n = shifted - to_integer;
    float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    float power = 1 / 24.f + r * (1 / 120.f + r * (1 / 720.f));
    power = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * power)));
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)(bits + 127) << 23); /* the exponent of 2^n */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}
