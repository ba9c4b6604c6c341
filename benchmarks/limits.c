/* What a machine can do at most: bytes read a second, and int8 products a second. For
 * exact_search.py, which compiles it: cc -O3 -std=c11 -fPIC -shared -pthread. */

#include <pthread.h>
#include <stdint.h>
#include <time.h>

#define STREAMS 4 /* read at once by a thread: one alone does not fill the memory's channels */
#define MAX_THREADS 256

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define NARROW __attribute__((target("avx2")))

WIDE static uint64_t read_wide(const char *from, int64_t bytes) {
    const int64_t share = bytes / STREAMS / 256 * 256;
    __m512i sums[STREAMS];
    for (int i = 0; i < STREAMS; i++) sums[i] = _mm512_setzero_si512();
    for (int64_t at = 0; at < share; at += 256)
        for (int i = 0; i < STREAMS; i++)
            for (int line = 0; line < 4; line++)
                sums[i] = _mm512_xor_si512(
                    sums[i], _mm512_loadu_si512(from + i * share + at + 64 * line));
    for (int i = 1; i < STREAMS; i++) sums[0] = _mm512_xor_si512(sums[0], sums[i]);
    return (uint64_t)_mm512_reduce_add_epi64(sums[0]);
}

WIDE static uint64_t multiply_wide(int64_t steps) {
    __m512i sums[24];
    const __m512i one = _mm512_set1_epi8(3), other = _mm512_set1_epi8(5);
    for (int i = 0; i < 24; i++) sums[i] = _mm512_set1_epi32(i);
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++) {
            sums[i] = _mm512_dpbusd_epi32(sums[i], one, other);
            __asm__ volatile("" : "+v"(sums[i]));
        }
    }
    for (int i = 1; i < 24; i++) sums[0] = _mm512_xor_si512(sums[0], sums[i]);
    return (uint64_t)_mm512_reduce_add_epi64(sums[0]);
}

NARROW static uint64_t multiply_narrow(int64_t steps) {
    __m256i sums[8];
    __m256i one = _mm256_set1_epi8(3);
    const __m256i other = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 8; i++) sums[i] = _mm256_set1_epi32(i);
    for (int64_t step = 0; step < steps; step++)
        for (int i = 0; i < 8; i++) {
            __asm__ volatile("" : "+x"(one));
            const __m256i pairs = _mm256_maddubs_epi16(one, other);
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
        }
    for (int i = 1; i < 8; i++) sums[0] = _mm256_xor_si256(sums[0], sums[i]);
    return (uint64_t)_mm256_extract_epi64(sums[0], 0);
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
    int64_t amount, wide;
    uint64_t sum;
    double operations;
} task;

static void *read_share(void *argument) {
    task *self = argument;
#if defined(__x86_64__)
    if (self->wide) self->sum = read_wide(self->from, self->amount);
    else
#endif
        self->sum = read_plain(self->from, self->amount);
    return 0;
}

static void *multiply_share(void *argument) {
    task *self = argument;
#if defined(__x86_64__)
    self->sum = self->wide ? multiply_wide(self->amount) : multiply_narrow(self->amount);
    self->operations = (double)self->amount * (self->wide ? 24 * 128 : 8 * 64);
#endif
    return 0;
}

static int has_vnni(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
#else
    return 0;
#endif
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
        tasks[i] = (task){from + i * share, share, has_vnni(), 0, 0};
    return (double)(share * threads) / run(tasks, threads, read_share);
}

/* Multiplications and additions a second, each counted; 0 where the processor is unknown. */
double int8_rate(int64_t steps, int64_t threads) {
    task tasks[MAX_THREADS];
    double operations = 0;
    for (int64_t i = 0; i < threads; i++) tasks[i] = (task){0, steps, has_vnni(), 0, 0};
    const double seconds = run(tasks, threads, multiply_share);
    for (int64_t i = 0; i < threads; i++) operations += tasks[i].operations;
    return operations / seconds;
}
