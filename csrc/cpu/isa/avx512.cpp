#define CACOVID_LOOPS avx512_loops
#define CACOVID_LOOPS_NAME "avx512"
#include "isa/hot_loops.inl"
