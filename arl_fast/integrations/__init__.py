"""Adapters for training loops that call a loss with something else than (output, target).

Lightning, timm and plain loops need none: see examples/.
"""
