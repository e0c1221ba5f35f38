/* The four loops over large float32 tensors, on a CPU: what kernels/aten.py computes, in as few passes as there can be.

   planes: images [N, C, L], contiguous.    rows: [R, C] with R = N * L, channels last.
   Sums are float64. Within a block that fits the first-level cache they are float32, about the block's own mean.
   cosums are float32 within a block of the same size.
   A norm may have an epilogue, relu(norm(x) + residual): then apply has it, too, and sums and combine see the gradient before
   it, which is dy where the output was positive, or NaN. Another activation is applied to blocks of outputs before it. Sums
   compute these again, and store the gradient before the activation, which combine replaces by the input's. */

#include "activations.h"
#include "kernels.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define BLOCK 4096  /* values of one channel in a block of planes */
#define TILE 64     /* channels in a block of rows */
#define ROWS 64     /* its rows: TILE * ROWS values */
#define SMALL 32768 /* values up to which threads cost more than they save */

#define AT(x) (*(const vector *)(x))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define PARALLEL _Pragma("omp parallel for num_threads(threads) if (threads > 1 && N * C * L > SMALL)")

/* An activation of n values z: in place, or dz, the gradient for z, in place of z.
   docs/decisions.md#one-formula-per-activation */
typedef void values_t(float *z, index_t n, float parameter);
typedef void gradients_t(float *z, const float *dy, index_t n, float parameter);

#define DEFINE(name)                                                                           \
    static void name##_values(float *z, index_t n, float parameter)                            \
    {                                                                                          \
        for (index_t i = 0; i < n; i++) z[i] = name(z[i], 0, parameter).value;                 \
    }                                                                                          \
    static void name##_gradients(float *z, const float *dy, index_t n, float parameter)        \
    {                                                                                          \
        for (index_t i = 0; i < n; i++) z[i] = name(z[i], dy[i], parameter).gradient;          \
    }
#define ENTRY(name) {name##_values, name##_gradients},
FORMULAS_OF_ACTIVATIONS(DEFINE)
static const struct {
    values_t *values;
    gradients_t *gradients;
} ACTIVATIONS[] = {[RELU] = {NULL, NULL}, FORMULAS_OF_ACTIVATIONS(ENTRY)};

static float total(vector lanes, float rest)
{
    for (int j = 0; j < LANES; j++) rest += lanes[j];
    return rest;
}

/* A block of planes: samples of length values of one channel, stride apart. */
typedef struct {
    index_t samples, length, stride;
} block_t;

static float mean_of(const float *x, block_t block)
{
    vector sum = {0};
    float rest = 0;
    for (index_t n = 0; n < block.samples; n++, x += block.stride) {
        index_t i = 0;
        for (; i + LANES <= block.length; i += LANES) sum += AT(x + i);
        for (; i < block.length; i++) rest += x[i];
    }
    return total(sum, rest) / (block.samples * block.length);
}

/* sum(dy) and sum(dy * (x - centre)), where dy = x - centre if there is none; samples of dy are step apart */
static void add_products(const float *dy, index_t step, const float *x, block_t block, float centre, double *one,
                         double *two)
{
    vector ones = {0}, twos = {0};
    float rest = 0, rests = 0;
    for (index_t n = 0; n < block.samples; n++) {
        const float *v = x + n * block.stride, *g = dy ? dy + n * step : NULL;
        index_t i = 0;
        for (; i + LANES <= block.length; i += LANES) {
            vector centred = AT(v + i) - centre, factor = g ? AT(g + i) : centred;
            ones += factor;
            twos += factor * centred;
        }
        for (; i < block.length; i++) {
            float centred = v[i] - centre, factor = g ? g[i] : centred;
            rest += factor;
            rests += factor * centred;
        }
    }
    *one += total(ones, rest);
    *two += total(twos, rests);
}

/* From sums about a centre to sums about 0. */
static void uncentre(double *sum, double *square, double count, double centre, double one, double two)
{
    *sum += count * centre + one;
    *square += two + centre * (2 * one + count * centre);
}

/* The output before the epilogue; everywhere the same expression, so that it is rounded alike. */
static inline float normed(float x, float centre, float factor, float term) { return (x - centre) * factor + term; }

static inline float tailed(float value, const float *residual, index_t i, int relu)
{
    if (residual) value += residual[i];
    return relu && value < 0 ? 0 : value; /* NaN stays NaN */
}

/* As many rows of length values as make a block, at least one. */
static index_t rows_of(index_t length) { return length < BLOCK ? BLOCK / length : 1; }

/* A layer's backward pass: the gradient, its epilogue, and what the norm did to a channel.
   Epilogues: none, if scale and y are NULL; an activation, if scale and shift are given; relu with a residual, if the output y
   is. dz is for the gradient before the epilogue, if that costs more than to mask by a relu without a residual. */
typedef struct {
    const float *dy, *y;
    float *dz;
    const float *pivot, *scale, *shift;
    epilogue_t epilogue;
} gradient_t;

static gradient_t moved(gradient_t g, index_t values, index_t channels)
{
    g.dy += values, g.pivot += channels;
    if (g.y) g.y += values;
    if (g.dz) g.dz += values;
    if (g.scale) g.scale += channels, g.shift += channels;
    return g;
}

/* The gradient of a block before an activation: in dz, or in a block of its own. Returns where.
   docs/decisions.md#the-mask-of-a-relu-is-recomputed */
static const float *masked_plane(gradient_t g, const float *x, block_t block, float *own, index_t *step)
{
    *step = g.dz ? block.stride : block.length;
    for (index_t n = 0; n < block.samples; n++) {
        index_t at = n * block.stride;
        if (g.y)
            for (index_t i = at; i < at + block.length; i++) g.dz[i] = g.y[i] <= 0 ? 0 : g.dy[i];
        else if (g.epilogue.activation == RELU)
            for (index_t i = 0; i < block.length; i++)
                own[n * block.length + i] = normed(x[at + i], *g.pivot, *g.scale, *g.shift) <= 0 ? 0 : g.dy[at + i];
        else {
            float *z = g.dz + at;
            for (index_t i = 0; i < block.length; i++) z[i] = normed(x[at + i], *g.pivot, *g.scale, *g.shift);
            ACTIVATIONS[g.epilogue.activation].gradients(z, g.dy + at, block.length, g.epilogue.parameter);
        }
    }
    return g.dz ? g.dz : own;
}

static void plane_moments(const float *x, block_t block, double *one, double *two)
{
    double first = 0, second = 0, centre = mean_of(x, block);
    add_products(NULL, 0, x, block, centre, &first, &second);
    uncentre(one, two, (double)block.samples * block.length, centre, first, second);
}

static void plane_cosums(gradient_t g, const float *x, block_t block, double *one, double *two)
{
    float own[BLOCK];
    index_t step = block.stride;
    const float *dz = g.y || g.scale ? masked_plane(g, x, block, own, &step) : g.dy;
    add_products(dz, step, x, block, *g.pivot, one, two);
}

/* Without dy: sums[c] = sum(x), sums[C + c] = sum(x^2), sums[2 C] = their count, and the pivot becomes the mean.
   With dy: sum(dz), sum(dz * (x - pivot)), and dz where it is wanted. */
void plane_sums(const float *dy, const float *x, const float *y, float *dz, float *pivot, const float *scale,
                const float *shift, epilogue_t epilogue, double *sums, index_t N, index_t C, index_t L, int threads)
{
    index_t length = MIN(L, BLOCK), samples = BLOCK / length;
    gradient_t gradient = {dy, y, dz, pivot, scale, shift, epilogue};
    if (!dy) sums[2 * C] = N * L;
    PARALLEL
    for (index_t c = 0; c < C; c++) {
        sums[c] = sums[C + c] = 0;
        for (index_t n = 0; n < N; n += samples)
            for (index_t l = 0; l < L; l += length) {
                index_t at = (n * C + c) * L + l;
                block_t block = {MIN(samples, N - n), MIN(length, L - l), C * L};
                if (dy)
                    plane_cosums(moved(gradient, at, c), x + at, block, sums + c, sums + C + c);
                else
                    plane_moments(x + at, block, sums + c, sums + C + c);
            }
        if (!dy) pivot[c] = sums[c] / (N * L);
    }
}

/* y = activation((x - pivot) * scale + shift + residual), with what there is of the epilogue */
void plane_apply(const float *x, const float *residual, float *y, const float *pivot, const float *scale,
                 const float *shift, epilogue_t epilogue, index_t N, index_t C, index_t L, int threads)
{
    values_t *values = ACTIVATIONS[epilogue.activation].values;
    index_t relu = epilogue.activation == RELU, step = rows_of(L);
    PARALLEL
    for (index_t first = 0; first < N * C; first += step) {
        index_t end = MIN(first + step, N * C);
        for (index_t row = first; row < end; row++) {
            float centre = pivot[row % C], factor = scale[row % C], term = shift[row % C];
            for (index_t i = row * L; i < (row + 1) * L; i++)
                y[i] = tailed(normed(x[i], centre, factor, term), residual, i, relu);
        }
        if (values) values(y + first * L, (end - first) * L, epilogue.parameter);
    }
}

/* dx = dz * scale + level + (x - pivot) * slope; with a shift, dz is dy before a relu, else dy, of which dx may take the place */
void plane_combine(const float *dy, const float *x, float *dx, const float *pivot, const float *scale,
                   const float *shift, const float *level, const float *slope, index_t N, index_t C, index_t L,
                   int threads)
{
    PARALLEL
    for (index_t row = 0; row < N * C; row++) {
        float centre = pivot[row % C], factor = scale[row % C], term = level[row % C], tilt = slope[row % C];
        float bound = shift ? shift[row % C] : 0;
        for (index_t i = row * L; i < (row + 1) * L; i++) {
            float dz = shift && normed(x[i], centre, factor, bound) <= 0 ? 0 : dy[i];
            dx[i] = dz * factor + ((x[i] - centre) * tilt + term);
        }
    }
}

/* As masked_plane. */
static const float *masked_rows(gradient_t g, const float *x, index_t rows, index_t width, index_t C, float *own,
                                index_t *step)
{
    gradients_t *gradients = ACTIVATIONS[g.epilogue.activation].gradients;
    *step = g.dz ? C : width;
    for (index_t r = 0; r < rows; r++) {
        index_t at = r * C;
        if (g.y)
            for (index_t j = 0; j < width; j++) g.dz[at + j] = g.y[at + j] <= 0 ? 0 : g.dy[at + j];
        else if (g.epilogue.activation == RELU)
            for (index_t j = 0; j < width; j++)
                own[r * width + j] = normed(x[at + j], g.pivot[j], g.scale[j], g.shift[j]) <= 0 ? 0 : g.dy[at + j];
        else {
            float *z = g.dz + at;
            for (index_t j = 0; j < width; j++) z[j] = normed(x[at + j], g.pivot[j], g.scale[j], g.shift[j]);
            if (width < C) gradients(z, g.dy + at, width, g.epilogue.parameter);
        }
    }
    if (gradients && width == C) gradients(g.dz, g.dy, rows * C, g.epilogue.parameter); /* without gaps, in one call */
    return g.dz ? g.dz : own;
}

static inline __attribute__((always_inline)) void row_block(const float *dz, index_t step, const float *x,
                                                            const float *pivot, index_t rows, index_t width, index_t C,
                                                            double *sums)
{
    float centre[TILE] = {0}, one[TILE] = {0}, two[TILE] = {0};
    if (dz)
        for (index_t j = 0; j < width; j++) centre[j] = pivot[j];
    else {
        for (index_t r = 0; r < rows; r++)
            for (index_t j = 0; j < width; j++) centre[j] += x[r * C + j];
        for (index_t j = 0; j < width; j++) centre[j] /= rows;
    }
    for (index_t r = 0; r < rows; r++)
        for (index_t j = 0; j < width; j++) {
            float centred = x[r * C + j] - centre[j], factor = dz ? dz[r * step + j] : centred;
            one[j] += factor;
            two[j] += factor * centred;
        }
    for (index_t j = 0; j < width; j++)
        if (dz)
            sums[j] += one[j], sums[C + j] += two[j];
        else
            uncentre(sums + j, sums + C + j, rows, centre[j], one[j], two[j]);
}

static void row_cosums(gradient_t g, const float *x, index_t rows, index_t width, index_t C, double *sums)
{
    float own[ROWS * TILE];
    index_t step = C;
    const float *dz = g.y || g.scale ? masked_rows(g, x, rows, width, C, own, &step) : g.dy;
    if (width == TILE)
        row_block(dz, step, x, g.pivot, rows, TILE, C, sums);
    else
        row_block(dz, step, x, g.pivot, rows, width, C, sums);
}

/* As plane_sums. The calls of row_block are one function, compiled for what is known of its arguments. */
void row_sums(const float *dy, const float *x, const float *y, float *dz, float *pivot, const float *scale,
              const float *shift, epilogue_t epilogue, double *sums, index_t N, index_t C, index_t L, int threads)
{
    gradient_t gradient = {dy, y, dz, pivot, scale, shift, epilogue};
    if (!dy) sums[2 * C] = N * L;
    PARALLEL
    for (index_t c = 0; c < C; c += TILE) {
        index_t width = MIN(TILE, C - c), R = N * L;
        for (index_t j = c; j < c + width; j++) sums[j] = sums[C + j] = 0;
        for (index_t r = 0; r < R; r += ROWS) {
            index_t rows = MIN(ROWS, R - r), at = r * C + c;
            if (dy)
                row_cosums(moved(gradient, at, c), x + at, rows, width, C, sums + c);
            else if (width == TILE)
                row_block(NULL, 0, x + at, NULL, rows, TILE, C, sums + c);
            else
                row_block(NULL, 0, x + at, NULL, rows, width, C, sums + c);
        }
        for (index_t j = c; !dy && j < c + width; j++) pivot[j] = sums[j] / R;
    }
}

/* As plane_apply. */
void row_apply(const float *x, const float *residual, float *y, const float *pivot, const float *scale,
               const float *shift, epilogue_t epilogue, index_t N, index_t C, index_t L, int threads)
{
    values_t *values = ACTIVATIONS[epilogue.activation].values;
    index_t relu = epilogue.activation == RELU, step = rows_of(C);
    PARALLEL
    for (index_t first = 0; first < N * L; first += step) {
        index_t end = MIN(first + step, N * L);
        for (index_t r = first; r < end; r++)
            for (index_t c = 0, i = r * C; c < C; c++, i++)
                y[i] = tailed(normed(x[i], pivot[c], scale[c], shift[c]), residual, i, relu);
        if (values) values(y + first * C, (end - first) * C, epilogue.parameter);
    }
}

/* As plane_combine. */
void row_combine(const float *dy, const float *x, float *dx, const float *pivot, const float *scale,
                 const float *shift, const float *level, const float *slope, index_t N, index_t C, index_t L,
                 int threads)
{
    PARALLEL
    for (index_t r = 0; r < N * L; r++)
        for (index_t c = 0, i = r * C; c < C; c++, i++) {
            float dz = shift && normed(x[i], pivot[c], scale[c], shift[c]) <= 0 ? 0 : dy[i];
            dx[i] = dz * scale[c] + ((x[i] - pivot[c]) * slope[c] + level[c]);
        }
}
