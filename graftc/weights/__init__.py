"""Where a new parameter's first value comes from.

`policies` are pure functions on tensors; `sources` reads the `init` sources of a spec or a rule;
`initialise` fills an operator's parameters and says where each came from; `solve` fits the ones
that wait for calibration data.
"""
