// Included by baseline.cpp, avx2.cpp and avx512.cpp, which define CACOVID_LOOPS and their compiler flags.
// Everything here has internal linkage: a shared inline function could leak AVX code into the baseline.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa/attention_loops.inl"
#include "isa/combination_draws.inl"
#include "isa/hot_loops.h"
#include "isa/noise_loops.inl"
#include "isa/policy_loops.inl"
#include "isa/pool_frame.inl"
#include "isa/row_loops.inl"
#include "isa/top_masks.inl"

namespace cacovid::cpu {

extern const HotLoops CACOVID_LOOPS;
const HotLoops CACOVID_LOOPS = {CACOVID_LOOPS_NAME,
                                load_keys,
                                top_masks,
                                set_ranked_zeros,
                                list_bits,
                                pool_frame,
                                &attention_loop_table,
                                &combination_loop_table,
                                &noise_loop_table,
                                &policy_loop_table,
                                &row_loop_table};

}  // namespace cacovid::cpu
