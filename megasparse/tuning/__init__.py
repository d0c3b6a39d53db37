"""Measuring the kernels of this machine for the tables that choose between them."""
