#define ATTN_CPU_IMPLEMENTATION
#include "attn_cpu.h"
