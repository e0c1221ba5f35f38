/* One slot of a step under a policy with a window: the same as ../windows.py. The values, divided
   by the loss scale, are added to the outbox with their weight; out is what the layer goes on with, of as many
   values. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

typedef ptrdiff_t index_t;

/* out = loss_scale * weight * mean of the completed entries, of which sums is the sum, and the newest, if it has any
   weight. If counted, the weight follows the values, in out too. */
void entries_window(const double *values, index_t count, int counted, double loss_scale, double weight,
                    const double *sums, const int64_t *filled, double *outbox, double *outbox_weight, double *out)
{
    if (counted) weight = out[count] = values[count];
    double factor = weight * loss_scale;
    index_t entries = *filled + (weight > 0);
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

/* A completed vector (values of all slots, then their weights) becomes the newest entry of the ring, slot by slot; slots
   without weight, and those with values that are not finite, keep their entries. starts: where slots begin, and the end
   of the last one. ring: [depth, values]; position: where a slot's next entry goes; sums: of a slot's entries. */
void entries_push(const double *vector, const int64_t *starts, index_t slots, index_t depth, double *ring,
                  int64_t *filled, int64_t *position, double *sums, int64_t *dropped, uint8_t *usable)
{
    index_t values = starts[slots];
    for (index_t slot = 0; slot < slots; slot++) {
        double weight = vector[values + slot];
        int finite = isfinite(weight) != 0;
        for (index_t i = starts[slot]; i < starts[slot + 1]; i++) finite &= isfinite(vector[i]) != 0;
        dropped[slot] += !finite;
        usable[slot] = finite && weight > 0;
        if (!usable[slot]) continue;
        double *row = ring + position[slot] * values;
        for (index_t i = starts[slot]; i < starts[slot + 1]; i++) {
            row[i] = vector[i] / weight;
            sums[i] = 0;
            for (index_t entry = 0; entry < depth; entry++) sums[i] += ring[entry * values + i];
        }
        position[slot] = (position[slot] + 1) % depth;
        filled[slot] += filled[slot] < depth;
    }
}
