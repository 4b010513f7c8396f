"""Tasks for lm-evaluation-harness that need no hub: YAML files with their lines beside them."""
