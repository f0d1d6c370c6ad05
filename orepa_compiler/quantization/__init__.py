"""int8 that is trained for: torch's fake quantizers on kernels and on what goes into them.

A layer that rounds is another type (`layers`) with the same parameters. The ranges belong to the
model (`quantizers`), a collapse carries them over (`carrying`), and an export writes them.
"""
