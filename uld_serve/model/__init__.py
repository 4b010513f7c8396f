"""Tensors: the base model, its layers, caches and adapters. Knows no request, profile or HTTP."""
