"""Offline training of assistants. Knows no engine and no server."""
