"""The trained stages put together: releases, weights, `UnCLIP` and the cascade of upsamplers."""
