/* What AMX does for scan.c: 32 queries at a time with half a panel, two tiles of each. Part of
 * scan_kernels.h, where the types are. */

#ifndef TWOTOWER_SCAN_AMX_H
#define TWOTOWER_SCAN_AMX_H

/* Compilers do not know what memory these instructions read: it has been written by here. */
#define AMX_READS __asm__ volatile("" ::: "memory");

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} amx_shapes;

ON_AMX static void amx_begin(void) {
    amx_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 4 * STEP, shapes.rows[i] = 16;
    AMX_READS
    _tile_loadconfig(&shapes);
}

ON_AMX static void amx_end(void) { _tile_release(); }

/* Of a row whose scale is 0 all products are 0: any other scale says the same of it. */
ON_AMX static void amx_bounds(const tt_shard *shard, int64_t at, tt_bounds *bounds) {
    for (int row = 0; row < HALF; row += QUARTER) {
        const __m512 scale =
            _mm512_max_ps(_mm512_loadu_ps(shard->scale + at + row), _mm512_set1_ps(0x1p-100f));
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1), scale);
        _mm512_storeu_ps(bounds->inverse + row, inverse);
        _mm512_storeu_ps(bounds->norm + row,
                         _mm512_mul_ps(_mm512_loadu_ps(shard->norm + at + row), inverse));
        _mm512_storeu_ps(bounds->error + row,
                         _mm512_mul_ps(_mm512_loadu_ps(shard->error + at + row), inverse));
    }
}

/* Sixteen products of a query. */
ON_AMX static inline __attribute__((always_inline)) __m512i amx_sum(const tt_products *products,
                                                                    int query, int row,
                                                                    const int split) {
    const __m512i rest = _mm512_loadu_si512(products->dots[query] + row);
    if (!split) return rest;
    const __m512i head = _mm512_loadu_si512(products->head[query] + row);
    return _mm512_add_epi32(rest, _mm512_slli_epi32(head, 2));
}

typedef struct { /* what bounds are compared with, in registers */
    __m512 inverse0, inverse1, width0, width1;
} amx_rows;

/* The width is that of the query whose bound is the widest. */
ON_AMX static inline __attribute__((always_inline)) amx_rows amx_rows_of(const tt_pending *of) {
    const __m512 spread = _mm512_set1_ps(of->queries->spread);
    const __m512 factor = _mm512_set1_ps(of->queries->factor);
    const tt_bounds *rows = of->rows;
#define AMX_WIDTH(row) \
    _mm512_fmadd_ps(spread, _mm512_loadu_ps(rows->norm + row), \
                    _mm512_mul_ps(factor, _mm512_loadu_ps(rows->error + row)))
    return (amx_rows){_mm512_loadu_ps(rows->inverse), _mm512_loadu_ps(rows->inverse + QUARTER),
                      AMX_WIDTH(0), AMX_WIDTH(QUARTER)};
}

/* A row reaches a threshold if its product >= limit / its scale - width, all in units of the two
 * scales. What is no number passes, and is looked at again. */
ON_AMX static inline __attribute__((always_inline)) void amx_reach(
    const tt_products *products, const amx_rows *rows, const float *limits, int from, int to,
    const int split, tt_reached *reached) {
    typedef uint16_t mask __attribute__((may_alias)); /* straight to memory, not by a register */
    mask *out = (mask *)reached->rows + 2 * from;
    for (int query = from; query < to; query++, out += 2) {
        const __m512 limit = _mm512_set1_ps(limits[query]);
#define AMX_REACH(i) \
    out[i] = _mm512_cmp_ps_mask( \
        _mm512_cvtepi32_ps(amx_sum(products, query, i * QUARTER, split)), \
        _mm512_fmsub_ps(limit, rows->inverse##i, rows->width##i), _CMP_NLT_UQ);
        AMX_REACH(0) AMX_REACH(1)
    }
}

/* Which queries have rows that may reach their limits, and the products of these. */
ON_AMX static inline __attribute__((always_inline)) void amx_keep(const tt_products *products,
                                                                  const tt_wide *queries,
                                                                  const int split,
                                                                  tt_reached *reached) {
    const __m512i low = _mm512_loadu_si512(reached->rows);
    const __m512i high = _mm512_loadu_si512(reached->rows + 16);
    reached->some = (uint32_t)_mm512_test_epi32_mask(low, low) |
                    (uint32_t)_mm512_test_epi32_mask(high, high) << 16;
    for (uint32_t left = reached->some; left; left &= left - 1) {
        const int query = __builtin_ctz(left);
        const __m512i less = _mm512_loadu_si512(queries->less[query]);
        for (int row = 0; row < HALF; row += QUARTER)
            _mm512_storeu_si512(reached->dots[query] + row,
                                _mm512_sub_epi32(amx_sum(products, query, row, split), less));
    }
}

/* Half of a part; one that is shorter than a step is put at the end of one, in `padded`. */
typedef struct {
    const uint8_t *from0, *from1, *next;
    int64_t steps, last, lines, share; /* share: lines that a step brings */
} amx_half;

ON_AMX static inline __attribute__((always_inline)) amx_half amx_half_of(
    const tt_panel *part, int half, uint8_t (*padded)[STEP * LINE]) {
    const int64_t words = part->words, least = words - STEP;
    const uint8_t *const *quarters = part->quarters + 2 * half;
    amx_half made = {quarters[0], quarters[1], part->next, (words + STEP - 1) / STEP,
                     least * LINE, part->lines, 0};
    if (made.steps) made.share = (part->lines + made.steps - 1) / made.steps;
    if (least >= 0 || !words) return made;
    memset(padded, 0, 2 * sizeof *padded);
    for (int i = 0; i < 2; i++)
        memcpy(padded[i] - least * LINE, quarters[i], (size_t)(words * LINE));
    AMX_READS
    made.from0 = padded[0], made.from1 = padded[1], made.last = 0;
    return made;
}

/* Tiles 0 to 3 += a step's products. What comes later is brought bit by bit: a burst would wait. */
ON_AMX static inline __attribute__((always_inline)) void amx_step(
    const amx_half *from, int64_t step, const int8_t (*codes)[WIDE][4 * STEP]) {
    const int64_t word = step * STEP * LINE, at = word < from->last ? word : from->last;
    const int64_t first = step * from->share, end = first + from->share;
    for (int64_t line = first; line < end && line < from->lines; line++)
        _mm_prefetch((const char *)from->next + line * 64, _MM_HINT_T1);
    _tile_loadd(4, codes[step][0], 4 * STEP);
    _tile_loadd(6, from->from0 + at, LINE);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, from->from1 + at, LINE);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, codes[step][16], 4 * STEP);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
}

#define AMX_STORE(out) \
    _tile_stored(0, out[0], 4 * HALF); \
    _tile_stored(1, out[0] + QUARTER, 4 * HALF); \
    _tile_stored(2, out[16], 4 * HALF); \
    _tile_stored(3, out[16] + QUARTER, 4 * HALF);

ON_AMX static inline __attribute__((always_inline)) void amx_both(
    const tt_panel *parts, int count, int half, const tt_wide *queries, const tt_pending *before,
    tt_products *products, tt_reached *reached, const int split) {
    uint8_t padded[2][STEP * LINE] __attribute__((aligned(64)));
    const int8_t(*codes)[WIDE][4 * STEP] = queries->codes;
    const amx_rows rows = amx_rows_of(before);
    int64_t steps = 0;
    int looked = 0, share;
    for (int part = split; part < count; part++) steps += (parts[part].words + STEP - 1) / STEP;
    share = (int)((WIDE + steps - 1) / steps); /* of the queries that are looked at, a step */
    _tile_loadd(0, queries->less[0], 4 * QUARTER);
    _tile_loadd(1, queries->less[0], 4 * QUARTER);
    _tile_loadd(2, queries->less[16], 4 * QUARTER);
    _tile_loadd(3, queries->less[16], 4 * QUARTER);
    for (int part = split; part < count; part++) {
        const amx_half from = amx_half_of(parts + part, half, padded);
        for (int64_t step = 0; step < from.steps; step++) {
            const int upto = looked + share < WIDE ? looked + share : WIDE;
            amx_step(&from, step, codes);
            amx_reach(products, &rows, before->limits, looked, upto, split, reached);
            looked = upto;
        }
        codes += from.steps;
    }
    amx_keep(products, before->queries, split, reached);
    AMX_STORE(products->dots)
    if (split) {
        const amx_half from = amx_half_of(parts, half, padded);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < from.steps; step++) amx_step(&from, step, codes);
        AMX_STORE(products->head)
    }
}

ON_AMX static void amx_wide(const tt_panel *parts, int count, int half, const tt_wide *queries,
                            const tt_pending *before, tt_products *products, tt_reached *reached) {
    if (count > 1) amx_both(parts, count, half, queries, before, products, reached, 1);
    else amx_both(parts, count, half, queries, before, products, reached, 0);
}

/* The same of the last ones, after which there are no more. */
ON_AMX static void amx_last(const tt_pending *before, const tt_products *products,
                            tt_reached *reached) {
    const amx_rows rows = amx_rows_of(before);
    if (before->split) amx_reach(products, &rows, before->limits, 0, WIDE, 1, reached);
    else amx_reach(products, &rows, before->limits, 0, WIDE, 0, reached);
    amx_keep(products, before->queries, before->split, reached);
}

/* Whether the processor has tiles of int8, and the system keeps them for a process that asks. */
ON_AMX static int amx_allowed(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return 0; /* tile, int8 */
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* xgetbv may be used */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return 0;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, tile data */
}

#endif
