"""What flow transformers share whose sequence holds image and text, and whose text one language model reads."""
