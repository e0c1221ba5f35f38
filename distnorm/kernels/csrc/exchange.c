/* Sums of float64 vectors among processes of one host, through memory that they share.

   The segment: per rank a cache line with its turn, and how long its vectors are and whose; then two vectors per rank,
   used by turns. A rank writes its vector of a turn, then the turn; after reading that turn, others may read the
   vector. Writing turn t overwrites turn t - 2, which nobody reads any more: a rank starts t after it has seen all
   others at t - 1, so they have finished t - 2. */

#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef ptrdiff_t index_t;

#define LINE 64
#define GLANCES 64 /* looks at a turn before the core is offered to others */
static const struct timespec NAP = {0, 50000};

static uint64_t *turn_of(char *segment, index_t rank) { return (uint64_t *)(segment + rank * LINE); }

static uint64_t *count_of(char *segment, index_t rank, int64_t turn) { return turn_of(segment, rank) + 1 + turn % 2; }

static uint64_t *sender_of(char *segment, index_t rank, int64_t turn) { return turn_of(segment, rank) + 3 + turn % 2; }

static double *values_of(char *segment, index_t rank, index_t size, index_t capacity, int64_t turn)
{
    return (double *)(segment + size * LINE) + (2 * rank + turn % 2) * capacity;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

/* Write this rank's vector of a turn, and its sender; once. */
void exchange_post(char *segment, index_t rank, index_t size, index_t capacity, int64_t turn, int64_t sender,
                   const double *values, index_t count)
{
    if (*turn_of(segment, rank) >= (uint64_t)turn) return;
    memcpy(values_of(segment, rank, size, capacity, turn), values, count * sizeof(double));
    *count_of(segment, rank, turn) = count;
    *sender_of(segment, rank, turn) = sender;
    __atomic_store_n(turn_of(segment, rank), turn, __ATOMIC_RELEASE);
}

/* Wait until all ranks have written their vectors of a turn: spin for a while, then sleep between looks, in seconds at
   most ``limit``. Returns a rank that has not, or -1. */
index_t exchange_await(char *segment, index_t size, int64_t turn, double spin, double limit)
{
    double start = now();
    for (index_t rank = 0; rank < size; rank++)
        for (int glances = 0; __atomic_load_n(turn_of(segment, rank), __ATOMIC_ACQUIRE) < (uint64_t)turn; glances++) {
            if (glances % GLANCES) continue;
            double waited = now() - start;
            if (waited > limit) return rank;
            if (waited < spin)
                sched_yield();
            else
                nanosleep(&NAP, NULL);
        }
    return -1;
}

/* The sum of all ranks' vectors of a turn, in the order of ranks: the same bits everywhere.
   Returns a rank whose vector has another length or sender, or -1. */
index_t exchange_add(char *segment, index_t size, index_t capacity, int64_t turn, int64_t sender, double *sum,
                     index_t count)
{
    memset(sum, 0, count * sizeof(double));
    for (index_t rank = 0; rank < size; rank++) {
        const double *values = values_of(segment, rank, size, capacity, turn);
        if (*count_of(segment, rank, turn) != (uint64_t)count) return rank;
        if (*sender_of(segment, rank, turn) != (uint64_t)sender) return rank;
        for (index_t i = 0; i < count; i++) sum[i] += values[i];
    }
    return -1;
}
