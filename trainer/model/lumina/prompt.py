"""The text that Lumina Image 2.0's language model reads."""

from __future__ import annotations

SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)


def prompt_text(caption: str) -> str:
    """Returns the prompt with a caption. Lumina2Pipeline puts nothing before the empty negative prompt."""
    return f"{SYSTEM_PROMPT} <Prompt Start> {caption}" if caption else ""
