/* attn.h alone, with its implementation. */
#define ATTN_IMPLEMENTATION
#include "attn.h"
#include "attn.h"

int main(void) { return attn_validate(NULL) != ATTN_ERR_ARGUMENT; }
