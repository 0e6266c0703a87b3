"""An export directory: the ONNX file, what it was made from, golden files, and what was checked.

`write_export` goes from a build to a directory that is whole or not there; `scripts/` holds the programs
that are copied into it and run there without graftc. Shapes are proved before they are declared
(`shapes`), halves are tried before they are written (`precision`), every node leads back to a module and
a rule (`regions`), and each check is PASS, FAIL or NOT RUN with its reason (`ladder`).
"""
