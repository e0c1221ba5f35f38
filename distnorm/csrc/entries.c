/* One slot of a step under a policy that remembers earlier steps: what policies/moving.py and policies/stale_mix.py say in
   torch. The values, divided by the loss scale, are added to the outbox with their weight; out is what the layer goes on
   with, of as many values. */

#include <stddef.h>
#include <stdint.h>

typedef ptrdiff_t index_t;

/* out = factor * mean of the landed entries, of which sums is the sum, and the newest, if it has any weight */
void entries_window(const double *values, index_t count, double loss_scale, double weight, double factor,
                    const double *sums, const int64_t *landed, double *outbox, double *outbox_weight, double *out)
{
    index_t entries = *landed + (weight > 0);
    double over = factor / (entries > 1 ? entries : 1);
    for (index_t i = 0; i < count; i++) {
        double value = values[i] / loss_scale;
        outbox[i] += value;
        out[i] = (sums[i] + (weight > 0 ? value / weight : 0)) * over;
    }
    *outbox_weight += weight;
}

/* out = values + factor * others */
void entries_mix(const double *values, index_t count, double loss_scale, double weight, double factor,
                 const double *others, double *outbox, double *outbox_weight, double *out)
{
    for (index_t i = 0; i < count; i++) {
        outbox[i] += values[i] / loss_scale;
        out[i] = values[i] + factor * others[i];
    }
    *outbox_weight += weight;
}
