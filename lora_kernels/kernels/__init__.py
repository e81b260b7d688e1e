"""Triton kernels, each with its launcher below it: allocate, make the grid, launch.

No policy, no question about the device, no autograd. Imports planning (Config) and spec.
"""
