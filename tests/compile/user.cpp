// A C++ file that links with core.c and cpu.c compiled as C.
#include "use.h"

int main() { return use_attn(); }
