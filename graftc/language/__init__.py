"""The `.graft` language: text → tokens → Document (syntax) → Rules (meaning).

`check` does it all for a file; `parse`, `resolve`, `select`, `evaluate` and `format_text` are the
single steps. What the words mean is in docs/language.md, how they are written in
grammar/graft.lark. Nothing here imports torch: an editor and `graftc check` stay light.
"""
