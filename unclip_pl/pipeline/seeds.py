"""What each stage adds to the user's seed, so that no two stages draw the same random numbers.

A generator reads 32 bits of a seed, and the offsets divide them into four ranges: for seeds below
2^30 they do not overlap. The decoder's seeds are the user's own.
"""

UPSAMPLER_256_OFFSET = 1 << 30
PRIOR_OFFSET = 2 << 30
UPSAMPLER_1024_OFFSET = 3 << 30
