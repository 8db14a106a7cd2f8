#define ATTN_CORE_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"
