/* What dense.c joins: loops.c says what the loops compute, arithmetic.c what the formulas do. */

#include <stddef.h>
#include <stdint.h>

typedef ptrdiff_t index_t;

/* An activation and its parameter: none, ReLU, then those of activations.h in order, as kernels/activations.py numbers them. */
enum { NONE, RELU };
typedef struct {
    int activation;
    float parameter;
} epilogue_t;

typedef void sums_t(const float *dy, const float *x, const float *y, float *dz, float *pivot, const float *scale,
                    const float *shift, epilogue_t epilogue, double *sums, index_t N, index_t C, index_t L, int threads);
typedef void apply_t(const float *x, const float *residual, float *y, const float *pivot, const float *scale,
                     const float *shift, epilogue_t epilogue, index_t N, index_t C, index_t L, int threads);
typedef void combine_t(const float *dy, const float *x, float *dx, const float *pivot, const float *scale,
                       const float *shift, const float *level, const float *slope, index_t N, index_t C, index_t L,
                       int threads);
sums_t plane_sums, row_sums;
apply_t plane_apply, row_apply;
combine_t plane_combine, row_combine;

typedef void forward_t(const double *payload, const float *pivot, const float *weight, const float *bias,
                       const float *running_var, double clip, double eps, index_t C, double *means, double *factor,
                       float *scale, float *shift);
typedef void pull_t(const double *sums, const double *means, const double *factor, const float *pivot,
                    const float *weight, index_t C, double *cotangents, float *weight_grad, float *bias_grad);
typedef void link_t(const double *cotangents, const double *means, const double *count, const float *pivot, double eps,
                    index_t C, float *level, float *slope);
typedef void update_running_t(const double *means, double over, double count, index_t C, double momentum, int guarded,
                      int64_t *tracked, float *running_mean, float *running_var);
forward_t rms_forward, batch_norm_forward;
pull_t rms_pull, batch_norm_pull;
link_t rms_link, batch_norm_link;
update_running_t rms_update_running, batch_norm_update_running;
