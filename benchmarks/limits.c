/* What a machine can do at most: bytes read a second, and int8 products a second. For
 * exact_search.py, which compiles it: cc -O3 -std=c11 -fPIC -shared -pthread. */

#include <pthread.h>
#include <stdint.h>
#include <time.h>

#include "../src/twotower/retrieval/scan/scan_kernels.h"

#define STREAMS 4 /* read at once by a thread: one alone does not fill the memory's channels */
#define MAX_THREADS 256

#if defined(ON_AVX2)
ON_VNNI static uint64_t read_wide(const char *from, int64_t bytes) {
    const int64_t share = bytes / STREAMS / 256 * 256;
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t at = 0; at < share; at += 256) {
#define READ(i) \
    s##i = _mm512_xor_si512(s##i, _mm512_loadu_si512(from + i * share + at)); \
    s##i = _mm512_xor_si512(s##i, _mm512_loadu_si512(from + i * share + at + 64)); \
    s##i = _mm512_xor_si512(s##i, _mm512_loadu_si512(from + i * share + at + 128)); \
    s##i = _mm512_xor_si512(s##i, _mm512_loadu_si512(from + i * share + at + 192));
        READ(0) READ(1) READ(2) READ(3)
    }
    s0 = _mm512_xor_si512(_mm512_xor_si512(s0, s1), _mm512_xor_si512(s2, s3));
    return (uint64_t)_mm512_reduce_add_epi64(s0);
}

/* Sums have names: compilers keep arrays of them in memory. */
#define TWELVE(m) m(0) m(1) m(2) m(3) m(4) m(5) m(6) m(7) m(8) m(9) m(10) m(11)

ON_VNNI static uint64_t multiply_wide(int64_t steps) {
    const __m512i one = _mm512_set1_epi8(3), other = _mm512_set1_epi8(5);
#define WIDE_SUM(i) __m512i s##i = _mm512_set1_epi32(i);
    TWELVE(WIDE_SUM)
    for (int64_t step = 0; step < steps; step++) {
#define WIDE_STEP(i) s##i = _mm512_dpbusd_epi32(s##i, one, other);
        TWELVE(WIDE_STEP) TWELVE(WIDE_STEP)
    }
#define WIDE_FOLD(i) sum += (uint64_t)_mm512_reduce_add_epi64(s##i);
    uint64_t sum = 0;
    TWELVE(WIDE_FOLD)
    return sum;
}

ON_AVX2 static uint64_t multiply_narrow(int64_t steps) {
    __m256i one = _mm256_set1_epi8(3);
    const __m256i other = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
#define NARROW_SUM(i) __m256i s##i = _mm256_set1_epi32(i);
    NARROW_SUM(0) NARROW_SUM(1) NARROW_SUM(2) NARROW_SUM(3)
    NARROW_SUM(4) NARROW_SUM(5) NARROW_SUM(6) NARROW_SUM(7)
    for (int64_t step = 0; step < steps; step++) {
#define NARROW_STEP(i) \
    __asm__ volatile("" : "+x"(one)); \
    s##i = _mm256_add_epi32(s##i, _mm256_madd_epi16(_mm256_maddubs_epi16(one, other), ones));
        NARROW_STEP(0) NARROW_STEP(1) NARROW_STEP(2) NARROW_STEP(3)
        NARROW_STEP(4) NARROW_STEP(5) NARROW_STEP(6) NARROW_STEP(7)
    }
    uint64_t sum = 0;
#define NARROW_FOLD(i) sum += (uint64_t)_mm256_extract_epi64(s##i, 0);
    NARROW_FOLD(0) NARROW_FOLD(1) NARROW_FOLD(2) NARROW_FOLD(3)
    NARROW_FOLD(4) NARROW_FOLD(5) NARROW_FOLD(6) NARROW_FOLD(7)
    return sum;
}
#endif

#if defined(ON_AMX)
/* Two tiles of each side make four of sums. */
ON_AMX static uint64_t multiply_tiles(int64_t steps) {
    int32_t sums[16][16];
    for (int i = 0; i < 256; i++) sums[i / 16][i % 16] = i * 40503; /* zeros take less power */
    amx_begin();
    AMX_READS
    _tile_loadd(4, sums, 64);
    _tile_loadd(5, sums, 64);
    _tile_loadd(6, sums, 64);
    _tile_loadd(7, sums, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    amx_end();
    return (uint64_t)sums[0][0];
}
#endif

static uint64_t read_plain(const char *from, int64_t bytes) {
    const int64_t share = bytes / STREAMS / 64 * 8;
    const uint64_t *words = (const uint64_t *)from;
    uint64_t sum = 0;
    for (int64_t at = 0; at < share; at++)
        for (int i = 0; i < STREAMS; i++) sum ^= words[i * share + at];
    return sum;
}

typedef struct {
    const char *from;
    int64_t amount;
    int level;
    uint64_t sum;
    double operations;
} task;

static void *read_share(void *argument) {
    task *self = argument;
#if defined(ON_AVX2)
    if (self->level >= AVX512_VNNI) self->sum = read_wide(self->from, self->amount);
    else
#endif
        self->sum = read_plain(self->from, self->amount);
    return 0;
}

static void *multiply_share(void *argument) {
    task *self = argument;
#if defined(ON_AMX)
    if (self->level == AMX) {
        self->sum = multiply_tiles(self->amount / 4); /* each takes longer */
        self->operations = (double)(self->amount / 4) * 4 * 2 * 16 * 16 * 64;
        return 0;
    }
#endif
#if defined(ON_AVX2)
    const int wide = self->level >= AVX512_VNNI;
    if (self->level == PLAIN) return 0;
    self->sum = wide ? multiply_wide(self->amount) : multiply_narrow(self->amount);
    self->operations = (double)self->amount * (wide ? 24 * 128 : 8 * 64);
#endif
    (void)self;
    return 0;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static double run(task *tasks, int64_t threads, void *(*work)(void *)) {
    pthread_t handles[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    const double start = now();
    for (int64_t i = 1; i < threads; i++)
        started[i] = pthread_create(&handles[i], 0, work, tasks + i) == 0;
    work(tasks);
    for (int64_t i = 1; i < threads; i++) {
        if (started[i]) pthread_join(handles[i], 0);
        else work(tasks + i);
    }
    return now() - start;
}

/* Bytes a second. */
double read_rate(const char *from, int64_t bytes, int64_t threads) {
    task tasks[MAX_THREADS];
    const int64_t share = bytes / threads / 4096 * 4096;
    for (int64_t i = 0; i < threads; i++)
        tasks[i] = (task){from + i * share, share, best_level(), 0, 0};
    return (double)(share * threads) / run(tasks, threads, read_share);
}

/* The best level of codes, and the best of vectors, where matrices are not multiplied at once. */
int int8_level(int vectors) { return vectors ? vector_level() : best_level(); }

/* Multiplications and additions a second, each counted; 0 where the processor is unknown. */
double int8_rate(int64_t steps, int64_t threads, int level) {
    task tasks[MAX_THREADS];
    double operations = 0;
    for (int64_t i = 0; i < threads; i++) tasks[i] = (task){0, steps, level, 0, 0};
    const double seconds = run(tasks, threads, multiply_share);
    for (int64_t i = 0; i < threads; i++) operations += tasks[i].operations;
    return operations / seconds;
}

/* What it is a rate of. */
const char *int8_name(int level) {
#if defined(ON_AVX2)
    return level_name(level);
#else
    (void)level;
    return "unknown";
#endif
}
