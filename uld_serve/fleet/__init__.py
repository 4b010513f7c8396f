"""Many replicas of one server that answer as one: the same profiles, keys and limits on each, or no answer."""
