"""Profiles as data: schema, directory on disk, registry of loaded versions."""
