"""The prompt that the language model reads: a template around the instruction and the control images."""

from __future__ import annotations

SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
SYSTEM_TOKENS = 64
"""Number of tokens in SYSTEM; the transformer never sees their states."""
IMAGE_TOKEN = "<|image_pad|>"
SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)


def build_prompt(instruction: str, image_tokens: list[int], numbered: bool) -> str:
    """Returns the prompt with this many tokens for each control image.

    `numbered` puts "Picture 1: " and so on before the images.
    """
    images = [
        (f"Picture {number}: " if numbered else "") + f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>"
        for number, count in enumerate(image_tokens, 1)
    ]
    return SYSTEM + "".join(images) + instruction + ANSWER
