/* Certified exact top-k: a scan of int8 codes by bounds, then a re-rank of the few rows left in
 * fp64.
 *
 * Row x is held as code p (int8), scale s, norm n and error e; a unit query q as code c, scale t
 * and error u. Then |q.(x - centre) - t s (c.p)| <= u n + e =: w; what e includes stands in
 * certificate.py, which makes all of them. A row can be among the best k only if its upper bound
 * t s (c.p) + w reaches the k-th best lower bound t s (c.p) - w. The scores that decide are summed
 * in fp64 in an order that only the dimension decides: the answer depends on nothing else.
 *
 * Codes lie in panels of 64 rows: [dim / 4][64][4] bytes, each p + 128.
 *
 * Where few dimensions hold most of the energy, the first `head` words are those dimensions, at
 * twice the scale (of rows and queries: four times in products), and the rest, the tail, lies in
 * panels elsewhere. By Cauchy and Schwarz the tail adds at most |tail of q| |tail of x| to what the
 * head says. A search of few queries, whose time is that of reading the codes, then has phases, if
 * it is given the memory for it:
 *   heads   what the head says of each row, and the best bound of each panel;
 *   seed    the rows that look best, scored, make a threshold;
 *   open    the tails of the panels whose bound reaches it;
 *   finish  what is left is re-ranked.
 * Else heads and tails are scanned together. */

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "scan_kernels.h"

#define MAX_THREADS 256
#define GROUP_BYTES (256 * 1024) /* panels that stay in L2 while all queries pass over them */
#define STREAM_BYTES (8 * 1024 * 1024)
#define BROUGHT 1024 /* bytes of a row that are asked for before it is its turn */
#define TURN_VECTORS 32 /* a thread rotates so many, at least */
#define SEEDS(k) (4 * (k) + 24) /* rows that look best, of which the k best make a threshold */

typedef struct {
    const void *rows;
    int64_t first, half; /* half: the rows are fp16, not fp32 */
} tt_part;

typedef struct {
    const tt_shard *shards;
    const tt_part *parts;
    const int64_t *ids;
    int64_t num_shards, num_parts, dim, words; /* words: dim padded to fours, in fours */
    int64_t head;               /* words of the head: all, where there is no tail */
    const int8_t *query_codes;  /* (Q, words, 4) */
    const float *query_scale, *query_error, *query_tail_norm;
    const double *queries;      /* (Q, dim) */
    const double *query_norm;   /* what a dot product is divided by for the unit query's score */
    const double *query_centre; /* unit query . centre */
    int64_t num_queries, k, cosine, threads, level;
    int32_t *said; /* by heads: PANEL + 1 numbers a panel and query; as much as there is room for */
    int64_t said_size;
    int64_t *position; /* (Q, k), -1 where there are fewer rows */
    double *score;     /* (Q, k) */
    int64_t *count;    /* rows collected, rows re-ranked, panels scanned by heads, those opened */
} tt_job;

typedef struct {
    double score, unit;
    int64_t id, position;
} exact;

typedef struct {
    int64_t position;
    float upper;
} candidate;

typedef struct { /* one query in one thread */
    float *heap; /* the k best lower bounds, the least first */
    candidate *found;
    exact *best; /* the k best of those re-ranked already, the worst first */
    int64_t in_heap, num_found, room, num_best;
    tt_asked asked;
    candidate *seeds; /* the rows that look best by their heads, the worst first */
    int64_t num_seeds;
} query_state;

typedef struct { /* what all threads know of a search */
    int64_t group, groups;    /* panels of a group; groups of all shards */
    int64_t first_group, end; /* groups of this phase */
    int32_t *dots;            /* by heads, (panels from first_group on, Q, 64) */
    float *peaks;             /* best bounds, (panels from first_group on, Q) */
} plan;

typedef struct {
    const tt_job *job;
    plan *plan;
    query_state *states;
    double *scratch;
    _Atomic int64_t *next;   /* group of panels, then query, that is taken next */
    _Atomic uint32_t *shared; /* thresholds of all threads, as ordered integers */
    query_state *const *all; /* states of each thread */
    int64_t num_threads, collected, reranked, opened;
    kernels does;
    int failed;
} worker;

/* ---- what a thread keeps of a query --------------------------------------------------------- */

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

static void raise_threshold(worker *self, int64_t query, float value) {
    query_state *state = self->states + query;
    if (value <= state->asked.threshold) return;
    state->asked.threshold = value;
    const uint32_t bits = ordered(value);
    uint32_t seen = atomic_load_explicit(self->shared + query, memory_order_relaxed);
    while (seen < bits &&
           !atomic_compare_exchange_weak_explicit(self->shared + query, &seen, bits,
                                                  memory_order_relaxed, memory_order_relaxed)) {
    }
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

static void keep_lower(worker *self, int64_t query, float lower) {
    query_state *state = self->states + query;
    const int64_t k = self->job->k;
    if (state->in_heap < k) {
        int64_t place = state->in_heap++;
        while (place && state->heap[(place - 1) / 2] > lower) {
            state->heap[place] = state->heap[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        state->heap[place] = lower;
        if (state->in_heap < k) return;
    } else {
        if (lower <= state->heap[0]) return;
        sift_down(state->heap, k, lower);
    }
    raise_threshold(self, query, state->heap[0]);
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

static void keep_exact(exact *best, int64_t *count, int64_t k, exact entry) {
    int64_t place;
    if (*count < k) {
        place = (*count)++;
        while (place && worse(&entry, &best[(place - 1) / 2])) {
            best[place] = best[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        best[place] = entry;
        return;
    }
    if (!worse(&best[0], &entry)) return;
    for (place = 0;;) {
        int64_t child = 2 * place + 1;
        if (child >= k) break;
        if (child + 1 < k && worse(&best[child + 1], &best[child])) child++;
        if (!worse(&best[child], &entry)) break;
        best[place] = best[child];
        place = child;
    }
    best[place] = entry;
}

static const void *row_at(const tt_job *job, int64_t position, int64_t *half) {
    int64_t low = 0, high = job->num_parts;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (job->parts[middle].first <= position) low = middle;
        else high = middle;
    }
    const tt_part *part = job->parts + low;
    *half = part->half;
    return (const char *)part->rows + (position - part->first) * job->dim * (part->half ? 2 : 4);
}

static exact score_of(worker *self, int64_t query, int64_t position) {
    const tt_job *job = self->job;
    int64_t half;
    const void *row = row_at(job, position, &half);
    const double dot =
        self->does.product(job->queries + query * job->dim, row, job->dim, half, self->scratch);
    const double unit = dot / job->query_norm[query];
    self->reranked++;
    return (exact){(job->cosine ? unit : dot) + 0.0, unit, job->ids[position], position};
}

/* A score that k rows reach is a threshold of bounds. */
static void raise_to_score(worker *self, int64_t query, double unit) {
    const float least = (float)(unit - self->job->query_centre[query]);
    raise_threshold(self, query, nextafterf(nextafterf(least, -FLT_MAX), -FLT_MAX));
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

/* Begin to read a row that is scored soon; the processor reads on by itself. */
static void bring_row(const tt_job *job, int64_t position) {
    int64_t half;
    const char *row = row_at(job, position, &half);
    const int64_t bytes = job->dim * (half ? 2 : 4);
    for (int64_t at = 0; at < bytes && at < BROUGHT; at += 64) __builtin_prefetch(row + at);
}

/* Score candidates by descending bound until none can be among the best k. */
static void rerank(worker *self, int64_t query, candidate *found, int64_t count, exact *best,
                   int64_t *num_best) {
    const tt_job *job = self->job;
    const double centre = job->query_centre[query];
    make_heap(found, count);
    while (count) {
        const candidate next = take_best(found, &count);
        if (count) bring_row(job, found[0].position);
        if (*num_best == job->k && centre + next.upper < best[0].unit) break;
        keep_exact(best, num_best, job->k, score_of(self, query, next.position));
    }
}

/* No room: drop what cannot be among the best; what is still too much is re-ranked now. */
static void settle(worker *self, int64_t query) {
    query_state *state = self->states + query;
    int64_t left = 0;
    for (int64_t i = 0; i < state->num_found; i++)
        if (state->found[i].upper >= state->asked.threshold) state->found[left++] = state->found[i];
    state->num_found = left;
    if (left <= state->room / 2) return;
    if (!state->best) state->best = malloc(sizeof(exact) * (size_t)self->job->k);
    if (!state->best) {
        self->failed = 1;
        state->num_found = 0;
        return;
    }
    rerank(self, query, state->found, left, state->best, &state->num_best);
    state->num_found = 0;
    if (state->num_best == self->job->k) raise_to_score(self, query, state->best[0].unit);
}

static void collect(worker *self, int64_t query, int64_t position, const bounds *of) {
    query_state *state = self->states + query;
    for (int row = 0; row < PANEL; row++) {
        if (!(of->upper[row] >= state->asked.threshold)) continue;
        if (state->num_found == state->room) settle(self, query);
        state->found[state->num_found++] = (candidate){position + row, of->upper[row]};
        self->collected++;
        keep_lower(self, query, of->lower[row]);
    }
}

/* ---- the phases of a thread ----------------------------------------------------------------- */

typedef struct { /* a few queries that pass over a group of panels together */
    int64_t from;
    const int32_t *codes[TILE];
    int width;
    int line, lines; /* what this tile brings from memory of each panel that comes next */
} tile;

static void heed_others(worker *self, int64_t query) {
    query_state *state = self->states + query;
    const float others =
        unordered(atomic_load_explicit(self->shared + query, memory_order_relaxed));
    if (others > state->asked.threshold) state->asked.threshold = others;
}

/* Tiles of even width: 16 queries are 6, 5 and 5. While they pass over a group of panels, which
 * lies in the cache, each of the first four brings a share of the next group. */
static tile make_tile(worker *self, int64_t number, int64_t tiles) {
    const tt_job *job = self->job;
    tile made = {.from = number * job->num_queries / tiles};
    const int first = (int)(4 * number / tiles), end = (int)(4 * (number + 1) / tiles);
    if (tiles <= 4) made.line = first, made.lines = end - first;
    else if (number < 4) made.line = (int)number, made.lines = 1;
    made.width = (int)((number + 1) * job->num_queries / tiles - made.from);
    for (int i = 0; i < made.width; i++) {
        made.codes[i] = (const int32_t *)(job->query_codes + (made.from + i) * job->words * 4);
        heed_others(self, made.from + i);
    }
    return made;
}

static int64_t head_bytes(const tt_job *job) { return job->head * 4 * PANEL; }

static int64_t tail_bytes(const tt_job *job) { return (job->words - job->head) * 4 * PANEL; }

static tt_panel head_of(const tt_job *job, const tt_shard *shard, int64_t panel) {
    return (tt_panel){.codes = shard->codes + panel * head_bytes(job), .words = job->head};
}

static tt_panel tail_of(const tt_job *job, const tt_shard *shard, int64_t panel) {
    return (tt_panel){.codes = shard->tail + panel * tail_bytes(job),
                      .words = job->words - job->head};
}

static void note_bounds(worker *self, const tt_shard *shard, int64_t panel, int64_t query,
                        const int32_t *dots, const int32_t *tails) {
    bounds of;
    if (self->does.bounds(dots, tails, shard, panel, &self->states[query].asked, &of))
        collect(self, query, shard->first + panel * PANEL, &of);
}

/* `next` is the panel that this one's place will have in the next group, if there is one. */
static void scan_panel(worker *self, const tt_shard *shard, int64_t panel, const tile *queries,
                       const tt_shard *next_shard, int64_t next) {
    tt_panel head = head_of(self->job, shard, panel), tail = tail_of(self->job, shard, panel);
    int32_t dots[TILE][PANEL] __attribute__((aligned(64)));
    if (next_shard) {
        head.next = head_of(self->job, next_shard, next).codes;
        tail.next = tail_of(self->job, next_shard, next).codes;
        head.line = tail.line = queries->line;
        head.lines = tail.lines = queries->lines;
    }
    self->does.dots[queries->width](&head, &tail, queries->codes, dots);
    for (int i = 0; i < queries->width; i++)
        note_bounds(self, shard, panel, queries->from + i, dots[i], 0);
}

/* One query: its time is that of reading the codes, from several places at once. Returns where the
 * even shares of the streams end. */
static int64_t scan_streams(worker *self, const tt_shard *shard, int64_t first, int64_t last,
                            const tile *one) {
    const int64_t share = (last - first) / STREAMS;
    int32_t dots[STREAMS][PANEL] __attribute__((aligned(64)));
    for (int64_t step = 0; step < share; step++) {
        tt_panel heads[STREAMS], tails[STREAMS];
        for (int i = 0; i < STREAMS; i++) {
            heads[i] = head_of(self->job, shard, first + i * share + step);
            tails[i] = tail_of(self->job, shard, first + i * share + step);
        }
        self->does.streams(heads, tails, one->codes[0], dots);
        heed_others(self, 0);
        for (int i = 0; i < STREAMS; i++)
            note_bounds(self, shard, first + i * share + step, 0, dots[i], 0);
    }
    return first + STREAMS * share;
}

/* The next group of this phase: panels of a shard, which is 0 where there is none. */
typedef struct {
    const tt_shard *shard;
    int64_t first, last, place; /* place: panels of this phase before it */
} group;

static group take_group(worker *self) {
    const plan *plan = self->plan;
    const int64_t number = plan->first_group + atomic_fetch_add(self->next, 1);
    group taken = {self->job->shards, number * plan->group, 0,
                   (number - plan->first_group) * plan->group};
    if (number >= plan->end || self->failed) return (group){0};
    for (;; taken.shard++) {
        const int64_t groups = (taken.shard->panels + plan->group - 1) / plan->group;
        if (taken.first < groups * plan->group) break;
        taken.first -= groups * plan->group;
    }
    taken.last = taken.first + plan->group;
    if (taken.last > taken.shard->panels) taken.last = taken.shard->panels;
    return taken;
}

static void scan_group(worker *self, const group *now, const group *next) {
    const int64_t tiles = (self->job->num_queries + TILE - 1) / TILE;
    for (int64_t number = 0; number < tiles; number++) {
        const tile queries = make_tile(self, number, tiles);
        int64_t panel = now->first;
        if (self->does.streams && self->job->num_queries == 1)
            panel = scan_streams(self, now->shard, now->first, now->last, &queries);
        for (; panel < now->last; panel++) {
            const int64_t place = next->first + panel - now->first;
            scan_panel(self, now->shard, panel, &queries, place < next->last ? next->shard : 0,
                       place);
        }
    }
}

static void *scan(void *argument) {
    worker *self = argument;
    group next;
    for (group now = take_group(self); now.shard; now = next) {
        next = take_group(self);
        scan_group(self, &now, &next);
    }
    return 0;
}

/* Keep the rows that look best by their heads. */
static void keep_seeds(worker *self, int64_t query, int64_t position, const float *looks) {
    query_state *state = self->states + query;
    const int64_t most = SEEDS(self->job->k);
    candidate *seeds = state->seeds;
    for (int row = 0; row < PANEL; row++) {
        const candidate entry = {position + row, looks[row]};
        int64_t place;
        if (entry.upper == -INFINITY) continue; /* deleted, or no row */
        if (state->num_seeds < most) {
            place = state->num_seeds++;
            while (place && seeds[(place - 1) / 2].upper > entry.upper) {
                seeds[place] = seeds[(place - 1) / 2];
                place = (place - 1) / 2;
            }
        } else {
            if (entry.upper <= seeds[0].upper) continue;
            for (place = 0;;) {
                int64_t child = 2 * place + 1;
                if (child >= most) break;
                if (child + 1 < most && seeds[child + 1].upper < seeds[child].upper) child++;
                if (seeds[child].upper >= entry.upper) break;
                seeds[place] = seeds[child];
                place = child;
            }
        }
        seeds[place] = entry;
    }
}

/* What the head of a panel says of a query: the best bound, and rows that look good. */
static void note_head(worker *self, const tt_shard *shard, int64_t panel, int64_t query,
                      const int32_t *dots, float *peak) {
    query_state *state = self->states + query;
    float looks[PANEL];
    const float look = self->does.heads(dots, shard, panel, &state->asked, looks, peak);
    if (state->num_seeds < SEEDS(self->job->k) || look > state->seeds[0].upper)
        keep_seeds(self, query, shard->first + panel * PANEL, looks);
}

/* The same for the panels of a group, from several places at once; returns of how many. */
static int64_t stream_heads(worker *self, const group *now, const int32_t *query,
                            int32_t (*dots)[PANEL], float *peaks) {
    const int64_t share = (now->last - now->first) / STREAMS;
    const tt_panel none[STREAMS] = {{0}};
    int32_t made[STREAMS][PANEL] __attribute__((aligned(64)));
    for (int64_t step = 0; step < share; step++) {
        tt_panel heads[STREAMS];
        for (int i = 0; i < STREAMS; i++)
            heads[i] = head_of(self->job, now->shard, now->first + i * share + step);
        self->does.streams(heads, none, query, made);
        for (int i = 0; i < STREAMS; i++) {
            const int64_t panel = i * share + step;
            memcpy(dots[panel], made[i], sizeof made[i]);
            note_head(self, now->shard, now->first + panel, 0, made[i], peaks + panel);
        }
    }
    return STREAMS * share;
}

static void *scan_heads(void *argument) {
    worker *self = argument;
    const tt_job *job = self->job;
    const int64_t count = job->num_queries;
    const tile queries = make_tile(self, 0, 1);
    const tt_panel none = {0};
    for (group now; (now = take_group(self)).shard;) {
        const int64_t panels = now.last - now.first;
        int32_t(*dots)[PANEL] = (int32_t(*)[PANEL])self->plan->dots + now.place * count;
        float *peaks = self->plan->peaks + now.place * count;
        int64_t i = 0;
        if (self->does.streams && count == 1)
            i = stream_heads(self, &now, queries.codes[0], dots, peaks);
        for (; i < panels; i++) {
            tt_panel head = head_of(job, now.shard, now.first + i);
            head.next = head.codes + head_bytes(job);
            head.lines = now.first + i + 1 < now.shard->panels ? 4 : 0;
            self->does.dots[queries.width](&head, &none, queries.codes, dots + i * count);
            for (int query = 0; query < queries.width; query++)
                note_head(self, now.shard, now.first + i, query, dots[i * count + query],
                          peaks + i * count + query);
        }
    }
    return 0;
}

/* The k-th best score of the rows that look best is a lower bound of the k-th best score of all. */
static int seed_query(worker *self, int64_t query) {
    const tt_job *job = self->job;
    int64_t count = 0, kept = 0;
    for (int64_t i = 0; i < self->num_threads; i++) count += self->all[i][query].num_seeds;
    if (count < job->k) return 1;
    candidate *seeds = malloc(sizeof *seeds * (size_t)count);
    exact *best = malloc(sizeof *best * (size_t)job->k);
    if (seeds && best) {
        count = 0;
        for (int64_t i = 0; i < self->num_threads; i++) {
            query_state *state = self->all[i] + query;
            for (int64_t j = 0; j < state->num_seeds; j++) seeds[count++] = state->seeds[j];
            state->num_seeds = 0;
        }
        make_heap(seeds, count);
        for (int64_t i = 0; count && i < SEEDS(job->k); i++)
            keep_exact(best, &kept, job->k,
                       score_of(self, query, take_best(seeds, &count).position));
        if (kept == job->k) raise_to_score(self, query, best[0].unit);
    }
    const int done = seeds && best;
    free(seeds);
    free(best);
    return done;
}

static void *seed_all(void *argument) {
    worker *self = argument;
    for (;;) {
        const int64_t query = atomic_fetch_add(self->next, 1);
        if (query >= self->job->num_queries || self->failed) return 0;
        if (!seed_query(self, query)) self->failed = 1;
    }
}

/* Panels of one query whose tails are read at once. */
typedef struct {
    int64_t panel[STREAMS];
    const int32_t *dots[STREAMS];
    int count;
} batch;

static void open_tails(worker *self, const tt_shard *shard, const int32_t *query, batch *some) {
    tt_panel rest[STREAMS];
    const tt_panel none[STREAMS] = {{0}};
    int32_t tails[STREAMS][PANEL] __attribute__((aligned(64)));
    for (int i = 0; i < some->count; i++) rest[i] = tail_of(self->job, shard, some->panel[i]);
    if (some->count == STREAMS)
        self->does.streams(rest, none, query, tails);
    else
        for (int i = 0; i < some->count; i++)
            self->does.dots[1](rest + i, none, &query, tails + i);
    heed_others(self, 0);
    self->opened += some->count;
    for (int i = 0; i < some->count; i++)
        note_bounds(self, shard, some->panel[i], 0, some->dots[i], tails[i]);
    some->count = 0;
}

static void open_streams(worker *self, const group *now, const int32_t *query) {
    const int32_t(*dots)[PANEL] = (const int32_t(*)[PANEL])self->plan->dots + now->place;
    const float *peaks = self->plan->peaks + now->place;
    const int64_t panels = now->last - now->first, share = (panels + STREAMS - 1) / STREAMS;
    batch some = {.count = 0};
    for (int64_t step = 0; step < share; step++)
        for (int64_t i = step; i < panels; i += share) {
            if (!(peaks[i] >= self->states->asked.threshold)) continue;
            some.panel[some.count] = now->first + i;
            some.dots[some.count++] = dots[i];
            if (some.count == STREAMS) open_tails(self, now->shard, query, &some);
        }
    open_tails(self, now->shard, query, &some);
}

/* The tail of a panel for those queries that need it. */
static void open_panel(worker *self, const tt_shard *shard, int64_t panel, const tile *queries,
                       int32_t (*dots)[PANEL], const float *peaks) {
    const tt_panel tail = tail_of(self->job, shard, panel), none = {0};
    int32_t tails[TILE][PANEL] __attribute__((aligned(64)));
    const int32_t *codes[TILE];
    int open[TILE], count = 0;
    for (int query = 0; query < queries->width; query++)
        if (peaks[query] >= self->states[query].asked.threshold) {
            codes[count] = queries->codes[query] + self->job->head;
            open[count++] = query;
        }
    if (!count) return;
    self->opened += count;
    self->does.dots[count](&tail, &none, codes, tails);
    for (int i = 0; i < count; i++)
        note_bounds(self, shard, panel, open[i], dots[open[i]], tails[i]);
}

static void *open_panels(void *argument) {
    worker *self = argument;
    const int64_t count = self->job->num_queries;
    for (group now; (now = take_group(self)).shard;) {
        const tile queries = make_tile(self, 0, 1);
        int32_t(*dots)[PANEL] = (int32_t(*)[PANEL])self->plan->dots + now.place * count;
        const float *peaks = self->plan->peaks + now.place * count;
        if (self->does.streams && count == 1)
            open_streams(self, &now, queries.codes[0] + self->job->head);
        else
            for (int64_t i = 0; i < now.last - now.first; i++)
                open_panel(self, now.shard, now.first + i, &queries, dots + i * count,
                           peaks + i * count);
    }
    return 0;
}

/* The candidates of all threads for one query, re-ranked; results best first. */
static int finish_query(worker *self, int64_t query) {
    const tt_job *job = self->job;
    const float threshold =
        unordered(atomic_load_explicit(self->shared + query, memory_order_relaxed));
    int64_t count = 0, num_best = 0;
    for (int64_t i = 0; i < self->num_threads; i++) count += self->all[i][query].num_found;
    candidate *found = malloc(sizeof *found * (size_t)(count + 1));
    exact *best = malloc(sizeof *best * (size_t)job->k);
    if (!found || !best) {
        free(found);
        free(best);
        return 0;
    }
    count = 0;
    for (int64_t i = 0; i < self->num_threads; i++) {
        const query_state *state = self->all[i] + query;
        for (int64_t j = 0; j < state->num_found; j++)
            if (state->found[j].upper >= threshold) found[count++] = state->found[j];
        for (int64_t j = 0; j < state->num_best; j++)
            keep_exact(best, &num_best, job->k, state->best[j]);
    }
    rerank(self, query, found, count, best, &num_best);
    int64_t *position = job->position + query * job->k;
    double *score = job->score + query * job->k;
    for (int64_t i = num_best; i < job->k; i++) position[i] = -1;
    for (int64_t left = num_best; left > 0; left--) { /* the worst first, from the back */
        position[left - 1] = best[0].position;
        score[left - 1] = best[0].score;
        const exact moved = best[left - 1];
        int64_t place = 0, size = left - 1;
        for (;;) {
            int64_t child = 2 * place + 1;
            if (child >= size) break;
            if (child + 1 < size && worse(&best[child + 1], &best[child])) child++;
            if (!worse(&best[child], &moved)) break;
            best[place] = best[child];
            place = child;
        }
        best[place] = moved;
    }
    free(found);
    free(best);
    return 1;
}

static void *finish(void *argument) {
    worker *self = argument;
    for (;;) {
        const int64_t query = atomic_fetch_add(self->next, 1);
        if (query >= self->job->num_queries || self->failed) return 0;
        if (!finish_query(self, query)) self->failed = 1;
    }
}

static void run_all(worker *workers, int64_t threads, void *(*phase)(void *)) {
    pthread_t handles[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    atomic_store(workers[0].next, 0);
    for (int64_t i = 1; i < threads; i++)
        started[i] = pthread_create(&handles[i], 0, phase, workers + i) == 0;
    phase(workers); /* takes over the share of a thread that could not be started */
    for (int64_t i = 1; i < threads; i++)
        if (started[i]) pthread_join(handles[i], 0);
}

/* Run a phase over groups of panels; whether a thread failed. */
static int run_groups(worker *workers, int64_t threads, void *(*phase)(void *), int64_t first,
                      int64_t end) {
    int failed = 0;
    workers->plan->first_group = first;
    workers->plan->end = end;
    run_all(workers, threads, phase);
    for (int64_t i = 0; i < threads; i++) failed |= workers[i].failed;
    return failed;
}

static int64_t group_size(const worker *self, int64_t panels) {
    const tt_job *job = self->job;
    const int64_t bytes = job->words * 4 * PANEL;
    int64_t wanted = GROUP_BYTES;
    if (self->does.streams && job->num_queries == 1) { /* large, but eight shares a thread */
        const int64_t fair = panels * bytes / (8 * self->num_threads);
        wanted = fair < STREAM_BYTES ? fair : STREAM_BYTES;
    } else if (job->num_queries <= TILE) {
        wanted = 4 * GROUP_BYTES;
    }
    return wanted > bytes ? wanted / bytes : 1;
}

/* The phases by heads, over as many groups at a time as there is room for; whether one failed. */
static int scan_by_heads(worker *workers, int64_t threads, int64_t step) {
    const tt_job *job = workers->job;
    plan *plan = workers->plan;
    int failed = 0;
    for (int64_t i = 0; i < threads; i++)
        for (int64_t query = 0; query < job->num_queries; query++) {
            query_state *state = workers[i].states + query;
            state->seeds = malloc(sizeof *state->seeds * (size_t)SEEDS(job->k));
            failed |= !state->seeds;
        }
    plan->dots = job->said;
    plan->peaks = (float *)job->said + step * plan->group * job->num_queries * PANEL;
    for (int64_t first = 0; first < plan->groups && !failed; first += step) {
        const int64_t end = first + step < plan->groups ? first + step : plan->groups;
        const int64_t few = threads < job->num_queries ? threads : job->num_queries;
        failed = run_groups(workers, threads, scan_heads, first, end) ||
                 run_groups(workers, few, seed_all, first, end) ||
                 run_groups(workers, threads, open_panels, first, end);
    }
    return failed;
}

/* All phases but the last; whether one failed. */
static int scan_all(worker *workers, int64_t threads) {
    const tt_job *job = workers->job;
    plan *plan = workers->plan;
    int64_t panels = 0;
    for (int64_t i = 0; i < job->num_shards; i++) panels += job->shards[i].panels;
    const int64_t room = job->said_size / ((PANEL + 1) * job->num_queries); /* panels */
    const int by_heads = job->head < job->words && job->num_queries <= TILE && room > 0;
    plan->group = group_size(workers, panels);
    if (by_heads && plan->group > room) plan->group = room;
    for (int64_t i = 0; i < job->num_shards; i++)
        plan->groups += (job->shards[i].panels + plan->group - 1) / plan->group;
    if (!by_heads) return run_groups(workers, threads, scan, 0, plan->groups);
    const int64_t fit = room / plan->group;
    job->count[2] = panels * job->num_queries;
    return scan_by_heads(workers, threads, fit < plan->groups ? fit : plan->groups);
}

static int prepare(worker *self, const tt_job *job, int64_t room) {
    self->states = calloc((size_t)job->num_queries, sizeof *self->states);
    self->scratch = malloc(sizeof(double) * (size_t)power_of_two(job->dim));
    if (!self->states || !self->scratch) return 0;
    for (int64_t query = 0; query < job->num_queries; query++) {
        query_state *state = self->states + query;
        const int8_t *code = job->query_codes + query * job->words * 4;
        int32_t head = 0, tail = 0;
        for (int64_t i = 0; i < job->head * 4; i++) head += code[i];
        for (int64_t i = job->head * 4; i < job->words * 4; i++) tail += code[i];
        if (!self->does.flips) {
            state->asked.head_correction = 128 * head;
            state->asked.correction = 128 * (job->head < job->words ? 4 * head + tail : head);
        }
        state->asked.scale = job->query_scale[query];
        state->asked.error = job->query_error[query];
        state->asked.tail_norm = job->query_tail_norm[query];
        state->asked.threshold = -FLT_MAX;
        state->room = room;
        state->heap = malloc(sizeof(float) * (size_t)job->k);
        state->found = malloc(sizeof(candidate) * (size_t)room);
        if (!state->heap || !state->found) return 0;
    }
    return 1;
}

static void discard(worker *self, const tt_job *job) {
    for (int64_t query = 0; self->states && query < job->num_queries; query++) {
        free(self->states[query].heap);
        free(self->states[query].found);
        free(self->states[query].best);
        free(self->states[query].seeds);
    }
    free(self->states);
    free(self->scratch);
}

/* ---- what Python calls ---------------------------------------------------------------------- */

/* Changes with the structures above, as those of native.py have to. */
int64_t tt_layout(void) { return 1000 * (int64_t)sizeof(tt_job) + (int64_t)sizeof(tt_shard); }

int tt_level(void) { return best_level(); }

const char *tt_level_name(int level) { return level_name(level); }

typedef struct {
    const double *vectors;
    const float *columns;
    int64_t count, dim, stride;
    double *out;
    turn_function turn;
} turn_share;

static void *turn_all(void *argument) {
    const turn_share *share = argument;
    for (int64_t i = 0; i < share->count; i += TURNED)
        share->turn(share->vectors + i * share->stride, share->stride, share->columns, share->dim,
                    share->out + i * share->stride);
    return 0;
}

/* out (count, stride) = vectors (count, stride) times a matrix (dim, dim), its columns one by one;
 * of both the first `dim` of `stride` numbers. `count` is a multiple of four. Without BLAS, whose
 * threads would go on waiting for work for a while, and take time from the search. */
void tt_turn(const double *vectors, const float *columns, int64_t count, int64_t dim,
             int64_t stride, double *out, int64_t threads) {
    const kernels chosen = choose_kernels(best_level());
    pthread_t handles[MAX_THREADS];
    turn_share shares[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    int64_t even = (count + TURN_VECTORS - 1) / TURN_VECTORS; /* shares worth a thread */
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < even) even = threads;
    if (even < 1) even = 1;
    for (int64_t i = 0; i < even; i++) {
        const int64_t from = i * (count / TURNED) / even * TURNED;
        const int64_t to = (i + 1) * (count / TURNED) / even * TURNED;
        shares[i] = (turn_share){vectors + from * stride, columns, to - from, dim, stride,
                                 out + from * stride, chosen.turn};
        if (i) started[i] = pthread_create(&handles[i], 0, turn_all, shares + i) == 0;
    }
    for (int64_t i = 0; i < even; i++)
        if (!started[i]) turn_all(shares + i);
    for (int64_t i = 0; i < even; i++)
        if (started[i]) pthread_join(handles[i], 0);
}

/* Fill `position` and `score` of the job; 0, or -1 where memory was short. */
int tt_search(const tt_job *job) {
    int64_t threads = job->threads < 1 ? 1 : job->threads, panels = 0;
    _Atomic int64_t next = 0;
    plan plan = {0};
    int failed = 0;
    for (int64_t i = 0; i < job->num_shards; i++) panels += job->shards[i].panels;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > panels) threads = panels ? panels : 1;
    worker *workers = calloc((size_t)threads, sizeof *workers);
    query_state **all = calloc((size_t)threads, sizeof *all);
    _Atomic uint32_t *shared = malloc(sizeof *shared * (size_t)job->num_queries);
    if (!workers || !all || !shared) failed = 1;
    for (int64_t i = 0; !failed && i < threads; i++) {
        workers[i] = (worker){.job = job, .plan = &plan, .next = &next, .shared = shared,
                              .all = all, .num_threads = threads};
        workers[i].does = choose_kernels(job->level);
        failed = !prepare(workers + i, job, 4 * job->k + 1024);
        all[i] = workers[i].states;
    }
    if (!failed) {
        for (int64_t i = 0; i < job->num_queries; i++) atomic_store(shared + i, ordered(-FLT_MAX));
        failed = scan_all(workers, threads);
    }
    if (!failed) {
        run_all(workers, threads < job->num_queries ? threads : job->num_queries, finish);
        for (int64_t i = 0; i < threads; i++) failed |= workers[i].failed;
    }
    for (int64_t i = 0; workers && i < threads; i++) {
        job->count[0] += workers[i].collected;
        job->count[1] += workers[i].reranked;
        job->count[3] += workers[i].opened;
        if (workers[i].job) discard(workers + i, job);
    }
    free(workers);
    free(all);
    free(shared);
    return failed ? -1 : 0;
}
