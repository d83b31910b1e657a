"""Callbacks and the trainer of a training run.

Of a stage they use `loss(batch)` and `sample(batch, noise)`, and some of them `process`, `embed`,
`enlarged`, or `x0_error` and `estimate_variance`. They do not import the stages, so that a stage of
one's own can use them.
"""
