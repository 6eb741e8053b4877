"""Pipelines in the format of diffusers: one that it lacks, and one for class tables of any size."""

from diffadapt.pipelines.class_conditional import ClassConditionalPipeline
from diffadapt.pipelines.dit import DiTPipeline

__all__ = ["ClassConditionalPipeline", "DiTPipeline"]
