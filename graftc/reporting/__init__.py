"""Pictures and pages for people: the drawing of an edit, and the report on a build.

Everything here goes from plain data to text: no torch, and no library draws.
"""
