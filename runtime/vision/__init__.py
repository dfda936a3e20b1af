"""Images in prompts: reading, preprocessing, encoding, placeholders."""
