"""DreamBooth's protocol: subjects, prompts, generated images and their scores."""
