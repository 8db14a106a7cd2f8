/* Everything in one translation unit, included twice; C or C++. */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn_cpu.h"
#include "use.h"

int main(void) { return use_attn(); }
