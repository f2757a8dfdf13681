#define CACOVID_LOOPS avx2_loops
#define CACOVID_LOOPS_NAME "avx2"
#include "isa/hot_loops.inl"
