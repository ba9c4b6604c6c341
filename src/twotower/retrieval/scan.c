/* Certified exact top-k: a scan of int8 codes by bounds, then a re-rank of the few rows left in fp64.
 *
 * Row x is held as code p (int8), scale s, norm n and error e; a unit query q as code c, scale t and
 * error u. Then |q.(x - centre) - t s (c.p)| <= u n + e =: w; what e includes stands in
 * certificate.py, which makes all of them. A row can be among the best k only if its upper bound
 * t s (c.p) + w reaches the k-th best lower bound t s (c.p) - w. The scores that decide are summed in
 * fp64 in an order that only the dimension decides, so that the answer depends on nothing else.
 *
 * Codes lie in panels of 64 rows: [dim / 4][64][4] bytes, each p + 128. */

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 64
#define TILE 6
#define MAX_THREADS 256
#define GROUP_BYTES (256 * 1024) /* panels that stay in L2 while all queries pass over them */
#define STREAMS 4 /* places that one query reads from at once: one alone leaves bandwidth unused */
#define STREAM_BYTES (8 * 1024 * 1024)

enum { PLAIN = 0, NEON_DOT = 1, AVX2 = 1, AVX512_VNNI = 2 };

typedef struct {
    const uint8_t *codes;
    const float *scale, *error, *norm;
    int64_t panels, first; /* position of the first row */
} tt_shard;

typedef struct {
    const void *rows;
    int64_t first, half; /* half: the rows are fp16, not fp32 */
} tt_part;

typedef struct {
    const tt_shard *shards;
    const tt_part *parts;
    const int64_t *ids;
    int64_t num_shards, num_parts, dim, words; /* words: dim padded to fours, in fours */
    const int8_t *query_codes;  /* (Q, words, 4) */
    const float *query_scale, *query_error;
    const double *queries;      /* (Q, dim) */
    const double *query_norm;   /* what a dot product is divided by for the unit query's score */
    const double *query_centre; /* unit query . centre */
    int64_t num_queries, k, cosine, threads, level;
    int64_t *position; /* (Q, k), -1 where there are fewer rows */
    double *score;     /* (Q, k) */
    int64_t *count;    /* [0] rows collected, [1] rows re-ranked */
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
    float threshold;
    int32_t correction; /* 128 * sum of the query's code */
} query_state;

typedef void (*dots_function)(const uint8_t *, const uint8_t *, const int32_t *const *, int64_t,
                              int32_t (*)[PANEL]);
typedef void (*streams_function)(const uint8_t *const *, const int32_t *, int64_t,
                                 int32_t (*)[PANEL]);
typedef int (*bounds_function)(const int32_t *, const tt_shard *, int64_t, float, float, float,
                               int32_t, float *, float *);
typedef double (*product_function)(const double *, const void *, int64_t, int64_t, double *);

typedef struct {
    const tt_job *job;
    query_state *states;
    double *scratch;
    _Atomic int64_t *next;   /* group of panels, then query, that is taken next */
    _Atomic uint32_t *shared; /* thresholds of all threads, as ordered integers */
    query_state *const *all; /* states of each thread */
    int64_t num_threads, collected, reranked;
    dots_function dots[TILE + 1];
    streams_function streams;
    bounds_function bounds;
    product_function product;
    int failed, flips; /* flips: dots are of p, not of p + 128 */
} worker;

/* ---- integer dot products of a panel with a few queries ------------------------------------- */

#define DOTS_OF(name, width) \
    static void name##_##width(const uint8_t *panel, const uint8_t *ahead, \
                               const int32_t *const *queries, int64_t words, \
                               int32_t (*out)[PANEL]) { \
        name(panel, ahead, queries, words, width, out); \
    }
#define ALL_DOTS(name, attribute) \
    attribute DOTS_OF(name, 1) attribute DOTS_OF(name, 2) attribute DOTS_OF(name, 3) \
    attribute DOTS_OF(name, 4) attribute DOTS_OF(name, 5) attribute DOTS_OF(name, 6)
#define TABLE_OF(name) {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}

static inline __attribute__((always_inline)) void plain_dots(
    const uint8_t *panel, const uint8_t *ahead, const int32_t *const *queries, int64_t words,
    const int width, int32_t (*out)[PANEL]) {
    (void)ahead;
    memset(out, 0, sizeof(out[0]) * (size_t)width);
    for (int64_t word = 0; word < words; word++)
        for (int query = 0; query < width; query++) {
            const int8_t *code = (const int8_t *)(queries[query] + word);
            for (int row = 0; row < PANEL; row++) {
                const uint8_t *p = panel + word * (4 * PANEL) + 4 * row;
                out[query][row] += p[0] * code[0] + p[1] * code[1] + p[2] * code[2] + p[3] * code[3];
            }
        }
}
ALL_DOTS(plain_dots, )

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define ON_AVX2 __attribute__((target("avx2,fma,f16c")))
#define ON_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))

/* Sums have names, and loops over them are written out: compilers keep arrays of them in memory. */
#define EACH(m) m(0) m(1) m(2) m(3) m(4) m(5)

ON_AVX2 static inline __attribute__((always_inline)) void avx2_few(
    const uint8_t *panel, const uint8_t *ahead, const int32_t *const *queries, int64_t words,
    const int width, int32_t (*out)[PANEL]) {
    const __m256i flip = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    for (int quarter = 0; quarter < 4; quarter++) {
        __m256i a0 = _mm256_setzero_si256(), b0 = a0, a1 = a0, b1 = a0, a2 = a0, b2 = a0;
        for (int64_t word = 0; word < words; word++) {
            const int64_t at = word * (4 * PANEL) + quarter * 64;
            const __m256i *p = (const __m256i *)(panel + at);
            if (ahead) _mm_prefetch((const char *)ahead + at, _MM_HINT_T1);
            /* vpmaddubsw takes one unsigned side: |p| and the query with p's sign; p >= -127. */
            const __m256i p0 = _mm256_xor_si256(_mm256_loadu_si256(p), flip);
            const __m256i p1 = _mm256_xor_si256(_mm256_loadu_si256(p + 1), flip);
            const __m256i m0 = _mm256_abs_epi8(p0), m1 = _mm256_abs_epi8(p1);
#define AVX2_STEP(q) \
    if (width > q) { \
        const __m256i code = _mm256_set1_epi32(queries[q][word]); \
        const __m256i c0 = _mm256_maddubs_epi16(m0, _mm256_sign_epi8(code, p0)); \
        const __m256i c1 = _mm256_maddubs_epi16(m1, _mm256_sign_epi8(code, p1)); \
        a##q = _mm256_add_epi32(a##q, _mm256_madd_epi16(c0, ones)); \
        b##q = _mm256_add_epi32(b##q, _mm256_madd_epi16(c1, ones)); \
    }
            AVX2_STEP(0) AVX2_STEP(1) AVX2_STEP(2)
        }
#define AVX2_STORE(q) \
    if (width > q) { \
        _mm256_storeu_si256((__m256i *)(out[q] + quarter * 16), a##q); \
        _mm256_storeu_si256((__m256i *)(out[q] + quarter * 16 + 8), b##q); \
    }
        AVX2_STORE(0) AVX2_STORE(1) AVX2_STORE(2)
    }
}

ON_AVX2 static inline __attribute__((always_inline)) void avx2_dots(
    const uint8_t *panel, const uint8_t *ahead, const int32_t *const *queries, int64_t words,
    const int width, int32_t (*out)[PANEL]) {
    avx2_few(panel, ahead, queries, words, width < 3 ? width : 3, out); /* what 16 registers hold */
    if (width > 3) avx2_few(panel, 0, queries + 3, words, width - 3, out + 3);
}
ALL_DOTS(avx2_dots, ON_AVX2)

ON_VNNI static inline __attribute__((always_inline)) void vnni_dots(
    const uint8_t *panel, const uint8_t *ahead, const int32_t *const *queries, int64_t words,
    const int width, int32_t (*out)[PANEL]) {
    const __m512i zero = _mm512_setzero_si512();
#define VNNI_SUMS(q) __m512i a##q = zero, b##q = zero, c##q = zero, d##q = zero;
    EACH(VNNI_SUMS)
    for (int64_t word = 0; word < words; word++) {
        const uint8_t *p = panel + word * (4 * PANEL);
        const __m512i p0 = _mm512_loadu_si512(p), p1 = _mm512_loadu_si512(p + 64);
        const __m512i p2 = _mm512_loadu_si512(p + 128), p3 = _mm512_loadu_si512(p + 192);
        if (ahead) {
            const char *next = (const char *)ahead + word * (4 * PANEL);
            _mm_prefetch(next, _MM_HINT_T1);
            _mm_prefetch(next + 64, _MM_HINT_T1);
            _mm_prefetch(next + 128, _MM_HINT_T1);
            _mm_prefetch(next + 192, _MM_HINT_T1);
        }
#define VNNI_STEP(q) \
    if (width > q) { \
        const __m512i code = _mm512_set1_epi32(queries[q][word]); \
        a##q = _mm512_dpbusd_epi32(a##q, p0, code); \
        b##q = _mm512_dpbusd_epi32(b##q, p1, code); \
        c##q = _mm512_dpbusd_epi32(c##q, p2, code); \
        d##q = _mm512_dpbusd_epi32(d##q, p3, code); \
    }
        EACH(VNNI_STEP)
    }
#define VNNI_STORE(q) \
    if (width > q) { \
        _mm512_storeu_si512(out[q], a##q); \
        _mm512_storeu_si512(out[q] + 16, b##q); \
        _mm512_storeu_si512(out[q] + 32, c##q); \
        _mm512_storeu_si512(out[q] + 48, d##q); \
    }
    EACH(VNNI_STORE)
}
ALL_DOTS(vnni_dots, ON_VNNI)

/* One query, and a panel from each of four places. */
ON_VNNI static void vnni_streams(const uint8_t *const *panels, const int32_t *query, int64_t words,
                                 int32_t (*out)[PANEL]) {
    const __m512i zero = _mm512_setzero_si512();
    const uint8_t *from0 = panels[0], *from1 = panels[1], *from2 = panels[2], *from3 = panels[3];
    VNNI_SUMS(0) VNNI_SUMS(1) VNNI_SUMS(2) VNNI_SUMS(3)
    for (int64_t word = 0; word < words; word++) {
        const __m512i code = _mm512_set1_epi32(query[word]);
        const int64_t at = word * (4 * PANEL);
#define VNNI_STREAM(q) \
    a##q = _mm512_dpbusd_epi32(a##q, _mm512_loadu_si512(from##q + at), code); \
    b##q = _mm512_dpbusd_epi32(b##q, _mm512_loadu_si512(from##q + at + 64), code); \
    c##q = _mm512_dpbusd_epi32(c##q, _mm512_loadu_si512(from##q + at + 128), code); \
    d##q = _mm512_dpbusd_epi32(d##q, _mm512_loadu_si512(from##q + at + 192), code);
        VNNI_STREAM(0) VNNI_STREAM(1) VNNI_STREAM(2) VNNI_STREAM(3)
    }
    const int width = STREAMS;
    VNNI_STORE(0) VNNI_STORE(1) VNNI_STORE(2) VNNI_STORE(3)
}
#endif

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__clang__)
#define ON_DOT __attribute__((target("dotprod")))
#else
#define ON_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

ON_DOT static inline void neon_dots(const uint8_t *panel, const uint8_t *ahead,
                                    const int32_t *const *queries, int64_t words, const int width,
                                    int32_t (*out)[PANEL]) {
    const uint8x16_t flip = vdupq_n_u8(0x80);
    for (int quarter = 0; quarter < 4; quarter++) {
        int32x4_t sums[TILE][4];
        for (int query = 0; query < width; query++)
            for (int part = 0; part < 4; part++) sums[query][part] = vdupq_n_s32(0);
        for (int64_t word = 0; word < words; word++) {
            const uint8_t *p = panel + word * (4 * PANEL) + quarter * 64;
            if (ahead) __builtin_prefetch(ahead + word * (4 * PANEL) + quarter * 64, 0, 2);
            int8x16_t rows[4];
            for (int part = 0; part < 4; part++)
                rows[part] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * part), flip));
            for (int query = 0; query < width; query++) {
                const int8x16_t code = vreinterpretq_s8_s32(vdupq_n_s32(queries[query][word]));
                for (int part = 0; part < 4; part++)
                    sums[query][part] = vdotq_s32(sums[query][part], rows[part], code);
            }
        }
        for (int query = 0; query < width; query++)
            for (int part = 0; part < 4; part++)
                vst1q_s32(out[query] + quarter * 16 + part * 4, sums[query][part]);
    }
}
ALL_DOTS(neon_dots, ON_DOT)
#endif

/* ---- bounds of 64 rows, and exact scores, each compiled once a processor -------------------- */

static inline __attribute__((always_inline)) int bounds_of(
    const int32_t *dots, const tt_shard *shard, int64_t panel, float scale, float error,
    float threshold, int32_t correction, float *upper, float *lower) {
    const float *s = shard->scale + panel * PANEL, *e = shard->error + panel * PANEL;
    const float *n = shard->norm + panel * PANEL;
    int any = 0;
    for (int row = 0; row < PANEL; row++) {
        const float middle = ((float)(dots[row] - correction) * scale) * s[row];
        const float width = error * n[row] + e[row];
        upper[row] = middle + width;
        lower[row] = middle - width;
        any |= upper[row] >= threshold;
    }
    return any;
}

static float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, low = half & 0x7fff;
    uint32_t bits;
    float value;
    if (low >= 0x0400) {
        bits = sign | ((low << 13) + ((127 - 15) << 23));
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    value = (float)low * 0x1p-24f; /* zero or denormal */
    return sign ? -value : value;
}

/* Products of fp32 and fp64 folded in halves: the order depends on `padded`, a power of two. */
static inline __attribute__((always_inline)) double fold(double *products, int64_t dim,
                                                         int64_t padded) {
    for (int64_t i = dim; i < padded; i++) products[i] = 0;
    for (int64_t width = padded / 2; width >= 1; width /= 2)
        for (int64_t i = 0; i < width; i++) products[i] += products[i + width];
    return products[0];
}

static inline int64_t power_of_two(int64_t dim) {
    int64_t padded = 1;
    while (padded < dim) padded *= 2;
    return padded;
}

static inline __attribute__((always_inline)) double product_of(
    const double *query, const void *row, int64_t dim, int64_t half, double *scratch) {
    if (half) {
        const uint16_t *values = row;
        for (int64_t i = 0; i < dim; i++) scratch[i] = (double)half_to_float(values[i]) * query[i];
    } else {
        const float *values = row;
        for (int64_t i = 0; i < dim; i++) scratch[i] = (double)values[i] * query[i];
    }
    return fold(scratch, dim, power_of_two(dim));
}

static int plain_bounds(const int32_t *dots, const tt_shard *shard, int64_t panel, float scale,
                        float error, float threshold, int32_t correction, float *upper,
                        float *lower) {
    return bounds_of(dots, shard, panel, scale, error, threshold, correction, upper, lower);
}

static double plain_product(const double *query, const void *row, int64_t dim, int64_t half,
                            double *scratch) {
    return product_of(query, row, dim, half, scratch);
}

#if defined(ON_AVX2)
ON_AVX2 static int avx2_bounds(const int32_t *dots, const tt_shard *shard, int64_t panel,
                               float scale, float error, float threshold, int32_t correction,
                               float *upper, float *lower) {
    return bounds_of(dots, shard, panel, scale, error, threshold, correction, upper, lower);
}

ON_AVX2 static double avx2_product(const double *query, const void *row, int64_t dim, int64_t half,
                                   double *scratch) {
    if (!half) return product_of(query, row, dim, 0, scratch);
    const uint16_t *values = row;
    int64_t i = 0;
    for (; i + 4 <= dim; i += 4) {
        const __m128i halves = _mm_loadl_epi64((const __m128i *)(values + i));
        const __m256d wide = _mm256_cvtps_pd(_mm_cvtph_ps(halves));
        _mm256_storeu_pd(scratch + i, _mm256_mul_pd(wide, _mm256_loadu_pd(query + i)));
    }
    for (; i < dim; i++) scratch[i] = (double)half_to_float(values[i]) * query[i];
    return fold(scratch, dim, power_of_two(dim));
}

ON_VNNI static int vnni_bounds(const int32_t *dots, const tt_shard *shard, int64_t panel,
                               float scale, float error, float threshold, int32_t correction,
                               float *upper, float *lower) {
    const float *s = shard->scale + panel * PANEL, *e = shard->error + panel * PANEL;
    const float *n = shard->norm + panel * PANEL;
    const __m512 scales = _mm512_set1_ps(scale), errors = _mm512_set1_ps(error);
    const __m512 least = _mm512_set1_ps(threshold);
    const __m512i minus = _mm512_set1_epi32(correction);
    __m512 middle[4], width[4];
    __mmask16 any = 0;
    for (int part = 0; part < 4; part++) {
        const __m512i dot = _mm512_sub_epi32(_mm512_loadu_si512(dots + part * 16), minus);
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scales);
        middle[part] = _mm512_mul_ps(product, _mm512_loadu_ps(s + part * 16));
        width[part] = _mm512_fmadd_ps(errors, _mm512_loadu_ps(n + part * 16),
                                      _mm512_loadu_ps(e + part * 16));
        any |= _mm512_cmp_ps_mask(_mm512_add_ps(middle[part], width[part]), least, _CMP_GE_OQ);
    }
    if (!any) return 0;
    for (int part = 0; part < 4; part++) {
        _mm512_storeu_ps(upper + part * 16, _mm512_add_ps(middle[part], width[part]));
        _mm512_storeu_ps(lower + part * 16, _mm512_sub_ps(middle[part], width[part]));
    }
    return 1;
}
#endif

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
    if (value <= state->threshold) return;
    state->threshold = value;
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
        self->product(job->queries + query * job->dim, row, job->dim, half, self->scratch);
    const double unit = dot / job->query_norm[query];
    self->reranked++;
    return (exact){(job->cosine ? unit : dot) + 0.0, unit, job->ids[position], position};
}

static int by_upper(const void *one, const void *other) {
    const candidate *a = one, *b = other;
    if (a->upper != b->upper) return a->upper < b->upper ? 1 : -1;
    return (a->position > b->position) - (a->position < b->position);
}

/* Score candidates by descending bound until none can be among the best k. */
static void rerank(worker *self, int64_t query, candidate *found, int64_t count, exact *best,
                   int64_t *num_best) {
    const tt_job *job = self->job;
    const double centre = job->query_centre[query];
    qsort(found, (size_t)count, sizeof *found, by_upper);
    for (int64_t i = 0; i < count; i++) {
        if (*num_best == job->k && centre + found[i].upper < best[0].unit) break;
        keep_exact(best, num_best, job->k, score_of(self, query, found[i].position));
    }
}

/* No room: drop what cannot be among the best; what is still too much is re-ranked now. */
static void settle(worker *self, int64_t query) {
    query_state *state = self->states + query;
    int64_t left = 0;
    for (int64_t i = 0; i < state->num_found; i++)
        if (state->found[i].upper >= state->threshold) state->found[left++] = state->found[i];
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
    if (state->num_best == self->job->k) {
        const double least = state->best[0].unit - self->job->query_centre[query];
        raise_threshold(self, query, nextafterf(nextafterf((float)least, -FLT_MAX), -FLT_MAX));
    }
}

static void collect(worker *self, int64_t query, int64_t position, const float *upper,
                    const float *lower) {
    query_state *state = self->states + query;
    for (int row = 0; row < PANEL; row++) {
        if (!(upper[row] >= state->threshold)) continue;
        if (state->num_found == state->room) settle(self, query);
        state->found[state->num_found++] = (candidate){position + row, upper[row]};
        self->collected++;
        keep_lower(self, query, lower[row]);
    }
}

/* ---- the two phases of a thread ------------------------------------------------------------- */

static void scan_group(worker *self, const tt_shard *shard, int64_t first, int64_t last) {
    const tt_job *job = self->job;
    const int64_t bytes = job->words * 4 * PANEL;
    int32_t dots[TILE][PANEL] __attribute__((aligned(64)));
    float upper[PANEL] __attribute__((aligned(64))), lower[PANEL] __attribute__((aligned(64)));
    int64_t tiles = (job->num_queries + TILE - 1) / TILE;
    for (int64_t tile = 0; tile < tiles; tile++) {
        /* Tiles of even width: 16 queries are 6, 5 and 5. */
        const int64_t from = tile * job->num_queries / tiles;
        const int width = (int)((tile + 1) * job->num_queries / tiles - from);
        const int32_t *codes[TILE];
        for (int query = 0; query < width; query++) {
            query_state *state = self->states + from + query;
            codes[query] = (const int32_t *)(job->query_codes + (from + query) * job->words * 4);
            const float others = unordered(
                atomic_load_explicit(self->shared + from + query, memory_order_relaxed));
            if (others > state->threshold) state->threshold = others;
        }
        for (int64_t panel = first; panel < last; panel++) {
            const uint8_t *here = shard->codes + panel * bytes;
            /* The first tile brings the group from memory; the others find it in the cache. */
            const uint8_t *ahead = tile || panel + 1 >= shard->panels ? 0 : here + bytes;
            self->dots[width](here, ahead, codes, job->words, dots);
            for (int query = 0; query < width; query++) {
                const query_state *state = self->states + from + query;
                if (self->bounds(dots[query], shard, panel, job->query_scale[from + query],
                                 job->query_error[from + query], state->threshold,
                                 state->correction, upper, lower))
                    collect(self, from + query, shard->first + panel * PANEL, upper, lower);
            }
        }
    }
}

/* The same for one query: its time is that of reading the codes. */
static void scan_streams(worker *self, const tt_shard *shard, int64_t first, int64_t last) {
    const tt_job *job = self->job;
    const int64_t bytes = job->words * 4 * PANEL, share = (last - first) / STREAMS;
    int32_t dots[STREAMS][PANEL] __attribute__((aligned(64)));
    float upper[PANEL] __attribute__((aligned(64))), lower[PANEL] __attribute__((aligned(64)));
    query_state *state = self->states;
    for (int64_t step = 0; step < share; step++) {
        const uint8_t *panels[STREAMS];
        for (int stream = 0; stream < STREAMS; stream++)
            panels[stream] = shard->codes + (first + stream * share + step) * bytes;
        self->streams(panels, (const int32_t *)job->query_codes, job->words, dots);
        const float others = unordered(atomic_load_explicit(self->shared, memory_order_relaxed));
        if (others > state->threshold) state->threshold = others;
        for (int stream = 0; stream < STREAMS; stream++) {
            const int64_t panel = first + stream * share + step;
            if (self->bounds(dots[stream], shard, panel, job->query_scale[0], job->query_error[0],
                             state->threshold, state->correction, upper, lower))
                collect(self, 0, shard->first + panel * PANEL, upper, lower);
        }
    }
    if (first + STREAMS * share < last) scan_group(self, shard, first + STREAMS * share, last);
}

static int64_t group_size(const worker *self) {
    const tt_job *job = self->job;
    const int64_t bytes = job->words * 4 * PANEL;
    int64_t panels = 0, wanted = GROUP_BYTES;
    if (self->streams && job->num_queries == 1) { /* large, but eight shares a thread at least */
        for (int64_t i = 0; i < job->num_shards; i++) panels += job->shards[i].panels;
        const int64_t fair = panels * bytes / (8 * self->num_threads);
        wanted = fair < STREAM_BYTES ? fair : STREAM_BYTES;
    } else if (job->num_queries <= TILE) {
        wanted = 4 * GROUP_BYTES;
    }
    return wanted > bytes ? wanted / bytes : 1;
}

static void *scan(void *argument) {
    worker *self = argument;
    const tt_job *job = self->job;
    const int64_t group = group_size(self);
    for (;;) {
        int64_t mine = atomic_fetch_add(self->next, 1) * group;
        int64_t shard = 0;
        while (shard < job->num_shards) {
            const int64_t even = (job->shards[shard].panels + group - 1) / group * group;
            if (mine < even) break;
            mine -= even;
            shard++;
        }
        if (shard == job->num_shards || self->failed) return 0;
        const int64_t panels = job->shards[shard].panels;
        const int64_t last = mine + group < panels ? mine + group : panels;
        if (self->streams && job->num_queries == 1)
            scan_streams(self, job->shards + shard, mine, last);
        else
            scan_group(self, job->shards + shard, mine, last);
    }
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

static void choose(worker *self, int64_t level) {
    static const dots_function plain[] = TABLE_OF(plain_dots);
    const dots_function *dots = plain;
    self->bounds = plain_bounds;
    self->product = plain_product;
#if defined(ON_AVX2)
    static const dots_function avx2[] = TABLE_OF(avx2_dots), vnni[] = TABLE_OF(vnni_dots);
    self->flips = level == AVX2;
    if (level >= AVX2) {
        dots = avx2;
        self->bounds = avx2_bounds;
        self->product = avx2_product;
    }
    if (level >= AVX512_VNNI) {
        dots = vnni;
        self->streams = vnni_streams;
        self->bounds = vnni_bounds;
    }
#elif defined(ON_DOT)
    static const dots_function neon[] = TABLE_OF(neon_dots);
    self->flips = level >= NEON_DOT;
    if (level >= NEON_DOT) dots = neon;
#endif
    (void)level;
    memcpy(self->dots, dots, sizeof self->dots);
}

static int prepare(worker *self, const tt_job *job, int64_t room) {
    self->states = calloc((size_t)job->num_queries, sizeof *self->states);
    self->scratch = malloc(sizeof(double) * (size_t)power_of_two(job->dim));
    if (!self->states || !self->scratch) return 0;
    for (int64_t query = 0; query < job->num_queries; query++) {
        query_state *state = self->states + query;
        const int8_t *code = job->query_codes + query * job->words * 4;
        int32_t sum = 0;
        for (int64_t i = 0; i < job->words * 4; i++) sum += code[i];
        state->correction = self->flips ? 0 : 128 * sum;
        state->threshold = -FLT_MAX;
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
    }
    free(self->states);
    free(self->scratch);
}

/* ---- what Python calls ---------------------------------------------------------------------- */

/* The best level that this processor can run. */
int tt_level(void) {
#if defined(ON_AVX2)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PLAIN;
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512_VNNI;
    return AVX2;
#elif defined(ON_DOT) && defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1 ? NEON_DOT : PLAIN; /* HWCAP_ASIMDDP */
#elif defined(ON_DOT) && defined(__ARM_FEATURE_DOTPROD)
    return NEON_DOT;
#else
    return PLAIN;
#endif
}

const char *tt_level_name(int level) {
#if defined(ON_DOT)
    static const char *const names[] = {"plain C", "NEON dot product"};
    return names[level == NEON_DOT];
#else
    static const char *const names[] = {"plain C", "AVX2", "AVX-512 VNNI"};
    return names[level < 0 || level > AVX512_VNNI ? 0 : level];
#endif
}

/* Fill `position` and `score` of the job; 0, or -1 where memory was short. */
int tt_search(const tt_job *job) {
    int64_t threads = job->threads < 1 ? 1 : job->threads, panels = 0;
    _Atomic int64_t next = 0;
    int failed = 0;
    for (int64_t i = 0; i < job->num_shards; i++) panels += job->shards[i].panels;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > panels) threads = panels ? panels : 1;
    worker *workers = calloc((size_t)threads, sizeof *workers);
    query_state **all = calloc((size_t)threads, sizeof *all);
    _Atomic uint32_t *shared = malloc(sizeof *shared * (size_t)job->num_queries);
    if (!workers || !all || !shared) failed = 1;
    for (int64_t i = 0; !failed && i < threads; i++) {
        workers[i] = (worker){.job = job, .next = &next, .shared = shared, .all = all,
                              .num_threads = threads};
        choose(workers + i, job->level);
        failed = !prepare(workers + i, job, 4 * job->k + 1024);
        all[i] = workers[i].states;
    }
    if (!failed) {
        for (int64_t i = 0; i < job->num_queries; i++) atomic_store(shared + i, ordered(-FLT_MAX));
        run_all(workers, threads, scan);
        for (int64_t i = 0; i < threads; i++) failed |= workers[i].failed;
    }
    if (!failed) {
        run_all(workers, threads < job->num_queries ? threads : job->num_queries, finish);
        for (int64_t i = 0; i < threads; i++) failed |= workers[i].failed;
    }
    for (int64_t i = 0; workers && i < threads; i++) {
        job->count[0] += workers[i].collected;
        job->count[1] += workers[i].reranked;
        if (workers[i].job) discard(workers + i, job);
    }
    free(workers);
    free(all);
    free(shared);
    return failed ? -1 : 0;
}
