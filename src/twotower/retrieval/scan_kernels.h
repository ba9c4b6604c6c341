/* What scan.c does in other ways on other processors: products of codes, their bounds, and exact
 * scores. A level is what a processor can run; choose_kernels gives its variants. */

#ifndef TWOTOWER_SCAN_KERNELS_H
#define TWOTOWER_SCAN_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL 64
#define TILE 6
#define TURNED 4 /* vectors that are rotated at once */
#define STREAMS 4 /* places that one query reads from at once: one alone leaves bandwidth unused */

enum { PLAIN = 0, NEON_DOT = 1, AVX2 = 1, AVX512_VNNI = 2 };

typedef struct {
    const uint8_t *codes, *tail; /* the tail and its norms are not read where there is none */
    const float *scale, *error, *norm, *tail_norm;
    int64_t panels, first; /* position of the first row */
} tt_shard;

typedef struct { /* what bounds need to know of a query */
    float threshold, scale, error, tail_norm;
    int32_t correction, head_correction; /* what the 128 in each code adds to products */
} tt_asked;

/* Codes of 64 rows, so many words of four dimensions; `next` are codes that come later: of each 256
 * bytes so many lines are brought from memory, none, one, two or all, from number `line` on. */
typedef struct {
    const uint8_t *codes, *next;
    int64_t words;
    int line, lines;
} tt_panel;

typedef struct { /* bounds of a panel's rows for one query */
    float upper[PANEL], lower[PANEL];
} bounds __attribute__((aligned(64)));

/* Products of a panel with queries; with a tail, four times those of the head and its own. */
typedef void (*dots_function)(const tt_panel *, const tt_panel *, const int32_t *const *,
                              int32_t (*)[PANEL]);
/* The same for one query and STREAMS panels. */
typedef void (*streams_function)(const tt_panel *, const tt_panel *, const int32_t *,
                                 int32_t (*)[PANEL]);
typedef int (*bounds_function)(const int32_t *, const int32_t *, const tt_shard *, int64_t,
                               const tt_asked *, bounds *);
typedef float (*heads_function)(const int32_t *, const tt_shard *, int64_t, const tt_asked *,
                                float *, float *);
typedef double (*product_function)(const double *, const void *, int64_t, int64_t, double *);
typedef void (*turn_function)(const double *, int64_t, const float *, int64_t, double *);

typedef struct {
    dots_function dots[TILE + 1]; /* by the number of queries */
    streams_function streams;     /* 0 where one place at a time is as fast */
    bounds_function bounds;
    heads_function heads;
    product_function product;
    turn_function turn;
    int flips; /* dots are of p, not of p + 128 */
} kernels;

/* ---- integer dot products of a panel with a few queries ------------------------------------- */

#define DOTS_OF(name, width) \
    static void name##_##width(const tt_panel *head, const tt_panel *tail, \
                               const int32_t *const *queries, int32_t (*out)[PANEL]) { \
        name(head, tail, queries, width, out); \
    }
#define ALL_DOTS(name, attribute) \
    attribute DOTS_OF(name, 1) attribute DOTS_OF(name, 2) attribute DOTS_OF(name, 3) \
    attribute DOTS_OF(name, 4) attribute DOTS_OF(name, 5) attribute DOTS_OF(name, 6)
#define TABLE_OF(name) {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}

static inline __attribute__((always_inline)) void plain_words(
    const tt_panel *panel, const int32_t *const *queries, int64_t first, const int width,
    int32_t (*out)[PANEL]) {
    for (int64_t word = 0; word < panel->words; word++)
        for (int query = 0; query < width; query++) {
            const int8_t *code = (const int8_t *)(queries[query] + first + word);
            for (int row = 0; row < PANEL; row++) {
                const uint8_t *p = panel->codes + word * (4 * PANEL) + 4 * row;
                out[query][row] +=
                    p[0] * code[0] + p[1] * code[1] + p[2] * code[2] + p[3] * code[3];
            }
        }
}

static inline __attribute__((always_inline)) void plain_dots(
    const tt_panel *head, const tt_panel *tail, const int32_t *const *queries, const int width,
    int32_t (*out)[PANEL]) {
    memset(out, 0, sizeof(out[0]) * (size_t)width);
    plain_words(head, queries, 0, width, out);
    if (!tail->words) return;
    for (int query = 0; query < width; query++)
        for (int row = 0; row < PANEL; row++) out[query][row] *= 4;
    plain_words(tail, queries, head->words, width, out);
}
ALL_DOTS(plain_dots, )

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define ON_AVX2 __attribute__((target("avx2,fma,f16c")))
#define ON_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))

/* Sums have names, and loops over them are written out: compilers keep arrays of them in memory. */
#define EACH(m) m(0) m(1) m(2) m(3) m(4) m(5)

ON_AVX2 static inline __attribute__((always_inline)) void avx2_few(
    const tt_panel *head, const tt_panel *tail, const int32_t *const *queries, const int width,
    const int prefetch, int32_t (*out)[PANEL]) {
    const __m256i flip = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    for (int quarter = 0; quarter < 4; quarter++) {
        __m256i a0 = _mm256_setzero_si256(), b0 = a0, a1 = a0, b1 = a0, a2 = a0, b2 = a0;
        int64_t first = 0;
#define AVX2_STEP(q) \
    if (width > q) { \
        const __m256i code = _mm256_set1_epi32(queries[q][first + word]); \
        const __m256i c0 = _mm256_maddubs_epi16(m0, _mm256_sign_epi8(code, p0)); \
        const __m256i c1 = _mm256_maddubs_epi16(m1, _mm256_sign_epi8(code, p1)); \
        a##q = _mm256_add_epi32(a##q, _mm256_madd_epi16(c0, ones)); \
        b##q = _mm256_add_epi32(b##q, _mm256_madd_epi16(c1, ones)); \
    }
/* vpmaddubsw takes one unsigned side: |p| and the query with p's sign; p >= -127. */
#define AVX2_WORDS(panel) { \
    const int ahead = prefetch && quarter >= panel->line && quarter < panel->line + panel->lines; \
    for (int64_t word = 0; word < panel->words; word++) { \
        const int64_t at = word * (4 * PANEL) + quarter * 64; \
        const __m256i *p = (const __m256i *)(panel->codes + at); \
        if (ahead) _mm_prefetch((const char *)panel->next + at, _MM_HINT_T1); \
        const __m256i p0 = _mm256_xor_si256(_mm256_loadu_si256(p), flip); \
        const __m256i p1 = _mm256_xor_si256(_mm256_loadu_si256(p + 1), flip); \
        const __m256i m0 = _mm256_abs_epi8(p0), m1 = _mm256_abs_epi8(p1); \
        AVX2_STEP(0) AVX2_STEP(1) AVX2_STEP(2) \
    } \
}
        AVX2_WORDS(head)
        if (tail->words) {
#define AVX2_SHIFT(q) a##q = _mm256_slli_epi32(a##q, 2), b##q = _mm256_slli_epi32(b##q, 2);
            AVX2_SHIFT(0) AVX2_SHIFT(1) AVX2_SHIFT(2)
            first = head->words;
            AVX2_WORDS(tail)
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
    const tt_panel *head, const tt_panel *tail, const int32_t *const *queries, const int width,
    int32_t (*out)[PANEL]) {
    avx2_few(head, tail, queries, width < 3 ? width : 3, 1, out); /* what 16 registers hold */
    if (width > 3) avx2_few(head, tail, queries + 3, width - 3, 0, out + 3);
}
ALL_DOTS(avx2_dots, ON_AVX2)

ON_VNNI static inline __attribute__((always_inline)) void vnni_dots(
    const tt_panel *head, const tt_panel *tail, const int32_t *const *queries, const int width,
    int32_t (*out)[PANEL]) {
    const __m512i zero = _mm512_setzero_si512();
    int64_t first = 0;
#define VNNI_SUMS(q) __m512i a##q = zero, b##q = zero, c##q = zero, d##q = zero;
    EACH(VNNI_SUMS)
#define VNNI_STEP(q) \
    if (width > q) { \
        const __m512i code = _mm512_set1_epi32(queries[q][word]); \
        a##q = _mm512_dpbusd_epi32(a##q, p0, code); \
        b##q = _mm512_dpbusd_epi32(b##q, p1, code); \
        c##q = _mm512_dpbusd_epi32(c##q, p2, code); \
        d##q = _mm512_dpbusd_epi32(d##q, p3, code); \
    }
#define VNNI_SHIFT(q) \
    a##q = _mm512_slli_epi32(a##q, 2), b##q = _mm512_slli_epi32(b##q, 2); \
    c##q = _mm512_slli_epi32(c##q, 2), d##q = _mm512_slli_epi32(d##q, 2);
    /* One loop for both: with two of them compilers keep the sums in memory. */
    for (const tt_panel *panel = head;; panel = tail) {
        const uint8_t *p = panel->codes;
        const int64_t end = first + panel->words;
        const int lines = panel->lines;
        uintptr_t next = (uintptr_t)panel->next + (uintptr_t)panel->line * 64;
        for (int64_t word = first; word < end; word++, p += 4 * PANEL, next += 4 * PANEL) {
            const __m512i p0 = _mm512_loadu_si512(p), p1 = _mm512_loadu_si512(p + 64);
            const __m512i p2 = _mm512_loadu_si512(p + 128), p3 = _mm512_loadu_si512(p + 192);
            if (lines) {
                _mm_prefetch((const char *)next, _MM_HINT_T1);
                if (lines > 1) _mm_prefetch((const char *)(next + 64), _MM_HINT_T1);
                if (lines > 2) {
                    _mm_prefetch((const char *)(next + 128), _MM_HINT_T1);
                    _mm_prefetch((const char *)(next + 192), _MM_HINT_T1);
                }
            }
            EACH(VNNI_STEP)
        }
        if (panel == tail || !tail->words) break;
        EACH(VNNI_SHIFT)
        first = head->words;
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

ON_VNNI static void vnni_streams(const tt_panel *heads, const tt_panel *tails, const int32_t *query,
                                 int32_t (*out)[PANEL]) {
    const __m512i zero = _mm512_setzero_si512();
    const int width = STREAMS;
    VNNI_SUMS(0) VNNI_SUMS(1) VNNI_SUMS(2) VNNI_SUMS(3)
#define VNNI_STREAM(q) \
    a##q = _mm512_dpbusd_epi32(a##q, _mm512_loadu_si512(from##q + at), code); \
    b##q = _mm512_dpbusd_epi32(b##q, _mm512_loadu_si512(from##q + at + 64), code); \
    c##q = _mm512_dpbusd_epi32(c##q, _mm512_loadu_si512(from##q + at + 128), code); \
    d##q = _mm512_dpbusd_epi32(d##q, _mm512_loadu_si512(from##q + at + 192), code);
#define VNNI_STREAMS(panels, query) { \
    const uint8_t *from0 = panels[0].codes, *from1 = panels[1].codes; \
    const uint8_t *from2 = panels[2].codes, *from3 = panels[3].codes; \
    for (int64_t word = 0; word < panels->words; word++) { \
        const __m512i code = _mm512_set1_epi32((query)[word]); \
        const int64_t at = word * (4 * PANEL); \
        VNNI_STREAM(0) VNNI_STREAM(1) VNNI_STREAM(2) VNNI_STREAM(3) \
    } \
}
    VNNI_STREAMS(heads, query)
    if (tails->words) {
        VNNI_SHIFT(0) VNNI_SHIFT(1) VNNI_SHIFT(2) VNNI_SHIFT(3)
        VNNI_STREAMS(tails, query + heads->words)
    }
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

ON_DOT static inline void neon_words(const tt_panel *panel, const int32_t *const *queries,
                                     int64_t first, int quarter, const int width,
                                     int32x4_t (*sums)[4]) {
    const uint8x16_t flip = vdupq_n_u8(0x80);
    const int ahead = quarter >= panel->line && quarter < panel->line + panel->lines;
    for (int64_t word = 0; word < panel->words; word++) {
        const int64_t at = word * (4 * PANEL) + quarter * 64;
        const uint8_t *p = panel->codes + at;
        if (ahead) __builtin_prefetch(panel->next + at, 0, 2);
        int8x16_t rows[4];
        for (int part = 0; part < 4; part++)
            rows[part] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * part), flip));
        for (int query = 0; query < width; query++) {
            const int8x16_t code = vreinterpretq_s8_s32(vdupq_n_s32(queries[query][first + word]));
            for (int part = 0; part < 4; part++)
                sums[query][part] = vdotq_s32(sums[query][part], rows[part], code);
        }
    }
}

ON_DOT static inline void neon_dots(const tt_panel *head, const tt_panel *tail,
                                    const int32_t *const *queries, const int width,
                                    int32_t (*out)[PANEL]) {
    for (int quarter = 0; quarter < 4; quarter++) {
        int32x4_t sums[TILE][4];
        for (int query = 0; query < width; query++)
            for (int part = 0; part < 4; part++) sums[query][part] = vdupq_n_s32(0);
        neon_words(head, queries, 0, quarter, width, sums);
        for (int query = 0; query < width && tail->words; query++)
            for (int part = 0; part < 4; part++)
                sums[query][part] = vshlq_n_s32(sums[query][part], 2);
        neon_words(tail, queries, head->words, quarter, width, sums);
        for (int query = 0; query < width; query++)
            for (int part = 0; part < 4; part++)
                vst1q_s32(out[query] + quarter * 16 + part * 4, sums[query][part]);
    }
}
ALL_DOTS(neon_dots, ON_DOT)
#endif

/* ---- bounds of 64 rows, and exact scores, each compiled once a processor -------------------- */

/* Bounds of what both products of 64 rows say, and how many rows reach the threshold. */
static inline __attribute__((always_inline)) int bounds_of(
    const int32_t *dots, const int32_t *tail, const tt_shard *shard, int64_t panel,
    const tt_asked *query, bounds *out) {
    const int64_t at = panel * PANEL;
    int count = 0;
    for (int row = 0; row < PANEL; row++) {
        const int32_t dot = (tail ? 4 * dots[row] + tail[row] : dots[row]) - query->correction;
        const float middle = ((float)dot * query->scale) * shard->scale[at + row];
        const float width = query->error * shard->norm[at + row] + shard->error[at + row];
        out->upper[row] = middle + width;
        out->lower[row] = middle - width;
        count += out->upper[row] >= query->threshold;
    }
    return count;
}

/* The same by the head alone: what it says (-inf of a deleted row), the best of that, and the best
 * upper bound. */
static inline __attribute__((always_inline)) float heads_of(
    const int32_t *dots, const tt_shard *shard, int64_t panel, const tt_asked *query,
    float *looks, float *peak) {
    const int64_t at = panel * PANEL;
    float best = -INFINITY, look = -INFINITY;
    for (int row = 0; row < PANEL; row++) {
        const int32_t dot = 4 * (dots[row] - query->head_correction);
        const float middle = ((float)dot * query->scale) * shard->scale[at + row];
        const float width = query->error * shard->norm[at + row] + shard->error[at + row];
        const float upper = middle + (width + query->tail_norm * shard->tail_norm[at + row]);
        looks[row] = shard->error[at + row] < 0 ? -INFINITY : middle;
        look = looks[row] > look ? looks[row] : look;
        best = upper > best ? upper : best;
    }
    *peak = best;
    return look;
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

#define ARGUMENTS \
    const int32_t *dots, const int32_t *tail, const tt_shard *shard, int64_t panel, \
        const tt_asked *query, bounds *out
typedef double doubles __attribute__((vector_size(64), aligned(8), may_alias));
typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));

/* TURNED vectors, `stride` numbers apart, times a matrix (dim, dim) whose columns lie together. */
static inline __attribute__((always_inline)) void turn_of(const double *vectors, int64_t stride,
                                                          const float *columns, int64_t dim,
                                                          double *out) {
    int64_t row = 0;
    for (; row + 16 <= dim; row += 16) {
        doubles a0 = {0}, b0 = a0, a1 = a0, b1 = a0, a2 = a0, b2 = a0, a3 = a0, b3 = a0;
        for (int64_t column = 0; column < dim; column++) {
            const floats *values = (const floats *)(columns + column * dim + row);
            const doubles low = __builtin_convertvector(values[0], doubles);
            const doubles high = __builtin_convertvector(values[1], doubles);
#define TURN_STEP(i) \
    a##i += low * vectors[column + i * stride]; \
    b##i += high * vectors[column + i * stride];
            TURN_STEP(0) TURN_STEP(1) TURN_STEP(2) TURN_STEP(3)
        }
#define TURN_STORE(i) \
    *(doubles *)(out + i * stride + row) = a##i; \
    *(doubles *)(out + i * stride + row + 8) = b##i;
        TURN_STORE(0) TURN_STORE(1) TURN_STORE(2) TURN_STORE(3)
    }
    for (; row < dim; row++)
        for (int i = 0; i < TURNED; i++) {
            double sum = 0;
            for (int64_t column = 0; column < dim; column++)
                sum += vectors[column + i * stride] * columns[column * dim + row];
            out[i * stride + row] = sum;
        }
}

static void plain_turn(const double *vectors, int64_t stride, const float *columns, int64_t dim,
                       double *out) {
    turn_of(vectors, stride, columns, dim, out);
}

static int plain_bounds(ARGUMENTS) { return bounds_of(dots, tail, shard, panel, query, out); }
#define HEAD_ARGUMENTS \
    const int32_t *dots, const tt_shard *shard, int64_t panel, const tt_asked *query, \
        float *looks, float *peak
static float plain_heads(HEAD_ARGUMENTS) {
    return heads_of(dots, shard, panel, query, looks, peak);
}

static double plain_product(const double *query, const void *row, int64_t dim, int64_t half,
                            double *scratch) {
    return product_of(query, row, dim, half, scratch);
}

#if defined(ON_AVX2)
ON_AVX2 static int avx2_bounds(ARGUMENTS) {
    return tail ? bounds_of(dots, tail, shard, panel, query, out)
                : bounds_of(dots, 0, shard, panel, query, out);
}
ON_AVX2 static float avx2_heads(HEAD_ARGUMENTS) {
    return heads_of(dots, shard, panel, query, looks, peak);
}

ON_AVX2 static void avx2_turn(const double *vectors, int64_t stride, const float *columns,
                              int64_t dim, double *out) {
    turn_of(vectors, stride, columns, dim, out);
}

ON_VNNI static void vnni_turn(const double *vectors, int64_t stride, const float *columns,
                              int64_t dim, double *out) {
    turn_of(vectors, stride, columns, dim, out);
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

/* Products of 16 rows with a query, as scores. */
#define VNNI_SCORES(dots, query, scales) \
    _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(query->scale)), \
                  _mm512_loadu_ps(scales))

ON_VNNI static int vnni_bounds(ARGUMENTS) {
    const int64_t at = panel * PANEL;
    const __m512 least = _mm512_set1_ps(query->threshold), errors = _mm512_set1_ps(query->error);
    const __m512i minus = _mm512_set1_epi32(query->correction);
    __m512 middle[4], width[4];
    int count = 0;
    for (int part = 0; part < 4; part++) {
        const int64_t here = at + part * 16;
        __m512i dot = _mm512_loadu_si512(dots + part * 16);
        if (tail)
            dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 2), _mm512_loadu_si512(tail + part * 16));
        middle[part] = VNNI_SCORES(_mm512_sub_epi32(dot, minus), query, shard->scale + here);
        width[part] = _mm512_fmadd_ps(errors, _mm512_loadu_ps(shard->norm + here),
                                      _mm512_loadu_ps(shard->error + here));
        count += __builtin_popcount(_mm512_cmp_ps_mask(
            _mm512_add_ps(middle[part], width[part]), least, _CMP_GE_OQ));
    }
    if (!count) return 0;
    for (int part = 0; part < 4; part++) {
        _mm512_store_ps(out->upper + part * 16, _mm512_add_ps(middle[part], width[part]));
        _mm512_store_ps(out->lower + part * 16, _mm512_sub_ps(middle[part], width[part]));
    }
    return count;
}

ON_VNNI static float vnni_heads(HEAD_ARGUMENTS) {
    const int64_t at = panel * PANEL;
    const __m512 errors = _mm512_set1_ps(query->error), rest = _mm512_set1_ps(query->tail_norm);
    const __m512i minus = _mm512_set1_epi32(query->head_correction);
    __m512 best = _mm512_set1_ps(-INFINITY), look = best;
    for (int part = 0; part < 4; part++) {
        const int64_t here = at + part * 16;
        const __m512 own = _mm512_loadu_ps(shard->error + here);
        const __m512 error = _mm512_fmadd_ps(errors, _mm512_loadu_ps(shard->norm + here), own);
        const __m512 width = _mm512_fmadd_ps(rest, _mm512_loadu_ps(shard->tail_norm + here), error);
        const __m512i dot = _mm512_sub_epi32(_mm512_loadu_si512(dots + part * 16), minus);
        const __m512 middle = VNNI_SCORES(_mm512_slli_epi32(dot, 2), query, shard->scale + here);
        const __m512 alive = _mm512_add_ps(middle, _mm512_min_ps(own, _mm512_setzero_ps()));
        _mm512_storeu_ps(looks + part * 16, alive);
        look = _mm512_max_ps(look, alive);
        best = _mm512_max_ps(best, _mm512_add_ps(middle, width));
    }
    *peak = _mm512_reduce_max_ps(best);
    return _mm512_reduce_max_ps(look);
}
#endif

/* The variants that a level runs. */
static kernels choose_kernels(int64_t level) {
    kernels chosen = {.dots = TABLE_OF(plain_dots), .bounds = plain_bounds, .heads = plain_heads,
                      .product = plain_product, .turn = plain_turn};
#if defined(ON_AVX2)
    static const dots_function avx2[] = TABLE_OF(avx2_dots), vnni[] = TABLE_OF(vnni_dots);
    chosen.flips = level == AVX2;
    if (level >= AVX2) {
        memcpy(chosen.dots, avx2, sizeof avx2);
        chosen.bounds = avx2_bounds;
        chosen.heads = avx2_heads;
        chosen.product = avx2_product;
        chosen.turn = avx2_turn;
    }
    if (level >= AVX512_VNNI) {
        memcpy(chosen.dots, vnni, sizeof vnni);
        chosen.streams = vnni_streams;
        chosen.bounds = vnni_bounds;
        chosen.heads = vnni_heads;
        chosen.turn = vnni_turn;
    }
#elif defined(ON_DOT)
    static const dots_function neon[] = TABLE_OF(neon_dots);
    chosen.flips = level >= NEON_DOT;
    if (level >= NEON_DOT) memcpy(chosen.dots, neon, sizeof neon);
#endif
    (void)level;
    return chosen;
}

/* The best level that this processor can run. */
static int best_level(void) {
#if defined(ON_AVX2)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PLAIN;
#if defined(__clang__) || __GNUC__ >= 11
    if (!__builtin_cpu_supports("f16c")) return PLAIN;
#endif
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

static const char *level_name(int level) {
#if defined(ON_DOT)
    static const char *const names[] = {"plain C", "NEON dot product"};
    return names[level == NEON_DOT];
#else
    static const char *const names[] = {"plain C", "AVX2", "AVX-512 VNNI"};
    return names[level < 0 || level > AVX512_VNNI ? 0 : level];
#endif
}

#endif
