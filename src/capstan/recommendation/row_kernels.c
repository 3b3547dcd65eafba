/* Embedding rows by 64-bit ID: distinct IDs of a batch, probe and insert, pooled reads, summed and applied gradients.
 *
 * Rows lie in one slab, each embedding | optimizer state. The index is open addressing with linear probing over
 * cells of {id, row}. A batch's gradients are summed for each distinct ID in the order of its occurrences and
 * applied at once, so no gradient ever has a place that another row could take, and the bits do not depend on
 * the number of threads: each takes its own rows.
 *
 * Compiled for the machine it runs on by capstan.hardware.compiler.
 */
#pragma GCC optimize("no-math-errno")

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AHEAD 12         /* probes whose cell is asked for before it is needed */
#define ROWS_AHEAD 10     /* the same for rows, and for gradients */
#define MOST_THREADS 64
#define WORTH_A_THREAD 32768 /* floats: below, starting one takes longer */
#define NONE -1

enum { LOOKED_UP = 0, TABLE_FULL = 1, BATCH_TOO_LARGE = 2 };
enum { SUM = 0, MEAN = 1, SQRT = 2 };
enum { SGD = 0, ADAGRAD = 1, ROW_WISE_ADAGRAD = 2, ADAM = 3, OLD_ADAGRAD = 4 };

typedef struct { uint64_t id; int64_t row; } Cell;
typedef struct { uint64_t id; uint32_t batch, index; } Scratch;

/* Mirrored by TableFields in kernels.py. */
typedef struct {
    float *slab;          /* [capacity, stride] */
    Cell *cells;          /* [cell_mask + 1] */
    uint64_t *row_ids;    /* [capacity] */
    int32_t *older, *newer; /* [capacity] the rows of a level in order of use; NULL where nothing is evicted */
    int64_t *used_at;     /* [capacity] the step of the last training lookup; NULL likewise */
    uint8_t *level;       /* [capacity] how often it was looked up before, at most levels - 1; NULL likewise */
    int64_t *oldest, *newest; /* [levels] the ends of each level's order; NULL likewise */
    uint8_t *seen;        /* [seen_mask + 1] how often IDs without a row were looked up; or NULL */
    int64_t cell_mask, seen_mask, capacity, stride, dim;
    int64_t used, first_free, levels;
    int64_t evicted, expired, refused, inserted;
    int64_t time_to_live; /* steps; 0: for ever */
    uint64_t init_key, admission_key, admission_below;
    int32_t admission_count;
    float init_low, init_width, init_state;
    int32_t state_floats;
} Table;

/* Mirrored by UpdateFields in kernels.py. */
typedef struct {
    int32_t kind;
    float lr, eps, momentum, first_share, second_share, weight_decay, bound; /* shares: 1 - beta, rounded once */
} Rule;

static inline uint64_t mixed(uint64_t x) { /* the finaliser of splitmix64 */
    x ^= x >> 30; x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27; x *= 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* --- the IDs of a batch -------------------------------------------------------------------------------- */

/* Distinct IDs in order of first occurrence; where each occurrence's is; occurrences sorted by it; their bags. */
int64_t capstan_distinct(const uint64_t *ids, int64_t count, const int64_t *offsets, int64_t bags,
                         Scratch *scratch, int64_t mask, uint32_t batch, uint64_t *distinct,
                         int32_t *inverse, int32_t *starts, int32_t *bag_of_sorted) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count) __builtin_prefetch(&scratch[mixed(ids[i + AHEAD]) & mask], 1);
        uint64_t id = ids[i], at = mixed(id) & mask;
        while (scratch[at].batch == batch && scratch[at].id != id) at = (at + 1) & mask;
        if (scratch[at].batch != batch) {
            scratch[at] = (Scratch){id, batch, (uint32_t)found};
            distinct[found] = id;
            starts[found++] = 0;
        }
        inverse[i] = (int32_t)scratch[at].index;
        starts[inverse[i]]++;
    }
    for (int64_t u = 0, sum = 0; u <= found; u++) {
        int32_t size = u < found ? starts[u] : 0;
        starts[u] = (int32_t)sum;
        sum += size;
    }
    for (int64_t bag = 0; bag < bags; bag++)
        for (int64_t i = offsets[bag]; i < offsets[bag + 1]; i++) bag_of_sorted[starts[inverse[i]]++] = (int32_t)bag;
    for (int64_t u = found; u > 0; u--) starts[u] = starts[u - 1];
    if (found) starts[0] = 0;
    return found;
}

/* --- the index ----------------------------------------------------------------------------------------- */

static inline int64_t cell_of(const Table *table, uint64_t id) {
    int64_t at = (int64_t)(mixed(id) & (uint64_t)table->cell_mask);
    while (table->cells[at].row != NONE && table->cells[at].id != id) at = (at + 1) & table->cell_mask;
    return at;
}

static void forget_cell(Table *table, int64_t hole) { /* later cells of the run move back: no tombstones */
    for (int64_t at = (hole + 1) & table->cell_mask; table->cells[at].row != NONE;
         at = (at + 1) & table->cell_mask) {
        int64_t home = (int64_t)(mixed(table->cells[at].id) & (uint64_t)table->cell_mask);
        if (((at - home) & table->cell_mask) >= ((at - hole) & table->cell_mask)) {
            table->cells[hole] = table->cells[at];
            hole = at;
        }
    }
    table->cells[hole].row = NONE;
}

static void unlink_row(Table *table, int64_t row) {
    int32_t older = table->older[row], newer = table->newer[row];
    if (older == NONE) table->oldest[table->level[row]] = newer; else table->newer[older] = newer;
    if (newer == NONE) table->newest[table->level[row]] = older; else table->older[newer] = older;
}

static void link_newest(Table *table, int64_t row, int64_t step) {
    int64_t *oldest = &table->oldest[table->level[row]], *newest = &table->newest[table->level[row]];
    table->older[row] = (int32_t)*newest;
    table->newer[row] = NONE;
    if (*newest == NONE) *oldest = row; else table->newer[*newest] = (int32_t)row;
    *newest = row;
    table->used_at[row] = step;
}

static void use_again(Table *table, int64_t row, int64_t step) {
    unlink_row(table, row);
    if (table->level[row] + 1 < table->levels) table->level[row]++;
    link_newest(table, row, step);
}

/* Of the lowest level the longest unused; of a level whose longest unused is in use now, all are. */
static int64_t first_to_go(const Table *table, int64_t step) {
    int64_t at = 0;
    while (table->oldest[at] == NONE || table->used_at[table->oldest[at]] == step) at++;
    return table->oldest[at];
}

static void drop_row(Table *table, int64_t row) {
    forget_cell(table, cell_of(table, table->row_ids[row]));
    unlink_row(table, row);
    table->row_ids[row] = ~0ull;
    table->newer[row] = (int32_t)table->first_free;
    table->older[row] = -2; /* free */
    table->first_free = row;
}

static int is_admitted(Table *table, uint64_t id, int64_t step) {
    if (table->seen) { /* a count-min sketch of two rows: it may admit early, never late */
        uint64_t hash = mixed(id ^ table->admission_key);
        uint8_t *one = &table->seen[hash & table->seen_mask], *two = &table->seen[(hash >> 32) & table->seen_mask];
        uint8_t count = *one < *two ? *one : *two;
        if (count + 1 < table->admission_count) {
            if (*one == count) (*one)++;
            if (*two == count && two != one) (*two)++;
            return 0;
        }
    }
    return mixed(mixed(id ^ table->admission_key) + (uint64_t)step) <= table->admission_below;
}

void capstan_initial(const Table *table, uint64_t id, float *row) {
    uint64_t key = mixed(id ^ table->init_key);
    for (int64_t j = 0; j < table->dim; j++)
        row[j] = table->init_low
                 + table->init_width * (float)(mixed(key + (uint64_t)(j + 1) * 0x9e3779b97f4a7c15ull) >> 40) * 0x1p-24f;
    for (int64_t j = 0; j < table->state_floats; j++) row[table->dim + j] = table->init_state;
}

static int64_t new_row(Table *table) {
    if (table->first_free != NONE) {
        int64_t row = table->first_free;
        table->first_free = table->newer[row];
        return row;
    }
    if (table->used < table->capacity) return table->used++;
    return NONE;
}

/* Rows of distinct IDs, NONE where there is none. `trains`: use is noted, and IDs without a row are given one. */
int capstan_probe(Table *table, const uint64_t *ids, int64_t count, int64_t *rows, int trains, int64_t step) {
    if (trains && table->time_to_live)
        while (*table->oldest != NONE && step - table->used_at[*table->oldest] > table->time_to_live) {
            drop_row(table, *table->oldest);
            table->expired++;
        }
    int64_t missing = 0;
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count)
            __builtin_prefetch(&table->cells[mixed(ids[i + AHEAD]) & (uint64_t)table->cell_mask], 1);
        rows[i] = table->cells[cell_of(table, ids[i])].row;
        missing += rows[i] == NONE;
    }
    if (!trains) return LOOKED_UP;
    if (missing && (table->seen || table->admission_below != ~0ull))
        for (int64_t i = 0; i < count; i++)
            if (rows[i] == NONE && !is_admitted(table, ids[i], step)) {
                rows[i] = -2;
                missing--;
                table->refused++;
            }
    int64_t live = table->inserted - table->evicted - table->expired;
    if (live + missing > table->capacity) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) kept += rows[i] >= 0;
        if (!table->older) return TABLE_FULL;
        if (kept + missing > table->capacity) return BATCH_TOO_LARGE;
    }
    if (table->older)
        for (int64_t i = 0; i < count; i++) {
            if (i + AHEAD < count && rows[i + AHEAD] >= 0) __builtin_prefetch(&table->used_at[rows[i + AHEAD]], 1);
            if (rows[i] >= 0) use_again(table, rows[i], step);
        }
    for (int64_t i = 0; i < count && missing; i++) {
        if (rows[i] != NONE) continue;
        int64_t row = new_row(table);
        if (row == NONE) {
            drop_row(table, first_to_go(table, step));
            table->evicted++;
            row = new_row(table);
        }
        table->cells[cell_of(table, ids[i])] = (Cell){ids[i], row};
        table->row_ids[row] = ids[i];
        if (table->older) {
            table->level[row] = 0;
            link_newest(table, row, step);
        }
        capstan_initial(table, ids[i], table->slab + row * table->stride);
        table->inserted++;
        rows[i] = row;
        missing--;
    }
    for (int64_t i = 0; i < count; i++)
        if (rows[i] == -2) rows[i] = NONE;
    return LOOKED_UP;
}

/* Put rows under IDs that have none, as they come: loading. The caller checked that they fit. */
void capstan_insert(Table *table, const uint64_t *ids, int64_t count, const float *from, const int64_t *used_at,
                    const uint8_t *level) {
    for (int64_t i = 0; i < count; i++) {
        int64_t row = new_row(table);
        table->cells[cell_of(table, ids[i])] = (Cell){ids[i], row};
        table->row_ids[row] = ids[i];
        if (table->older) {
            table->level[row] = level[i] < table->levels ? level[i] : (uint8_t)(table->levels - 1);
            link_newest(table, row, used_at[i]);
        }
        memcpy(table->slab + row * table->stride, from + i * table->stride, (size_t)table->stride * 4);
        table->inserted++;
    }
}

/* Rows that hold an ID; where use is noted the seldom used first, of equals the longest unused. */
int64_t capstan_live_rows(const Table *table, int64_t *rows) {
    int64_t count = 0;
    if (table->older)
        for (int64_t at = 0; at < table->levels; at++)
            for (int64_t row = table->oldest[at]; row != NONE; row = table->newer[row]) rows[count++] = row;
    else
        for (int64_t row = 0; row < table->used; row++) rows[count++] = row;
    return count;
}

/* --- threads ------------------------------------------------------------------------------------------- */

typedef struct Job Job;
struct Job {
    const Table *table;
    const int64_t *rows, *offsets;
    const int32_t *inverse, *starts, *bag_of_sorted;
    const uint64_t *ids;
    const Rule *rule;
    const float *grads;
    float *out;
    int64_t width;            /* floats from a bag's vector to the next */
    int32_t pooling;
    void (*work)(Job *);
    int64_t begin, end, late;
    int failed;
};

static void *run_job(void *job) {
    ((Job *)job)->work(job);
    return NULL;
}

static int64_t divide(Job *whole, int64_t count, int64_t floats, int32_t threads) {
    int64_t most = 1 + floats / WORTH_A_THREAD, late = 0;
    if (threads > most) threads = (int32_t)most;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    Job jobs[MOST_THREADS];
    pthread_t started[MOST_THREADS];
    int is_started[MOST_THREADS] = {0};
    for (int32_t t = 0; t < threads; t++) {
        jobs[t] = *whole;
        jobs[t].begin = count * t / threads;
        jobs[t].end = count * (t + 1) / threads;
        if (t) is_started[t] = !pthread_create(&started[t], NULL, run_job, &jobs[t]);
    }
    for (int32_t t = 0; t < threads; t++) {
        if (is_started[t]) pthread_join(started[t], NULL);
        else run_job(&jobs[t]);
        late += jobs[t].late;
        whole->failed |= jobs[t].failed;
    }
    return late;
}

static inline void prefetch_floats(const float *from, int64_t count, int writes) {
    for (int64_t at = 0; at < count; at += 16) {
        if (writes) __builtin_prefetch(from + at, 1);
        else __builtin_prefetch(from + at, 0);
    }
}

static inline void prefetch_row(const Table *table, int64_t row, int64_t floats, int writes) {
    if (row >= 0) prefetch_floats(table->slab + row * table->stride, floats, writes);
}

static inline float scale_of(int32_t pooling, int64_t size) {
    if (pooling == SUM || size < 2) return 1.0f;
    return pooling == MEAN ? 1.0f / (float)size : 1.0f / sqrtf((float)size);
}

/* --- forward ------------------------------------------------------------------------------------------- */

static inline __attribute__((always_inline)) void pool_bags_of(Job *job, const int64_t dim) {
    const Table *table = job->table;
    int64_t last = job->offsets[job->end];
    for (int64_t bag = job->begin; bag < job->end; bag++) {
        float *restrict out = job->out + bag * job->width;
        int64_t begin = job->offsets[bag], end = job->offsets[bag + 1], is_empty = 1;
        for (int64_t i = begin; i < end; i++) {
            if (i + ROWS_AHEAD < last) prefetch_row(table, job->rows[job->inverse[i + ROWS_AHEAD]], dim, 0);
            int64_t row = job->rows[job->inverse[i]];
            if (row < 0) continue;
            const float *restrict from = table->slab + row * table->stride;
            if (is_empty) memcpy(out, from, (size_t)dim * 4);
            else for (int64_t j = 0; j < dim; j++) out[j] += from[j];
            is_empty = 0;
        }
        if (is_empty) memset(out, 0, (size_t)dim * 4);
        float scale = scale_of(job->pooling, end - begin);
        if (scale != 1.0f) for (int64_t j = 0; j < dim; j++) out[j] *= scale;
    }
}

/* The common widths are compiled in, so that a row's loop is a few vector operations. */
#define FOR_DIM(work, job) \
    switch ((job)->table->dim) { \
    case 16: work(job, 16); break; \
    case 32: work(job, 32); break; \
    case 64: work(job, 64); break; \
    case 128: work(job, 128); break; \
    default: work(job, (job)->table->dim); \
    }

static void pool_bags(Job *job) { FOR_DIM(pool_bags_of, job) }

void capstan_pool(const Table *table, const int64_t *rows, const int32_t *inverse, const int64_t *offsets,
                  int64_t bags, int32_t pooling, float *out, int64_t width, int32_t threads) {
    Job job = {.table = table, .rows = rows, .inverse = inverse, .offsets = offsets, .pooling = pooling,
               .out = out, .width = width, .work = pool_bags};
    divide(&job, bags, offsets[bags] * table->dim, threads);
}

/* --- backward and update ------------------------------------------------------------------------------- */

static inline __attribute__((always_inline)) void apply(const Rule *rule, float *restrict row, float *restrict g,
                                                        const int64_t dim) {
    float *restrict state = row + dim, lr = rule->lr, eps = rule->eps;
    if (rule->weight_decay != 0) for (int64_t j = 0; j < dim; j++) g[j] += rule->weight_decay * row[j];
    switch (rule->kind) {
    case SGD:
        if (rule->momentum == 0) {
            for (int64_t j = 0; j < dim; j++) row[j] -= lr * g[j];
            break;
        }
        for (int64_t j = 0; j < dim; j++) {
            state[j] = rule->momentum * state[j] + g[j];
            row[j] -= lr * state[j];
        }
        break;
    case ADAGRAD:
        for (int64_t j = 0; j < dim; j++) {
            state[j] += g[j] * g[j];
            row[j] -= lr * g[j] / (sqrtf(state[j]) + eps);
        }
        break;
    case OLD_ADAGRAD:
        for (int64_t j = 0; j < dim; j++) {
            row[j] -= lr * g[j] / sqrtf(state[j] + eps);
            state[j] += g[j] * g[j];
        }
        break;
    case ROW_WISE_ADAGRAD: {
        float squares = 0;
        for (int64_t j = 0; j < dim; j++) squares += g[j] * g[j];
        state[0] += squares / (float)dim;
        float rate = lr / (sqrtf(state[0]) + eps);
        for (int64_t j = 0; j < dim; j++) row[j] -= rate * g[j];
        break;
    }
    case ADAM: { /* lr comes with the bias corrections in it */
        float *restrict second = state + dim;
        for (int64_t j = 0; j < dim; j++) {
            state[j] += rule->first_share * (g[j] - state[j]);
            second[j] += rule->second_share * (g[j] * g[j] - second[j]);
            row[j] -= lr * state[j] / (sqrtf(second[j]) + eps);
        }
    }
    }
    if (rule->bound > 0)
        for (int64_t j = 0; j < dim; j++) row[j] = fminf(fmaxf(row[j], -rule->bound), rule->bound);
}

static inline __attribute__((always_inline)) void update_rows_of(Job *job, const int64_t dim) {
    const Table *table = job->table;
    float *restrict g = malloc((size_t)dim * 4);
    if (!g) { job->failed = 1; return; }
    int32_t last = job->starts[job->end];
    for (int64_t u = job->begin; u < job->end; u++) {
        if (u + ROWS_AHEAD < job->end) prefetch_row(table, job->rows[u + ROWS_AHEAD], table->stride, 1);
        int64_t row = job->rows[u];
        if (row < 0) continue;
        if (table->row_ids[row] != job->ids[u]) { /* evicted since it was looked up */
            job->late++;
            continue;
        }
        for (int32_t i = job->starts[u]; i < job->starts[u + 1]; i++) {
            if (i + ROWS_AHEAD < last) prefetch_floats(job->grads + job->bag_of_sorted[i + ROWS_AHEAD] * job->width, dim, 0);
            int64_t bag = job->bag_of_sorted[i];
            const float *restrict from = job->grads + bag * job->width;
            float scale = scale_of(job->pooling, job->offsets[bag + 1] - job->offsets[bag]);
            if (i == job->starts[u]) for (int64_t j = 0; j < dim; j++) g[j] = scale * from[j];
            else for (int64_t j = 0; j < dim; j++) g[j] += scale * from[j];
        }
        apply(job->rule, table->slab + row * table->stride, g, dim);
    }
    free(g);
}

static void update_rows(Job *job) { FOR_DIM(update_rows_of, job) }

int capstan_is_finite(const uint32_t *patterns, int64_t count) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; i++) found |= (patterns[i] & 0x7f800000u) == 0x7f800000u;
    return !found;
}

/* Sum the gradients of each distinct ID and apply them. Returns how many rows had gone, or -1: no memory. */
int64_t capstan_update(const Table *table, const Rule *rule, const uint64_t *ids, const int64_t *rows,
                       int64_t count, const int32_t *starts, const int32_t *bag_of_sorted,
                       const int64_t *offsets, int32_t pooling, const float *grads, int64_t width,
                       int32_t threads) {
    Job job = {.table = table, .rule = rule, .ids = ids, .rows = rows, .starts = starts,
               .bag_of_sorted = bag_of_sorted, .offsets = offsets, .pooling = pooling, .grads = grads,
               .width = width, .work = update_rows};
    int64_t late = divide(&job, count, count * table->stride, threads);
    return job.failed ? -1 : late;
}
