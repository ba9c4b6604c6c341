/* Runs every level of scan.c on random, equal, zero and deleted rows beside a double loop; for the
 * sanitizers. Prints nothing and returns 0 where all is well. */

#include "../../../src/twotower/retrieval/scan/scan.c"

#include <stdio.h>

static uint32_t seed = 1;

static float uniform(void) { /* from -1 to 1 */
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / 8388608.0f - 1.0f;
}

/* Exactly, so that a byte beyond is noticed; sanitizers do not see what AMX loads and stores. */
static void *room(size_t bytes) {
    void *made = calloc(bytes ? bytes : 1, 1);
    if (!made) exit(3);
    return made;
}

typedef struct {
    float scale, error, norm, beyond[2];
} about;

/* The head at twice the scale, where there is a tail. */
static about code(const float *row, int64_t dim, int64_t head, int64_t back, int8_t *codes) {
    about made = {0};
    double error = 0, norm = 0, beyond[2] = {0};
    float largest = 0;
    for (int64_t i = 0; i < dim; i++) {
        const float value = fabsf(row[i]) / (head < dim && i < head ? 2 : 1);
        largest = value > largest ? value : largest;
    }
    made.scale = largest / 127;
    for (int64_t i = 0; i < dim; i++) {
        const double unit = (double)made.scale * (head < dim && i < head ? 2 : 1);
        const double step = unit > 0 ? rint(row[i] / unit) : 0;
        codes[i] = (int8_t)(step > 127 ? 127 : step < -127 ? -127 : step);
        error += pow(row[i] - codes[i] * unit, 2);
        norm += pow(codes[i] * unit, 2);
        if (i >= head) beyond[BY_HEAD] += (double)row[i] * row[i];
        if (i >= back) beyond[BY_FRONT] += (double)row[i] * row[i];
    }
    made.error = (float)(sqrt(error) * 1.00001 + 1e-5 * (sqrt(norm) + 1));
    made.norm = (float)(sqrt(norm) * 1.00001);
    for (int i = 0; i < 2; i++) made.beyond[i] = (float)(sqrt(beyond[i]) * 1.00001);
    return made;
}

/* A code's place among those of a part of all rows, in quarters of so many words. */
static size_t place_of(int64_t row, int64_t dimension, int64_t words) {
    return (size_t)(((row / QUARTER * words + dimension / 4) * QUARTER + row % QUARTER) * 4 +
                    dimension % 4);
}

static int check(int64_t rows, int64_t dim, int64_t num_queries, int64_t k, int64_t level,
                 int64_t threads, int kind, int split, int stage) {
    const int64_t words = (dim + 3) / 4, panels = (rows + PANEL - 1) / PANEL;
    const int64_t head = split && words > 1 ? (words + 2) / 3 : words;
    const int64_t front = (words - head + 1) / 2, places = panels * PANEL;
    const int64_t part[PARTS] = {head, front, words - head - front};
    const int64_t begins[PARTS + 1] = {0, 4 * head, 4 * (head + front), 4 * words};
    float *values = room(sizeof(float) * (size_t)(rows * dim));
    uint8_t *codes[PARTS];
    float *beyond[2] = {room(sizeof(float) * (size_t)places), room(sizeof(float) * (size_t)places)};
    float *scale = room(sizeof(float) * (size_t)places);
    float *norm = room(sizeof(float) * (size_t)places);
    float *error = room(sizeof(float) * (size_t)places);
    int64_t *ids = room(sizeof(int64_t) * (size_t)rows);
    int8_t *one = room((size_t)(words * 4));
    for (int i = 0; i < PARTS; i++) {
        codes[i] = room((size_t)(places * part[i] * 4));
        memset(codes[i], 0x80, (size_t)(places * part[i] * 4));
    }
    for (int64_t row = 0; row < places; row++) error[row] = -INFINITY;
    for (int64_t row = 0; row < rows; row++) {
        float *here = values + row * dim;
        ids[row] = 2 * row;
        for (int64_t i = 0; i < dim; i++)
            here[i] = kind == 1 ? 0.5f : kind == 2 && row % 2 ? 0 : uniform();
        if (kind == 3 && row % 3 == 0) continue; /* deleted */
        const about made = code(here, dim, begins[FRONT], begins[BACK], one);
        scale[row] = made.scale, error[row] = made.error, norm[row] = made.norm;
        for (int i = 0; i < 2; i++) beyond[i][row] = made.beyond[i];
        for (int i = 0; i < PARTS; i++)
            for (int64_t j = begins[i]; j < begins[i + 1] && j < dim; j++)
                codes[i][place_of(row, j - begins[i], part[i])] = (uint8_t)(one[j] + 128);
    }
    int8_t *query_codes = room((size_t)(num_queries * words * 4));
    float *query_scale = room(sizeof(float) * (size_t)num_queries);
    float *query_error = room(sizeof(float) * (size_t)num_queries);
    float *query_beyond[2] = {room(sizeof(float) * (size_t)num_queries),
                              room(sizeof(float) * (size_t)num_queries)};
    double *queries = room(sizeof(double) * (size_t)(num_queries * dim));
    double *query_norm = room(sizeof(double) * (size_t)num_queries);
    double *centre = room(sizeof(double) * (size_t)num_queries);
    float *single = room(sizeof(float) * (size_t)dim);
    for (int64_t query = 0; query < num_queries; query++) {
        double length = 0;
        for (int64_t i = 0; i < dim; i++) single[i] = uniform();
        for (int64_t i = 0; i < dim; i++) length += (double)single[i] * single[i];
        for (int64_t i = 0; i < dim; i++) {
            queries[query * dim + i] = single[i];
            single[i] = (float)(single[i] / sqrt(length));
        }
        query_norm[query] = sqrt(length);
        const about made =
            code(single, dim, begins[FRONT], begins[BACK], query_codes + query * words * 4);
        query_scale[query] = made.scale, query_error[query] = made.error;
        for (int i = 0; i < 2; i++) query_beyond[i][query] = made.beyond[i];
    }
    const int64_t seven = 7; /* panels that there is room for at a time */
    float *peaks = room(sizeof(float) * (size_t)(seven * QUARTERS * num_queries));
    int32_t *dots = room(sizeof(int32_t) * (size_t)(num_queries == 1 ? seven * PANEL : 0));
    uint8_t *kept = room((size_t)(num_queries == 1 ? seven : 0));
    int64_t *position = room(sizeof(int64_t) * (size_t)(num_queries * k)), count[4] = {0};
    double *score = room(sizeof(double) * (size_t)(num_queries * k));
    /* A shard of one panel, an empty one, and the rest. */
    const int64_t cut = panels > 0, at = cut * PANEL;
    tt_shard shards[3];
    for (int i = 0; i < 3; i++) {
        const int64_t first = i ? at : 0;
        shards[i] = (tt_shard){
            .scale = scale + first, .error = error + first, .norm = norm + first,
            .beyond = {beyond[0] + first, beyond[1] + first}, .first = first,
            .panels = i == 0 ? cut : i == 1 ? 0 : panels - cut};
        for (int j = 0; j < PARTS; j++) shards[i].codes[j] = codes[j] + first * part[j] * 4;
    }
    const tt_part parts[2] = {{values, 0, 0}, {values + rows / 2 * dim, rows / 2, 0}};
    const tt_job job = {.shards = shards, .parts = parts, .ids = ids,
                        .num_shards = rows > 0 ? 3 : 0, .num_parts = 2, .dim = dim, .words = words,
                        .part = {part[0], part[1], part[2]}, .stage = stage,
                        .query_codes = query_codes, .query_scale = query_scale,
                        .query_error = query_error,
                        .query_beyond = {query_beyond[0], query_beyond[1]}, .queries = queries,
                        .query_norm = query_norm, .query_centre = centre,
                        .num_queries = num_queries, .k = k, .cosine = 1, .threads = threads,
                        .level = level, .peaks = peaks, .dots = dots, .kept = kept,
                        .num_peaks = seven * QUARTERS * num_queries, .position = position,
                        .score = score, .count = count};
    int bad = tt_search(&job);
    for (int64_t query = 0; query < num_queries && !bad; query++) {
        int64_t alive = 0;
        for (int64_t row = 0; row < rows; row++) {
            double dot = 0;
            int64_t better = 0;
            for (int64_t i = 0; i < dim; i++)
                dot += (double)values[row * dim + i] * queries[query * dim + i];
            dot /= query_norm[query];
            if (kind == 3 && row % 3 == 0) continue;
            alive++;
            /* A row that is better than the worst one found by more than rounding is found. */
            for (int64_t i = 0; i < k; i++) better += position[query * k + i] == row;
            const int64_t last = position[query * k + k - 1];
            if (!better && (last < 0 || dot > score[query * k + k - 1] + 1e-6)) bad = 1;
        }
        for (int64_t i = 0; i < k; i++) bad |= (position[query * k + i] >= 0) != (i < alive);
        for (int64_t i = 1; i < k && i < alive; i++)
            bad |= rounded(score[query * k + i - 1]) < rounded(score[query * k + i]);
    }
    for (int i = 0; i < PARTS; i++) free(codes[i]);
    for (int i = 0; i < 2; i++) free(beyond[i]), free(query_beyond[i]);
    free(values), free(scale), free(norm), free(error), free(ids), free(one);
    free(query_codes), free(query_scale), free(query_error), free(queries), free(query_norm);
    free(centre), free(single), free(position), free(score), free(peaks), free(dots), free(kept);
    if (bad)
        fprintf(stderr, "wrong: rows %ld dim %ld queries %ld k %ld level %ld threads %ld %d %d "
                "%d\n",
                (long)rows, (long)dim, (long)num_queries, (long)k, (long)level, (long)threads,
                kind, split, stage);
    return bad;
}

/* A rotation by every level beside a double loop. */
static int check_turn(int64_t count, int64_t dim, int64_t stride, int64_t threads) {
    double *vectors = room(sizeof(double) * (size_t)(count * stride)), worst = 0;
    double *out = room(sizeof(double) * (size_t)(count * stride));
    float *columns = room(sizeof(float) * (size_t)(dim * dim));
    for (int64_t i = 0; i < count * stride; i++) vectors[i] = uniform();
    for (int64_t i = 0; i < dim * dim; i++) columns[i] = uniform();
    for (int64_t level = -1; level <= tt_level(); level++) {
        if (level < 0) tt_turn(vectors, columns, count, dim, stride, out, threads);
        for (int64_t i = 0; level >= 0 && i < count; i += TURNED)
            choose_kernels(level).turn(vectors + i * stride, stride, columns, dim,
                                       out + i * stride);
        for (int64_t i = 0; i < count * dim; i++) {
            double sum = 0;
            for (int64_t j = 0; j < dim; j++)
                sum += vectors[i / dim * stride + j] * columns[j * dim + i % dim];
            worst = fmax(worst, fabs(sum - out[i / dim * stride + i % dim]));
        }
    }
    free(vectors), free(out), free(columns);
    if (worst > 1e-10) fprintf(stderr, "wrong turn: count %ld dim %ld\n", (long)count, (long)dim);
    return worst > 1e-10;
}

/* Queries in blocks, the last of them not full, and codes of few words or of steps and a rest. */
static int check_blocks(int64_t level) {
    static const int64_t queries[] = {2, 7, 9, 15, 16, 17, 31, 32, 33, 65};
    static const int64_t dims[] = {12, 60, 64, 68, 130, 260};
    int bad = 0;
    for (int q = 0; q < 10; q++)
        for (int d = 0; d < 6; d++)
            for (int split = 0; split < 2; split++)
                bad |= check(q % 2 ? 700 : 130, dims[d], queries[q], 1 + 9 * (d % 2), level,
                             1 + (q + d) % 3, (q + d) % 4, split,
                             split && d % 3 == 2 ? BY_HEAD : BY_ALL);
    return bad;
}

/* What a row can score at most by its code: in long double, which rounds no step as fp32 does. */
static long double bound(int32_t dot, int row, const tt_shard *shard, const tt_asked *asked) {
    return (long double)(dot - asked->correction[BY_ALL]) * asked->scale * shard->scale[row] +
           (long double)asked->error * shard->norm[row] + shard->error[row];
}

/* Whether a row is missing of those that reach the threshold. */
static int misses(uint64_t rows, int from, int to, const int32_t *dots, const tt_shard *shard,
                  const tt_asked *asked) {
    int bad = 0;
    for (int row = from; row < to; row++)
        bad |= bound(dots[row], row, shard, asked) >= asked->threshold &&
               !(rows >> (row - from) & 1);
    return bad;
}

#if defined(ON_AMX)
/* Half a panel's products beside limits, as after AMX; these are AVX-512, and need no tiles. */
static int check_last(const int32_t (*dots)[PANEL], const tt_shard *shard, const tt_asked *asked) {
    static tt_products products;
    static tt_reached reached;
    static int32_t less[WIDE][QUARTER];
    float limits[WIDE];
    tt_bounds rows;
    tt_wide wide = {.less = (const void *)less};
    int bad = 0;
    for (int query = 0; query < WIDE; query++) {
        const tt_asked *one = asked + query % TILE;
        widen(&wide.factor, &wide.spread, one);
        limits[query] = limit_of(one);
        for (int row = 0; row < HALF; row++)
            products.dots[query][row] = dots[query % TILE][row] - one->correction[BY_ALL];
    }
    const tt_pending pending = {&wide, limits, &rows, 0};
    amx_bounds(shard, 0, &rows);
    amx_last(&pending, &products, &reached);
    for (int query = 0; query < WIDE; query++)
        bad |= misses(reached.rows[query], 0, HALF, dots[query % TILE], shard,
                      asked + query % TILE);
    return bad;
}
#endif

/* Queries of very different scales and errors in one tile, each of which some row just reaches. */
static int check_limits(int64_t words, int split) {
    const int64_t part[PARTS] = {split ? words / 3 : words, split ? words / 3 : 0,
                                 split ? words - words / 3 * 2 : 0};
    uint8_t *codes = room((size_t)(words * LINE * QUARTERS)), *at = codes;
    int8_t *queries = room((size_t)(words * 4 * TILE));
    int32_t *packed = room((size_t)(words * 4 * TILE)), dots[TILE][PANEL];
    float scale[PANEL], norm[PANEL], error[PANEL];
    const tt_shard shard = {.scale = scale, .norm = norm, .error = error};
    tt_panel parts[PARTS];
    tt_asked asked[TILE] = {{0}};
    tt_few few = {.codes = packed};
    tt_seen seen;
    const int32_t *single[TILE];
    const int count = split ? PARTS : 1;
    int bad = 0;
    for (int64_t i = 0; i < words * LINE * QUARTERS; i++)
        codes[i] = (uint8_t)(128 + 127 * uniform());
    for (int64_t i = 0; i < words * 4 * TILE; i++) queries[i] = (int8_t)(127 * uniform());
    for (int row = 0; row < PANEL; row++) {
        scale[row] = ldexpf(1.5f + uniform() / 2, (int)(40 * uniform()));
        norm[row] = scale[row] * 127 * sqrtf((float)words * 4);
        error[row] = row % 9 ? scale[row] * (1 + uniform()) : 0;
    }
    for (int i = 0; i < count; i++) {
        parts[i] = (tt_panel){.words = part[i]};
        for (int j = 0; j < QUARTERS; j++, at += part[i] * LINE) parts[i].quarters[j] = at;
    }
    for (int i = 0; i < TILE; i++) {
        int32_t sum = 0;
        single[i] = (const int32_t *)(queries + i * words * 4);
        for (int64_t j = 0; j < words * 4; j++)
            sum += (split && j < part[HEAD] * 4 ? 4 : 1) * queries[i * words * 4 + j];
        for (int64_t j = 0; j < words; j++) packed[j * TILE + i] = single[i][j];
        asked[i].correction[BY_ALL] = 128 * sum;
        asked[i].scale = ldexpf(1.5f + uniform() / 2, -8 + (int)(3 * uniform()));
        asked[i].error = i % 2 ? 0 : 0.01f * (1 + uniform());
        take_factors(asked + i);
    }
    choose_kernels(PLAIN).dots[TILE](parts, count, single, dots);
    for (int i = 0; i < TILE; i++) {
        const int row = (int)(31.9f + 31.9f * uniform()) / (i % 2 + 1); /* of the first half, too */
        const long double reached = bound(dots[i][row], row, &shard, asked + i);
        asked[i].threshold = (float)reached;
        if (asked[i].threshold > reached)
            asked[i].threshold = nextafterf(asked[i].threshold, -FLT_MAX);
        few.start[i] = -asked[i].correction[BY_ALL] / (split ? 4 : 1);
        few.limits[i] = limit_of(asked + i);
        widen(&few.factor, &few.spread, asked + i);
    }
    for (int64_t level = 0; level <= vector_level(); level++) {
        const few_function look = choose_kernels(level).few[TILE];
        const unsigned some = look ? look(parts, count, &few, &shard, 0, &seen) : 0;
        for (int i = 0; look && i < TILE; i++) {
            bad |= misses(seen.rows[i], 0, PANEL, dots[i], &shard, asked + i);
            bad |= (some >> i & 1) != (seen.rows[i] != 0);
            bad |= seen.rows[i] && memcmp(seen.dots[i], dots[i], sizeof dots[i]);
        }
    }
#if defined(ON_AMX)
    if (vector_level() == AVX512_VNNI) bad |= check_last((const void *)dots, &shard, asked);
#endif
    free(codes), free(queries), free(packed);
    if (bad) fprintf(stderr, "wrong limits: words %ld %d\n", (long)words, split);
    return bad;
}

int main(void) {
    static const int64_t rows[] = {0, 1, 63, 64, 65, 3000}, dims[] = {1, 4, 7, 100, 512};
    static const int64_t queries[] = {1, 6, 13}, ks[] = {1, 10, 600}; /* 600: one step has less */
    int bad = check_turn(4, 1, 1, 1) | check_turn(8, 16, 20, 2) | check_turn(100, 33, 33, 3);
    for (int i = 0; i < 600; i++) bad |= check_limits(3 + i % 40, i % 2);
    for (int64_t level = 0; level <= tt_level(); level++) bad |= check_blocks(level);
    for (int64_t level = 0; level <= tt_level(); level++)
        for (int kind = 0; kind < 16; kind++)
            for (int r = 0; r < 6; r++)
                for (int d = 0; d < 5; d++)
                    for (int q = 0; q < 3; q++)
                        bad |= check(rows[r], dims[d] > 7 && rows[r] > 65 && q ? 33 : dims[d],
                                     queries[q], ks[(r + d + q) % 3], level, 1 + (r + q) % 3,
                                     kind % 4, kind / 4 > 0,
                                     kind / 4 > 1 ? kind / 4 - 2 : BY_ALL);
    return bad;
}
