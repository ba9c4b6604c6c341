/* Certified exact top-k: a scan of int8 codes by bounds, then a re-rank of the few rows left in
 * fp64.
 *
 * Row x is held as code p (int8), scale s, norm n and error e; a unit query q as code c, scale t
 * and error u. Then |q.(x - centre) - t s (c.p)| <= u n + e =: w; what e includes stands in
 * certificate.py, which makes all of them. A row can be among the best k only if its upper bound
 * t s (c.p) + w reaches the k-th best lower bound t s (c.p) - w. The scores that decide are summed
 * in fp64 in an order that only the dimension decides: the answer depends on nothing else.
 *
 * Codes lie in panels of 64 rows, a quarter of them together: [4][dim / 4][16][4] bytes, each
 * p + 128.
 *
 * Where few dimensions hold most of the energy, codes have three parts, in panels of their own:
 * the head, which are those dimensions at twice the scale (of rows and queries: four times in
 * products), and the front and the back of the tail. By Cauchy and Schwarz the tail adds at most
 * |tail of q| |tail of x| to what the head says, and the back at most |back of q| |back of x| to
 * what both say. So a search can rule out most rows before it has read their codes to the end, if
 * queries are like few of them. It has phases then, if it is asked for them and given the memory:
 *   first   the best bound of each quarter of a panel, by its head, or by head and front;
 *   seed    the rows that look best, scored, make a threshold;
 *   open    what is left of the quarters whose bound reaches it, the front before the back;
 *   finish  what is left is re-ranked.
 * Else all parts are scanned together: of groups of panels by a few queries at a time, or, where a
 * level multiplies matrices, of half a panel by all of them. */

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "scan_heaps.h"
#include "scan_kernels.h"

#define MAX_THREADS 256
#define GROUP_BYTES (256 * 1024) /* panels that stay in L2 while all queries pass over them */
#define STREAM_BYTES (8 * 1024 * 1024)
#define BROUGHT 2048 /* bytes of a row that are asked for before it is its turn */
#define TURN_VECTORS 32 /* a thread rotates so many, at least */
#define STREAMS QUARTERS /* places that one query reads from at once: one alone does not fill the
                          * memory's channels */
#define AHEAD 4 /* panels that are asked for before they are opened */
#define ROWS_AHEAD 4 /* rows that are asked for before they are scored */
#define WIDE_QUERIES 2 /* from so many on in blocks, where a level has them */
#define SEEDS(k) (2 * (k) + 44) /* rows that look best, of which the k best make a threshold */

typedef struct {
    const void *rows;
    int64_t first, half; /* half: the rows are fp16, not fp32 */
} tt_part;

typedef struct {
    const tt_shard *shards;
    const tt_part *parts;
    const int64_t *ids;
    int64_t num_shards, num_parts, dim, words; /* words: dim padded to fours, in fours */
    int64_t part[PARTS];        /* words of each part; all in the first where there is no tail */
    int64_t stage;              /* what is read first: BY_HEAD, BY_FRONT, or BY_ALL at once */
    const int8_t *query_codes;  /* (Q, words, 4) */
    const float *query_scale, *query_error, *query_beyond[2];
    const double *queries;      /* (Q, dim) */
    const double *query_norm;   /* what a dot product is divided by for the unit query's score */
    const double *query_centre; /* unit query . centre */
    int64_t num_queries, k, cosine, threads, level;
    float *peaks;  /* for that: QUARTERS numbers a panel and query; as much as there is room for */
    int32_t *dots; /* and of one query PANEL numbers a panel, in the order of `peaks` */
    uint8_t *kept; /* of which panels they are */
    int64_t num_peaks;
    int64_t *position; /* (Q, k), -1 where there are fewer rows */
    double *score;     /* (Q, k) */
    int64_t *count;    /* rows collected, rows re-ranked; in phases, words of quarters, and those
                        * that were spared */
} tt_job;

typedef struct { /* of one query the k best lower bounds, whichever thread found them */
    pthread_mutex_t lock;
    float *heap; /* the least first */
    int64_t size;
} lower_heap;

typedef struct { /* one query in one thread */
    candidate *found;
    exact *best; /* the k best of those re-ranked already, the worst first */
    int64_t num_found, room, num_best;
    tt_asked asked;
    candidate *seeds; /* the rows that look best by what was read first, the worst first */
    int64_t num_seeds;
} query_state;

typedef struct { /* what all threads know of a search */
    tt_wide *wide; /* queries in blocks, where they are scanned so */
    void *memory;  /* of their codes */
    int32_t *packed; /* codes of all queries, tile by tile, word by word */
    int64_t group, groups;    /* panels of a group; groups of all shards */
    int64_t first_group, end; /* groups of this phase */
} plan;

typedef struct {
    const tt_job *job;
    plan *plan;
    query_state *states;
    double *scratch;
    float *limits; /* of queries that are scanned in blocks */
    _Atomic int64_t *next;   /* group of panels, then query, that is taken next */
    _Atomic uint32_t *shared; /* thresholds of all threads, as ordered integers */
    lower_heap *lower;        /* what they are made of, a query each */
    query_state *const *all; /* states of each thread */
    int64_t num_threads, collected, reranked, spared;
    kernels does;
    int failed;
} worker;

/* ---- what a thread keeps of a query --------------------------------------------------------- */

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

/* Threads keep them together: each alone would see too few rows for a high threshold. Once k rows
 * are there few are better, so that hardly one thread waits for another. */
static void keep_lower(worker *self, int64_t query, float lower) {
    lower_heap *of = self->lower + query;
    const int64_t k = self->job->k;
    if (lower <= self->states[query].asked.threshold) return; /* k rows are better */
    pthread_mutex_lock(&of->lock);
    if (of->size < k) {
        int64_t place = of->size++;
        while (place && of->heap[(place - 1) / 2] > lower) {
            of->heap[place] = of->heap[(place - 1) / 2];
            place = (place - 1) / 2;
        }
        of->heap[place] = lower;
    } else if (lower > of->heap[0]) {
        sift_down(of->heap, k, lower);
    }
    const float least = of->size == k ? of->heap[0] : -FLT_MAX;
    pthread_mutex_unlock(&of->lock);
    raise_threshold(self, query, least);
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

/* Begin to read a row that is scored soon; the processor reads on by itself. */
static void bring_row(const tt_job *job, int64_t position) {
    int64_t half;
    const char *row = row_at(job, position, &half);
    const int64_t bytes = job->dim * (half ? 2 : 4);
    for (int64_t at = 0; at < bytes && at < BROUGHT; at += 64) __builtin_prefetch(row + at);
}

typedef struct { /* candidates in order, a few of whose rows are on their way already */
    candidate *heap, coming[ROWS_AHEAD];
    int64_t in_heap, taken, given;
} lineup;

static lineup line_up(candidate *found, int64_t count) {
    make_heap(found, count);
    return (lineup){.heap = found, .in_heap = count};
}

/* The next one; whether there is one. */
static int take_next(const tt_job *job, lineup *all, candidate *next) {
    while (all->in_heap && all->taken < all->given + ROWS_AHEAD) {
        candidate *const last = all->coming + all->taken++ % ROWS_AHEAD;
        *last = take_best(all->heap, &all->in_heap);
        bring_row(job, last->position);
    }
    if (all->given == all->taken) return 0;
    *next = all->coming[all->given++ % ROWS_AHEAD];
    return 1;
}

/* Score candidates by descending bound until none can be among the best k. */
static void rerank(worker *self, int64_t query, candidate *found, int64_t count, exact *best,
                   int64_t *num_best) {
    const tt_job *job = self->job;
    const double centre = job->query_centre[query];
    lineup all = line_up(found, count);
    candidate next;
    while (take_next(job, &all, &next)) {
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

/* Take rows that reach the threshold by all of their codes: those of a mask, from place `at` on. */
static void collect(worker *self, const tt_shard *shard, int64_t at, int64_t query,
                    const int32_t *dots, uint64_t rows) {
    query_state *state = self->states + query;
    for (; rows; rows &= rows - 1) {
        const int row = __builtin_ctzll(rows);
        const int32_t dot = dots[row] - state->asked.correction[BY_ALL];
        const float middle = middle_of(dot, shard, at + row, &state->asked);
        const float width = width_of(shard, at + row, &state->asked);
        if (!(middle + width >= state->asked.threshold)) continue; /* it has risen */
        if (state->num_found == state->room) settle(self, query);
        state->found[state->num_found++] = (candidate){shard->first + at + row, middle + width};
        self->collected++;
        keep_lower(self, query, middle - width);
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

static int64_t num_tiles(const tt_job *job) { return (job->num_queries + TILE - 1) / TILE; }

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

/* A part of the codes of a quarter. */
static const uint8_t *quarter_at(const tt_job *job, const tt_shard *shard, int64_t panel,
                                 int quarter, int part) {
    return shard->codes[part] + (panel * QUARTERS + quarter) * job->part[part] * LINE;
}

/* Parts of a panel's codes, from one to another. */
static void parts_of(const tt_job *job, const tt_shard *shard, int64_t panel, int from, int to,
                     tt_panel *made) {
    for (int part = from; part <= to; part++, made++) {
        *made = (tt_panel){.words = job->part[part]};
        for (int i = 0; i < QUARTERS; i++)
            made->quarters[i] = quarter_at(job, shard, panel, i, part);
    }
}

/* Let a tile bring its share of parts of a panel that comes later. */
static void bring_later(const tt_job *job, const tile *queries, const tt_shard *shard,
                        int64_t panel, int to, tt_panel *parts) {
    for (int part = 0; part <= to; part++) {
        parts[part].next = quarter_at(job, shard, panel, 0, part);
        parts[part].line = queries->line;
        parts[part].lines = queries->lines;
    }
}

/* The last part that the first phase reads. */
static int last_part(const tt_job *job) {
    return job->stage == BY_HEAD ? HEAD : job->stage == BY_FRONT ? FRONT : BACK;
}

static void note_rows(worker *self, const tt_shard *shard, int64_t panel, int64_t query,
                      const int32_t *dots) {
    const tt_asked *asked = &self->states[query].asked;
    const int64_t at = panel * PANEL;
    const uint64_t rows = self->does.reach(dots, shard, at, asked, BY_ALL);
    if (rows) collect(self, shard, at, query, dots, rows);
}

/* The bound that rows have to reach, in units of the query's scale. */
static float limit_of(const tt_asked *asked) {
    const float limit = asked->threshold / asked->scale;
    return limit < FLT_MAX ? limit : FLT_MAX;
}

/* What is left of a bound when factors are taken out of it, to look at many rows. Rounding moves it
 * by less than eight fp32 roundings, half a millionth, of the norm and of its width. */
static void take_factors(tt_asked *asked) {
    asked->factor = 1.000001f / asked->scale;
    asked->spread = (asked->error + 0.000001f) * asked->factor;
}

/* Make the factors of several queries as large as those of this one. */
static void widen(float *factor, float *spread, const tt_asked *asked) {
    if (*factor < asked->factor) *factor = asked->factor;
    if (*spread < asked->spread) *spread = asked->spread;
}

/* What `few` functions need to know of a tile. */
static tt_few make_few(const worker *self, const tile *queries) {
    tt_few made = {.codes = self->plan->packed + queries->from * self->job->words};
    for (int i = 0; i < queries->width; i++) {
        const tt_asked *asked = &self->states[queries->from + i].asked;
        made.start[i] = -asked->correction[BY_ALL] / (self->job->part[FRONT] ? 4 : 1);
        made.limits[i] = limit_of(asked);
        widen(&made.factor, &made.spread, asked);
    }
    return made;
}

static void scan_few(worker *self, const tt_shard *shard, int64_t panel, const tt_panel *parts,
                     int count, const tile *queries, tt_few *few) {
    const int64_t at = panel * PANEL;
    tt_seen seen __attribute__((aligned(64)));
    unsigned some = self->does.few[queries->width](parts, count, few, shard, at, &seen);
    for (; some; some &= some - 1) {
        const int i = __builtin_ctz(some);
        collect(self, shard, at, queries->from + i, seen.dots[i], seen.rows[i]);
        few->limits[i] = limit_of(&self->states[queries->from + i].asked);
    }
}

/* `next` is the panel that this one's place will have in the next group, if there is one. */
static void scan_panel(worker *self, const tt_shard *shard, int64_t panel, const tile *queries,
                       tt_few *few, const tt_shard *next_shard, int64_t next) {
    const tt_job *job = self->job;
    const int to = job->part[FRONT] ? BACK : HEAD;
    tt_panel parts[PARTS];
    int32_t dots[TILE][PANEL] __attribute__((aligned(64)));
    parts_of(job, shard, panel, HEAD, to, parts);
    if (next_shard) bring_later(job, queries, next_shard, next, to, parts);
    if (few->codes) {
        scan_few(self, shard, panel, parts, to + 1, queries, few);
        return;
    }
    self->does.dots[queries->width](parts, to + 1, queries->codes, dots);
    for (int i = 0; i < queries->width; i++)
        note_rows(self, shard, panel, queries->from + i, dots[i]);
}

/* What a tile knows of a panel that is opened. */
typedef struct {
    int32_t dots[TILE][PANEL] __attribute__((aligned(64)));
    unsigned open[TILE]; /* quarters that are still of interest to each query, a bit each */
} passage;

static int num_open(const passage *here, int width) {
    int count = 0;
    for (int i = 0; i < width; i++)
        for (unsigned left = here->open[i]; left; left &= left - 1) count++;
    return count;
}

/* Add products of some quarters to what is known of them. What the head says is times four before
 * the front is added. */
static void add_dots(int32_t *dots, const int32_t *more, const int *quarters, int count, int from) {
    const int factor = from == FRONT ? 4 : 1;
    for (int i = 0; i < count; i++)
        for (int row = 0; row < QUARTER; row++) {
            int32_t *dot = dots + quarters[i] * QUARTER + row;
            *dot = *dot * factor + more[i * QUARTER + row];
        }
}

/* Read parts of the quarters that one query has open. */
static void read_quarters(worker *self, const tt_shard *shard, int64_t panel, const int32_t *codes,
                          int from, int to, unsigned open, int32_t *dots) {
    tt_panel parts[PARTS];
    int32_t more[PANEL] __attribute__((aligned(64)));
    int quarters[QUARTERS], count = 0;
    for (int quarter = 0; quarter < QUARTERS; quarter++)
        if (open >> quarter & 1) quarters[count++] = quarter;
    for (int part = from; part <= to; part++) {
        parts[part - from] = (tt_panel){.words = self->job->part[part]};
        for (int i = 0; i < QUARTERS; i++) /* what is too much is read twice */
            parts[part - from].quarters[i] =
                quarter_at(self->job, shard, panel, quarters[i < count ? i : 0], part);
    }
    const dots_function read = count > 1 ? self->does.dots[1] : self->does.single;
    read(parts, to - from + 1, &codes, &more);
    add_dots(dots, more, quarters, count, from);
}

/* Read parts of a whole panel for several queries. */
static void read_together(worker *self, const tt_shard *shard, int64_t panel,
                          const int32_t *const *codes, const int *which, int count, int from,
                          int to, passage *here) {
    static const int every[QUARTERS] = {0, 1, 2, 3};
    tt_panel parts[PARTS];
    int32_t more[TILE][PANEL] __attribute__((aligned(64)));
    parts_of(self->job, shard, panel, from, to, parts);
    self->does.dots[count](parts, to - from + 1, codes, more);
    for (int i = 0; i < count; i++)
        add_dots(here->dots[which[i]], more[i], every, QUARTERS, from);
}

/* Read parts of the open quarters: of whole panels with several queries at once where most are
 * open, else of each query with its quarters. */
static void read_on(worker *self, const tt_shard *shard, int64_t panel, const tile *queries,
                    int from, int to, passage *here) {
    const int32_t *codes[TILE];
    int which[TILE], count = 0;
    int64_t before = 0, words = 0;
    for (int part = 0; part <= to; part++)
        *(part < from ? &before : &words) += self->job->part[part];
    for (int i = 0; i < queries->width; i++)
        if (here->open[i]) {
            codes[count] = queries->codes[i] + before;
            which[count++] = i;
        }
    const int open = num_open(here, queries->width);
    self->spared -= open * words;
    if (count > 1 && 3 * open >= 8 * count) {
        read_together(self, shard, panel, codes, which, count, from, to, here);
        return;
    }
    for (int i = 0; i < count; i++)
        read_quarters(self, shard, panel, codes[i], from, to, here->open[which[i]],
                      here->dots[which[i]]);
}

/* Which rows of the open quarters can still be among the best of a query, the tile's i-th. */
static uint64_t still_open(worker *self, const tt_shard *shard, int64_t panel, int64_t query, int i,
                           int stage, passage *here) {
    static const uint64_t every_row = (1 << QUARTER) - 1;
    uint64_t rows = self->does.reach(here->dots[i], shard, panel * PANEL,
                                     &self->states[query].asked, stage);
    unsigned left = 0;
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const uint64_t inside = every_row << quarter * QUARTER;
        if (!(here->open[i] >> quarter & 1)) rows &= ~inside;
        else if (rows & inside) left |= 1u << quarter;
    }
    here->open[i] = left;
    return rows;
}

/* What the first phase has not read of a panel, as far as queries need it. */
static void open_panel(worker *self, const tt_shard *shard, int64_t panel, const tile *queries,
                       passage *here) {
    if (self->job->stage == BY_HEAD) {
        read_on(self, shard, panel, queries, FRONT, FRONT, here);
        for (int i = 0; i < queries->width; i++)
            if (here->open[i])
                still_open(self, shard, panel, queries->from + i, i, BY_FRONT, here);
        if (!num_open(here, queries->width)) return;
    }
    read_on(self, shard, panel, queries, BACK, BACK, here);
    for (int i = 0; i < queries->width; i++) {
        const int64_t query = queries->from + i;
        if (!here->open[i]) continue;
        const uint64_t rows = still_open(self, shard, panel, query, i, BY_ALL, here);
        if (rows) collect(self, shard, panel * PANEL, query, here->dots[i], rows);
    }
}

/* Begin to read what the bounds of a panel are made of. */
static void bring_bounds(const tt_shard *shard, int64_t panel, int stage) {
    const float *columns[] = {shard->scale, shard->error, shard->norm,
                              stage == BY_ALL ? shard->norm : shard->beyond[stage]};
    for (int column = 0; column < 4; column++)
        for (int row = 0; row < PANEL; row += QUARTER)
            __builtin_prefetch(columns[column] + panel * PANEL + row);
}

/* Parts of several panels for one query, whose time is that of reading: from several places. */
static void read_streams(worker *self, const tt_shard *shard, const int64_t *panels,
                         const tile *one, int to, int32_t (*dots)[PANEL]) {
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        tt_panel parts[PARTS];
        int32_t made[PANEL] __attribute__((aligned(64)));
        for (int part = 0; part <= to; part++) {
            parts[part] = (tt_panel){.words = self->job->part[part], .lines = QUARTERS};
            for (int i = 0; i < STREAMS; i++)
                parts[part].quarters[i] = quarter_at(self->job, shard, panels[i], quarter, part);
        }
        self->does.dots[1](parts, to + 1, one->codes, &made);
        for (int i = 0; i < STREAMS; i++)
            memcpy(dots[i] + quarter * QUARTER, made + i * QUARTER, QUARTER * sizeof *made);
    }
}

/* Panels of a group, all but a few at its end; returns where these begin. */
static int64_t scan_streams(worker *self, const tt_shard *shard, int64_t first, int64_t last,
                            const tile *one) {
    const int64_t share = (last - first) / STREAMS;
    const int to = self->job->part[FRONT] ? BACK : HEAD;
    int32_t dots[STREAMS][PANEL] __attribute__((aligned(64)));
    for (int64_t step = 0; step < share; step++) {
        int64_t panels[STREAMS];
        for (int i = 0; i < STREAMS; i++) panels[i] = first + i * share + step;
        for (int i = 0; i < STREAMS; i++) bring_bounds(shard, panels[i], BY_ALL);
        read_streams(self, shard, panels, one, to, dots);
        heed_others(self, 0);
        for (int i = 0; i < STREAMS; i++) note_rows(self, shard, panels[i], 0, dots[i]);
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
    const int64_t tiles = num_tiles(self->job);
    for (int64_t number = 0; number < tiles; number++) {
        const tile queries = make_tile(self, number, tiles);
        tt_few few = self->plan->packed ? make_few(self, &queries) : (tt_few){0};
        int64_t panel = now->first;
        if (self->job->num_queries == 1)
            panel = scan_streams(self, now->shard, now->first, now->last, &queries);
        for (; panel < now->last; panel++) {
            const int64_t place = next->first + panel - now->first;
            const tt_shard *there = place < next->last ? next->shard : 0;
            scan_panel(self, now->shard, panel, &queries, &few, there, place);
        }
    }
}

/* Lay out the queries for `few` functions; whether there was memory. */
static int pack_tiles(worker *self, plan *plan) {
    const tt_job *job = self->job;
    const int64_t tiles = num_tiles(job);
    plan->packed = malloc(sizeof(int32_t) * (size_t)(job->num_queries * job->words));
    if (!plan->packed) return 0;
    for (int64_t number = 0; number < tiles; number++) {
        const tile queries = make_tile(self, number, tiles);
        int32_t *to = plan->packed + queries.from * job->words;
        for (int64_t word = 0; word < job->words; word++)
            for (int i = 0; i < queries.width; i++) *to++ = queries.codes[i][word];
    }
    return 1;
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

/* ---- queries in blocks, for levels that multiply matrices ----------------------------------- */

static int64_t num_wide(const tt_job *job) { return (job->num_queries + WIDE - 1) / WIDE; }

static int64_t steps_of(const tt_job *job) {
    int64_t steps = 0;
    for (int part = 0; part < PARTS; part++) steps += (job->part[part] + STEP - 1) / STEP;
    return steps;
}

/* A query's codes as the i-th of a block. */
static void pack_query(const tt_job *job, int64_t query, int i, int8_t (*to)[WIDE][4 * STEP]) {
    static const int order[PARTS] = {FRONT, BACK, HEAD};
    for (int number = 0; number < PARTS; number++) {
        const int8_t *codes = job->query_codes + query * job->words * 4;
        const int64_t words = job->part[order[number]];
        for (int part = 0; part < order[number]; part++) codes += 4 * job->part[part];
        for (int64_t first = 0; first < words; first += STEP, to++) {
            const int64_t left = words - first < STEP ? words - first : STEP;
            memcpy((*to)[i] + 4 * (STEP - left), codes + 4 * first, (size_t)(4 * left));
        }
    }
}

/* Lay out the queries; whether there was memory. */
static int make_wide(const worker *self, plan *plan) {
    const tt_job *job = self->job;
    const int64_t blocks = num_wide(job), steps = steps_of(job);
    const size_t bytes = sizeof(int8_t[WIDE][4 * STEP]); /* of a step, and of `less` */
    _Static_assert(sizeof(int32_t[WIDE][QUARTER]) == sizeof(int8_t[WIDE][4 * STEP]), "as large");
    plan->wide = calloc((size_t)blocks, sizeof *plan->wide);
    plan->memory = calloc((size_t)(blocks * (steps + 1)) + 1, bytes);
    if (!plan->wide || !plan->memory) return 0;
    char *place = (char *)plan->memory + (bytes - (uintptr_t)plan->memory % bytes);
    for (int64_t number = 0; number < blocks; number++, place += (steps + 1) * (int64_t)bytes) {
        tt_wide *made = plan->wide + number;
        int32_t(*less)[QUARTER] = (void *)place;
        int8_t(*codes)[WIDE][4 * STEP] = (void *)(place + bytes);
        for (int i = 0; i < WIDE && number * WIDE + i < job->num_queries; i++) {
            const tt_asked *asked = &self->states[number * WIDE + i].asked;
            widen(&made->factor, &made->spread, asked);
            for (int row = 0; row < QUARTER; row++) less[i][row] = -asked->correction[BY_ALL];
            pack_query(job, number * WIDE + i, i, codes);
        }
        made->less = (const void *)less;
        made->codes = (const void *)codes;
    }
    return 1;
}

/* Let a block of queries bring its share of the panel that comes next. */
static void bring_share(const tt_job *job, const tt_shard *shard, int64_t panel, int64_t number,
                        int64_t shares, int to, tt_panel *parts) {
    for (int part = 0; part <= to; part++) {
        const int64_t lines = QUARTERS * job->part[part];
        const int64_t first = number * lines / shares, end = (number + 1) * lines / shares;
        parts[part].next = quarter_at(job, shard, panel, 0, part) + first * LINE;
        parts[part].lines = (int)(end - first);
    }
}

typedef struct { /* what a thread works on */
    tt_products products __attribute__((aligned(64)));
    tt_reached reached __attribute__((aligned(64)));
    tt_bounds bounds[2]; /* of the half that is multiplied, and of the one before */
    tt_pending pending;
    const tt_shard *shard; /* of what is pending; 0 if nothing is */
    int64_t at, from;      /* its rows and queries */
} bench;

/* Take the rows that may reach the limits of queries, of what was pending. */
static void note_wide(worker *self, bench *bench) {
    const int64_t left = self->job->num_queries - bench->from;
    uint32_t some = bench->shard ? bench->reached.some : 0;
    if (left < WIDE) some &= (1u << left) - 1;
    for (; some; some &= some - 1) {
        const int i = __builtin_ctz(some);
        collect(self, bench->shard, bench->at, bench->from + i, bench->reached.dots[i],
                bench->reached.rows[i]);
        self->limits[bench->from + i] = limit_of(&self->states[bench->from + i].asked);
    }
}

/* All queries pass over half a panel while it lies in the nearest cache, then over the other, and
 * bring the next panel. */
static void scan_wide(worker *self, bench *bench, const tt_shard *shard, int64_t panel,
                      const tt_shard *next_shard, int64_t next) {
    const tt_job *job = self->job;
    const int64_t blocks = num_wide(job);
    const int to = job->part[FRONT] ? BACK : HEAD;
    tt_panel parts[PARTS];
    parts_of(job, shard, panel, HEAD, to, parts);
    if (next_shard) bring_bounds(next_shard, next, BY_ALL);
    for (int half = 0; half < 2; half++) {
        const int64_t at = panel * PANEL + half * HALF;
        self->does.bounds(shard, at, bench->bounds + half);
        for (int64_t number = 0; number < blocks; number++) {
            const tt_wide *queries = self->plan->wide + number;
            if (next_shard)
                bring_share(job, next_shard, next, half * blocks + number, 2 * blocks, to, parts);
            self->does.wide(parts, to + 1, half, queries, &bench->pending, &bench->products,
                            &bench->reached);
            note_wide(self, bench);
            bench->pending = (tt_pending){queries, self->limits + number * WIDE,
                                          bench->bounds + half, to > HEAD};
            bench->shard = shard, bench->at = at, bench->from = number * WIDE;
        }
    }
}

static void *scan_blocks(void *argument) {
    worker *self = argument;
    group next;
    bench bench = {.pending = {self->plan->wide, self->limits, bench.bounds, 0}};
    self->does.begin_wide();
    for (group now = take_group(self); now.shard; now = next) {
        next = take_group(self);
        for (int64_t query = 0; query < self->job->num_queries; query++) {
            heed_others(self, query);
            self->limits[query] = limit_of(&self->states[query].asked);
        }
        for (int64_t panel = now.first; panel < now.last; panel++) {
            const int inside = panel + 1 < now.last;
            scan_wide(self, &bench, now.shard, panel, inside ? now.shard : next.shard,
                      inside ? panel + 1 : next.first);
        }
    }
    self->does.last(&bench.pending, &bench.products, &bench.reached);
    note_wide(self, &bench);
    self->does.end_wide();
    return 0;
}

/* The peaks of a panel of a group: (Q, QUARTERS). */
static float (*peaks_at(const worker *self, const group *of, int64_t i))[QUARTERS] {
    float(*peaks)[QUARTERS] = (float(*)[QUARTERS])self->job->peaks;
    return peaks + (of->place + i) * self->job->num_queries;
}

/* Keep the rows of a panel that look best. */
static void keep_seeds(worker *self, int64_t query, const tt_shard *shard, int64_t panel,
                       const int32_t *dots) {
    query_state *state = self->states + query;
    for (int row = 0; row < PANEL; row++) {
        const int64_t at = panel * PANEL + row;
        if (shard->error[at] < 0) continue; /* deleted, or no row */
        const float looks = look_of(dots[row], shard, at, &state->asked, (int)self->job->stage);
        keep_largest(state->seeds, &state->num_seeds, SEEDS(self->job->k),
                     (candidate){shard->first + at, looks});
    }
}

/* What the first phase says of a panel and a query: the best bounds, and rows that look good.
 * Returns whether it could be opened, judged by those so far. */
static int note_first(worker *self, const tt_shard *shard, int64_t panel, int64_t query,
                      const int32_t *dots, float *peaks) {
    query_state *state = self->states + query;
    const int enough = state->num_seeds == SEEDS(self->job->k);
    const float looks = enough ? state->seeds[0].upper : -INFINITY;
    const int stage = (int)self->job->stage;
    if (self->does.peaks(dots, shard, panel, &state->asked, stage, looks, peaks))
        keep_seeds(self, query, shard, panel, dots);
    return peaks[0] > looks || peaks[1] > looks || peaks[2] > looks || peaks[3] > looks;
}

/* The same for one query, whose products are kept if they may be needed: to read what the most of
 * them are made of a second time would take longer. */
static void note_single(worker *self, const group *now, int64_t i, const int32_t *dots) {
    const int64_t place = now->place + i;
    float *peaks = *peaks_at(self, now, i);
    const int kept = note_first(self, now->shard, now->first + i, 0, dots, peaks);
    self->job->kept[place] = (uint8_t)kept;
    if (kept) memcpy(self->job->dots + place * PANEL, dots, sizeof *dots * PANEL);
}

/* The same for the panels of a group and one query; returns of how many. */
static int64_t stream_first(worker *self, const group *now) {
    const int stage = (int)self->job->stage;
    const tile one = make_tile(self, 0, 1);
    const int64_t share = (now->last - now->first) / STREAMS;
    int32_t dots[STREAMS][PANEL] __attribute__((aligned(64)));
    for (int64_t step = 0; step < share; step++) {
        int64_t panels[STREAMS];
        for (int i = 0; i < STREAMS; i++) panels[i] = now->first + i * share + step;
        for (int i = 0; i < STREAMS; i++) bring_bounds(now->shard, panels[i], stage);
        read_streams(self, now->shard, panels, &one, last_part(self->job), dots);
        for (int i = 0; i < STREAMS; i++) note_single(self, now, i * share + step, dots[i]);
    }
    return STREAMS * share;
}

static void scan_first(worker *self, const group *now, int64_t i, const tile *queries,
                       const tt_shard *next_shard, int64_t next) {
    const tt_job *job = self->job;
    const int to = last_part(job);
    tt_panel parts[PARTS];
    int32_t dots[TILE][PANEL] __attribute__((aligned(64)));
    float(*peaks)[QUARTERS] = peaks_at(self, now, i) + queries->from;
    parts_of(job, now->shard, now->first + i, HEAD, to, parts);
    if (next_shard) bring_later(job, queries, next_shard, next, to, parts);
    self->does.dots[queries->width](parts, to + 1, queries->codes, dots);
    if (job->num_queries == 1) note_single(self, now, i, dots[0]);
    else
        for (int j = 0; j < queries->width; j++)
            note_first(self, now->shard, now->first + i, queries->from + j, dots[j], peaks[j]);
}

static void *first_phase(void *argument) {
    worker *self = argument;
    const int64_t count = self->job->num_queries, tiles = num_tiles(self->job);
    group next = {0};
    for (group now = take_group(self); now.shard; now = next) {
        next = take_group(self);
        for (int64_t number = 0; number < tiles; number++) {
            const tile queries = make_tile(self, number, tiles);
            int64_t i = count == 1 ? stream_first(self, &now) : 0;
            for (; i < now.last - now.first; i++)
                scan_first(self, &now, i, &queries,
                          next.first + i < next.last ? next.shard : 0, next.first + i);
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
        lineup all = line_up(seeds, count);
        candidate next;
        for (int64_t i = 0; i < SEEDS(job->k) && take_next(job, &all, &next); i++)
            keep_exact(best, &kept, job->k, score_of(self, query, next.position));
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

/* The quarters whose best bound reaches the threshold. */
static unsigned open_quarters(const float *peaks, float threshold) {
    unsigned open = 0;
    for (int quarter = 0; quarter < QUARTERS; quarter++)
        open |= (unsigned)(peaks[quarter] >= threshold) << quarter;
    return open;
}

/* A panel that is opened, and the quarters that some query opens. */
typedef struct {
    int64_t place; /* in its group */
    unsigned quarters;
} opening;

typedef struct { /* a group and what is opened of it */
    group of;
    opening *list;
    int64_t count;
} openings;

static void take_openings(worker *self, openings *taken) {
    const int64_t queries = self->job->num_queries;
    taken->of = take_group(self);
    taken->count = 0;
    for (int64_t query = 0; query < queries; query++) heed_others(self, query);
    for (int64_t i = 0; i < taken->of.last - taken->of.first; i++) {
        float(*peaks)[QUARTERS] = peaks_at(self, &taken->of, i);
        unsigned any = 0;
        for (int64_t query = 0; query < queries; query++)
            any |= open_quarters(peaks[query], self->states[query].asked.threshold);
        if (any) taken->list[taken->count++] = (opening){i, any};
    }
}

/* Begin to read what is opened first, and what has to be read again for it. */
static void bring_opening(const worker *self, const openings *from, int64_t number) {
    const tt_job *job = self->job;
    const opening *next = from->list + number;
    const int64_t panel = from->of.first + next->place;
    const int to = last_part(job) + 1;
    const int kept = job->num_queries == 1 && job->kept[from->of.place + next->place];
    for (int quarter = 0; next->quarters >> quarter; quarter++)
        for (int part = kept ? to : HEAD; next->quarters >> quarter & 1 && part <= to; part++) {
            const uint8_t *codes = quarter_at(job, from->of.shard, panel, quarter, part);
            for (int64_t word = 0; word < job->part[part]; word++)
                __builtin_prefetch(codes + word * LINE, 0, 2);
        }
}

/* A panel, for each query that opens it. What the first phase has read is read again if its
 * products were not kept, as each of several queries opens few panels. */
static void open_all(worker *self, const group *now, int64_t place) {
    const tt_job *job = self->job;
    const int64_t tiles = num_tiles(job), panel = now->first + place;
    float(*peaks)[QUARTERS] = peaks_at(self, now, place);
    for (int64_t number = 0; number < tiles; number++) {
        const tile queries = make_tile(self, number, tiles);
        passage here = {.dots = {{0}}};
        unsigned any = 0;
        for (int i = 0; i < queries.width; i++)
            any |= here.open[i] = open_quarters(peaks[queries.from + i],
                                                self->states[queries.from + i].asked.threshold);
        if (!any) continue;
        if (job->num_queries == 1 && job->kept[now->place + place])
            memcpy(here.dots, job->dots + (now->place + place) * PANEL, sizeof here.dots[0]);
        else
            read_on(self, now->shard, panel, &queries, HEAD, last_part(job), &here);
        open_panel(self, now->shard, panel, &queries, &here);
    }
}

static void *open_panels(void *argument) {
    worker *self = argument;
    openings both[2], *now = both, *next = both + 1;
    for (int i = 0; i < 2; i++) both[i].list = malloc(sizeof(opening) * (size_t)self->plan->group);
    if (both[0].list && both[1].list) {
        take_openings(self, now);
        while (now->of.shard) {
            take_openings(self, next);
            for (int64_t i = 0; i < now->count; i++) {
                const int64_t ahead = i + AHEAD - now->count;
                if (ahead < 0) bring_opening(self, now, i + AHEAD);
                else if (ahead < next->count) bring_opening(self, next, ahead);
                open_all(self, &now->of, now->list[i].place);
            }
            openings *const done = now;
            now = next;
            next = done;
        }
    } else {
        self->failed = 1;
    }
    for (int i = 0; i < 2; i++) free(both[i].list);
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
    while (num_best) { /* the worst first, from the back */
        const exact worst = take_worst(best, &num_best);
        position[num_best] = worst.position;
        score[num_best] = worst.score;
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

static int64_t group_size(const worker *self, int64_t panels, int phases) {
    const tt_job *job = self->job;
    int64_t bytes = 0;
    for (int part = 0; part <= (phases ? last_part(job) : BACK); part++)
        bytes += job->part[part] * 4 * PANEL;
    const int once = job->num_queries == 1 || (self->limits && !phases); /* no panel comes again */
    int64_t wanted = GROUP_BYTES;
    if (once) { /* large, but eight shares a thread */
        const int64_t fair = panels * bytes / (8 * self->num_threads);
        const int64_t most = job->num_queries == 1 ? STREAM_BYTES : 4 * GROUP_BYTES;
        wanted = fair < most ? fair : most;
    } else if (job->num_queries <= TILE) {
        wanted = 4 * GROUP_BYTES;
    }
    return wanted > bytes ? wanted / bytes : 1;
}

/* All phases but the last, in steps of about as many groups, of which so many fit in the memory;
 * whether one failed. */
static int scan_in_phases(worker *workers, int64_t threads, int64_t fit) {
    const tt_job *job = workers->job;
    plan *plan = workers->plan;
    int failed = 0;
    for (int64_t i = 0; i < threads; i++)
        for (int64_t query = 0; query < job->num_queries; query++) {
            query_state *state = workers[i].states + query;
            state->seeds = malloc(sizeof *state->seeds * (size_t)SEEDS(job->k));
            failed |= !state->seeds;
        }
    const int64_t steps = (plan->groups + fit - 1) / fit;
    for (int64_t step = 0; step < steps && !failed; step++) {
        const int64_t first = step * plan->groups / steps, end = (step + 1) * plan->groups / steps;
        const int64_t few = threads < job->num_queries ? threads : job->num_queries;
        failed = run_groups(workers, threads, first_phase, first, end) ||
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
    const int64_t room = job->num_peaks / (QUARTERS * job->num_queries); /* panels */
    const int phases = job->stage != BY_ALL && job->part[FRONT] && room > 0;
    plan->group = group_size(workers, panels, phases);
    if (phases && plan->group > room) plan->group = room;
    for (int64_t i = 0; i < job->num_shards; i++)
        plan->groups += (job->shards[i].panels + plan->group - 1) / plan->group;
    if (!phases && workers->limits) {
        if (!make_wide(workers, plan)) return 1;
        return run_groups(workers, threads, scan_blocks, 0, plan->groups);
    }
    if (!phases) {
        if (workers->does.few[1] && !pack_tiles(workers, plan)) return 1;
        return run_groups(workers, threads, scan, 0, plan->groups);
    }
    for (int part = 0; part < PARTS; part++) {
        const int64_t words = panels * job->num_queries * QUARTERS * job->part[part];
        job->count[2] += words;
        if (part > last_part(job)) job->count[3] += words;
    }
    return scan_in_phases(workers, threads, room / plan->group);
}

static int prepare(worker *self, const tt_job *job, int64_t room) {
    self->states = calloc((size_t)job->num_queries, sizeof *self->states);
    self->scratch = malloc(sizeof(double) * (size_t)power_of_two(job->dim));
    if (!self->states || !self->scratch) return 0;
    if (self->does.wide && job->num_queries >= WIDE_QUERIES) {
        self->limits = calloc((size_t)(num_wide(job) * WIDE), sizeof *self->limits);
        if (!self->limits) return 0;
    }
    for (int64_t query = 0; query < job->num_queries; query++) {
        query_state *state = self->states + query;
        const int8_t *code = job->query_codes + query * job->words * 4;
        int32_t sum = 0;
        for (int part = 0; part < PARTS; part++) {
            for (int64_t i = 0; i < job->part[part] * 4; i++) sum += *code++;
            if (part == HEAD && job->part[FRONT]) sum *= 4;
            state->asked.correction[part] = self->does.flips ? 0 : 128 * sum;
        }
        state->asked.scale = job->query_scale[query];
        state->asked.error = job->query_error[query];
        take_factors(&state->asked);
        for (int i = 0; i < 2; i++) state->asked.beyond[i] = job->query_beyond[i][query];
        state->asked.threshold = -FLT_MAX;
        state->room = room;
        state->found = malloc(sizeof(candidate) * (size_t)room);
        if (!state->found) return 0;
    }
    return 1;
}

static void discard_lower(lower_heap *of, int64_t queries) {
    if (!of) return;
    for (int64_t query = 0; query < queries; query++) pthread_mutex_destroy(&of[query].lock);
    free(of->heap); /* of all, one behind the other */
    free(of);
}

/* Of all queries; 0 where memory was short. */
static lower_heap *make_lower(const tt_job *job) {
    lower_heap *made = malloc(sizeof *made * (size_t)job->num_queries);
    float *heaps = malloc(sizeof *heaps * (size_t)(job->num_queries * job->k));
    if (!made || !heaps) {
        free(made);
        free(heaps);
        return 0;
    }
    for (int64_t query = 0; query < job->num_queries; query++) {
        made[query] = (lower_heap){.heap = heaps + query * job->k};
        pthread_mutex_init(&made[query].lock, 0);
    }
    return made;
}

static void discard(worker *self, const tt_job *job) {
    for (int64_t query = 0; self->states && query < job->num_queries; query++) {
        free(self->states[query].found);
        free(self->states[query].best);
        free(self->states[query].seeds);
    }
    free(self->states);
    free(self->scratch);
    free(self->limits);
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
    const kernels chosen = choose_kernels(vector_level());
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
    lower_heap *lower = make_lower(job);
    if (!workers || !all || !shared || !lower) failed = 1;
    for (int64_t i = 0; !failed && i < threads; i++) {
        workers[i] = (worker){.job = job, .plan = &plan, .next = &next, .shared = shared,
                              .lower = lower, .all = all, .num_threads = threads};
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
        job->count[3] += workers[i].spared;
        if (workers[i].job) discard(workers + i, job);
    }
    discard_lower(lower, job->num_queries);
    free(plan.wide);
    free(plan.memory);
    free(plan.packed);
    free(workers);
    free(all);
    free(shared);
    return failed ? -1 : 0;
}
