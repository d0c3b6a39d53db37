"""Tells the truth about a machine with GPUs in minutes: numbers right or wrong, speeds against what the chip allows.

``tools/check_gpu.py`` is the command, ``driver.check`` what it calls. Every section runs in a process of its own.
"""
