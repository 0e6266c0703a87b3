"""The model as a value: capture, normalisation, roles, chains of blocks, cost.

`capture` turns a `Model` (a PyTorch module with example inputs) into a `Program`: a tree of
FX graphs, one for each module call, with the original qualified names. `analyse` reads the
Program's dataflow and says which module plays which role. Nothing here knows the language.
"""
