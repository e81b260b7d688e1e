"""What runs on a device: the C++ kernels, the Triton kernels, the library's own calls; and the
tuner that measures them.

Imports kernels, planning and spec.
"""
