"""Parts of the Qwen-Image-Edit family: prompt template, encoder and a tiny checkpoint."""
