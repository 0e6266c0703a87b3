"""The replacement operators, one file a family, and what graftc knows of them.

`spec` and `specs` are data without torch; the family files hold the modules, which need torch
alone, since a generated student carries their source; `build` goes from the one to the other.
"""
