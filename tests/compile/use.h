/* use.h - a user of the public part, C99 and C++11: one attention call against the reference. */
#ifndef USE_H
#define USE_H

#include "attn_cpu.h"
#include "attn.h"
#include "attn_cpu.h"

#ifdef __cplusplus
#define ZERO attn_desc()
#else
#define ZERO {0}
#endif

static int use_attn(void) { /* 0: right */
    static unsigned char mem[4 << 20];
    static float q[64], k[5 * 32], v[5 * 32], out[64];
    static double expected[64];
    int32_t q_start[2], kv_len[1];
    static const attn_desc zero = ZERO;
    attn_desc d = zero;
    unsigned char *at = mem + (64 - (uintptr_t)mem % 64);
    int i;
    for (i = 0; i < 64; i++) q[i] = (float)(i % 7) - 3.0f;
    for (i = 0; i < 5 * 32; i++) {
        k[i] = (float)(i % 11) / 11.0f;
        v[i] = (float)(i % 13) - 6.0f;
    }
    q_start[0] = 0;
    q_start[1] = 1;
    kv_len[0] = 5;
    d.n_seq = 1;
    d.q_start = q_start;
    d.n_heads = 2;
    d.n_kv_heads = 1;
    d.head_dim = 32;
    d.q.data = q;
    d.o.data = out;
    d.kv.k.data = k;
    d.kv.v.data = v;
    d.q.dtype = d.o.dtype = d.kv.k.dtype = d.kv.v.dtype = ATTN_F32;
    d.kv.n_pages = 1;
    d.kv.page_tokens = 5;
    d.kv.kv_len = kv_len;
    if (attn_cpu_forward(&d, at, sizeof mem - 64, 1) != ATTN_OK) return 1;
    if (attn_ref_forward(&d, expected, NULL) != ATTN_OK) return 2;
    for (i = 0; i < 64; i++) {
        double e = (double)out[i] - expected[i];
        if (!(e < 1e-5 && e > -1e-5)) return 3;
    }
    return 0;
}

#endif
