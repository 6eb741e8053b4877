"""Pipelines that stock diffusers lacks, or that know more of class tables, in its stock format."""

from diffadapt.pipelines.class_conditional import ClassConditionalPipeline
from diffadapt.pipelines.dit import DiTPipeline

__all__ = ["ClassConditionalPipeline", "DiTPipeline"]
