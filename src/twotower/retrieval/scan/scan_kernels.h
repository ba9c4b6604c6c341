/* What scan.c does in other ways on other processors: products of codes, their bounds, and exact
 * scores. A level is what a processor can run; choose_kernels gives its variants. */

#ifndef TWOTOWER_SCAN_KERNELS_H
#define TWOTOWER_SCAN_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL 64
#define QUARTER 16 /* rows of a panel whose codes lie together */
#define QUARTERS (PANEL / QUARTER)
#define LINE (4 * QUARTER) /* bytes of a word */
#define TILE 6
#define HALF (2 * QUARTER)
#define STEP 16 /* words that AMX multiplies at once */
#define WIDE 32 /* queries that it takes with half a panel: two tiles of sixteen with two */
#define TURNED 4 /* vectors that are rotated at once */

enum { PLAIN = 0, NEON_DOT = 1, AVX2 = 1, AVX512_VNNI = 2, AMX = 3 };

/* Parts of codes, and what has been read of them: the head, the front too, or all. */
enum { HEAD, FRONT, BACK, PARTS };
enum { BY_HEAD, BY_FRONT, BY_ALL, STAGES };

typedef struct {
    const uint8_t *codes[PARTS];
    const float *scale, *error, *norm;
    const float *beyond[2]; /* norms of what is beyond the head, and beyond the front */
    int64_t panels, first;  /* position of the first row */
} tt_shard;

typedef struct { /* what bounds need to know of a query */
    float threshold, scale, error, beyond[2];
    int32_t correction[STAGES]; /* what the 128 in each code adds to products */
    float factor, spread;       /* 1 / scale and error / scale, a little more */
} tt_asked;

/* Codes of four times 16 rows, so many words of four dimensions; `next` are those of a panel that
 * comes later, one quarter behind the other: of each word so many lines are brought from memory,
 * none, one, two or all, from that of quarter `line` on. For one query it is the four lines that
 * follow the quarters' own, if there are `lines` at all. */
typedef struct {
    const uint8_t *quarters[QUARTERS];
    int64_t words;
    const uint8_t *next;
    int line, lines;
} tt_panel;

/* Up to TILE queries for a level that looks at bounds as it multiplies: of each word their codes
 * lie together. */
typedef struct {
    const int32_t *codes;
    int32_t start[TILE]; /* of sums: minus the correction, or a quarter of it if there is a tail */
    float limits[TILE];  /* threshold / scale */
    float factor, spread; /* the largest of them */
} tt_few;

typedef struct { /* rows of a panel that may reach the limits, and the products of such queries */
    uint64_t rows[TILE];
    int32_t dots[TILE][PANEL];
} tt_seen;

/* Up to WIDE queries for a level that takes so many at once. Codes are in steps, of front, back and
 * head; a part's last step ends where the part ends, and has zeros for what the one before had. */
typedef struct {
    const int8_t (*codes)[WIDE][4 * STEP];
    const int32_t (*less)[QUARTER]; /* minus the correction of each, for each row of a quarter */
    float factor, spread;           /* the largest of them */
} tt_wide;

typedef struct { /* of half a panel and WIDE queries; those of the head lie apart, if it is one */
    int32_t dots[WIDE][HALF], head[WIDE][HALF];
} tt_products;

/* What bounds need to know of half a panel's rows, in units of their codes. */
typedef struct {
    float inverse[HALF], norm[HALF], error[HALF];
} tt_bounds;

/* Products whose bounds are not looked at yet: of which queries, if of any, and rows. A limit is
 * threshold / scale. */
typedef struct {
    const tt_wide *queries;
    const float *limits;
    const tt_bounds *rows;
    int split; /* the head's lie apart */
} tt_pending;

typedef struct { /* queries that have rows that may reach their limits, which, and their products */
    uint32_t rows[WIDE], some;
    int32_t dots[WIDE][HALF];
} tt_reached;

/* Products of so many parts of a panel with queries, four times those of the first if there are
 * others. */
typedef void (*dots_function)(const tt_panel *, int, const int32_t *const *, int32_t (*)[PANEL]);
/* The same, and whose rows may reach their limits, a bit a query; these are looked at again. */
typedef unsigned (*few_function)(const tt_panel *, int, const tt_few *, const tt_shard *, int64_t,
                                 tt_seen *);
typedef uint64_t (*reach_function)(const int32_t *, const tt_shard *, int64_t, const tt_asked *,
                                   int);
typedef int (*peaks_function)(const int32_t *, const tt_shard *, int64_t, const tt_asked *, int,
                              float, float *);
typedef double (*product_function)(const double *, const void *, int64_t, int64_t, double *);
typedef void (*turn_function)(const double *, int64_t, const float *, int64_t, double *);
typedef void (*bounds_function)(const tt_shard *, int64_t, tt_bounds *);
/* Look at products that have been made, then put those of so many parts of a panel, by half, in
 * their place; both at once, as each leaves the other half of the processor idle. */
typedef void (*wide_function)(const tt_panel *, int, int, const tt_wide *, const tt_pending *,
                              tt_products *, tt_reached *);
typedef void (*last_function)(const tt_pending *, const tt_products *, tt_reached *);

typedef struct {
    dots_function dots[TILE + 1]; /* by the number of queries */
    dots_function single;         /* of one query and the first quarter, at least */
    few_function few[TILE + 1];   /* 0 where a level has none */
    reach_function reach;
    peaks_function peaks;
    product_function product;
    turn_function turn;
    void (*begin_wide)(void), (*end_wide)(void); /* before and after those that follow, a thread */
    bounds_function bounds;
    wide_function wide; /* 0 where a level has none */
    last_function last;
    int flips;          /* dots are of p, not of p + 128 */
} kernels;

/* ---- integer dot products of a panel with a few queries ------------------------------------- */

/* What is brought from memory while a quarter is read. */
static inline const uint8_t *later_of(const tt_panel *panel, int quarter, int width) {
    const uint8_t *from = width == 1 ? panel->quarters[quarter] : panel->next;
    return from + (width == 1 ? 1 : quarter) * panel->words * LINE;
}

#define DOTS_OF(name, width) \
    static void name##_##width(const tt_panel *parts, int count, const int32_t *const *queries, \
                               int32_t (*out)[PANEL]) { \
        name(parts, count, queries, width, out); \
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
                const uint8_t *p =
                    panel->quarters[row / QUARTER] + word * LINE + row % QUARTER * 4;
                out[query][row] +=
                    p[0] * code[0] + p[1] * code[1] + p[2] * code[2] + p[3] * code[3];
            }
        }
}

static inline __attribute__((always_inline)) void plain_dots(
    const tt_panel *parts, int count, const int32_t *const *queries, const int width,
    int32_t (*out)[PANEL]) {
    int64_t first = 0;
    memset(out, 0, sizeof(out[0]) * (size_t)width);
    for (int part = 0; part < count; part++) {
        for (int query = 0; part == 1 && query < width; query++)
            for (int row = 0; row < PANEL; row++) out[query][row] *= 4;
        plain_words(parts + part, queries, first, width, out);
        first += parts[part].words;
    }
}
ALL_DOTS(plain_dots, )

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define ON_AVX2 __attribute__((target("avx2,fma,f16c")))
#define ON_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
long syscall(long, ...); /* which C11 alone does not declare */
#define ON_AMX \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,amx-tile,amx-int8")))
#endif

/* Sums have names, and loops over them are written out: compilers keep arrays of them in memory. */
#define EACH(m) m(0) m(1) m(2) m(3) m(4) m(5)

ON_AVX2 static inline __attribute__((always_inline)) void avx2_few(
    const tt_panel *parts, int count, const int32_t *const *queries, const int width,
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
        for (const tt_panel *panel = parts; panel < parts + count; panel++) {
            const int ahead =
                prefetch && quarter >= panel->line && quarter < panel->line + panel->lines;
            if (panel == parts + 1) {
#define AVX2_SHIFT(q) a##q = _mm256_slli_epi32(a##q, 2), b##q = _mm256_slli_epi32(b##q, 2);
                AVX2_SHIFT(0) AVX2_SHIFT(1) AVX2_SHIFT(2)
            }
            for (int64_t word = 0; word < panel->words; word++) {
                const int64_t at = word * LINE;
                const __m256i *p = (const __m256i *)(panel->quarters[quarter] + at);
                if (ahead)
                    _mm_prefetch((const char *)later_of(panel, quarter, width) + at, _MM_HINT_T1);
                const __m256i p0 = _mm256_xor_si256(_mm256_loadu_si256(p), flip);
                const __m256i p1 = _mm256_xor_si256(_mm256_loadu_si256(p + 1), flip);
                const __m256i m0 = _mm256_abs_epi8(p0), m1 = _mm256_abs_epi8(p1);
                AVX2_STEP(0) AVX2_STEP(1) AVX2_STEP(2)
            }
            first += panel->words;
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
    const tt_panel *parts, int count, const int32_t *const *queries, const int width,
    int32_t (*out)[PANEL]) {
    avx2_few(parts, count, queries, width < 3 ? width : 3, 1, out); /* what 16 registers hold */
    if (width > 3) avx2_few(parts, count, queries + 3, width - 3, 0, out + 3);
}
ALL_DOTS(avx2_dots, ON_AVX2)

/* Products, stored, or, if it `looks`, compared with the limits of a few; whose rows may reach
 * them. */
ON_VNNI static inline __attribute__((always_inline)) unsigned vnni_tile(
    const tt_panel *parts, int count, const int32_t *const *queries, const int width,
    const int looks, const tt_few *few, const tt_shard *shard, int64_t at, tt_seen *seen,
    int32_t (*out)[PANEL]) {
    const int32_t *code = looks ? few->codes : 0;
    const int32_t shift = count > 1 ? 2 : 0;
    int64_t first = 0;
#define VNNI_SUMS(q) \
    __m512i a##q = _mm512_set1_epi32(looks && width > q ? few->start[q] : 0), b##q = a##q, \
            c##q = a##q, d##q = a##q;
    EACH(VNNI_SUMS)
#define VNNI_STEP(q) \
    if (width > q) { \
        const __m512i asked = _mm512_set1_epi32(looks ? code[q] : queries[q][word]); \
        a##q = _mm512_dpbusd_epi32(a##q, p0, asked); \
        b##q = _mm512_dpbusd_epi32(b##q, p1, asked); \
        c##q = _mm512_dpbusd_epi32(c##q, p2, asked); \
        d##q = _mm512_dpbusd_epi32(d##q, p3, asked); \
    }
#define VNNI_SHIFT(q) \
    a##q = _mm512_slli_epi32(a##q, 2), b##q = _mm512_slli_epi32(b##q, 2); \
    c##q = _mm512_slli_epi32(c##q, 2), d##q = _mm512_slli_epi32(d##q, 2);
    /* One loop for all: with two of them compilers keep the sums in memory. */
    for (const tt_panel *panel = parts;; panel++) {
        const uint8_t *from0 = panel->quarters[0], *from1 = panel->quarters[1];
        const uint8_t *from2 = panel->quarters[2], *from3 = panel->quarters[3];
        const int64_t end = first + panel->words, apart = panel->words * LINE;
        const int lines = panel->lines;
        uintptr_t next = (uintptr_t)panel->next + (uintptr_t)(panel->line * apart);
        for (int64_t word = first, at = 0; word < end; word++, at += LINE, next += LINE) {
            const __m512i p0 = _mm512_loadu_si512(from0 + at), p1 = _mm512_loadu_si512(from1 + at);
            const __m512i p2 = _mm512_loadu_si512(from2 + at), p3 = _mm512_loadu_si512(from3 + at);
            if (width == 1 && lines) { /* what follows each quarter is read next */
                _mm_prefetch((const char *)from0 + at + apart, _MM_HINT_T1);
                _mm_prefetch((const char *)from1 + at + apart, _MM_HINT_T1);
                _mm_prefetch((const char *)from2 + at + apart, _MM_HINT_T1);
                _mm_prefetch((const char *)from3 + at + apart, _MM_HINT_T1);
            } else if (lines) {
                _mm_prefetch((const char *)next, _MM_HINT_T1);
                if (lines > 1) _mm_prefetch((const char *)(next + apart), _MM_HINT_T1);
                if (lines > 2) {
                    _mm_prefetch((const char *)(next + 2 * apart), _MM_HINT_T1);
                    _mm_prefetch((const char *)(next + 3 * apart), _MM_HINT_T1);
                }
            }
            EACH(VNNI_STEP)
            if (looks) code += width;
        }
        /* Held in registers: GCC would keep them in memory, in the loop too, for what follows. */
#define VNNI_HOLD(q) __asm__("" : "+v"(a##q), "+v"(b##q), "+v"(c##q), "+v"(d##q));
        EACH(VNNI_HOLD)
        first = end;
        if (!--count) break;
        if (panel == parts) { EACH(VNNI_SHIFT) }
    }
    if (!looks) {
#define VNNI_STORE(q) \
    if (width > q) { \
        _mm512_storeu_si512(out[q], a##q); \
        _mm512_storeu_si512(out[q] + 16, b##q); \
        _mm512_storeu_si512(out[q] + 32, c##q); \
        _mm512_storeu_si512(out[q] + 48, d##q); \
    }
        EACH(VNNI_STORE)
        return 0;
    }
    /* A row reaches a threshold if its product times its scale >= limit - width, in units of the
     * query's scale. The width is that of the query whose bound is the widest. */
    unsigned some = 0;
    const __m512 factor = _mm512_set1_ps(few->factor), spread = _mm512_set1_ps(few->spread);
#define VNNI_WIDTH(row) \
    _mm512_fmadd_ps(spread, _mm512_loadu_ps(shard->norm + at + row), \
                    _mm512_mul_ps(factor, _mm512_loadu_ps(shard->error + at + row)))
    const __m512 width0 = VNNI_WIDTH(0), width1 = VNNI_WIDTH(16);
    const __m512 width2 = VNNI_WIDTH(32), width3 = VNNI_WIDTH(48);
#define VNNI_PASS(sums, i) \
    (uint64_t) _mm512_cmp_ps_mask( \
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), \
                        _mm512_loadu_ps(shard->scale + at + 16 * i), width##i), \
        limit, _CMP_NLT_UQ) << 16 * i
#define VNNI_LOOK(q) \
    if (width > q) { \
        const __m512 limit = _mm512_set1_ps(few->limits[q]); \
        seen->rows[q] = VNNI_PASS(a##q, 0) | VNNI_PASS(b##q, 1) | VNNI_PASS(c##q, 2) | \
                        VNNI_PASS(d##q, 3); \
        if (seen->rows[q]) { \
            const __m512i less = _mm512_set1_epi32((int32_t)((uint32_t)few->start[q] << shift)); \
            some |= 1u << q; \
            _mm512_storeu_si512(seen->dots[q], _mm512_sub_epi32(a##q, less)); \
            _mm512_storeu_si512(seen->dots[q] + 16, _mm512_sub_epi32(b##q, less)); \
            _mm512_storeu_si512(seen->dots[q] + 32, _mm512_sub_epi32(c##q, less)); \
            _mm512_storeu_si512(seen->dots[q] + 48, _mm512_sub_epi32(d##q, less)); \
        } \
    }
    EACH(VNNI_LOOK)
    return some;
}

ON_VNNI static inline __attribute__((always_inline)) void vnni_dots(
    const tt_panel *parts, int count, const int32_t *const *queries, const int width,
    int32_t (*out)[PANEL]) {
    vnni_tile(parts, count, queries, width, 0, 0, 0, 0, 0, out);
}
ALL_DOTS(vnni_dots, ON_VNNI)

#define VNNI_FEW(width) \
    ON_VNNI static unsigned vnni_few_##width(const tt_panel *parts, int count, const tt_few *few, \
                                             const tt_shard *shard, int64_t at, tt_seen *seen) { \
        return vnni_tile(parts, count, 0, width, 1, few, shard, at, seen, 0); \
    }
VNNI_FEW(1) VNNI_FEW(2) VNNI_FEW(3) VNNI_FEW(4) VNNI_FEW(5) VNNI_FEW(6)

/* Of one quarter and one query: four sums, as each waits for the one before. */
ON_VNNI static void vnni_single(const tt_panel *part, int count, const int32_t *const *queries,
                                int32_t (*out)[PANEL]) {
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0, sum2 = sum0, sum3 = sum0, all = sum0;
    const int32_t *code = queries[0];
    for (int i = 0; i < count; i++, part++) {
        const uint8_t *p = part->quarters[0];
        int64_t word = 0;
#define VNNI_SINGLE(sum, i) \
    sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(p + (word + i) * LINE), \
                              _mm512_set1_epi32(code[word + i]));
        for (; word + 4 <= part->words; word += 4) {
            VNNI_SINGLE(sum0, 0) VNNI_SINGLE(sum1, 1) VNNI_SINGLE(sum2, 2) VNNI_SINGLE(sum3, 3)
        }
        for (; word < part->words; word++) { VNNI_SINGLE(sum0, 0) }
        code += part->words;
        all = _mm512_add_epi32(_mm512_add_epi32(sum0, sum1), _mm512_add_epi32(sum2, sum3));
        if (!i && count > 1) {
            sum0 = _mm512_slli_epi32(all, 2);
            sum1 = sum2 = sum3 = _mm512_setzero_si512();
        }
    }
    _mm512_storeu_si512(out[0], all);
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
        const int64_t at = word * LINE;
        const uint8_t *p = panel->quarters[quarter] + at;
        if (ahead) __builtin_prefetch(later_of(panel, quarter, width) + at, 0, 2);
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

ON_DOT static inline void neon_dots(const tt_panel *parts, int count,
                                    const int32_t *const *queries, const int width,
                                    int32_t (*out)[PANEL]) {
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        int32x4_t sums[TILE][4];
        int64_t first = 0;
        for (int query = 0; query < width; query++)
            for (int part = 0; part < 4; part++) sums[query][part] = vdupq_n_s32(0);
        for (int i = 0; i < count; i++) {
            for (int query = 0; query < width && i == 1; query++)
                for (int part = 0; part < 4; part++)
                    sums[query][part] = vshlq_n_s32(sums[query][part], 2);
            neon_words(parts + i, queries, first, quarter, width, sums);
            first += parts[i].words;
        }
        for (int query = 0; query < width; query++)
            for (int part = 0; part < 4; part++)
                vst1q_s32(out[query] + quarter * 16 + part * 4, sums[query][part]);
    }
}
ALL_DOTS(neon_dots, ON_DOT)
#endif

/* ---- bounds of 64 rows, and exact scores, each compiled once a processor -------------------- */

/* A row's score by its code, but for the centre, and how far off it may be. */
static inline __attribute__((always_inline)) float middle_of(int32_t dot, const tt_shard *shard,
                                                             int64_t place,
                                                             const tt_asked *query) {
    return ((float)dot * query->scale) * shard->scale[place];
}

static inline __attribute__((always_inline)) float width_of(const tt_shard *shard, int64_t place,
                                                            const tt_asked *query) {
    return query->error * shard->norm[place] + shard->error[place];
}

/* What has been read says of a row; products of the head are not yet times four where that is the
 * head alone. */
static inline __attribute__((always_inline)) float look_of(int32_t dot, const tt_shard *shard,
                                                           int64_t place, const tt_asked *query,
                                                           int stage) {
    return middle_of((stage == BY_HEAD ? 4 * dot : dot) - query->correction[stage], shard, place,
                     query);
}

/* The upper bound by it. */
static inline __attribute__((always_inline)) float upper_of(int32_t dot, const tt_shard *shard,
                                                            int64_t place, const tt_asked *query,
                                                            int stage) {
    float width = width_of(shard, place, query);
    if (stage != BY_ALL) width += query->beyond[stage] * shard->beyond[stage][place];
    return look_of(dot, shard, place, query, stage) + width;
}

/* Of 64 rows from the shard's place `at` on, which can reach the threshold by what has been read:
 * the lowest bit is the first row. */
static inline __attribute__((always_inline)) uint64_t reach_of(
    const int32_t *dots, const tt_shard *shard, int64_t at, const tt_asked *query, int stage) {
    uint64_t reached = 0;
    for (int row = 0; row < PANEL; row++) {
        const float upper = upper_of(dots[row], shard, at + row, query, stage);
        reached |= (uint64_t)(upper >= query->threshold) << row;
    }
    return reached;
}

/* The best upper bound of each quarter of a panel by what has been read; whether the product alone
 * says more than `looks` of some row. */
static inline __attribute__((always_inline)) int peaks_of(const int32_t *dots,
                                                          const tt_shard *shard, int64_t panel,
                                                          const tt_asked *query, int stage,
                                                          float looks, float *peaks) {
    int more = 0;
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        float best = -INFINITY;
        for (int row = quarter * QUARTER; row < (quarter + 1) * QUARTER; row++) {
            const int64_t place = panel * PANEL + row;
            const float upper = upper_of(dots[row], shard, place, query, stage);
            more |= look_of(dots[row], shard, place, query, stage) > looks;
            best = upper > best ? upper : best;
        }
        peaks[quarter] = best;
    }
    return more;
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

#define REACH_ARGUMENTS \
    const int32_t *dots, const tt_shard *shard, int64_t at, const tt_asked *query, int stage
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

static uint64_t plain_reach(REACH_ARGUMENTS) {
    return reach_of(dots, shard, at, query, stage);
}
#define PEAKS_ARGUMENTS \
    const int32_t *dots, const tt_shard *shard, int64_t panel, const tt_asked *query, int stage, \
        float looks, float *peaks
static int plain_peaks(PEAKS_ARGUMENTS) {
    return peaks_of(dots, shard, panel, query, stage, looks, peaks);
}

static double plain_product(const double *query, const void *row, int64_t dim, int64_t half,
                            double *scratch) {
    return product_of(query, row, dim, half, scratch);
}

#if defined(ON_AVX2)
ON_AVX2 static uint64_t avx2_reach(REACH_ARGUMENTS) {
    const __m256i minus = _mm256_set1_epi32(query->correction[stage]);
    const __m256 scale = _mm256_set1_ps(query->scale), errors = _mm256_set1_ps(query->error);
    const __m256 least = _mm256_set1_ps(query->threshold);
    uint64_t reached = 0;
    for (int row = 0; row < PANEL; row += 8) {
        __m256i dot = _mm256_loadu_si256((const __m256i *)(dots + row));
        if (stage == BY_HEAD) dot = _mm256_slli_epi32(dot, 2);
        dot = _mm256_sub_epi32(dot, minus);
        const __m256 rows = _mm256_loadu_ps(shard->scale + at + row);
        const __m256 middle = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale), rows);
        __m256 width = _mm256_fmadd_ps(errors, _mm256_loadu_ps(shard->norm + at + row),
                                       _mm256_loadu_ps(shard->error + at + row));
        if (stage != BY_ALL)
            width = _mm256_fmadd_ps(_mm256_set1_ps(query->beyond[stage]),
                                    _mm256_loadu_ps(shard->beyond[stage] + at + row), width);
        const __m256 there = _mm256_cmp_ps(_mm256_add_ps(middle, width), least, _CMP_GE_OQ);
        reached |= (uint64_t)(uint32_t)_mm256_movemask_ps(there) << row;
    }
    return reached;
}

ON_AVX2 static int avx2_peaks(PEAKS_ARGUMENTS) {
    return peaks_of(dots, shard, panel, query, stage, looks, peaks);
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

ON_VNNI static uint64_t vnni_reach(REACH_ARGUMENTS) {
    const __m512 least = _mm512_set1_ps(query->threshold), errors = _mm512_set1_ps(query->error);
    const __m512 beyond = _mm512_set1_ps(stage == BY_ALL ? 0 : query->beyond[stage]);
    const __m512i minus = _mm512_set1_epi32(query->correction[stage]);
    uint64_t reached = 0;
    for (int part = 0; part < QUARTERS; part++) {
        const int64_t here = at + part * QUARTER;
        __m512i dot = _mm512_loadu_si512(dots + part * QUARTER);
        if (stage == BY_HEAD) dot = _mm512_slli_epi32(dot, 2);
        dot = _mm512_sub_epi32(dot, minus);
        const __m512 middle = VNNI_SCORES(dot, query, shard->scale + here);
        __m512 width = _mm512_fmadd_ps(errors, _mm512_loadu_ps(shard->norm + here),
                                       _mm512_loadu_ps(shard->error + here));
        if (stage != BY_ALL)
            width = _mm512_fmadd_ps(beyond, _mm512_loadu_ps(shard->beyond[stage] + here), width);
        const __mmask16 there =
            _mm512_cmp_ps_mask(_mm512_add_ps(middle, width), least, _CMP_GE_OQ);
        reached |= (uint64_t)there << (part * QUARTER);
    }
    return reached;
}

ON_VNNI static int vnni_peaks(PEAKS_ARGUMENTS) {
    const int64_t at = panel * PANEL;
    const __m512 errors = _mm512_set1_ps(query->error);
    const __m512 beyond = _mm512_set1_ps(query->beyond[stage]);
    const __m512i minus = _mm512_set1_epi32(query->correction[stage]);
    const __m128i shift = _mm_cvtsi32_si128(stage == BY_HEAD ? 2 : 0);
    __m512 upper[QUARTERS], look = _mm512_set1_ps(-INFINITY);
    for (int part = 0; part < QUARTERS; part++) {
        const int64_t here = at + part * QUARTER;
        const __m512 width =
            _mm512_fmadd_ps(beyond, _mm512_loadu_ps(shard->beyond[stage] + here),
                            _mm512_fmadd_ps(errors, _mm512_loadu_ps(shard->norm + here),
                                            _mm512_loadu_ps(shard->error + here)));
        const __m512i dot = _mm512_sll_epi32(_mm512_loadu_si512(dots + part * QUARTER), shift);
        const __m512 middle =
            VNNI_SCORES(_mm512_sub_epi32(dot, minus), query, shard->scale + here);
        look = _mm512_max_ps(look, middle);
        upper[part] = _mm512_add_ps(middle, width);
    }
    /* The largest of each sixteen: of halves, then quarters, of vectors side by side. */
#define VNNI_FOLD(a, b) \
    _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee))
    const __m512 first = VNNI_FOLD(upper[0], upper[1]), second = VNNI_FOLD(upper[2], upper[3]);
    __m512 best = _mm512_max_ps(_mm512_shuffle_f32x4(first, second, 0x88),
                                _mm512_shuffle_f32x4(first, second, 0xdd));
    best = _mm512_max_ps(best, _mm512_permute_ps(best, 0x4e));
    best = _mm512_max_ps(best, _mm512_permute_ps(best, 0xb1)); /* in each lane, four times */
    const __m512i pick = _mm512_castsi128_si512(_mm_set_epi32(12, 8, 4, 0));
    _mm_storeu_ps(peaks, _mm512_castps512_ps128(_mm512_permutexvar_ps(pick, best)));
    return _mm512_cmp_ps_mask(look, _mm512_set1_ps(looks), _CMP_GT_OQ) != 0;
}
#endif

#if defined(ON_AMX)
#include "scan_amx.h"
#endif

/* The variants that a level runs. */
static kernels choose_kernels(int64_t level) {
    kernels chosen = {.dots = TABLE_OF(plain_dots), .single = plain_dots_1,
                      .reach = plain_reach, .peaks = plain_peaks, .product = plain_product,
                      .turn = plain_turn};
#if defined(ON_AVX2)
    static const dots_function avx2[] = TABLE_OF(avx2_dots), vnni[] = TABLE_OF(vnni_dots);
    static const few_function few[] = TABLE_OF(vnni_few);
    chosen.flips = level == AVX2;
    if (level >= AVX2) {
        memcpy(chosen.dots, avx2, sizeof avx2);
        chosen.single = avx2_dots_1;
        chosen.reach = avx2_reach;
        chosen.peaks = avx2_peaks;
        chosen.product = avx2_product;
        chosen.turn = avx2_turn;
    }
    if (level >= AVX512_VNNI) {
        memcpy(chosen.dots, vnni, sizeof vnni);
        memcpy(chosen.few, few, sizeof few);
        chosen.single = vnni_single;
        chosen.reach = vnni_reach;
        chosen.peaks = vnni_peaks;
        chosen.turn = vnni_turn;
    }
#if defined(ON_AMX)
    if (level >= AMX) {
        chosen.begin_wide = amx_begin;
        chosen.end_wide = amx_end;
        chosen.bounds = amx_bounds;
        chosen.wide = amx_wide;
        chosen.last = amx_last;
    }
#endif
#elif defined(ON_DOT)
    static const dots_function neon[] = TABLE_OF(neon_dots);
    chosen.flips = level >= NEON_DOT;
    if (level >= NEON_DOT) {
        memcpy(chosen.dots, neon, sizeof neon);
        chosen.single = neon_dots_1;
    }
#endif
    (void)level;
    return chosen;
}

/* The best level of vectors that this processor can run. */
static int vector_level(void) {
#if defined(ON_AVX2)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PLAIN;
#if !defined(__clang__) && __GNUC__ >= 11 /* others do not know it; who has AVX2 has it */
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

/* The best level that this processor can run, and that the system lets it run. */
static int best_level(void) {
#if defined(ON_AMX)
    if (vector_level() == AVX512_VNNI && amx_allowed()) return AMX;
#endif
    return vector_level();
}

static const char *level_name(int level) {
#if defined(ON_DOT)
    static const char *const names[] = {"plain C", "NEON dot product"};
    return names[level == NEON_DOT];
#else
    static const char *const names[] = {"plain C", "AVX2", "AVX-512 VNNI", "AMX int8"};
    return names[level < 0 || level > AMX ? 0 : level];
#endif
}

#endif
