"""Whole models: which layers get an adapter, PEFT's format on disk, and what the classes of
transformers and accelerate do.

Imports layers and the rooms below.
"""
