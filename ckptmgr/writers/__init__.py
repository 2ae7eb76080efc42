"""
How checkpoints get from memory to disk.

The trainer's side plans, copies tensors into an arena and hands over jobs (`dcp`, `huggingface`,
`arena`, `process`); the writer process (`worker`) knows only jobs, bytes and files, and never
imports torch. Nothing is imported here, so that the writer process starts in milliseconds.
"""
