"""What an editor asks of a `.graft` file: where names come from, what can stand here, its colours.

Everything but `server.py` works on plain text and offsets, and nothing here imports torch.
"""
