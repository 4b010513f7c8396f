"""Forgetting on request: uploaded files, training jobs and their processes, in OpenAI's shape. Knows no tensor."""
