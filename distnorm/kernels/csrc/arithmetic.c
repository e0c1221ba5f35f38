/* The C-sized float64 arithmetic of methods: the same as methods/batch_norm.py and methods/rms.py, in one call each.

   payload: K sums per channel and their count, shared. means: payload over count. pivot: what the loops centre about.
   Forward, of a method: means[K * C]; factor = d scale / d weight; y = (x - pivot) * scale + shift.
   Pull: from sum(dy) and sum(dy * (x - pivot)) to the cotangents of the method's link, and to the parameters' gradients.
   Link: from shared cotangents to dx = dy * scale + level + (x - pivot) * slope.
   Update running statistics: running += (moments of means / over - running) * rate, if count is at least 2; if guarded,
   only where all moments are finite and fit. */

#include <float.h>
#include <math.h>

#include "kernels.h"

static double divisor(double count) { return count > 0 ? count : 1; }

/* Rounding can give less than 0; NaN stays NaN. */
static double variance(double mean, double square)
{
    double var = square - mean * mean;
    return var < 0 ? 0 : var;
}

static double or_one(const float *values, index_t c) { return values ? values[c] : 1; }
static double or_zero(const float *values, index_t c) { return values ? values[c] : 0; }

void batch_norm_forward(const double *payload, const float *pivot, const float *weight, const float *bias,
                        const float *running_var, double clip, double eps, index_t C, double *means, double *factor,
                        float *scale, float *shift)
{
    (void)running_var, (void)clip;
    double count = divisor(payload[2 * C]);
    for (index_t c = 0; c < C; c++) {
        double mean = payload[c] / count, square = payload[C + c] / count;
        double invstd = 1 / sqrt(variance(mean, square) + eps), slope = invstd * or_one(weight, c);
        means[c] = mean, means[C + c] = square, factor[c] = invstd;
        scale[c] = slope, shift[c] = (pivot[c] - mean) * slope + or_zero(bias, c);
    }
}

void batch_norm_pull(const double *sums, const double *means, const double *factor, const float *pivot,
                     const float *weight, index_t C, double *cotangents, float *weight_grad, float *bias_grad)
{
    for (index_t c = 0; c < C; c++) {
        double centred = sums[C + c] + (pivot[c] - means[c]) * sums[c], slope = factor[c] * or_one(weight, c);
        cotangents[c] = -slope * sums[c], cotangents[C + c] = -slope * centred;
        weight_grad[c] = factor[c] * centred, bias_grad[c] = sums[c];
    }
}

void batch_norm_link(const double *cotangents, const double *means, const double *count, const float *pivot,
                          double eps, index_t C, float *level, float *slope)
{
    double total = divisor(*count);
    for (index_t c = 0; c < C; c++) {
        double tilt = cotangents[C + c] / ((variance(means[c], means[C + c]) + eps) * total);
        level[c] = cotangents[c] / total + (pivot[c] - means[c]) * tilt, slope[c] = tilt;
    }
}

/* Counts the step, and returns the weight of its moments; a negative momentum is the plain average over all steps. */
static double next_rate(double momentum, int64_t *tracked)
{
    ++*tracked;
    return momentum < 0 ? 1.0 / *tracked : momentum;
}

/* Whether running statistics stay finite when they move towards a value. */
static int fits(double value) { return fabs(value) <= FLT_MAX / 2; }

void batch_norm_update_running(const double *means, double over, double count, index_t C, double momentum, int guarded,
                       int64_t *tracked, float *running_mean, float *running_var)
{
    if (!(count > 1)) return;
    double bessel = count / (count - 1);
    for (index_t c = 0; guarded && c < C; c++) {
        double mean = means[c] / over;
        if (!fits(mean) || !fits(variance(mean, means[C + c] / over) * bessel)) return;
    }
    double rate = next_rate(momentum, tracked);
    for (index_t c = 0; c < C; c++) {
        double mean = means[c] / over, unbiased = variance(mean, means[C + c] / over) * bessel;
        running_mean[c] += (mean - running_mean[c]) * rate;
        running_var[c] += (unbiased - running_var[c]) * rate;
    }
}

/* The correction of RMS by the running second moment: sqrt((square + eps) / (running_var + eps)), clipped. */
static double correction(double square, const float *running_var, index_t c, double clip, double eps)
{
    if (!running_var) return 1;
    double ratio = sqrt((square + eps) / (running_var[c] + eps));
    return ratio < 1 / clip ? 1 / clip : ratio > clip ? clip : ratio;
}

void rms_forward(const double *payload, const float *pivot, const float *weight, const float *bias,
                 const float *running_var, double clip, double eps, index_t C, double *means, double *factor,
                 float *scale, float *shift)
{
    double count = divisor(payload[C]);
    for (index_t c = 0; c < C; c++) {
        double square = payload[c] / count, slope;
        means[c] = square, factor[c] = correction(square, running_var, c, clip, eps) / sqrt(square + eps);
        slope = factor[c] * or_one(weight, c);
        scale[c] = slope, shift[c] = pivot[c] * slope + or_zero(bias, c);
    }
}

void rms_pull(const double *sums, const double *means, const double *factor, const float *pivot, const float *weight,
              index_t C, double *cotangents, float *weight_grad, float *bias_grad)
{
    (void)means;
    for (index_t c = 0; c < C; c++) {
        double gradient = factor[c] * (sums[C + c] + pivot[c] * sums[c]);
        cotangents[c] = -gradient * or_one(weight, c);
        weight_grad[c] = gradient, bias_grad[c] = sums[c];
    }
}

void rms_link(const double *cotangents, const double *means, const double *count, const float *pivot, double eps,
                   index_t C, float *level, float *slope)
{
    double total = divisor(*count);
    for (index_t c = 0; c < C; c++) {
        double tilt = cotangents[c] / ((means[c] + eps) * total);
        level[c] = pivot[c] * tilt, slope[c] = tilt;
    }
}

void rms_update_running(const double *means, double over, double count, index_t C, double momentum, int guarded,
                int64_t *tracked, float *running_mean, float *running_var)
{
    (void)running_mean;
    if (!(count > 1)) return;
    for (index_t c = 0; guarded && c < C; c++) {
        if (!fits(means[c] / over)) return;
    }
    double rate = next_rate(momentum, tracked);
    for (index_t c = 0; c < C; c++) running_var[c] += (means[c] / over - running_var[c]) * rate;
}
