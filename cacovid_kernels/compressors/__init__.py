"""Other published compressors, as functions of tensors: what they keep of a video at a given number of tokens.

They are written from their papers and agree with their published code on the vectors in `tests/data`. All take any
number of leading batch dimensions and return ascending indices: into the flat video, `density_peaks` into every frame.
"""

from cacovid_kernels.compressors.density import density_peaks
from cacovid_kernels.compressors.divprune import divprune
from cacovid_kernels.compressors.evs import evs
from cacovid_kernels.compressors.fastv import fastv
from cacovid_kernels.compressors.vidcom2 import vidcom2

__all__ = ["density_peaks", "divprune", "evs", "fastv", "vidcom2"]
