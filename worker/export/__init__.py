"""Checkpoint formats: write a quantized model so that common tools load it, and prove that they do."""

from worker.export.manifest import write_manifest
from worker.export.model_card import write_model_card
from worker.export.writer import SCALE_DTYPES, export

__all__ = ["SCALE_DTYPES", "export", "write_manifest", "write_model_card"]
