#define ATTN_STATIC
#define ATTN_IMPLEMENTATION
#include "attn_cpu.h"
#include "use.h"

int other_copy(void);
int other_copy(void) { return use_attn(); }
