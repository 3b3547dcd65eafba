/* Decode attention over a KV cache that rests in host memory, read in place at the rate of that memory.
 *
 * One call attends one new token of each of several sequences. A sequence's rows lie one after the other in
 * its slot; a row holds every key head's key, then every key head's value, as plain elements or as records
 * of GroupQuantised (codes, the first in the lowest bits; then low and step in float16). Arithmetic is in
 * float32 whatever the elements are. Work is shared out by sequence and by blocks of key heads, so that a
 * core reads runs of a few kilobytes. The threads are our own and sleep between calls: OpenMP's would spin,
 * beside a Python that needs its cores.
 *
 * Compiled for the machine it runs on by capstan.hardware.compiler; vectors of 16 floats are lowered to
 * whatever that machine has.
 */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define LANES 16
#define RUN_BYTES 4096 /* a task's share of a row's keys is about this long */

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t words16 __attribute__((vector_size(32), aligned(2), may_alias));

#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2
#define GROUP8 3
#define GROUP4 4

/* Given when compiling, so that the inner loops have no variable bounds: KIND, what the cache's elements are;
 * QUERY_KIND, what queries and outputs are; QUERIES, how many query heads of one key head are computed at a
 * time, a divisor of PER_KEY, all of them; KEY_SIZE and VALUE_SIZE, elements of a head, multiples of 16;
 * GROUP_SIZE, a divisor of both and a multiple of 16.
 */
#define IS_GROUPED (KIND >= GROUP8)
#if KIND == FLOAT32
#define BITS 32
#elif KIND == GROUP8
#define BITS 8
#elif KIND == GROUP4
#define BITS 4
#else
#define BITS 16
#endif
#define RUN (GROUP_SIZE % 32 ? 16 : 32) /* of 4-bit codes that are unpacked together */
#define CODE_BYTES (GROUP_SIZE * BITS / 8)
#define HEAD_BYTES(size) (IS_GROUPED ? (size) / GROUP_SIZE * (CODE_BYTES + 4) : (size) * BITS / 8)

/* Mirrored by _Call in host_attention.py. */
typedef struct {
    const uint8_t *prefix; /* [prefix_rows, row bytes], the first rows of every sequence */
    uint8_t *region;       /* [slots, rows of a slot, row bytes], the rows after those */
    const uint8_t *news;   /* [sequences, row bytes], the last row of each, to be put there; or NULL */
    const void *queries;   /* [sequences, key heads, PER_KEY, KEY_SIZE] of QUERY_KIND */
    void *outputs;         /* [sequences, key heads, PER_KEY, VALUE_SIZE] of QUERY_KIND */
    const int32_t *slots;  /* [sequences] */
    const int32_t *starts; /* [sequences] the first visible row */
    const int32_t *ends;   /* [sequences] one past the last visible row, beyond `starts` */
    int64_t slot_bytes, row_bytes;
    int32_t sequences, key_heads, prefix_rows, threads;
    float scaling, softcap; /* softcap 0: none */
} Call;

/* --- elements ------------------------------------------------------------------------------------------ */

static inline float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value;
    if (magnitude >= 0x0f800000u) magnitude += 0x70000000u; /* infinities and NaN */
    else {
        memcpy(&value, &magnitude, 4);
        value *= 0x1p112f;
        memcpy(&magnitude, &value, 4);
    }
    magnitude |= sign;
    memcpy(&value, &magnitude, 4);
    return value;
}

static inline float load_half(const void *from) {
    uint16_t half;
    memcpy(&half, from, 2);
#if defined(__F16C__) || defined(__AVX512F__)
    return _cvtsh_ss(half);
#else
    return half_to_float(half);
#endif
}

static inline uint16_t float_to_half(float value) {
#if defined(__F16C__) || defined(__AVX512F__)
    return (uint16_t)_cvtss_sh(value, 0);
#else
    uint32_t pattern, sign;
    memcpy(&pattern, &value, 4);
    sign = (pattern >> 16) & 0x8000;
    pattern &= 0x7fffffffu;
    if (pattern > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (pattern >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (pattern < 0x38800000u) { /* a subnormal half: let the float unit round it */
        float magnitude;
        memcpy(&magnitude, &pattern, 4);
        magnitude += 0.5f;
        memcpy(&pattern, &magnitude, 4);
        return (uint16_t)(sign | (pattern - 0x3f000000u));
    }
    pattern += 0xc8000fffu + ((pattern >> 13) & 1);
    return (uint16_t)(sign | (pattern >> 13));
#endif
}

static inline uint16_t float_to_bfloat(float value) {
    uint32_t pattern;
    memcpy(&pattern, &value, 4);
    if ((pattern & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((pattern >> 16) | 0x40);
    return (uint16_t)((pattern + 0x7fffu + ((pattern >> 16) & 1)) >> 16);
}

static inline floats load_floats(const void *from) { return *(const floats *)from; }

static inline floats load_halves(const void *from) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256(from));
#elif defined(__F16C__)
    union { __m256 half[2]; floats whole; } value;
    value.half[0] = _mm256_cvtph_ps(_mm_loadu_si128(from));
    value.half[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + 1));
    return value.whole;
#else
    floats value;
    for (int lane = 0; lane < LANES; lane++) value[lane] = half_to_float(((const uint16_t *)from)[lane]);
    return value;
#endif
}

static inline floats load_bfloats(const void *from) {
    return (floats)(__builtin_convertvector(*(const words16 *)from, ints) << 16);
}

static inline floats bytes_to_floats(bytes16 codes) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)codes));
#else
    return __builtin_convertvector(__builtin_convertvector(codes, ints), floats);
#endif
}

/* exp of numbers that are not positive, to about 2 units in the last place (Cephes' polynomial). */
static inline floats exponential(floats x) {
    ints vanishes = x < -87.0f; /* -infinity too; NaN does not compare, and stays */
    x = (floats)((ints)x & ~vanishes);
    ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, ints); /* truncated, so the nearest */
    floats whole = __builtin_convertvector(power, floats);
    x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats y = 1.9875691500e-4f * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    y *= (floats)((power + 127) << 23);
    return (floats)((ints)y & ~vanishes);
}

static inline float read_element(const void *from, int64_t index) {
#if QUERY_KIND == FLOAT32
    return ((const float *)from)[index];
#elif QUERY_KIND == FLOAT16
    return half_to_float(((const uint16_t *)from)[index]);
#else
    uint32_t pattern = (uint32_t)((const uint16_t *)from)[index] << 16;
    float value;
    memcpy(&value, &pattern, 4);
    return value;
#endif
}

static inline void write_element(void *to, int64_t index, float value) {
#if QUERY_KIND == FLOAT32
    ((float *)to)[index] = value;
#elif QUERY_KIND == FLOAT16
    ((uint16_t *)to)[index] = float_to_half(value);
#else
    ((uint16_t *)to)[index] = float_to_bfloat(value);
#endif
}

/* --- a tile: one key head of 16 rows --------------------------------------------------------------------
 *
 * Decoded elements, and so queries and outputs too, are in the order in which they come out of the cache: as
 * they are, except that of 4-bit codes each run of RUN has its even ones first.
 */

static inline int place_of(int element) {
    if (KIND != GROUP4) return element;
    return element / RUN * RUN + element % 2 * (RUN / 2) + element % RUN / 2;
}

/* 16 elements, or codes of a group, from `index` on. */
static inline floats load(const uint8_t *from, int index) {
#if KIND == FLOAT32
    return load_floats(from + 4 * index);
#elif KIND == FLOAT16
    return load_halves(from + 2 * index);
#elif KIND == BFLOAT16
    return load_bfloats(from + 2 * index);
#elif KIND == GROUP8
    return bytes_to_floats(*(const bytes16 *)(from + index));
#elif RUN == 32
    bytes16 pairs = *(const bytes16 *)(from + index / 32 * 16);
    return bytes_to_floats(index % 32 ? pairs >> 4 : (bytes16)(pairs & 15));
#else
    uint64_t pairs[2];
    memcpy(pairs, from + index / 2, 8);
    pairs[1] = pairs[0] >> 4;
    bytes16 codes;
    memcpy(&codes, pairs, 16);
    return bytes_to_floats(codes & 15);
#endif
}

/* One head's elements of one row. */
static inline void decode(const uint8_t *from, float *to, int size) {
#if IS_GROUPED
    for (int group = 0; group < size / GROUP_SIZE; group++, from += CODE_BYTES + 4) {
        float low = load_half(from + CODE_BYTES), step = load_half(from + CODE_BYTES + 2);
        for (int at = 0; at < GROUP_SIZE; at += LANES)
            *(floats *)(to + group * GROUP_SIZE + at) = low + step * load(from, at);
    }
#else
    for (int at = 0; at < size; at += LANES) *(floats *)(to + at) = load(from, at);
#endif
}

/* For each width, the lanes of two vectors, the second's counted from 16 on, of which those `width` further on
 * are added to give one vector of sums. */
static const ints PAIRS[4] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
    {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
    {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
    {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
};

static inline __attribute__((always_inline)) void add_pairs(floats *totals, int width, const ints lanes) {
    for (int low = 0; low < width; low++)
        totals[low] = __builtin_shuffle(totals[low], totals[low + width], lanes)
                    + __builtin_shuffle(totals[low], totals[low + width], lanes + width);
}

/* Lane i of the result is the sum of totals[i]'s lanes. */
static inline floats sums_of(floats *totals) {
    add_pairs(totals, 8, PAIRS[0]);
    add_pairs(totals, 4, PAIRS[1]);
    add_pairs(totals, 2, PAIRS[2]);
    add_pairs(totals, 1, PAIRS[3]);
    return totals[0];
}

/* scores[row] = query . keys[row] */
static inline void score(float keys[LANES][KEY_SIZE], const float *query, float *scores) {
    floats totals[LANES] = {};
    for (int at = 0; at < KEY_SIZE; at += LANES) {
        floats part = load_floats(query + at);
        for (int row = 0; row < LANES; row++) totals[row] += part * load_floats(&keys[row][at]);
    }
    *(floats *)scores = sums_of(totals);
}

/* output += the sum over rows of weights[row] values[row] */
static inline void mix(float values[LANES][VALUE_SIZE], const float *weights, float *output) {
    for (int at = 0; at < VALUE_SIZE; at += LANES) {
        floats total = load_floats(output + at);
        for (int row = 0; row < LANES; row++) total += weights[row] * load_floats(&values[row][at]);
        *(floats *)(output + at) = total;
    }
}

/* --- one task: a sequence and a run of its key heads ---------------------------------------------------- */

typedef struct {
    float tile[LANES][KEY_SIZE > VALUE_SIZE ? KEY_SIZE : VALUE_SIZE];
    int64_t stride; /* of one query's scores: the most rows, a multiple of LANES */
    float *queries; /* [heads, QUERIES, KEY_SIZE] */
    float *outputs; /* [heads, QUERIES, VALUE_SIZE] */
    float *scores;  /* [heads, QUERIES, stride] */
} Scratch;

/* Scores become weights, in place; those after the last row become 0. */
static void softmax(float *scores, int64_t rows, float scaling, float softcap) {
    float highest = -INFINITY, total = 0;
    for (int64_t row = 0; row < rows; row++) {
        scores[row] *= scaling;
        if (softcap > 0) scores[row] = softcap * tanhf(scores[row] / softcap);
        highest = scores[row] > highest ? scores[row] : highest;
    }
    int64_t padded = (rows + LANES - 1) / LANES * LANES;
    for (int64_t row = rows; row < padded; row++) scores[row] = -INFINITY;
    floats totals = {};
    for (int64_t row = 0; row < padded; row += LANES) {
        floats weights = exponential(load_floats(scores + row) - highest);
        *(floats *)(scores + row) = weights;
        totals += weights;
    }
    for (int lane = 0; lane < LANES; lane++) total += totals[lane];
    for (int64_t row = 0; row < padded; row += LANES) *(floats *)(scores + row) /= total;
}

/* Where 16 rows from `first` on begin; those after the last are the last again. */
static inline void find_rows(
    const Call *call, const uint8_t *slot, int64_t first, int64_t end, const uint8_t *rows[LANES]
) {
    for (int row = 0; row < LANES; row++) {
        int64_t at = first + row < end ? first + row : end - 1;
        rows[row] = at < call->prefix_rows ? call->prefix + at * call->row_bytes
                                           : slot + (at - call->prefix_rows) * call->row_bytes;
    }
}

static inline void prefetch(const uint8_t *rows[LANES], int64_t offset, int size_bytes) {
    for (int row = 0; row < LANES; row++)
        for (int at = 0; at < size_bytes; at += 64) __builtin_prefetch(rows[row] + offset + at);
}

static void attend(const Call *call, int sequence, int first_head, int heads, Scratch *scratch) {
    int64_t start = call->starts[sequence], end = call->ends[sequence], stride = scratch->stride;
    uint8_t *slot = call->region + call->slots[sequence] * call->slot_bytes;
    int64_t key_offset = first_head * HEAD_BYTES(KEY_SIZE);
    int64_t value_offset = call->key_heads * HEAD_BYTES(KEY_SIZE) + first_head * HEAD_BYTES(VALUE_SIZE);
    float(*keys)[KEY_SIZE] = (float(*)[KEY_SIZE])scratch->tile;
    float(*values)[VALUE_SIZE] = (float(*)[VALUE_SIZE])scratch->tile;
    const uint8_t *rows[LANES], *next[LANES];

    if (call->news) {
        const uint8_t *from = call->news + sequence * call->row_bytes;
        uint8_t *to = slot + (end - 1 - call->prefix_rows) * call->row_bytes;
        memcpy(to + key_offset, from + key_offset, heads * HEAD_BYTES(KEY_SIZE));
        memcpy(to + value_offset, from + value_offset, heads * HEAD_BYTES(VALUE_SIZE));
    }
    for (int part = 0; part < PER_KEY; part += QUERIES) {
        int64_t first = ((int64_t)sequence * call->key_heads + first_head) * PER_KEY + part;
        for (int query = 0; query < heads * QUERIES; query++)
            for (int at = 0; at < KEY_SIZE; at++)
                scratch->queries[query * KEY_SIZE + place_of(at)] = read_element(
                    call->queries, (first + query / QUERIES * PER_KEY + query % QUERIES) * KEY_SIZE + at);
        for (int64_t row = start; row < end; row += LANES) {
            find_rows(call, slot, row, end, rows);
            find_rows(call, slot, row + LANES, end, next);
            for (int head = 0; head < heads; head++) {
                int64_t offset = key_offset + head * HEAD_BYTES(KEY_SIZE);
                prefetch(next, offset, HEAD_BYTES(KEY_SIZE));
                for (int each = 0; each < LANES; each++) decode(rows[each] + offset, keys[each], KEY_SIZE);
                for (int query = head * QUERIES; query < (head + 1) * QUERIES; query++)
                    score(
                        keys, scratch->queries + query * KEY_SIZE,
                        scratch->scores + query * stride + row - start);
            }
        }
        for (int query = 0; query < heads * QUERIES; query++)
            softmax(scratch->scores + query * stride, end - start, call->scaling, call->softcap);
        memset(scratch->outputs, 0, sizeof(float) * heads * QUERIES * VALUE_SIZE);
        for (int64_t row = start; row < end; row += LANES) {
            find_rows(call, slot, row, end, rows);
            find_rows(call, slot, row + LANES, end, next);
            for (int head = 0; head < heads; head++) {
                int64_t offset = value_offset + head * HEAD_BYTES(VALUE_SIZE);
                prefetch(next, offset, HEAD_BYTES(VALUE_SIZE));
                for (int each = 0; each < LANES; each++) decode(rows[each] + offset, values[each], VALUE_SIZE);
                if (row + LANES > end) /* weights of 0 would make NaN of a last row's infinities */
                    memset(values[end - row], 0, sizeof(*values) * (row + LANES - end));
                for (int query = head * QUERIES; query < (head + 1) * QUERIES; query++)
                    mix(values, scratch->scores + query * stride + row - start,
                        scratch->outputs + query * VALUE_SIZE);
            }
        }
        for (int query = 0; query < heads * QUERIES; query++)
            for (int at = 0; at < VALUE_SIZE; at++)
                write_element(
                    call->outputs, (first + query / QUERIES * PER_KEY + query % QUERIES) * VALUE_SIZE + at,
                    scratch->outputs[query * VALUE_SIZE + place_of(at)]);
    }
}

/* --- threads -------------------------------------------------------------------------------------------- */

/* What all threads of one call take their tasks from. */
typedef struct {
    const Call *call;
    int heads, runs; /* key heads of a run, and runs of a sequence */
    int64_t stride;
    atomic_int next, failed;
} Work;

static void work_on(Work *work) {
    const Call *call = work->call;
    Scratch scratch = {.stride = work->stride};
    int64_t queries = (int64_t)work->heads * QUERIES;
    float *memory = malloc(sizeof(float) * queries * (KEY_SIZE + VALUE_SIZE + work->stride));
    if (!memory) {
        atomic_store(&work->failed, 1);
        return;
    }
    scratch.queries = memory;
    scratch.outputs = memory + queries * KEY_SIZE;
    scratch.scores = memory + queries * (KEY_SIZE + VALUE_SIZE);
    int task;
    while ((task = atomic_fetch_add(&work->next, 1)) < call->sequences * work->runs) {
        int first = task % work->runs * work->heads, left = call->key_heads - first;
        attend(call, task / work->runs, first, left < work->heads ? left : work->heads, &scratch);
    }
    free(memory);
}

typedef struct {
    pthread_mutex_t busy; /* held during a call */
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t wake, done;
    Work *work;
    int threads, wanted, working;
} Pool;

#define NOBODY {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, \
                .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER}

static Pool pool = NOBODY;

/* Threads do not survive a fork, but conditions remember who waited, and locks who held them. */
static void forget_threads(void) { pool = (Pool)NOBODY; }

static __attribute__((constructor)) void forget_threads_after_fork(void) {
    pthread_atfork(NULL, NULL, forget_threads);
}

static void *helper(void *unused) {
    (void)unused;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.wanted) pthread_cond_wait(&pool.wake, &pool.lock);
        pool.wanted--;
        pool.working++;
        Work *work = pool.work;
        pthread_mutex_unlock(&pool.lock);
        work_on(work);
        pthread_mutex_lock(&pool.lock);
        if (!--pool.working && !pool.wanted) pthread_cond_signal(&pool.done);
    }
    return NULL;
}

/* At least `count` threads that wait for work, or as many as the system grants. */
static void hire(int count) {
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; pool.threads < count; pool.threads++)
        if (pthread_create(&thread, &detached, helper, NULL)) break;
    pthread_attr_destroy(&detached);
}

/* Returns 0, or 1 when there was no memory for scratch. */
int capstan_attend(const Call *call) {
    Work work = {.call = call};
    work.heads = (RUN_BYTES + HEAD_BYTES(KEY_SIZE) - 1) / HEAD_BYTES(KEY_SIZE);
    work.heads = work.heads > call->key_heads ? call->key_heads : work.heads;
    work.runs = (call->key_heads + work.heads - 1) / work.heads;
    for (int sequence = 0; sequence < call->sequences; sequence++) {
        int64_t rows = call->ends[sequence] - call->starts[sequence];
        work.stride = rows > work.stride ? rows : work.stride;
    }
    work.stride = (work.stride + LANES - 1) / LANES * LANES;
    if (call->threads <= 1) {
        work_on(&work);
        return atomic_load(&work.failed);
    }
    pthread_mutex_lock(&pool.busy);
    pthread_mutex_lock(&pool.lock);
    hire(call->threads - 1);
    pool.work = &work;
    pool.wanted = call->threads - 1 < pool.threads ? call->threads - 1 : pool.threads;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    work_on(&work);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0; /* whoever has not woken yet would find nothing left to do */
    while (pool.working) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.busy);
    return atomic_load(&work.failed);
}
