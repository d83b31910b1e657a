"""The trained stages put together: reading weights, `UnCLIP`, and the cascade of upsamplers."""
