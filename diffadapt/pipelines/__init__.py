"""Pipelines that stock diffusers lacks, in its stock format."""

from diffadapt.pipelines.class_conditional import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline"]
