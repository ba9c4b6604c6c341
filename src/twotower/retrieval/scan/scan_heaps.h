/* What scan.c keeps in heaps: lower bounds, candidates, and the best rows by their scores. */

#ifndef TWOTOWER_SCAN_HEAPS_H
#define TWOTOWER_SCAN_HEAPS_H

#include <stdint.h>
#include <string.h>

typedef struct {
    double score, unit;
    int64_t id, position;
} exact;

typedef struct {
    int64_t position;
    float upper;
} candidate;

/* Floats as integers of the same order, so that threads can share the largest. */
static uint32_t ordered(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float unordered(uint32_t bits) {
    float value;
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void sift_down(float *heap, int64_t size, float value) {
    int64_t place = 0;
    for (;;) {
        int64_t child = 2 * place + 1;
        if (child >= size) break;
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= value) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = value;
}

/* fp64 rounded as fp32 rounds, half to even, but without its limits: scores that a user sees as
 * equal are ranked by id. The same as `round_to_24_bits` in candidates.py. */
static double rounded(double value) {
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (bits + (((int64_t)1 << 28) - 1 + ((bits >> 29) & 1))) & ~(((int64_t)1 << 29) - 1);
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int worse(const exact *one, const exact *other) {
    const double a = rounded(one->score), b = rounded(other->score);
    return a != b ? a < b : one->id > other->id;
}

/* Let an entry sink from the top of a heap of the best, the worst first, to its place. */
static void settle_worst(exact *best, int64_t size, exact entry) {
    int64_t place = 0;
    for (;;) {
        int64_t child = 2 * place + 1;
        if (child >= size) break;
        if (child + 1 < size && worse(&best[child + 1], &best[child])) child++;
        if (!worse(&best[child], &entry)) break;
        best[place] = best[child];
        place = child;
    }
    best[place] = entry;
}

static void keep_exact(exact *best, int64_t *count, int64_t k, exact entry) {
    if (*count < k) {
        int64_t place = (*count)++;
        while (place && worse(&entry, &best[(place - 1) / 2])) {
            best[place] = best[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        best[place] = entry;
    } else if (worse(&best[0], &entry)) {
        settle_worst(best, k, entry);
    }
}

/* The worst of a heap, which is smaller by it then. */
static exact take_worst(exact *best, int64_t *count) {
    const exact worst = best[0];
    const int64_t size = --*count;
    if (size) settle_worst(best, size, best[size]);
    return worst;
}

static int before(candidate one, candidate other) {
    return one.upper != other.upper ? one.upper > other.upper : one.position < other.position;
}

/* Let a candidate sink to its place in a heap, the best first. */
static void sink(candidate *heap, int64_t place, int64_t size, candidate entry) {
    for (;;) {
        int64_t child = 2 * place + 1;
        if (child >= size) break;
        if (child + 1 < size && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], entry)) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = entry;
}

static void make_heap(candidate *found, int64_t count) {
    for (int64_t place = count / 2 - 1; place >= 0; place--)
        sink(found, place, count, found[place]);
}

/* The best of a heap, which is smaller by it then. */
static candidate take_best(candidate *heap, int64_t *count) {
    const candidate best = heap[0];
    --*count;
    if (*count) sink(heap, 0, *count, heap[*count]);
    return best;
}

/* Keep the largest of what is offered: a heap of at most so many, the least first. */
static void keep_largest(candidate *heap, int64_t *count, int64_t most, candidate entry) {
    int64_t place = 0;
    if (*count < most) {
        for (place = (*count)++; place && heap[(place - 1) / 2].upper > entry.upper;) {
            heap[place] = heap[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        heap[place] = entry;
        return;
    }
    if (entry.upper <= heap[0].upper) return;
    for (;;) {
        int64_t child = 2 * place + 1;
        if (child >= most) break;
        if (child + 1 < most && heap[child + 1].upper < heap[child].upper) child++;
        if (heap[child].upper >= entry.upper) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = entry;
}

#endif
