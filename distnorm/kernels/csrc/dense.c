/* The passes of one layer: forward what comes before and after its sums are shared, and backward the same. Each is loops
   of loops.c with the arithmetic of arithmetic.c before or behind them; one call, for a call from Python costs as much as
   a small layer. rows: channels last. formula: 0 is RMS, of one sum per channel, 1 batch norm, of two.

   memory is the layer's from its forward to its backward: 7 C + 1 doubles and then 5 C floats. */

#include "kernels.h"

typedef struct {
    sums_t *sums;
    apply_t *apply;
    combine_t *combine;
} loops_t;

typedef struct {
    forward_t *forward;
    pull_t *pull;
    link_t *link;
    absorb_t *absorb;
} formula_t;

static const loops_t LOOPS[] = {{plane_sums, plane_apply, plane_combine}, {row_sums, row_apply, row_combine}};
static const formula_t FORMULAS[] = {{rms_forward, rms_pull, rms_link, rms_absorb},
                                     {batch_norm_forward, batch_norm_pull, batch_norm_link, batch_norm_absorb}};

typedef struct {
    double *sums, *means, *factor, *cosums;
    float *pivot, *scale, *shift, *level, *slope;
} memory_t;

static memory_t laid_out(double *memory, index_t C)
{
    float *narrow = (float *)(memory + 7 * C + 1);
    return (memory_t){memory,     memory + 2 * C + 1, memory + 4 * C + 1, memory + 5 * C + 1, narrow, narrow + C,
                      narrow + 2 * C, narrow + 3 * C,     narrow + 4 * C};
}

/* Sums of x, of its squares, and their count begin the memory. */
void dense_sums(int rows, const float *x, double *memory, index_t N, index_t C, index_t L, int threads)
{
    memory_t m = laid_out(memory, C);
    LOOPS[rows].sums(NULL, x, NULL, NULL, m.pivot, NULL, NULL, m.sums, N, C, L, threads);
}

/* The output by shared sums and their count, which running statistics absorb if there are any (tracked is not NULL). */
void dense_normalize(int rows, int formula, const float *x, const float *residual, float *y, int relu,
                     const double *shared, const float *weight, const float *bias, const float *followed, double clip,
                     double eps, double *memory, float *running_mean, float *running_var, int64_t *tracked,
                     double momentum, int guarded, index_t N, index_t C, index_t L, int threads)
{
    memory_t m = laid_out(memory, C);
    formula_t f = FORMULAS[formula];
    f.forward(shared, m.pivot, weight, bias, followed, clip, eps, C, m.means, m.factor, m.scale, m.shift);
    if (tracked) f.absorb(shared, C, momentum, guarded, tracked, running_mean, running_var);
    LOOPS[rows].apply(x, residual, y, m.pivot, m.scale, m.shift, relu, N, C, L, threads);
}

/* Cotangents of what was shared, and the parameters' gradients. Behind a relu the output's sign is formed anew from x
   (relu), or read from y, which gives dz, too. */
void dense_pull(int rows, int formula, int relu, const float *dy, const float *x, const float *y, float *dz,
                const float *weight, double *memory, double *cotangents, float *weight_grad, float *bias_grad,
                index_t N, index_t C, index_t L, int threads)
{
    memory_t m = laid_out(memory, C);
    const float *scale = relu ? m.scale : NULL, *shift = relu ? m.shift : NULL;
    LOOPS[rows].sums(dy, x, y, dz, m.pivot, scale, shift, m.cosums, N, C, L, threads);
    FORMULAS[formula].pull(m.cosums, m.means, m.factor, m.pivot, weight, C, cotangents, weight_grad, bias_grad);
}

/* The input's gradient, by shared cotangents and their forward's count. */
void dense_combine(int rows, int formula, int relu, const float *dz, const float *x, float *dx,
                   const double *cotangents, const double *count, double eps, double *memory, index_t N, index_t C,
                   index_t L, int threads)
{
    memory_t m = laid_out(memory, C);
    FORMULAS[formula].link(cotangents, m.means, count, m.pivot, eps, C, m.level, m.slope);
    LOOPS[rows].combine(dz, x, dx, m.pivot, m.scale, relu ? m.shift : NULL, m.level, m.slope, N, C, L, threads);
}
