"""Adapters: the Trainer's way to call a loss, callbacks that log statistics, and one for any logger.

Timm and plain loops need none, nor does the loss in a LightningModule: see examples/.
"""
