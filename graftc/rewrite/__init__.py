"""From rules and a Program to a student: match, claim, plan, apply, undo.

All rules match the original Program; each edit claims what it rewires; claims that cross are an
error; then everything is applied at once. Nothing here runs the model or knows how a student
is trained or written to disk.
"""
