"""Triton kernels and their launchers. Nothing here asks where it runs or decides anything."""
