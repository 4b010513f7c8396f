"""Data as people have it: files and datasets of questions, conversations and texts. Knows no model."""
