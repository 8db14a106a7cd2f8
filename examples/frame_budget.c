/* frame_budget.c - 60 frames a second while a character talks: a game loop whose language model
 * runs in what the frame leaves over, stops at the deadline and goes on in the next frame.
 *
 *   cc -O3 -march=native -I. examples/frame_budget.c -o frame_budget -pthread -lm
 *
 * The game: a flock of particles, simulated and drawn by software every frame, on one thread. The
 * character has read a document and answers the player's questions about it, one after another,
 * token by token. Its forward step is a queue of tasks of some ten microseconds: those of llama.h's
 * operations and of the attention plan, whose max_task_cost keeps each one short. The frame's
 * thread takes tasks until the budget is used up, a second thread does so from the frame's start.
 * A task is taken only if its estimate fits: its cost times the largest time per cost seen lately.
 * At the end the same answers are computed at once, without slices: tokens and logits must be the
 * same bit for bit, else the exit status is 1. `frame_budget --help` lists the options. */
#define LLAMA_IMPLEMENTATION
#include "llama.h"
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"

#include <sched.h>
#include <time.h>

#define FRAME_NS 16666667  /* 60 Hz */
#define TASK_NS 250000     /* longest attention task that the plan is asked for */
#define QUANTUM_NS 40000   /* small tasks are taken together up to this */
#define CALL_COST 256      /* of an attention call itself, in the plan's unit */
#define MARGIN 1.5         /* an estimate may be that wrong */
#define STORE_ROWS 16      /* tokens per task of storing K and V */
#define CHECK_CHUNK 512    /* tokens per step of the check without slices */
#define SAID_PER_FRAME 256 /* tokens at most, to have room for them */
#define FAST_LIMIT 20      /* times the frames that --fast may take */
#define FAST_DOCUMENT 700  /* bytes of the document that it reads */

typedef struct options {
    const char *model, *document, *questions;
    int32_t frames, fast, threads, chunk, answer, agents, show;
    double budget_ms;
} options;

static const char usage[] =
    "frame_budget: 60 frames a second while a character talks\n"
    "\n"
    "  --frames N         frames to show               (1200)\n"
    "  --fast             a short run that does not wait for the next frame\n"
    "  --budget MS        work per frame at most       (14)\n"
    "  --threads N        1 or 2 that think            (2)\n"
    "  --chunk N          prompt tokens per step       (128)\n"
    "  --answer N         tokens per answer            (48)\n"
    "  --agents N         size of the game's flock     (13000)\n"
    "  --show             draw the scene on the terminal\n"
    "  --model FILE       GGUF file                    (examples/models/recall.gguf)\n"
    "  --document FILE    what the character knows     (examples/data/document.txt)\n"
    "  --questions FILE   lines question<TAB>expected  (examples/data/questions.txt)\n";

static void die(const char *what, const char *why) {
    fprintf(stderr, "frame_budget: %s: %s\n", what, why);
    exit(2);
}

static void need(attn_result r, const char *what) {
    if (r != ATTN_OK) die(what, attn_result_string(r));
}

/* Zeroed, starts at a multiple of 64, lives until free_all. */
static void *blocks;

static void *get(size_t n, size_t size) {
    void *p = size && n > (SIZE_MAX - 128) / size ? NULL : calloc(n * size + 128, 1);
    if (!p) die("memory", "out of it");
    *(void **)p = blocks;
    blocks = p;
    return (char *)p + 128 - (uintptr_t)p % 64;
}

static void free_all(void) {
    while (blocks) {
        void *next = *(void **)blocks;
        free(blocks);
        blocks = next;
    }
}

static int64_t clock_ns(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
static int64_t cpu_ns(void) { return clock_ns(CLOCK_THREAD_CPUTIME_ID); }

/* ==== the game: a flock that keeps together, apart and aligned; every agent glows ==== */

enum { WIDTH = 480, HEIGHT = 270, CELL = 6, GRID_X = WIDTH / CELL, GRID_Y = HEIGHT / CELL,
       GLOW = 9, LOOKS = 64 };

typedef struct game {
    int32_t n, *next, *cell;           /* agents of a cell: a list */
    float *x, *y, *vx, *vy;
    float light[HEIGHT][WIDTH];
    float glow[GLOW][GLOW];
    uint8_t pixel[HEIGHT][WIDTH][3];   /* the picture */
    double mouth;                      /* 0 closed .. 1 open */
} game;

static float noise(uint32_t *s) { /* 0 .. 1 */
    *s = *s * 1664525u + 1013904223u;
    return (float)(*s >> 8) / 16777216.0f;
}

static game *game_create(int32_t n) {
    game *g = (game *)get(1, sizeof *g);
    uint32_t seed = 1;
    g->n = n;
    g->next = (int32_t *)get((size_t)n, sizeof *g->next);
    g->cell = (int32_t *)get(GRID_X * GRID_Y, sizeof *g->cell);
    g->x = (float *)get((size_t)n, 4 * sizeof *g->x);
    g->y = g->x + n;
    g->vx = g->y + n;
    g->vy = g->vx + n;
    for (int32_t i = 0; i < n; i++) {
        g->x[i] = noise(&seed) * WIDTH;
        g->y[i] = noise(&seed) * HEIGHT;
        g->vx[i] = noise(&seed) * 2 - 1;
        g->vy[i] = noise(&seed) * 2 - 1;
    }
    for (int y = 0; y < GLOW; y++)
        for (int x = 0; x < GLOW; x++)
            g->glow[y][x] = expf(-0.3f * (float)((x - 4) * (x - 4) + (y - 4) * (y - 4)));
    return g;
}

static int cell_of(const game *g, int32_t i) {
    int cx = (int)g->x[i] / CELL, cy = (int)g->y[i] / CELL;
    cx = cx < 0 ? 0 : cx >= GRID_X ? GRID_X - 1 : cx;
    cy = cy < 0 ? 0 : cy >= GRID_Y ? GRID_Y - 1 : cy;
    return cy * GRID_X + cx;
}

/* Steers agent i by those in the cells around it; a crowd costs no more than LOOKS of them. */
static void game_steer(game *g, int32_t i) {
    int c = cell_of(g, i), cx = c % GRID_X, cy = c / GRID_X, n = 0, looks = 0;
    float sx = 0, sy = 0, svx = 0, svy = 0, ax = 0, ay = 0;
    for (int y = cy > 0 ? cy - 1 : 0; y <= cy + 1 && y < GRID_Y; y++)
        for (int x = cx > 0 ? cx - 1 : 0; x <= cx + 1 && x < GRID_X; x++)
            for (int32_t j = g->cell[y * GRID_X + x]; j >= 0 && looks++ < LOOKS; j = g->next[j]) {
                float dx = g->x[i] - g->x[j], dy = g->y[i] - g->y[j], d = dx * dx + dy * dy;
                if (j == i || d > CELL * CELL) continue;
                sx += g->x[j], sy += g->y[j], svx += g->vx[j], svy += g->vy[j], n++;
                ax += dx / (d + 0.5f), ay += dy / (d + 0.5f);
            }
    if (n) {
        float k = 1.0f / (float)n;
        g->vx[i] += 0.02f * (sx * k - g->x[i]) + 0.08f * (svx * k - g->vx[i]) + 0.25f * ax * k;
        g->vy[i] += 0.02f * (sy * k - g->y[i]) + 0.08f * (svy * k - g->vy[i]) + 0.25f * ay * k;
    }
    g->vx[i] += (WIDTH / 2 - g->x[i]) * 2e-4f; /* the character's lamp draws them */
    g->vy[i] += (HEIGHT / 2 - g->y[i]) * 4e-4f;
    float v = sqrtf(g->vx[i] * g->vx[i] + g->vy[i] * g->vy[i]);
    if (v > 1.5f) g->vx[i] *= 1.5f / v, g->vy[i] *= 1.5f / v;
}

static void game_update(game *g) {
    for (int c = 0; c < GRID_X * GRID_Y; c++) g->cell[c] = -1;
    for (int32_t i = 0; i < g->n; i++) {
        int c = cell_of(g, i);
        g->next[i] = g->cell[c];
        g->cell[c] = i;
    }
    for (int32_t i = 0; i < g->n; i++) game_steer(g, i);
    for (int32_t i = 0; i < g->n; i++) {
        g->x[i] += g->vx[i];
        g->y[i] += g->vy[i];
        if (g->x[i] < 8 || g->x[i] > WIDTH - 8) g->vx[i] = g->x[i] < 8 ? 1.0f : -1.0f;
        if (g->y[i] < 8 || g->y[i] > HEIGHT - 8) g->vy[i] = g->y[i] < 8 ? 1.0f : -1.0f;
    }
}

static void game_draw(game *g) {
    int lip = 2 + (int)(10 * g->mouth);
    for (int y = 0; y < HEIGHT; y++)
        for (int x = 0; x < WIDTH; x++) g->light[y][x] *= 0.82f; /* trails */
    for (int32_t i = 0; i < g->n; i++) {
        int x0 = (int)g->x[i] - GLOW / 2, y0 = (int)g->y[i] - GLOW / 2;
        if (x0 < 0 || y0 < 0 || x0 + GLOW > WIDTH || y0 + GLOW > HEIGHT) continue;
        for (int y = 0; y < GLOW; y++)
            for (int x = 0; x < GLOW; x++) g->light[y0 + y][x0 + x] += 0.2f * g->glow[y][x];
    }
    for (int y = -lip; y <= lip; y++) /* a mouth that opens with every word */
        for (int x = -30; x <= 30; x++)
            if (x * x * lip * lip + y * y * 900 <= 900 * lip * lip)
                g->light[HEIGHT / 2 + y][WIDTH / 2 + x] = 3;
    for (int y = 0; y < HEIGHT; y++)
        for (int x = 0; x < WIDTH; x++) {
            float v = g->light[y][x], t = v / (1 + v);
            g->pixel[y][x][0] = (uint8_t)(255 * t);
            g->pixel[y][x][1] = (uint8_t)(220 * t * t);
            g->pixel[y][x][2] = (uint8_t)(60 + 180 * t * t * t);
        }
    g->mouth *= 0.8;
}

static void game_show(const game *g, const char *line) {
    enum { COLUMNS = 79, ROWS = 22 };
    static char out[ROWS * (COLUMNS + 1) + 1];
    char *at = out;
    for (int y = 0; y < ROWS; y++, *at++ = '\n')
        for (int x = 0; x < COLUMNS; x++)
            *at++ = " .:-=+*#%@"[g->pixel[y * HEIGHT / ROWS][x * WIDTH / COLUMNS][0] * 10 / 256];
    printf("\033[H%.*s\033[K%s\n", (int)(at - out), out, line);
    fflush(stdout);
}

/* ==== the character ==== */

/* What a turn of the talk says; logits by their hash, so that every bit counts. */
typedef struct said {
    int32_t token;
    uint64_t hash;
} said;

typedef struct question {
    const char *text, *expected;
    int32_t *ids, n_ids;
} question;

/* Kinds of operations, each with a time per cost of its own. */
enum { BATCH, EMBED, QKV, STORE, ATTEND, MERGE, OUT, LOGITS, SAMPLE, N_KINDS };
enum { SUB_KINDS = N_KINDS * LLAMA_MAX_OPS };
typedef struct mind {
    const llama_model *m;
    llama_state *s;
    attn_desc d;
    attn_plan *plan;
    attn_plan_params params;
    void *partials, *scratch[2];
    uint8_t **k, **v;          /* (n_layers) one long page each */
    int32_t q_start[2], q_pos0, kv_len, *pos;
    float *logits;

    const question *q;         /* the talk: question after question, then from the start */
    int32_t n_q, n_answer, chunk, turn;
    int32_t *ids, n_ids, n_kv; /* tokens of the turn; those whose K and V are stored */
    int32_t n_prompt;
    said *said;                /* turn after turn */
    int64_t n_said, cap_said, prompt_tokens;
    int status;                /* atomic: attn_result */

    /* the queue: one operation at a time */
    pthread_mutex_t lock;
    int kind, layer, at, n_ops;
    llama_op ops[LLAMA_MAX_OPS];
    llama_task fn;
    void *ctx;
    int64_t n_tasks, next, done; /* done: atomic */
    double cost;                 /* of a task, where they are alike */
    int64_t deadline;            /* atomic */
    int finished;                /* atomic */
} mind;

static void note(mind *c, attn_result r) {
    if (r) __atomic_store_n(&c->status, (int)r, __ATOMIC_RELAXED);
}

/* Which tokens the next step runs: a chunk of the question's prompt or the token just said. What
 * the prompt has in common with the turn before is stored already. */
static void batch_task(void *ctx, int64_t task, int32_t thread) {
    mind *c = (mind *)ctx;
    (void)task;
    (void)thread;
    if (c->n_ids == c->n_prompt + c->n_answer || !c->n_ids) {
        const question *q = &c->q[c->turn++ % c->n_q];
        int32_t same = 0, most = c->n_kv < q->n_ids - 1 ? c->n_kv : q->n_ids - 1;
        while (same < most && c->ids[same] == q->ids[same]) same++;
        memcpy(c->ids, q->ids, (size_t)q->n_ids * sizeof *c->ids);
        c->n_ids = c->n_prompt = q->n_ids;
        c->n_kv = same;
        c->prompt_tokens += q->n_ids - same;
    }
    int32_t n = c->n_ids - c->n_kv < c->chunk ? c->n_ids - c->n_kv : c->chunk;
    for (int32_t i = 0; i < n; i++) c->pos[i] = c->n_kv + i;
    c->q_start[1] = n;
    c->q_pos0 = c->n_kv;
    c->kv_len = c->n_kv + n;
    if (c->plan) note(c, attn_plan_update(c->plan, &c->d, NULL));
}

static void store_task(void *ctx, int64_t task, int32_t thread) {
    mind *c = (mind *)ctx;
    attn_tensor k, v;
    int64_t first = task * STORE_ROWS, left = c->q_start[1] - first;
    (void)thread;
    memset(&k, 0, sizeof k);
    k.dtype = ATTN_F32;
    v = k;
    k.data = c->s->k;
    v.data = c->s->v;
    note(c, attn_cpu_store(&c->d, &k, &v, NULL, first, left < STORE_ROWS ? left : STORE_ROWS));
}

static void attend_task(void *ctx, int64_t task, int32_t thread) {
    mind *c = (mind *)ctx;
    note(c, attn_cpu_run(&c->d, c->plan, (int32_t)task, 1, c->partials, c->scratch[thread]));
}

static void merge_task(void *ctx, int64_t task, int32_t thread) {
    mind *c = (mind *)ctx;
    (void)thread;
    note(c, attn_cpu_merge(&c->d, c->plan, (int32_t)task, 1, c->partials));
}

static uint64_t hash_floats(const float *x, int32_t n) { /* FNV-1a over the bits */
    uint64_t h = 1469598103934665603u;
    for (int32_t i = 0; i < n; i++) h = (h ^ attni_bits32(x[i])) * 1099511628211u;
    return h;
}

static void sample_task(void *ctx, int64_t task, int32_t thread) {
    mind *c = (mind *)ctx;
    llama_sampler greedy = {0, 1, 0, 0};
    (void)task;
    (void)thread;
    said *w = &c->said[c->n_said];
    w->token = llama_sample(&greedy, c->logits, c->m->n_vocab);
    w->hash = hash_floats(c->logits, c->m->n_vocab);
    c->ids[c->n_ids++] = w->token;
    __atomic_store_n(&c->n_said, c->n_said + 1, __ATOMIC_RELEASE);
}

static const int32_t first_row = 0;

static void set_op(mind *c, llama_task fn, int64_t n_tasks, double cost) {
    c->fn = fn;
    c->ctx = c;
    c->n_tasks = n_tasks;
    c->cost = cost;
    c->n_ops = 1;
}

/* The operation that follows kind. */
static int next_kind(mind *c) {
    switch (c->kind) {
    case MERGE: return OUT;
    case OUT:
        if (++c->layer < c->m->n_layers) return QKV;
        c->n_kv = c->kv_len;
        return c->n_kv == c->n_ids ? LOGITS : BATCH;
    case SAMPLE: return BATCH;
    default: return c->kind + 1;
    }
}

/* Moves the queue on to the next operation; under the lock, all tasks being done. */
static void advance(mind *c) {
    if (++c->at >= c->n_ops) {
        int32_t n = c->q_start[1];
        c->kind = next_kind(c);
        c->at = 0;
        switch (c->kind) {
        case BATCH:
            if (c->n_said == c->cap_said) __atomic_store_n(&c->finished, 1, __ATOMIC_RELEASE);
            set_op(c, batch_task, 1, 1);
            break;
        case EMBED:
            c->layer = 0;
            c->n_ops = llama_embed_ops(c->m, c->s, c->ids + c->n_kv, c->pos, n, c->ops);
            break;
        case QKV: c->n_ops = llama_qkv_ops(c->m, c->s, c->layer, c->ops); break;
        case STORE:
            c->d.kv.k.data = c->k[c->layer];
            c->d.kv.v.data = c->v[c->layer];
            set_op(c, store_task, (n + STORE_ROWS - 1) / STORE_ROWS,
                   n < STORE_ROWS ? n : STORE_ROWS);
            break;
        case ATTEND: set_op(c, attend_task, c->plan->n_tasks, 0); break;
        case MERGE: set_op(c, merge_task, c->plan->n_merges, 0); break;
        case OUT: c->n_ops = llama_out_ops(c->m, c->s, c->layer, c->ops); break;
        case LOGITS: /* of the last row */
            if (n > 1) memcpy(c->s->x, c->s->x + (size_t)(n - 1) * (size_t)c->m->d_model,
                              (size_t)c->m->d_model * sizeof *c->s->x);
            c->n_ops = llama_logits_ops(c->m, c->s, &first_row, 1, c->logits, c->ops);
            break;
        default: set_op(c, sample_task, 1, 1); break;
        }
    }
    if (c->kind == EMBED || c->kind == QKV || c->kind == OUT || c->kind == LOGITS) {
        llama_op *op = &c->ops[c->at];
        c->fn = op->fn;
        c->ctx = &op->ctx;
        c->n_tasks = op->n_tasks;
        c->cost = op->cost;
    }
    c->next = 0;
    __atomic_store_n(&c->done, 0, __ATOMIC_RELAXED);
}

/* Attention tasks whose keys are all masked cost nothing by the plan; calling them does. */
static double task_cost(const mind *c, int64_t i) {
    if (c->kind == ATTEND) return (double)c->plan->task[i].cost + CALL_COST;
    return c->kind == MERGE ? (double)c->plan->merge[i].cost + CALL_COST : c->cost;
}

/* ---- a thread that thinks */

typedef struct thinker {
    mind *c;
    int32_t thread;
    int may_wait;            /* for the lock: not the frame's thread */
    double rate[SUB_KINDS];  /* ns per cost: the largest seen lately */
    int64_t units, longest;  /* tasks taken together, ns of the longest */
    double busy_ns;
} thinker;

typedef struct unit {
    llama_task fn;
    void *ctx;
    int64_t first, count;
    double cost;
    int kind;
} unit;

/* Takes tasks that fit into left_ns. 0: none is free just now; -1: the next one does not fit. */
static int claim(thinker *t, int64_t left_ns, unit *u) {
    mind *c = t->c;
    int got = 0;
    if (t->may_wait) pthread_mutex_lock(&c->lock);
    else if (pthread_mutex_trylock(&c->lock)) return 0; /* its holder may have lost its core */
    if (c->next == c->n_tasks && __atomic_load_n(&c->done, __ATOMIC_ACQUIRE) == c->n_tasks &&
        !c->finished)
        do advance(c);
        while (!c->n_tasks);
    if (c->finished) got = -1;
    else if (c->next < c->n_tasks) {
        double rate, limit = (double)left_ns / MARGIN, share;
        int64_t left = c->n_tasks - c->next, most = (left + 1) / 2; /* leave some to the other */
        u->kind = c->kind * LLAMA_MAX_OPS + c->at;
        u->fn = c->fn;
        u->ctx = c->ctx;
        u->first = c->next;
        u->count = 0;
        u->cost = 0;
        rate = t->rate[u->kind];
        share = limit < QUANTUM_NS ? limit : QUANTUM_NS;
        do {
            double more = task_cost(c, c->next);
            if ((u->cost + more) * rate > (u->count ? share : limit)) break;
            u->cost += more;
            u->count++;
            c->next++;
        } while (u->count < most);
        got = u->count ? 1 : -1;
    }
    pthread_mutex_unlock(&c->lock);
    return got;
}

/* Runs tasks until the deadline, or until none fits. */
static void think(thinker *t) {
    mind *c = t->c;
    int spins = 0;
    for (;;) {
        unit u;
        int64_t from = now_ns(), left = __atomic_load_n(&c->deadline, __ATOMIC_ACQUIRE) - from, ns;
        int got = left > 0 ? claim(t, left, &u) : -1;
        if (got < 0) {
            /* an estimate spoilt once must not stop the character for ever */
            for (int i = 0; i < SUB_KINDS; i++) t->rate[i] *= 0.98;
            return;
        }
        if (!got) {
            if (++spins % 256) llama_relax();
            else sched_yield(); /* the other thread may need this core to finish its tasks */
            continue;
        }
        int64_t c0 = cpu_ns();
        for (int64_t i = u.first; i < u.first + u.count; i++) u.fn(u.ctx, i, t->thread);
        ns = cpu_ns() - c0; /* being interrupted says nothing about the next task */
        __atomic_add_fetch(&c->done, u.count, __ATOMIC_RELEASE);
        double rate = (double)ns / u.cost, *seen = &t->rate[u.kind];
        *seen = rate > *seen ? rate : *seen * 0.995 + rate * 0.005;
        if (ns > t->longest) t->longest = ns;
        t->busy_ns += (double)ns;
        t->units++;
    }
}

/* ---- setting up */

static void open_plan(mind *c, double max_task_cost) {
    size_t bytes;
    attn_cpu_plan_params(&c->d, 2, &c->params);
    c->params.max_task_cost = (float)max_task_cost;
    c->params.max_tokens = c->s->cap;
    c->params.max_kv_len = c->d.kv.page_tokens;
    c->params.partial_bytes = 4 * (size_t)(c->m->v_head_dim + 2) * (size_t)c->s->cap *
                              (size_t)c->m->n_heads *
                              (size_t)(c->d.kv.page_tokens / ATTN_SPAN + 2);
    bytes = attn_plan_bytes(&c->d, &c->params);
    need(attn_plan_build(&c->d, &c->params, get(bytes, 1), bytes, &c->plan), "planning");
    c->partials = get(c->params.partial_bytes, 1);
    for (int i = 0; i < 2; i++) c->scratch[i] = get(attn_cpu_scratch_bytes(&c->d, c->plan), 1);
}

static void open_mind(mind *c, const llama_model *m, const question *q, int32_t n_q,
                      const options *o, int32_t chunk, int64_t cap_said) {
    attn_desc *d = &c->d;
    int32_t len = 0;
    memset(c, 0, sizeof *c);
    for (int32_t i = 0; i < n_q; i++) len = q[i].n_ids > len ? q[i].n_ids : len;
    len = (len + o->answer + 15) / 16 * 16;
    c->m = m;
    c->q = q;
    c->n_q = n_q;
    c->n_answer = o->answer;
    c->chunk = chunk;
    c->s = llama_state_create(m, chunk);
    if (!c->s) die("memory", "out of it");
    c->ids = (int32_t *)get((size_t)len, sizeof *c->ids);
    c->pos = (int32_t *)get((size_t)chunk, sizeof *c->pos);
    c->logits = (float *)get((size_t)m->n_vocab, sizeof *c->logits);
    c->said = (said *)get((size_t)cap_said, sizeof *c->said);
    c->cap_said = cap_said;
    pthread_mutex_init(&c->lock, NULL);
    d->n_seq = 1;
    d->q_start = c->q_start;
    d->q_pos0 = &c->q_pos0;
    d->n_heads = m->n_heads;
    d->n_kv_heads = m->n_kv_heads;
    d->head_dim = m->head_dim;
    d->v_head_dim = m->v_head_dim;
    d->q.data = c->s->q;
    d->o.data = c->s->att;
    d->q.dtype = d->o.dtype = d->kv.k.dtype = d->kv.v.dtype = ATTN_F32;
    d->kv.layout = ATTN_K16;
    d->kv.n_pages = 1;
    d->kv.page_tokens = len;
    d->kv.kv_len = &c->kv_len;
    c->k = (uint8_t **)get((size_t)m->n_layers, sizeof *c->k);
    c->v = (uint8_t **)get((size_t)m->n_layers, sizeof *c->v);
    for (int32_t l = 0; l < m->n_layers; l++) {
        c->k[l] = (uint8_t *)get(attn_kv_page_bytes(d, 0), 1);
        c->v[l] = (uint8_t *)get(attn_kv_page_bytes(d, 1), 1);
    }
    d->kv.k.data = c->k[0];
    d->kv.v.data = c->v[0];
    batch_task(c, 0, 0); /* the first step, so that there is something to plan */
}

static void rewind_mind(mind *c) {
    c->turn = c->n_ids = c->n_kv = 0;
    c->n_said = c->prompt_tokens = 0;
    c->kind = SAMPLE; /* what BATCH follows */
    c->at = c->n_ops = 0;
    c->next = c->n_tasks = c->done = 0;
}

/* A loading screen's work: runs a little of the prompt and of an answer without a deadline, which
 * leaves a time per cost of every kind, then starts again with attention tasks cut to TASK_NS. */
static void calibrate(mind *c, thinker *t) {
    question first = c->q[0];
    const question *q = c->q;
    int32_t n_q = c->n_q;
    double rate;
    if (first.n_ids > 3 * c->chunk) first.n_ids = 3 * c->chunk;
    c->q = &first;
    c->n_q = 1;
    rewind_mind(c);
    batch_task(c, 0, 0);
    open_plan(c, 0);
    rewind_mind(c);
    c->deadline = INT64_MAX;
    while (c->n_said < 2) {
        unit u;
        int64_t c0;
        for (int i = 0; i < SUB_KINDS; i++) t->rate[i] += 1e-9; /* nothing is free */
        if (claim(t, INT64_MAX / 2, &u) != 1) continue;
        c0 = cpu_ns();
        for (int64_t i = u.first; i < u.first + u.count; i++) u.fn(u.ctx, i, 0);
        rate = (double)(cpu_ns() - c0) / u.cost;
        if (rate > t->rate[u.kind]) t->rate[u.kind] = rate;
        c->done += u.count;
    }
    c->q = q;
    c->n_q = n_q;
    rate = t->rate[ATTEND * LLAMA_MAX_OPS];
    if (t->rate[MERGE * LLAMA_MAX_OPS] > rate) rate = t->rate[MERGE * LLAMA_MAX_OPS];
    else t->rate[MERGE * LLAMA_MAX_OPS] = rate; /* there was nothing to merge yet */
    rewind_mind(c);
    batch_task(c, 0, 0);
    open_plan(c, TASK_NS / rate);
    rewind_mind(c);
}

/* ---- the same talk without slices */

static void run_at_once(mind *c, llama_pool *pool) {
    const llama_model *m = c->m;
    int32_t last;
    batch_task(c, 0, 0);
    llama_embed(m, pool, c->s, c->ids + c->n_kv, c->pos, c->q_start[1]);
    for (int32_t l = 0; l < m->n_layers; l++) {
        llama_qkv(m, pool, c->s, l);
        c->d.kv.k.data = c->k[l];
        c->d.kv.v.data = c->v[l];
        llama_pool_run(pool, store_task, c, (c->q_start[1] + STORE_ROWS - 1) / STORE_ROWS);
        llama_pool_run(pool, attend_task, c, c->plan->n_tasks);
        llama_pool_run(pool, merge_task, c, c->plan->n_merges);
        llama_out(m, pool, c->s, l);
    }
    c->n_kv = c->kv_len;
    last = c->q_start[1] - 1;
    if (c->n_kv < c->n_ids) return;
    llama_logits(m, pool, c->s, &last, 1, c->logits);
    sample_task(c, 0, 0);
}

/* Every token said, against the same turn computed at once. Turns repeat when the questions do. */
static int64_t compare(const mind *c, const options *o, llama_pool *pool, double *seconds) {
    mind r;
    int64_t i, bad = 0, talk = (int64_t)c->n_q * c->n_answer;
    int64_t cap = c->n_said < talk ? c->n_said : talk, from = now_ns();
    open_mind(&r, c->m, c->q, c->n_q, o, CHECK_CHUNK, cap);
    open_plan(&r, 0);
    rewind_mind(&r);
    while (r.n_said < cap && !r.status) run_at_once(&r, pool);
    need((attn_result)r.status, "attention");
    *seconds = 1e-9 * (double)(now_ns() - from);
    for (i = 0; i < c->n_said; i++) {
        const said *a = &c->said[i], *b = &r.said[i % talk];
        if (a->token == b->token && a->hash == b->hash) continue;
        if (!bad++)
            fprintf(stderr, "frame_budget: token %lld of the talk differs\n", (long long)i);
    }
    llama_state_free(r.s);
    return bad;
}

/* ==== frames ==== */

typedef struct helper { /* the second thread */
    thinker t;
    pthread_t id;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int64_t frame;
    int stop;
} helper;

static void *helper_main(void *arg) {
    helper *h = (helper *)arg;
    for (int64_t seen = 0;;) {
        pthread_mutex_lock(&h->lock);
        while (h->frame == seen && !h->stop) pthread_cond_wait(&h->wake, &h->lock);
        seen = h->frame;
        int stop = h->stop;
        pthread_mutex_unlock(&h->lock);
        if (stop) return NULL;
        think(&h->t);
    }
}

static void helper_tell(helper *h, int stop) {
    pthread_mutex_lock(&h->lock);
    h->frame++;
    h->stop = stop;
    pthread_cond_signal(&h->wake);
    pthread_mutex_unlock(&h->lock);
}

typedef struct frame_times {
    double *work, *cpu, *game; /* ms per frame of the frame's thread */
    int32_t n, missed, dropped, thinking;
} frame_times;

static void sleep_until(int64_t ns) {
    int64_t left = ns - now_ns();
    struct timespec t;
    if (left <= 0) return;
    t.tv_sec = (time_t)(left / 1000000000);
    t.tv_nsec = (long)(left % 1000000000);
    nanosleep(&t, NULL);
}

/* The last words, for the bottom line. */
static void caption(const mind *c, char *out, size_t cap) {
    int64_t n = __atomic_load_n(&c->n_said, __ATOMIC_ACQUIRE), from = n - n % c->n_answer;
    size_t at = 0;
    for (int64_t i = from; i < n; i++) {
        size_t len = llama_piece(c->m, c->said[i].token, NULL, 0);
        if (at + len >= cap) break;
        at += llama_piece(c->m, c->said[i].token, out + at, len);
    }
    for (size_t i = 0; i < at; i++) if (out[i] == '\n') out[i] = ' ';
    out[at] = 0;
}

/* A short run on a busy machine goes on until there is an answer to compare. */
static int more_frames(const mind *c, const options *o, int32_t f) {
    if (f < o->frames) return 1;
    return o->fast && f < FAST_LIMIT * o->frames &&
           __atomic_load_n(&c->n_said, __ATOMIC_ACQUIRE) < c->n_answer;
}

static void run_frames(game *g, mind *c, thinker *t, helper *h, const options *o, frame_times *ft) {
    int64_t budget = (int64_t)(o->budget_ms * 1e6), start = now_ns(), said_before = 0;
    for (int32_t f = 0; more_frames(c, o, f); f++) {
        int64_t t0, c0, t1, late;
        if (!o->fast) sleep_until(start);
        t0 = now_ns();
        c0 = cpu_ns();
        if (o->fast) start = t0;
        late = (t0 - start) / FRAME_NS; /* whole refreshes that went by without a frame */
        start += late * FRAME_NS;
        ft->dropped += (int32_t)late;
        __atomic_store_n(&c->deadline, start + budget, __ATOMIC_RELEASE);
        if (o->threads > 1) helper_tell(h, 0);
        ft->thinking += !__atomic_load_n(&c->finished, __ATOMIC_ACQUIRE);

        int64_t words = __atomic_load_n(&c->n_said, __ATOMIC_ACQUIRE);
        if (words != said_before) g->mouth = 1;
        said_before = words;
        game_update(g);
        game_draw(g);
        if (o->show && f % 3 == 0) {
            char line[80];
            caption(c, line, sizeof line);
            game_show(g, line);
        }
        ft->game[f] = 1e-6 * (double)(now_ns() - t0);
        think(t);

        t1 = now_ns();
        ft->work[f] = 1e-6 * (double)(t1 - t0);
        ft->cpu[f] = 1e-6 * (double)(cpu_ns() - c0);
        ft->missed += t1 > start + FRAME_NS;
        start += FRAME_NS;
        ft->n = f + 1;
    }
}

/* ==== report ==== */

/* Seconds that the hypervisor kept this machine's cores to itself so far; 0 where nobody says. */
static double stolen_seconds(void) {
    double ticks = 0;
    FILE *f = fopen("/proc/stat", "r");
    if (!f) return 0;
    if (fscanf(f, "cpu %*s %*s %*s %*s %*s %*s %*s %lf", &ticks) != 1) ticks = 0;
    fclose(f);
    return ticks / (double)sysconf(_SC_CLK_TCK);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double print_times(const char *name, double *x, int32_t n) {
    static const double p[] = {0.5, 0.99, 0.999};
    double sum = 0;
    qsort(x, (size_t)n, sizeof *x, by_value);
    for (int32_t i = 0; i < n; i++) sum += x[i];
    printf("%-22s mean %6.2f", name, sum / n);
    for (int i = 0; i < 3; i++)
        printf("  p%g %6.2f", 100 * p[i], x[(int32_t)ceil(p[i] * n) - 1]);
    printf("  max %6.2f ms\n", x[n - 1]);
    return x[(int32_t)ceil(0.999 * n) - 1];
}

static void print_talk(const mind *c, int32_t turns) {
    int32_t right = 0, whole = 0;
    for (int32_t k = 0; (int64_t)k * c->n_answer < c->n_said; k++) {
        const question *q = &c->q[k % c->n_q];
        char text[1024];
        size_t at = 0;
        for (int64_t i = (int64_t)k * c->n_answer; i < c->n_said && i < (k + 1) * c->n_answer; i++)
            if (at + 64 < sizeof text) at += llama_piece(c->m, c->said[i].token, text + at, 64);
        text[at] = 0;
        if ((int64_t)(k + 1) * c->n_answer <= c->n_said) {
            whole++;
            right += !strncmp(text, q->expected, strlen(q->expected));
        }
        if (k < turns) {
            for (size_t i = 0; i < at; i++) if (text[i] == '\n') text[i] = ' ';
            printf("  %s\n    %s\n", q->text, text);
        }
    }
    printf("answers                %d, %d of them right\n", (int)whole, (int)right);
}

/* ==== main ==== */

static char *read_text(const char *path) {
    FILE *f = fopen(path, "rb");
    long n = f && !fseek(f, 0, SEEK_END) ? ftell(f) : -1;
    char *text;
    if (n < 0 || fseek(f, 0, SEEK_SET)) die(path, "cannot be read");
    text = (char *)get((size_t)n + 1, 1);
    if (fread(text, 1, (size_t)n, f) != (size_t)n) die(path, "cannot be read");
    fclose(f);
    return text;
}

/* Questions whose answer the document holds. */
static int32_t load_questions(const llama_model *m, const options *o, question **out) {
    char *doc = read_text(o->document), *list = read_text(o->questions), *at = list, *prompt;
    int32_t n = 0, lines = 1;
    size_t room = strlen(doc) + strlen(list) + 32;
    if (o->fast && strlen(doc) > FAST_DOCUMENT) {
        doc[FAST_DOCUMENT] = 0;
        char *line = strrchr(doc, '\n');
        if (line) line[1] = 0;
    }
    for (char *p = list; *p; p++) lines += *p == '\n';
    *out = (question *)get((size_t)lines, sizeof **out);
    prompt = (char *)get(room, 1);
    while (*at) {
        char *end = at + strcspn(at, "\r\n"), *tab = (char *)memchr(at, '\t', (size_t)(end - at));
        question *q = &(*out)[n];
        char *next = *end ? end + 1 : end;
        *end = 0;
        if (tab) {
            size_t n_ids;
            *tab = 0;
            q->text = at;
            q->expected = tab + 1;
            if (strstr(doc, q->expected)) {
                snprintf(prompt, room, "%s\nQ: %s\nA: ", doc, q->text);
                int32_t *ids = llama_tokenize(m, prompt, strlen(prompt), LLAMA_ADD_BOS, &n_ids);
                if (!ids || n_ids < 2 || n_ids + (size_t)o->answer > (size_t)m->n_ctx)
                    die(o->document, "does not fit into the model's context");
                q->ids = (int32_t *)get(n_ids, sizeof *ids);
                memcpy(q->ids, ids, n_ids * sizeof *ids);
                q->n_ids = (int32_t)n_ids;
                free(ids);
                n++;
            }
        }
        at = next;
    }
    if (!n) die(o->questions, "no question about this document");
    return n;
}

static void parse_options(int argc, char **argv, options *o) {
    static const options defaults = {"examples/models/recall.gguf", "examples/data/document.txt",
                                     "examples/data/questions.txt", 0, 0, 2, 128, 48, 13000, 0,
                                     14};
    *o = defaults;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(a, "--help")) {
            printf("%s", usage);
            exit(0);
        }
        if (!strcmp(a, "--fast")) { o->fast = 1; continue; }
        if (!strcmp(a, "--show")) { o->show = 1; continue; }
        if (!v) die(a, "unknown, or a value is missing");
        if (!strcmp(a, "--frames")) o->frames = atoi(v);
        else if (!strcmp(a, "--budget")) o->budget_ms = atof(v);
        else if (!strcmp(a, "--threads")) o->threads = atoi(v);
        else if (!strcmp(a, "--chunk")) o->chunk = atoi(v);
        else if (!strcmp(a, "--answer")) o->answer = atoi(v);
        else if (!strcmp(a, "--agents")) o->agents = atoi(v);
        else if (!strcmp(a, "--model")) o->model = v;
        else if (!strcmp(a, "--document")) o->document = v;
        else if (!strcmp(a, "--questions")) o->questions = v;
        else die(a, "unknown option");
        i++;
    }
    if (!o->frames) o->frames = o->fast ? 150 : 1200;
    if (o->frames < 1 || o->frames > 1 << 22 || !(o->budget_ms > 0 && o->budget_ms <= 1000) ||
        o->threads < 1 || o->threads > 2 || o->chunk < 1 || o->chunk > 4096 || o->answer < 1 ||
        o->answer > 4096 || o->agents < 1 || o->agents > 1 << 20)
        die("options", "a value is out of its range (--help)");
}

int main(int argc, char **argv) {
    static mind c;
    static thinker t;
    static helper h;
    options o;
    question *q;
    frame_times ft;
    char err[LLAMA_ERR_BYTES];
    double at_once = 0, seconds;
    parse_options(argc, argv, &o);
    attn_cpu_open();
    llama_pool *pool = llama_pool_create(2);
    llama_model *m = pool ? llama_load(o.model, pool, 0, err) : NULL;
    if (!pool) die("threads", "cannot be started");
    if (!m) die(o.model, err);
    int32_t n_q = load_questions(m, &o, &q);
    game *g = game_create(o.agents);
    open_mind(&c, m, q, n_q, &o, o.chunk, (int64_t)o.frames * SAID_PER_FRAME);
    memset(&ft, 0, sizeof ft);
    size_t most = (size_t)o.frames * (o.fast ? FAST_LIMIT : 1);
    ft.work = (double *)get(most, 3 * sizeof *ft.work);
    ft.cpu = ft.work + most;
    ft.game = ft.cpu + most;
    t.c = &c;
    calibrate(&c, &t);
    h.t = t;
    h.t.thread = 1;
    h.t.may_wait = 1;
    pthread_mutex_init(&h.lock, NULL);
    pthread_cond_init(&h.wake, NULL);
    if (o.threads > 1 && pthread_create(&h.id, NULL, helper_main, &h))
        die("threads", "cannot be started");
    for (int i = 0; i < 30; i++) game_update(g), game_draw(g); /* a flock, not a crowd */

    double stolen = stolen_seconds();
    int64_t from = now_ns();
    run_frames(g, &c, &t, &h, &o, &ft);
    seconds = 1e-9 * (double)(now_ns() - from);
    stolen = stolen_seconds() - stolen;
    if (o.threads > 1) {
        helper_tell(&h, 1);
        pthread_join(h.id, NULL);
    }
    need((attn_result)c.status, "attention");

    printf("\n%s, %d + %d tokens, %s, %d threads, attention tasks of at most %.0f us\n", o.model,
           (int)q[0].n_ids, (int)o.answer, attn_cpu_executor(&c.d), (int)o.threads, TASK_NS * 1e-3);
    print_talk(&c, 3);
    printf("frames                 %d at 60 Hz, budget %.1f ms, %d while thinking, %.1f s\n",
           (int)ft.n, o.budget_ms, (int)ft.thinking, seconds);
    printf("tokens spoken          %lld (%.0f/s), and %lld of prompts read\n", (long long)c.n_said,
           (double)c.n_said / seconds, (long long)c.prompt_tokens);
    printf("slices                 %lld + %lld units, mean %.0f us, longest %.0f us of CPU time\n",
           (long long)t.units, (long long)h.t.units,
           1e-3 * (t.busy_ns + h.t.busy_ns) / (double)(t.units + h.t.units + 1),
           1e-3 * (double)(t.longest > h.t.longest ? t.longest : h.t.longest));
    print_times("the game alone", ft.game, ft.n);
    print_times("frame CPU time", ft.cpu, ft.n);
    double worst = print_times("frame work time", ft.work, ft.n);
    printf("missed deadlines       %d, refreshes without a frame %d; p99.9 %s 16.7 ms\n",
           (int)ft.missed, (int)ft.dropped, worst < 16.7 ? "under" : "OVER");
    if (stolen > 0) printf("taken by a hypervisor  %.2f s of CPU time\n", stolen);
    int64_t bad = compare(&c, &o, pool, &at_once);
    printf("the same talk at once  %.2f s, %s\n", at_once,
           bad ? "OTHER BITS" : c.n_said ? "the same bits" : "nothing was said");
    llama_state_free(c.s);
    llama_free(m);
    llama_pool_free(pool);
    free_all();
    return bad || !c.n_said;
}
