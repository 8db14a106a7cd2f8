/* Two private copies in one program: this one and static_b.c. */
#define ATTN_STATIC
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"
#include "use.h"

int other_copy(void);
int main(void) { return use_attn() + other_copy(); }
