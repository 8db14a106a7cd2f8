/* The public part without an implementation, each header twice and in both orders. */
#include "attn_cpu.h"
#include "attn.h"
#include "attn.h"
#include "attn_cpu.h"

int public_part(const attn_desc *d);
int public_part(const attn_desc *d) {
    return attn_validate(d) == ATTN_OK && attn_cpu_supports(d) == ATTN_OK;
}
