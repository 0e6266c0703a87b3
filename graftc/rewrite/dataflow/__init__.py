"""Dataflow rules: `match { … }` and `rewrite { … }` on the ops of a model, wherever module boundaries lie.

A pattern is lowered to a small graph of ops (`pattern`), every occurrence of it is found through an index by
op (`matcher`), and what it becomes is worked out on fake tensors before anything is changed (`edit`).
"""
