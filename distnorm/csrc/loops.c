/* The four loops over big float32 tensors, on a CPU: what kernels/aten.py computes, in as few passes as there can be.

   planes: images [N, C, L], contiguous.    rows: [R, C] with R = N * L, channels last.
   Sums are float64. Within a block that fits the first-level cache they are float32, about the block's own mean.
   cosums are float32 within a block of the same size. */

#include <stddef.h>

typedef ptrdiff_t index_t;

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

/* sum(dy) and sum(dy * (x - centre)), where dy = x - centre if there is none */
static void add_products(const float *dy, const float *x, block_t block, float centre, double *one, double *two)
{
    vector ones = {0}, twos = {0};
    float rest = 0, rests = 0;
    for (index_t n = 0; n < block.samples; n++) {
        const float *v = x + n * block.stride, *g = dy ? dy + n * block.stride : NULL;
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

static void plane_block(const float *dy, const float *x, block_t block, const float *pivot, double *one, double *two)
{
    if (dy) {
        add_products(dy, x, block, *pivot, one, two);
        return;
    }
    double first = 0, second = 0, centre = mean_of(x, block);
    add_products(NULL, x, block, centre, &first, &second);
    uncentre(one, two, (double)block.samples * block.length, centre, first, second);
}

/* Without dy: sums[c] = sum(x), sums[C + c] = sum(x^2), sums[2 C] = their count, and the pivot becomes the mean.
   With dy: sum(dy), sum(dy * (x - pivot)). */
void plane_sums(const float *dy, const float *x, float *pivot, double *sums, index_t N, index_t C, index_t L,
                int threads)
{
    index_t length = MIN(L, BLOCK), samples = BLOCK / length;
    if (!dy) sums[2 * C] = N * L;
    PARALLEL
    for (index_t c = 0; c < C; c++) {
        sums[c] = sums[C + c] = 0;
        for (index_t n = 0; n < N; n += samples)
            for (index_t l = 0; l < L; l += length) {
                index_t at = (n * C + c) * L + l;
                block_t block = {MIN(samples, N - n), MIN(length, L - l), C * L};
                plane_block(dy ? dy + at : NULL, x + at, block, pivot + c, sums + c, sums + C + c);
            }
        if (!dy) pivot[c] = sums[c] / (N * L);
    }
}

/* y = (x - pivot) * scale + shift */
void plane_apply(const float *x, float *y, const float *pivot, const float *scale, const float *shift, index_t N,
                 index_t C, index_t L, int threads)
{
    PARALLEL
    for (index_t row = 0; row < N * C; row++) {
        float centre = pivot[row % C], factor = scale[row % C], term = shift[row % C];
        for (index_t i = row * L; i < (row + 1) * L; i++) y[i] = (x[i] - centre) * factor + term;
    }
}

/* dx = dy * scale + level + (x - pivot) * slope */
void plane_combine(const float *dy, const float *x, float *dx, const float *pivot, const float *scale,
                   const float *level, const float *slope, index_t N, index_t C, index_t L, int threads)
{
    PARALLEL
    for (index_t row = 0; row < N * C; row++) {
        float centre = pivot[row % C], factor = scale[row % C], term = level[row % C], tilt = slope[row % C];
        for (index_t i = row * L; i < (row + 1) * L; i++) dx[i] = dy[i] * factor + ((x[i] - centre) * tilt + term);
    }
}

static inline __attribute__((always_inline)) void row_block(const float *dy, const float *x, const float *pivot,
                                                            index_t rows, index_t width, index_t C, double *sums)
{
    float centre[TILE] = {0}, one[TILE] = {0}, two[TILE] = {0};
    if (dy)
        for (index_t j = 0; j < width; j++) centre[j] = pivot[j];
    else {
        for (index_t r = 0; r < rows; r++)
            for (index_t j = 0; j < width; j++) centre[j] += x[r * C + j];
        for (index_t j = 0; j < width; j++) centre[j] /= rows;
    }
    for (index_t r = 0; r < rows; r++)
        for (index_t j = 0; j < width; j++) {
            float centred = x[r * C + j] - centre[j], factor = dy ? dy[r * C + j] : centred;
            one[j] += factor;
            two[j] += factor * centred;
        }
    for (index_t j = 0; j < width; j++)
        if (dy)
            sums[j] += one[j], sums[C + j] += two[j];
        else
            uncentre(sums + j, sums + C + j, rows, centre[j], one[j], two[j]);
}

/* As plane_sums. The four calls are one function, compiled for what is known of its arguments. */
void row_sums(const float *dy, const float *x, float *pivot, double *sums, index_t N, index_t C, index_t L, int threads)
{
    if (!dy) sums[2 * C] = N * L;
    PARALLEL
    for (index_t c = 0; c < C; c += TILE) {
        index_t width = MIN(TILE, C - c), R = N * L;
        for (index_t j = c; j < c + width; j++) sums[j] = sums[C + j] = 0;
        for (index_t r = 0; r < R; r += ROWS) {
            index_t rows = MIN(ROWS, R - r), at = r * C + c;
            if (dy && width == TILE)
                row_block(dy + at, x + at, pivot + c, rows, TILE, C, sums + c);
            else if (dy)
                row_block(dy + at, x + at, pivot + c, rows, width, C, sums + c);
            else if (width == TILE)
                row_block(NULL, x + at, NULL, rows, TILE, C, sums + c);
            else
                row_block(NULL, x + at, NULL, rows, width, C, sums + c);
        }
        for (index_t j = c; !dy && j < c + width; j++) pivot[j] = sums[j] / R;
    }
}

/* As plane_apply. */
void row_apply(const float *x, float *y, const float *pivot, const float *scale, const float *shift, index_t N,
               index_t C, index_t L, int threads)
{
    PARALLEL
    for (index_t r = 0; r < N * L; r++)
        for (index_t c = 0; c < C; c++) y[r * C + c] = (x[r * C + c] - pivot[c]) * scale[c] + shift[c];
}

/* As plane_combine. */
void row_combine(const float *dy, const float *x, float *dx, const float *pivot, const float *scale,
                 const float *level, const float *slope, index_t N, index_t C, index_t L, int threads)
{
    PARALLEL
    for (index_t r = 0; r < N * L; r++)
        for (index_t c = 0, i = r * C; c < C; c++, i++)
            dx[i] = dy[i] * scale[c] + ((x[i] - pivot[c]) * slope[c] + level[c]);
}
