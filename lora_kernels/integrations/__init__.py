"""Other people's classes: PEFT's layers, vLLM, SGLang, continuous batching; and the comparison of a
model with and without us.

Imports models and the rooms below, nothing of serving.
"""
