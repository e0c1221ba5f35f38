/* The passes of one layer: forward what comes before and after its sums are shared, and backward the same. Each is loops
   of loops.c with the arithmetic of arithmetic.c before or behind them; one call, for a call from Python costs as much as
   a small layer. rows: channels last. formula: 0 is RMS, of one sum per channel, 1 batch norm, of two.

   memory is the layer's from its forward to its backward: a head, 7 C + 1 doubles, then 5 C floats. */

#include "kernels.h"

typedef struct {
    sums_t *sums;
    apply_t *apply;
    combine_t *combine;
} loops_t;

typedef struct {
    index_t kinds;
    forward_t *forward;
    pull_t *pull;
    link_t *link;
    update_running_t *update_running;
} formula_t;

static const loops_t LOOPS[] = {{plane_sums, plane_apply, plane_combine}, {row_sums, row_apply, row_combine}};
static const formula_t FORMULAS[] = {
    {1, rms_forward, rms_pull, rms_link, rms_update_running},
    {2, batch_norm_forward, batch_norm_pull, batch_norm_link, batch_norm_update_running},
};

/* What one pass is, as dense.py begins it: as long as 8 doubles. */
typedef struct {
    index_t N, C, L;
    double eps, count;
    int rows, formula, threads, unused;
    epilogue_t epilogue; /* that the backward recomputes from x */
} head_t;

typedef struct {
    double *sums, *means, *factor, *cosums;
    float *pivot, *scale, *shift, *level, *slope;
} memory_t;

static memory_t laid_out(head_t *head)
{
    index_t C = head->C;
    double *wide = (double *)(head + 1);
    float *narrow = (float *)(wide + 7 * C + 1);
    return (memory_t){wide,           wide + 2 * C + 1, wide + 4 * C + 1, wide + 5 * C + 1, narrow, narrow + C,
                      narrow + 2 * C, narrow + 3 * C,   narrow + 4 * C};
}

/* Begins the memory with a pass over x; sums of x, of its squares, and their count follow the head. */
void dense_sums(head_t *head, int rows, int formula, double eps, const float *x, index_t N, index_t C, index_t L,
                int threads)
{
    *head = (head_t){.N = N, .C = C, .L = L, .eps = eps, .rows = rows, .formula = formula, .threads = threads};
    memory_t m = laid_out(head);
    LOOPS[rows].sums(NULL, x, NULL, NULL, m.pivot, NULL, NULL, (epilogue_t){NONE, 0}, m.sums, N, C, L, threads);
}

/* The output by shared sums and their count, which update the running statistics, if any (tracked is not NULL).
   For an activation without a residual, the backward recomputes what it was applied to. */
void dense_normalize(head_t *head, const float *x, const float *residual, float *y, int activation, float parameter,
                     const double *shared, const float *weight, const float *bias, const float *followed, double clip,
                     float *running_mean, float *running_var, int64_t *tracked, double momentum, int guarded)
{
    head_t h = *head;
    memory_t m = laid_out(head);
    formula_t f = FORMULAS[h.formula];
    double count = head->count = shared[f.kinds * h.C];
    epilogue_t epilogue = {activation, parameter};
    if (!residual) head->epilogue = epilogue;
    f.forward(shared, m.pivot, weight, bias, followed, clip, h.eps, h.C, m.means, m.factor, m.scale, m.shift);
    if (tracked) f.update_running(shared, count, count, h.C, momentum, guarded, tracked, running_mean, running_var);
    LOOPS[h.rows].apply(x, residual, y, m.pivot, m.scale, m.shift, epilogue, h.N, h.C, h.L, h.threads);
}

/* Cotangents of what was shared, and the parameters' gradients. With an activation its input is recomputed from x, or
   its sign read from y. dz, the gradient before it, is given unless a ReLU without a residual will mask dy again. */
void dense_pull(head_t *head, const float *dy, const float *x, const float *y, float *dz, const float *weight,
                double *cotangents, float *weight_grad, float *bias_grad)
{
    head_t h = *head;
    memory_t m = laid_out(head);
    const float *scale = h.epilogue.activation ? m.scale : NULL, *shift = scale ? m.shift : NULL;
    LOOPS[h.rows].sums(dy, x, y, dz, m.pivot, scale, shift, h.epilogue, m.cosums, h.N, h.C, h.L, h.threads);
    FORMULAS[h.formula].pull(m.cosums, m.means, m.factor, m.pivot, weight, h.C, cotangents, weight_grad, bias_grad);
}

/* The gradient of the input, from shared cotangents; it may take the place of dz. */
void dense_combine(head_t *head, const float *dz, const float *x, float *dx, const double *cotangents)
{
    head_t h = *head;
    memory_t m = laid_out(head);
    FORMULAS[h.formula].link(cotangents, m.means, &h.count, m.pivot, h.eps, h.C, m.level, m.slope);
    const float *shift = h.epilogue.activation == RELU ? m.shift : NULL;
    LOOPS[h.rows].combine(dz, x, dx, m.pivot, m.scale, shift, m.level, m.slope, h.N, h.C, h.L, h.threads);
}
