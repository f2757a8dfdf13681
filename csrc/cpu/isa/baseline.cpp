#define CACOVID_LOOPS baseline_loops
#define CACOVID_LOOPS_NAME "baseline"
#include "isa/hot_loops.inl"
